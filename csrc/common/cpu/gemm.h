// Single-threaded GEMM microkernel with arbitrary strides, for operands that are in cache.
//
//                     k          VECTORS vectors of B(k, :)
//   A(0 … ROWS-1, k)  |    x    | v0 | v1 | v2 |     ROWS x VECTORS accumulators stay in registers over all k
#pragma once
#include "common/cpu/vector.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// How A is laid out: row_major has A(m, k) at a[m * lda + k], column_major at a[k * lda + m] (a transposed operand).
enum class Layout { row_major, column_major };

// Rows of the register tile for a width of `vectors` vectors.
constexpr int rows_per_tile(int vectors) {
  return PYTBPTT_ACCUMULATORS / vectors;
}

// The widest microkernel, in vectors.
constexpr int widest_tile = PYTBPTT_ACCUMULATORS >= 24 ? 4 : 3;

// C (ROWS x VECTORS vectors) = A (ROWS x depth) B (depth x VECTORS vectors), added to C if accumulate.
// Rows of B are ldb apart and of C ldc, both contiguous inside a row and of any alignment; ldc is arbitrary: with ldc
// one more than C's real row stride, each row is stored one column further to the right. FETCHES_AHEAD prefetches B one
// 4 KiB page ahead, because the hardware prefetcher stops at page boundaries. Use it for a packed B that is not in L2.
template <typename T, int VECTORS, int ROWS, Layout LAYOUT, bool FETCHES_AHEAD>
__attribute__((noinline)) void tile(std::int64_t depth, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
                                    T* c, std::int64_t ldc, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int lanes = Vec<T>::lanes, ahead = 4096 / sizeof(T), line = 64 / sizeof(T);
  V sum[ROWS][VECTORS];
#pragma GCC unroll 24
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = V{};
  // One pointer per three rows of A: x86 addressing modes cover base + {0, 1, 2} * lda, and this keeps all pointers in
  // registers.
  constexpr int pointers = LAYOUT == Layout::row_major ? (ROWS + 2) / 3 : 1;
  const T* rows[pointers];
#pragma GCC unroll 8
  for (int p = 0; p < pointers; ++p) rows[p] = a + 3 * p * lda;
  for (std::int64_t k = 0; k < depth; ++k) {
    if constexpr (FETCHES_AHEAD) {
#pragma GCC unroll 4
      for (int column = 0; column < VECTORS * lanes; column += line) __builtin_prefetch(b + ahead + column);
    }
    V row_b[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row_b[v] = load(b + v * lanes);
    // Advance b before the FMAs: otherwise GCC reloads the B vector as a memory operand of each FMA. Not needed for one
    // row.
    if constexpr (ROWS > 1) b += ldb;
#pragma GCC unroll 24
    for (int m = 0; m < ROWS; ++m) {
      const T value = LAYOUT == Layout::row_major ? rows[m / 3][(m % 3) * lda] : rows[0][m];
      const V value_of_a = broadcast(value);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += value_of_a * row_b[v];
    }
    if (LAYOUT == Layout::row_major) {
#pragma GCC unroll 8
      for (int p = 0; p < pointers; ++p) ++rows[p];
    } else {
      rows[0] += lda;
    }
    if constexpr (ROWS == 1) b += ldb;
  }
  // Add the old C at the end. Starting the sum from it would round every product to the magnitude of C.
  if (accumulate) {
#pragma GCC unroll 24
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += load(c + m * ldc + v * lanes);
  }
#pragma GCC unroll 24
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + m * ldc + v * lanes, sum[m][v]);
}

// Dispatches a runtime row count, 0 < rows <= ROWS, to `tile`.
template <typename T, int VECTORS, Layout LAYOUT, int ROWS = rows_per_tile(VECTORS), bool FETCHES_AHEAD = false>
PYTBPTT_INLINE void tile_rows(std::int64_t rows, std::int64_t depth, const T* a, std::int64_t lda, const T* b,
                              std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return tile_rows<T, VECTORS, LAYOUT, ROWS - 1, FETCHES_AHEAD>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    }
  }
  tile<T, VECTORS, ROWS, LAYOUT, FETCHES_AHEAD>(depth, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
