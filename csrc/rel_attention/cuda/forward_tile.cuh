// What the forward kernels of rel_attention share: their launch, their blocks, the softmax of a tile, the output.
//
//   keys        | tile 0 | tile 1 | tile 2 | tile 3 |     of one block of queries
//   2 splits    |     block 0     |     block 1     |     each writes a partial output
//
// The softmax is online (RunningSoftmax): maximum, total and output of a warp's 16 queries are rescaled whenever a tile
// has a greater score. A lane has rows lane / 4 and lane / 4 + 8.
#pragma once
#include "rel_attention/cuda/tile.cuh"

namespace pytbptt::cuda {

struct ForwardLaunch {
  KernelInputs in;
  void *out, *rounding;
  float* log_sum_exp;
  // Number of blocks that share the keys of a tile of queries. With several, each writes a partial output, without
  // dropout's scale, to `parts` (splits, B, H, T, D) and its log-sum-exp, -inf if no key was visible, to `part_sums`
  // (splits, B, H, T).
  int splits;
  float *parts, *part_sums;
};

// Which queries a block has, `size` from the first on, and which share of their keys. Longest blocks first: the last
// queries see the most keys.
struct BlockOfQueries {
  int64_t first_query, head, batch;
  int split;

  PYTBPTT_DEVICE BlockOfQueries(const KernelInputs& in, int size) {
    const int64_t blocks = (in.T + size - 1) / size;
    first_query = (blocks - 1 - block() % blocks) * size;
    head = block() / blocks % in.H;
    batch = block() / blocks / in.H % in.B;
    split = static_cast<int>(block() / blocks / in.H / in.B);
  }
};

// The softmax of a warp's 16 queries over the keys met so far: the largest sums, and the sum of the exponentials.
template <typename T, int PADDED>
struct RunningSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};

  // Online softmax update: scores to exponentials; rescales previous output and total.
  PYTBPTT_DEVICE void add(float (&sums)[T::size / 8][4], float (&out)[PADDED / 8][4], float log2_scale) {
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      float now = maximum[h];
      PYTBPTT_UNROLL
      for (int n = 0; n < T::size / 8; ++n) now = largest(now, largest(sums[n][2 * h], sums[n][2 * h + 1]));
      now = largest(now, shfl_xor(now, 1));
      now = largest(now, shfl_xor(now, 2));
      const float offset = now == -INFINITY ? 0.0f : now * log2_scale;  // nothing seen yet: all stays 0
      const float rescale = exp2(fma(maximum[h], log2_scale, -offset));
      maximum[h] = now;
      total[h] *= rescale;
      PYTBPTT_UNROLL
      for (int n = 0; n < PADDED / 8; ++n) {
        out[n][2 * h] *= rescale;
        out[n][2 * h + 1] *= rescale;
      }
      PYTBPTT_UNROLL
      for (int n = 0; n < T::size / 8; ++n) {
        PYTBPTT_UNROLL
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          sums[n][i] = exp2(fma(sums[n][i], log2_scale, -offset));
          total[h] += sums[n][i];
        }
      }
    }
  }
};

// Dropout mask without the 1/(1-p) factor.
template <typename T>
PYTBPTT_DEVICE void drop_weights(float (&weights)[T::size / 8][4], const KernelInputs& in, int64_t seed, int64_t batch,
                                 int64_t first_query, int first_key, int64_t head) {
  if (in.dropout_threshold == 0) return;
  random_bits<T>(in, seed, batch, first_query, first_key, head, [&](int n, int i, std::uint32_t bits) {
    if (bits < in.dropout_threshold) weights[n][i] = 0;
  });
}

// Writes the output of a warp's queries, or the share of it that this block has.
template <typename E, int PADDED>
PYTBPTT_DEVICE void store_output(const ForwardLaunch& launch, float (&out)[PADDED / 8][4], const float (&maximum)[2],
                                 float (&total)[2], int64_t batch, int64_t first_query, int64_t head, int split) {
  const KernelInputs& in = launch.in;
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    total[h] += shfl_xor(total[h], 1);
    total[h] += shfl_xor(total[h], 2);
    const int64_t query = first_query + lane() / 4 + 8 * h;
    if (query >= in.T) continue;
    const int64_t index = (batch * in.H + head) * in.T + query;
    const float inverse = total[h] == 0 ? 0.0f : 1 / total[h];
    const float log_sum = fma(maximum[h], in.log2_scale, log2(total[h]));
    const int depth = static_cast<int>(in.D);
    if (launch.splits == 1) {
      const int64_t at = ((batch * in.T + query) * in.H + head) * in.D;
      const float factor = inverse * static_cast<float>(in.keep_scale);
      PYTBPTT_UNROLL
      for (int n = 0; n < PADDED / 8; ++n) {
        store_two(static_cast<E*>(launch.out) + at, 8 * n + lane() % 4 * 2, depth, out[n][2 * h] * factor,
                  out[n][2 * h + 1] * factor);
      }
      if (sizeof(E) == 2 && launch.rounding != nullptr) {
        PYTBPTT_UNROLL
        for (int n = 0; n < PADDED / 8; ++n) {
          store_two(static_cast<E*>(launch.rounding) + at, 8 * n + lane() % 4 * 2, depth,
                    rounded_off<E>(out[n][2 * h] * factor), rounded_off<E>(out[n][2 * h + 1] * factor));
        }
      }
      if (lane() % 4 == 0) store(launch.log_sum_exp + index, total[h] == 0 ? INFINITY : log_sum);
    } else {
      const int64_t part = split * in.B * in.H * in.T + index;
      PYTBPTT_UNROLL
      for (int n = 0; n < PADDED / 8; ++n) {
        store_two(launch.parts + part * in.D, 8 * n + lane() % 4 * 2, depth, out[n][2 * h] * inverse,
                  out[n][2 * h + 1] * inverse);
      }
      if (lane() % 4 == 0) store(launch.part_sums + part, total[h] == 0 ? -INFINITY : log_sum);
    }
  }
}

}  // namespace pytbptt::cuda
