// Register-tiled matrix products for the inside of fused kernels: one thread, operands in cache, general strides.
#pragma once
#include "common/cpu/vector.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// How A is laid out: row_major has A(m, k) at a[m * lda + k], column_major at a[k * lda + m] (a transposed operand).
enum class Layout { row_major, column_major };

// Rows of C that one microkernel keeps in registers when it is `vectors` vectors wide.
constexpr int rows_per_tile(int vectors) {
  return PYTBPTT_ACCUMULATORS / vectors;
}

// The widest microkernel, in vectors.
constexpr int widest_tile = PYTBPTT_ACCUMULATORS >= 24 ? 4 : 3;

// C (ROWS x VECTORS vectors) = A (ROWS x depth) B (depth x VECTORS vectors), added to C if accumulate.
// Rows of B are ldb apart and of C ldc, both contiguous inside a row and of any alignment; ldc may be anything, so that
// ldc = ld + 1 writes along diagonals. FETCHES_AHEAD is for a packed B (ldb the width) that comes from L3 or memory:
// the processor's own prefetching stops at every page of 4096 bytes.
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
  // Row-major A is read through one pointer for every three rows, whose addresses are then pointer + {0, 1, 2} * lda:
  // what x86 addresses in one operand, and few enough pointers to stay in registers.
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
    // Early, or GCC repeats a load in every multiply-add; a single row uses each just once.
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
  // What C held is added last: a long sum that starts from it would round every term to its size.
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

// tile with a number of rows known only now, 0 < rows <= ROWS.
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
