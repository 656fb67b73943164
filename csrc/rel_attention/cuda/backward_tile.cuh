// What the two large kernels of rel_attention's backward share: their launch, their shared memory, and the step from
// scores to gradients of scores, in the layout of the scores:
//
//   scores S -> weights P = exp(S - log_sum_exp)            log_sum_exp: of the forward
//   d out · valueᵀ = dP -> dS = P · (keep · dP - delta)     delta: row sums of d out · out (the dots kernel)
#pragma once
#include "rel_attention/cuda/head_size.cuh"
#include "rel_attention/cuda/tile.cuh"

namespace pytbptt::cuda {

struct BackwardLaunch {
  KernelInputs in;
  Operand query_u, query_v;  // the queries plus content_bias and plus position_bias, times the scale's sign
  Operand grad_out, out, rounding;
  bool out_in_pieces;  // whether `out` and `rounding` allow 16-byte loads (the packed operands always do)
  const float* log_sum_exp;
  bool memory_needs_grad;
  void *query, *key, *value, *position, *content_bias, *position_bias, *memory_key, *memory_value;
  std::int64_t first_key;   // of the keys kernel's first tile
  std::int64_t partials;    // for each head
  std::int64_t bias_parts;  // for each head
  float* dots;              // (B, H, T)
  float* sums;        // (partials, H, R, PADDED + 8): d position / |scale|, and in column PADDED the band's column sums
  float* query_sums;  // (partials, H, PADDED): d query / scale, summed over queries
  float* position_parts;  // (H, bias_parts, PADDED): d position_bias / scale, of some of the table's rows each
};

// How the two large kernels lay out their shared memory, in bytes.
template <typename Kind, int PADDED>
struct BackwardMemory {
  using T = Tile<Kind, PADDED, true>;
  static constexpr int element = sizeof(typename T::Element);
  // Per-warp scratch, reused: first the shifted position scores, then either weights and dS (keys kernel), 16 rows of
  // TILE each, or dS by distance (queries kernel), 16 rows of TILE + 16.
  static constexpr int weights_stride = T::size + Products<Kind>::padding;
  static constexpr int band_stride = T::size + 16 + Products<Kind>::padding;
  static constexpr int own = at_least(T::skew_elements * 4, element * 16 * at_least(2 * weights_stride, band_stride));
  static constexpr int keys = 0;
  static constexpr int values = keys + T::bytes;
  static constexpr int upper = values + T::bytes;
  static constexpr int lower = upper + T::bytes;
  static constexpr int query_u = lower + T::bytes;
  static constexpr int query_v = query_u + T::bytes;
  static constexpr int grad_out = query_v + T::bytes;
  static constexpr int warps = grad_out + T::bytes;
  static constexpr int query_sums = warps + T::warps * own;
  static constexpr int clamped_sums = query_sums + T::warps * PADDED * 4;
  static constexpr int saved = clamped_sums + T::size * 4;
  static constexpr int bytes = saved + T::size * PADDED * 4;
  static_assert(bytes <= max_shared_bytes, "a block must fit on every GPU");
};

// The log-sum-exp and the dot product of each of a lane's two queries.
struct Softmax {
  float log_sum_exp[2], dot[2];

  PYTBPTT_DEVICE Softmax(const BackwardLaunch& launch, int64_t batch, int64_t first_query, int64_t head) {
    for (int h = 0; h < 2; ++h) {
      const int64_t query = first_query + lane() / 4 + 8 * h;
      const bool exists = query < launch.in.T;
      const int64_t row = (batch * launch.in.H + head) * launch.in.T + query;
      log_sum_exp[h] = exists ? load(launch.log_sum_exp + row) : INFINITY;
      dot[h] = exists ? load(launch.dots + row) : 0.0f;
    }
  }
};

// Scores to probabilities (before dropout).
template <typename T>
PYTBPTT_DEVICE void recompute_weights(float (&sums)[T::size / 8][4], const KernelInputs& in, const Softmax& softmax,
                                      const Visibility& visibility, int first_key) {
  visibility.mask<T>(sums, first_key);
  PYTBPTT_UNROLL
  for (int n = 0; n < T::size / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) sums[n][i] = exp2(fma(sums[n][i], in.log2_scale, -softmax.log_sum_exp[i / 2]));
  }
}

// Computes dS from probabilities and `gradients` (gradient w.r.t. the dropped-out probabilities), in place. With
// KEEP_WEIGHTS the probabilities get dropout applied.
template <bool KEEP_WEIGHTS, typename T>
PYTBPTT_DEVICE void softmax_backward(float (&weights)[T::size / 8][4], float (&gradients)[T::size / 8][4],
                                     const KernelInputs& in, const Softmax& softmax, const Visibility& visibility,
                                     int64_t seed, int64_t batch, int64_t first_query, int first_key, int64_t head) {
  // With a single visible key the weight is 1 whatever the score: dS is 0, or NaN if the weight's gradient is not
  // finite.
  const bool only_key[2] = {visibility.first[0] == visibility.last[0], visibility.first[1] == visibility.last[1]};
  const auto finish = [&](int n, int i, float keep) {
    gradients[n][i] =
        weights[n][i] * (only_key[i / 2] ? 0 * gradients[n][i] : fma(gradients[n][i], keep, -softmax.dot[i / 2]));
    if (KEEP_WEIGHTS) weights[n][i] *= keep;
  };
  if (in.dropout_threshold != 0) {
    random_bits<T>(in, seed, batch, first_query, first_key, head, [&](int n, int i, std::uint32_t bits) {
      finish(n, i, bits < in.dropout_threshold ? 0.0f : static_cast<float>(in.keep_scale));
    });
  } else {
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) finish(n, i, 1.0f);
    }
  }
}

// Both of the above, with the weights in the place of the sums.
template <bool KEEP_WEIGHTS, typename Kind, typename T, int PADDED>
PYTBPTT_DEVICE void score_gradients(float (&sums)[T::size / 8][4], float (&gradients)[T::size / 8][4],
                                    const BackwardLaunch& launch, const Softmax& softmax, const Visibility& visibility,
                                    Smem<typename T::Element> grad_out, Smem<typename T::Element> values, int64_t seed,
                                    int64_t batch, int64_t first_query, int first_key, int64_t head) {
  recompute_weights<T>(sums, launch.in, softmax, visibility, first_key);
  PYTBPTT_UNROLL
  for (int n = 0; n < T::size / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) gradients[n][i] = 0;
  }
  const typename Products<Kind>::template Rows<PADDED> rows(grad_out + 16 * warp() * T::stride, T::stride);
  Products<Kind>::template times_transposed<T::size / 8, PADDED>(gradients, rows, values, T::stride);
  softmax_backward<KEEP_WEIGHTS, T>(sums, gradients, launch.in, softmax, visibility, seed, batch, first_query,
                                    first_key, head);
}

// Adds the gradients of a warp's queries, summed over them, to the warp's row of `query_sums`.
template <int PADDED>
PYTBPTT_DEVICE void add_query_sums(Smem<float> query_sums, const float (&d_query)[PADDED / 8][4]) {
  PYTBPTT_UNROLL
  for (int n = 0; n < PADDED / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = d_query[n][i] + d_query[n][i + 2];
      PYTBPTT_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
      const int index = warp() * PADDED + 8 * n + lane() % 4 * 2 + i;
      if (lane() < 4) query_sums.store(index, query_sums.load(index) + sum);
    }
  }
}

// The block's share of the sums over queries, from all of its warps'.
template <typename T, int PADDED>
PYTBPTT_DEVICE void store_query_sums(const BackwardLaunch& launch, Smem<float> query_sums, int64_t partial,
                                     int64_t head) {
  for (int c = thread(); c < PADDED; c += T::threads) {
    float sum = 0;
    for (int of_warp = 0; of_warp < T::warps; ++of_warp) sum += query_sums.load(of_warp * PADDED + c);
    store(launch.query_sums + (partial * launch.in.H + head) * PADDED + c, sum);
  }
}

// Writes the gradients of a warp's queries.
template <typename E, int PADDED>
PYTBPTT_DEVICE void store_queries(const BackwardLaunch& launch, const float (&d_query)[PADDED / 8][4], int64_t batch,
                                  int64_t first_query, int64_t head) {
  const KernelInputs& in = launch.in;
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t query = first_query + lane() / 4 + 8 * h;
    if (query >= in.T) continue;
    E* const row = static_cast<E*>(launch.query) + ((batch * in.T + query) * in.H + head) * in.D;
    const auto scale = static_cast<float>(in.scale);
    PYTBPTT_UNROLL
    for (int n = 0; n < PADDED / 8; ++n) {
      store_two(row, 8 * n + lane() % 4 * 2, static_cast<int>(in.D), d_query[n][2 * h] * scale,
                d_query[n][2 * h + 1] * scale);
    }
  }
}

// Moves dS entries whose distance is clamped to R - 1 out of `gradients` (set to 0) and sums them per query into
// `totals`. `nearest` is the distance of the warp's first query and the tile's first key.
template <typename T>
PYTBPTT_DEVICE void extract_clamped(float (&totals)[2], float (&gradients)[T::size / 8][4], int nearest, int64_t R) {
  PYTBPTT_UNROLL
  for (int n = 0; n < T::size / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (nearest + lane() / 4 + i / 2 * 8 - (8 * n + lane() % 4 * 2 + i % 2) < R - 1) continue;
      totals[i / 2] += gradients[n][i];
      gradients[n][i] = 0;
    }
  }
}

// dQ += total · last row of R; stores the totals in shared memory for add_clamped_to_position.
template <int PADDED, typename E>
PYTBPTT_DEVICE void add_clamped_to_query(float (&d_query)[PADDED / 8][4], float (&totals)[2], Smem<float> clamped_sums,
                                         const E* last_row, int depth) {
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    totals[h] += shfl_xor(totals[h], 1);
    totals[h] += shfl_xor(totals[h], 2);
    if (lane() % 4 == 0) clamped_sums.store(16 * warp() + lane() / 4 + 8 * h, totals[h]);
  }
  PYTBPTT_UNROLL
  for (int n = 0; n < PADDED / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * n + lane() % 4 * 2 + i % 2;
      if (column < depth) d_query[n][i] = fma(totals[i / 2], to_float(load(last_row + column)), d_query[n][i]);
    }
  }
}

// Adds totalᵀ · (Q + v) to the gradient of R's last row, and the sum of totals to column PADDED.
template <typename T, int PADDED, typename Query>
PYTBPTT_DEVICE void add_clamped_to_position(float* row, Smem<float> clamped_sums, Query query) {
  for (int c = thread(); c <= PADDED; c += T::threads) {
    float sum = 0;
    for (int r = 0; r < 16 * T::warps; ++r) sum = fma(clamped_sums.load(r), c == PADDED ? 1.0f : query(r, c), sum);
    store(row + c, load(row + c) + sum);
  }
}

// Columns 2q and 2q + 1 of a warp's rows, as the products read them.
template <typename E>
PYTBPTT_DEVICE void keep_two(Smem<E> rows, int index, float first, float second) {
  if constexpr (sizeof(E) == 2) {
    rows.template store_many<std::uint32_t>(index, pack<E>(first, second));
  } else {
    rows.template store_many<Pair>(index, Pair{first, second});
  }
}

}  // namespace pytbptt::cuda
