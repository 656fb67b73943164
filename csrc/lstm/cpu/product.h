// The products of lstm: hidden states or gradients (rows: streams) with packed weights.
//
//   A (streams, depth)   x   slice 0 of packed weights | slice_depth rows, a few vectors wide: stays in L1
//                            slice 1                   | while all rows of A pass over it
//
// The summation order depends on sizes only: results are bitwise the same for any number of threads.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/span.h"
#include "lstm/params.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// Rows of a microkernel that is `vectors` vectors wide. With 16 registers, width 4 allows only 2 rows. Width 1 is only
// used for remainders and shares the row count of width 2.
template <int VECTORS>
constexpr int microkernel_rows = VECTORS == 4 ? (PYTBPTT_ACCUMULATORS >= 24 ? 6 : 2) : rows_per_tile(2);

// Width of the microkernel in vectors: 4 for small batches (more independent accumulators), and with 32 registers for
// weights that fit in L2 (fewer instructions, but twice the bandwidth); otherwise 2.
PYTBPTT_INLINE int max_microkernel_vectors(const Lstm& inputs) {
  constexpr int64_t weights_in_l2 = 256 * 256;
  const bool prefers_wide = PYTBPTT_ACCUMULATORS >= 24 && inputs.H * inputs.H <= weights_in_l2;
  return inputs.B <= microkernel_rows<4> || prefers_wide ? 4 : 2;
}

// Maximum k per pass over the rows: a slice of weights, two vectors wide, fits in half of L1 (hyper-threads share it).
// A quarter of it for small batches, to match the accuracy of PyTorch's dot products.
constexpr int64_t slice_depth = 104;

PYTBPTT_INLINE int64_t slice_count(int64_t depth, int64_t streams) {
  const int64_t longest = streams <= microkernel_rows<4> ? slice_depth / 4 : slice_depth;
  return (depth + longest - 1) / longest;
}

// C (rows x VECTORS vectors) = A (rows x depth) B (depth x VECTORS vectors, packed), added to C if accumulate. The
// product is summed separately before it is added to C, for accuracy.
template <typename T, int VECTORS>
void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
                   bool accumulate) {
  constexpr int most = microkernel_rows<VECTORS>;
  constexpr int64_t width = VECTORS * Vec<T>::lanes;
  const int64_t tiles = (rows + most - 1) / most;
  const Span first = part(rows, 0, tiles);
  tile_rows<T, VECTORS, Layout::row_major, most, true>(first.end, depth, a, lda, b, width, c, ldc, accumulate);
  for (int64_t index = 1; index < tiles; ++index) {
    const Span own = part(rows, index, tiles);
    tile_rows<T, VECTORS, Layout::row_major, most>(own.size(), depth, a + own.begin * lda, lda, b, width,
                                                   c + own.begin * ldc, ldc, accumulate);
  }
}

template <typename T>
PYTBPTT_INLINE void multiply(int vectors, int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, T* c,
                             int64_t ldc, bool accumulate) {
  if (vectors == 4) return multiply_rows<T, 4>(rows, depth, a, lda, b, c, ldc, accumulate);
  if (vectors == 2) return multiply_rows<T, 2>(rows, depth, a, lda, b, c, ldc, accumulate);
  multiply_rows<T, 1>(rows, depth, a, lda, b, c, ldc, accumulate);
}

// Covers the blocks with column tiles, widest first; calls use(first_block, vectors).
template <typename Use>
PYTBPTT_INLINE void for_kernels(Span blocks, int widest, const Use& use) {
  int vectors = widest;
  for (int64_t block = blocks.begin; block < blocks.end; block += vectors) {
    while (vectors > blocks.end - block) vectors /= 2;
    use(block, vectors);
  }
}

}  // namespace
}  // namespace pytbptt::cpu::PYTBPTT_ISA
