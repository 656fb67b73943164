// Warp-level matrix products C += A · B, operands in shared memory and accumulators in registers: `half` and `bfloat16`
// on tensor cores, `Tf32` for floats on tensor cores, `float` by plain multiply-adds. Strides are counted in elements.
// All 32 lanes take part.
//
// Accumulators c[n][4] are 16 rows by 8 · N columns in the m16n8 layout of the tensor cores, which all kinds share.
// Lane 4g + q owns these elements of column tile n:
//
//              columns 8n +    0 1     2 3     4 5     6 7
//              row g         | q = 0 | q = 1 | q = 2 | q = 3 |     c[n][0], c[n][1]
//              row g + 8     | q = 0 | q = 1 | q = 2 | q = 3 |     c[n][2], c[n][3]
//
//   times_transposed   c += a · bᵀ   a: Rows, 16 x DEPTH;          b (8N, DEPTH)
//   weights_times      c += a · b    a: sums in registers, 16 x K;  b (K, 8N)
//   times              c += a · b    a (16, 16);                    b (16, 8N)
//   transposed_times   c += aᵀ · b   a (16, 16);                    b (16, 8N)
//   add_columns        s += aᵀ · 1   a (16, 16); s[0] is row g of the result and s[2] row g + 8, in lanes with q = 0
#pragma once
#include <type_traits>

#include "common/cuda/compute_type.h"
#include "common/cuda/device/device.h"

namespace pytbptt::cuda {

using namespace device;

struct Tf32 {};

template <ComputeType COMPUTE_TYPE>
using KindOf =
    std::conditional_t<COMPUTE_TYPE == ComputeType::float16, half,
                       std::conditional_t<COMPUTE_TYPE == ComputeType::bfloat16, bfloat16,
                                          std::conditional_t<COMPUTE_TYPE == ComputeType::float32, float, Tf32>>>;

PYTBPTT_DEVICE int larger(int a, int b) {
  return a > b ? a : b;
}
PYTBPTT_DEVICE int smaller(int a, int b) {
  return a < b ? a : b;
}

template <typename Kind>
struct Products {  // half and bfloat16
  using Element = Kind;
  // Row padding: 16 bytes, so that the eight 16-byte rows of an ldmatrix hit different banks.
  static constexpr int padding = 8;
  // The element as rounded by the MMA (TF32).
  static PYTBPTT_DEVICE float factor(float element) { return element; }

  template <int DEPTH>
  struct Rows {
    PYTBPTT_DEVICE Rows(Smem<Kind> a, int stride) {
      PYTBPTT_UNROLL
      for (int k = 0; k < DEPTH / 16; ++k) {
        ldmatrix_x4<false>(fragments[k], a + (lane() % 16 * stride + 16 * k + lane() / 16 * 8));
      }
    }
    std::uint32_t fragments[DEPTH / 16][4];
  };

  template <int N, int DEPTH>
  static PYTBPTT_DEVICE void times_transposed(float (&c)[N][4], const Rows<DEPTH>& a, Smem<Kind> b, int stride) {
    PYTBPTT_UNROLL
    for (int k = 0; k < DEPTH / 16; ++k) {
      PYTBPTT_UNROLL
      for (int n = 0; n < N; n += 2) {
        std::uint32_t two[4];
        const int row = 8 * n + lane() % 8 + lane() / 16 * 8;
        ldmatrix_x4<false>(two, b + (row * stride + 16 * k + lane() / 8 % 2 * 8));
        add_two<N>(c, n, a.fragments[k], two);
      }
    }
  }

  template <int N, int K>
  static PYTBPTT_DEVICE void weights_times(float (&c)[N][4], const float (&a)[K / 8][4], Smem<Kind> b, int stride) {
    PYTBPTT_UNROLL
    for (int k = 0; k < K / 16; ++k) {
      const float (&left)[4] = a[2 * k], (&right)[4] = a[2 * k + 1];
      const std::uint32_t fragment[4] = {pack<Kind>(left[0], left[1]), pack<Kind>(left[2], left[3]),
                                         pack<Kind>(right[0], right[1]), pack<Kind>(right[2], right[3])};
      times_rows<N>(c, fragment, b + 16 * k * stride, stride);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void times(float (&c)[N][4], Smem<Kind> a, int stride_a, Smem<Kind> b, int stride) {
    std::uint32_t fragment[4];
    ldmatrix_x4<false>(fragment, a + (lane() % 16 * stride_a + lane() / 16 * 8));
    times_rows<N>(c, fragment, b, stride);
  }

  template <int N>
  static PYTBPTT_DEVICE void transposed_times(float (&c)[N][4], Smem<Kind> a, int stride_a, Smem<Kind> b, int stride) {
    std::uint32_t fragment[4];
    load_transposed(fragment, a, stride_a);
    times_rows<N>(c, fragment, b, stride);
  }

  static PYTBPTT_DEVICE void add_columns(float (&s)[4], Smem<Kind> a, int stride_a) {
    std::uint32_t fragment[4];
    load_transposed(fragment, a, stride_a);
    const std::uint32_t ones = lane() / 4 == 0 ? pack<Kind>(1, 1) : 0;
    mma<Kind>(s, fragment, {ones, ones});
  }

 private:
  static PYTBPTT_DEVICE void load_transposed(std::uint32_t (&fragment)[4], Smem<Kind> a, int stride) {
    ldmatrix_x4<true>(fragment, a + ((lane() % 8 + lane() / 16 * 8) * stride + lane() / 8 % 2 * 8));
  }

  template <int N>
  static PYTBPTT_DEVICE void times_rows(float (&c)[N][4], const std::uint32_t (&fragment)[4], Smem<Kind> b,
                                        int stride) {
    PYTBPTT_UNROLL
    for (int n = 0; n < N; n += 2) {
      std::uint32_t two[4];
      ldmatrix_x4<true>(two, b + (lane() % 16 * stride + 8 * n + lane() / 16 * 8));
      add_two<N>(c, n, fragment, two);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void add_two(float (&c)[N][4], int n, const std::uint32_t (&fragment)[4],
                                     const std::uint32_t (&two)[4]) {
    static_assert(N % 2 == 0, "matrices are loaded in pairs");
    mma<Kind>(c[n], fragment, {two[0], two[1]});
    mma<Kind>(c[n + 1], fragment, {two[2], two[3]});
  }
};

// FP32 and TF32: A stays in shared memory, as it would need too many registers.
struct FloatRows {
  Smem<float> first;
  int stride;
};

template <>
struct Products<float> {
  using Element = float;
  static constexpr int padding = 4;
  static PYTBPTT_DEVICE float factor(float element) { return element; }

  template <int DEPTH>
  struct Rows : FloatRows {
    PYTBPTT_DEVICE Rows(Smem<float> a, int stride) : FloatRows{a, stride} {}
  };

  template <int N, int DEPTH>
  static PYTBPTT_DEVICE void times_transposed(float (&c)[N][4], const Rows<DEPTH>& a, Smem<float> b, int stride) {
    const Smem<float> upper = a.first + lane() / 4 * a.stride, lower = upper + 8 * a.stride;
    const Smem<float> column = b + lane() % 4 * 2 * stride;
    // Sum 16 products at a time before adding to the accumulator: one long chain of additions would be less accurate
    // than a BLAS.
    PYTBPTT_LOOP
    for (int k = 0; k < DEPTH; k += 16) {
      float sums[N][4] = {};
      PYTBPTT_UNROLL
      for (int i = k; i < k + 16; i += 4) {
        const Quad top = upper.load_many<Quad>(i), bottom = lower.load_many<Quad>(i);
        PYTBPTT_UNROLL
        for (int n = 0; n < N; ++n) {
          const Quad left = column.load_many<Quad>(8 * n * stride + i);
          const Quad right = column.load_many<Quad>((8 * n + 1) * stride + i);
          sums[n][0] = dot(top, left, sums[n][0]);
          sums[n][1] = dot(top, right, sums[n][1]);
          sums[n][2] = dot(bottom, left, sums[n][2]);
          sums[n][3] = dot(bottom, right, sums[n][3]);
        }
      }
      PYTBPTT_UNROLL
      for (int n = 0; n < N; ++n) {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) c[n][i] += sums[n][i];
      }
    }
  }

  template <int N, int K>
  static PYTBPTT_DEVICE void weights_times(float (&c)[N][4], const float (&a)[K / 8][4], Smem<float> b, int stride) {
    const Smem<float> columns = b + lane() % 4 * 2;
    PYTBPTT_UNROLL
    for (int k = 0; k < K; ++k) {
      const int source = lane() / 4 * 4 + k % 8 / 2;
      const float top = shfl(a[k / 8][k % 2], source), bottom = shfl(a[k / 8][k % 2 + 2], source);
      add_row<N>(c, top, bottom, columns + k * stride);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void times(float (&c)[N][4], Smem<float> a, int stride_a, Smem<float> b, int stride) {
    const Smem<float> row = a + lane() / 4 * stride_a, columns = b + lane() % 4 * 2;
    PYTBPTT_LOOP
    for (int k = 0; k < 16; ++k) {
      add_row<N>(c, row.load(k), row.load(8 * stride_a + k), columns + k * stride);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void transposed_times(float (&c)[N][4], Smem<float> a, int stride_a, Smem<float> b,
                                              int stride) {
    const Smem<float> column = a + lane() / 4, columns = b + lane() % 4 * 2;
    PYTBPTT_LOOP
    for (int k = 0; k < 16; ++k) {
      add_row<N>(c, column.load(k * stride_a), column.load(k * stride_a + 8), columns + k * stride);
    }
  }

  static PYTBPTT_DEVICE void add_columns(float (&s)[4], Smem<float> a, int stride_a) {
    for (int k = 0; k < 16; ++k) {
      s[0] += a.load(k * stride_a + lane() / 4);
      s[2] += a.load(k * stride_a + lane() / 4 + 8);
    }
  }

 private:
  static PYTBPTT_DEVICE float dot(Quad a, Quad b, float sum) {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
  }

  template <int N>
  static PYTBPTT_DEVICE void add_row(float (&c)[N][4], float top, float bottom, Smem<float> row) {
    PYTBPTT_UNROLL
    for (int n = 0; n < N; ++n) {
      const Pair b = row.load_many<Pair>(8 * n);
      c[n][0] = fma(top, b.x, c[n][0]);
      c[n][1] = fma(top, b.y, c[n][1]);
      c[n][2] = fma(bottom, b.x, c[n][2]);
      c[n][3] = fma(bottom, b.y, c[n][3]);
    }
  }
};

template <>
struct Products<Tf32> {
  using Element = float;
  static constexpr int padding = 4;
  static PYTBPTT_DEVICE float factor(float element) { return from_tf32(to_tf32(element)); }

  template <int DEPTH>
  struct Rows : FloatRows {
    PYTBPTT_DEVICE Rows(Smem<float> a, int stride) : FloatRows{a, stride} {}
  };

  template <int N, int DEPTH>
  static PYTBPTT_DEVICE void times_transposed(float (&c)[N][4], const Rows<DEPTH>& a, Smem<float> b, int stride) {
    const int g = lane() / 4, q = lane() % 4;
    PYTBPTT_LOOP
    for (int k = 0; k < DEPTH; k += 8) {
      const Smem<float> rows = a.first + (g * a.stride + k + q), columns = b + (g * stride + k + q);
      const std::uint32_t fragment[4] = {to_tf32(rows.load(0)), to_tf32(rows.load(8 * a.stride)), to_tf32(rows.load(4)),
                                         to_tf32(rows.load(8 * a.stride + 4))};
      PYTBPTT_UNROLL
      for (int n = 0; n < N; ++n) {
        mma_tf32(c[n], fragment, {to_tf32(columns.load(8 * n * stride)), to_tf32(columns.load(8 * n * stride + 4))});
      }
    }
  }

  // k may be permuted if A and B use the same order. Here it is the accumulator's register order.
  template <int N, int K>
  static PYTBPTT_DEVICE void weights_times(float (&c)[N][4], const float (&a)[K / 8][4], Smem<float> b, int stride) {
    const Smem<float> columns = b + (lane() % 4 * 2 * stride + lane() / 4);
    PYTBPTT_UNROLL
    for (int k = 0; k < K / 8; ++k) {
      const std::uint32_t fragment[4] = {to_tf32(a[k][0]), to_tf32(a[k][2]), to_tf32(a[k][1]), to_tf32(a[k][3])};
      add_rows<N>(c, fragment, columns + 8 * k * stride, stride);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void times(float (&c)[N][4], Smem<float> a, int stride_a, Smem<float> b, int stride) {
    const int g = lane() / 4, q = lane() % 4;
    PYTBPTT_UNROLL
    for (int k = 0; k < 16; k += 8) {
      const Smem<float> from = a + (g * stride_a + k + q);
      const std::uint32_t fragment[4] = {to_tf32(from.load(0)), to_tf32(from.load(8 * stride_a)), to_tf32(from.load(4)),
                                         to_tf32(from.load(8 * stride_a + 4))};
      add_rows<N>(c, fragment, b + ((k + q) * stride + g), 4 * stride);
    }
  }

  template <int N>
  static PYTBPTT_DEVICE void transposed_times(float (&c)[N][4], Smem<float> a, int stride_a, Smem<float> b,
                                              int stride) {
    const int g = lane() / 4, q = lane() % 4;
    PYTBPTT_UNROLL
    for (int k = 0; k < 16; k += 8) {
      const Smem<float> from = a + ((k + q) * stride_a + g);
      const std::uint32_t fragment[4] = {to_tf32(from.load(0)), to_tf32(from.load(8)), to_tf32(from.load(4 * stride_a)),
                                         to_tf32(from.load(4 * stride_a + 8))};
      add_rows<N>(c, fragment, b + ((k + q) * stride + g), 4 * stride);
    }
  }

  static PYTBPTT_DEVICE void add_columns(float (&s)[4], Smem<float> a, int stride_a) {
    Products<float>::add_columns(s, a, stride_a);
  }

 private:
  // `first` points to the row for b[0]; b[1]'s row is `distance` elements further.
  template <int N>
  static PYTBPTT_DEVICE void add_rows(float (&c)[N][4], const std::uint32_t (&fragment)[4], Smem<float> first,
                                      int distance) {
    PYTBPTT_UNROLL
    for (int n = 0; n < N; ++n) {
      mma_tf32(c[n], fragment, {to_tf32(first.load(8 * n)), to_tf32(first.load(distance + 8 * n))});
    }
  }
};

}  // namespace pytbptt::cuda
