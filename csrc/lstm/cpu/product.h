// The products of lstm: hidden states or gradients (rows: streams) with packed weights.
//
// Every result is a sum over k in an order that depends on sizes alone, so that it has the same bits however many
// threads there are and whichever of them computes it.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/span.h"
#include "lstm/params.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// Rows of a microkernel that is `vectors` vectors wide. Four vectors and their four sums per row only fit 16 registers
// two rows at a time; a single vector is the remainder of a thread's blocks and not worth more code.
template <int VECTORS>
constexpr int rows_of_kernel = VECTORS == 4 ? (PYTBPTT_ACCUMULATORS >= 24 ? 6 : 2) : rows_per_tile(2);

// Vectors of the widest microkernel. Few rows need more columns for enough independent sums. With 32 registers it also
// takes fewer instructions, but as it asks for weights twice as fast, these had better stay in L2.
PYTBPTT_INLINE int widest_kernel(const Lstm& inputs) {
  constexpr int64_t weights_in_l2 = 256 * 256;
  const bool takes_fewer = PYTBPTT_ACCUMULATORS >= 24 && inputs.H * inputs.H <= weights_in_l2;
  return inputs.B <= rows_of_kernel<4> || takes_fewer ? 4 : 2;
}

// How many of the sum's terms one pass over the rows adds at most: a slice of weights two vectors wide stays in half an
// L1, the other half being another thread's where two share a core. For few streams PyTorch calls dot products that run
// in many short chains of additions, and ours must not lose more digits.
constexpr int64_t slice_depth = 104;

PYTBPTT_INLINE int64_t slices_of(int64_t depth, int64_t streams) {
  const int64_t longest = streams <= rows_of_kernel<4> ? slice_depth / 4 : slice_depth;
  return (depth + longest - 1) / longest;
}

// C (rows x VECTORS vectors) = A (rows x depth) B (depth x VECTORS vectors, packed), added to C if accumulate. What is
// added is a sum of its own first, since one long chain of additions would lose digits.
template <typename T, int VECTORS>
void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
                   bool accumulate) {
  constexpr int most = rows_of_kernel<VECTORS>;
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

// Calls use(first block, vectors) for the kernels that cover a thread's blocks, widest first.
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
