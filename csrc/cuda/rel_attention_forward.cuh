// The forward of rel_attention. A block has one head's TILE queries of one stream and walks over the keys that they
// see, nearest last; scores exist only as tiles in registers, and the softmax is rescaled as larger scores turn up.
#pragma once
#include "cuda/rel_attention_head_size.cuh"
#include "cuda/rel_attention_tile.cuh"

namespace pytbptt::cuda {

struct ForwardLaunch {
  Inputs in;
  void* out;
  float* log_sum_exp;
};

// How a block's shared memory is laid out, in bytes.
template <typename Kind, int PADDED>
struct ForwardMemory {
  using T = Tile<Kind, PADDED>;
  // With two, keys and values are on their way while the previous ones are used; wide rows have no room for that.
  static constexpr int stages = T::floats || PADDED > 64 ? 1 : 2;
  static constexpr int keys = 0;
  static constexpr int values = keys + stages * T::bytes;
  static constexpr int table = values + stages * T::bytes;  // places in groups of TILE, a ring of stages + 1 of them
  static constexpr int skew = table + (stages + 1) * T::bytes;
  static constexpr int queries =
      skew + T::warps * T::skew_elements * 4;  // floats; others only pass through the last stage
  static constexpr int bytes = queries + (T::floats ? 2 * T::bytes : 0);
};

template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED>::threads), 1)
rel_attention_forward_kernel(const ForwardLaunch launch) {
  using T = Tile<Kind, PADDED>;
  using E = typename T::Element;
  using Memory = ForwardMemory<Kind, PADDED>;
  using Rows = typename Products<Kind>::template Rows<PADDED>;
  const Inputs& in = launch.in;
  const int64_t tiles_of_queries = (in.T + T::size - 1) / T::size;
  // The last queries see the most keys: they start first.
  const int64_t first_query = (tiles_of_queries - 1 - block() % tiles_of_queries) * T::size;
  const int64_t head = block() / tiles_of_queries % in.H, batch = block() / tiles_of_queries / in.H;

  const auto keys = shared<E>(Memory::keys, Memory::stages * T::elements);
  const auto values = shared<E>(Memory::values, Memory::stages * T::elements);
  const auto table = shared<E>(Memory::table, (Memory::stages + 1) * T::elements);
  const auto skew = shared<float>(Memory::skew + warp() * T::skew_elements * 4, T::skew_elements);

  const auto with_content =
      T::floats ? shared<E>(Memory::bytes - 2 * T::bytes, T::elements) : keys + (Memory::stages - 1) * T::elements;
  const auto with_position =
      T::floats ? shared<E>(Memory::bytes - T::bytes, T::elements) : values + (Memory::stages - 1) * T::elements;
  biased_queries<T>(with_content, with_position, in, batch, first_query, head);
  sync_threads();
  const Rows content_rows(with_content + 16 * warp() * T::stride, T::stride);
  const Rows position_rows(with_position + 16 * warp() * T::stride, T::stride);

  const Sight sight(in, batch, first_query + 16 * warp());
  // Random bits come in eights of keys, so tiles start at one.
  const int start = first_visible_to_tile<T>(in, batch, first_query) / 8 * 8;
  const int end = static_cast<int>(in.M + smaller64(first_query + T::size, in.T));
  const int tiles = end > start ? (end - start + T::size - 1) / T::size : 0;
  const int64_t far = in.M + first_query + T::size - 1 - start;  // at place 0 of the first tile
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);

  const auto fetch_group = [&](int group) {
    fetch<T>(table + group % (Memory::stages + 1) * T::elements, in, in.aligned,
             [&](int r) { return position_row<E>(in, far - int64_t{group} * T::size - r, head); });
  };
  const auto fetch_tile = [&](int tile) {
    const int first_key = start + tile * T::size;
    const int stage = tile % Memory::stages * T::elements;
    fetch<T>(keys + stage, in, in.aligned,
             [&](int r) { return key_row<E>(in.memory_key, in.key, in, batch, first_key + r, head); });
    fetch<T>(values + stage, in, in.aligned,
             [&](int r) { return key_row<E>(in.memory_value, in.value, in, batch, first_key + r, head); });
    fetch_group(tile + 1);
  };

  float out[PADDED / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  if (tiles > 0) {
    fetch_group(0);
    if (Memory::stages == 2) fetch_tile(0);
  }
  PYTBPTT_LOOP
  for (int tile = 0; tile < tiles; ++tile) {
    if constexpr (Memory::stages == 2) {
      cp_async_wait();
      sync_threads();  // the tile is here, and everyone is done with the stage that the next one takes
      if (tile + 1 < tiles) fetch_tile(tile + 1);
    } else {
      sync_threads();
      fetch_tile(tile);
      cp_async_wait();
      sync_threads();
    }
    const int first_key = start + tile * T::size;
    if (sight.nothing<T>(first_key)) continue;

    const int stage = tile % Memory::stages * T::elements;
    const auto upper = table + tile % (Memory::stages + 1) * T::elements;
    const auto lower = table + (tile + 1) % (Memory::stages + 1) * T::elements;
    const bool one_row = far - int64_t{tile + 2} * T::size + 2 >= in.R - 1;
    float sums[T::size / 8][4];
    compute_sums<Kind, T, PADDED>(
        sums, [&]() -> const Rows& { return content_rows; }, [&]() -> const Rows& { return position_rows; },
        keys + stage, upper, lower, one_row, skew);
    if (!sight.everything<T>(first_key)) {
      PYTBPTT_UNROLL
      for (int n = 0; n < T::size / 8; ++n) {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!sight.sees(i / 2, first_key + 8 * n + lane() % 4 * 2 + i % 2)) sums[n][i] = -INFINITY;
        }
      }
    }

    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      float now = maximum[h];
      PYTBPTT_UNROLL
      for (int n = 0; n < T::size / 8; ++n) now = largest(now, largest(sums[n][2 * h], sums[n][2 * h + 1]));
      now = largest(now, shfl_xor(now, 1));
      now = largest(now, shfl_xor(now, 2));
      const float offset = now == -INFINITY ? 0.0f : now * in.log2_scale;  // nothing seen yet: all stays 0
      const float rescale = exp2(fma(maximum[h], in.log2_scale, -offset));
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
          sums[n][i] = exp2(fma(sums[n][i], in.log2_scale, -offset));
          total[h] += sums[n][i];
        }
      }
    }
    if (in.dropout_threshold != 0) {
      random_bits<T>(in, seed, batch, first_query + 16 * warp(), first_key, head,
                     [&](int n, int i, std::uint32_t bits) {
                       if (bits < in.dropout_threshold) sums[n][i] = 0;
                     });
    }
    Products<Kind>::template weights_times<PADDED / 8, T::size>(out, sums, values + stage, T::stride);
  }

  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    total[h] += shfl_xor(total[h], 1);
    total[h] += shfl_xor(total[h], 2);
    const int64_t query = first_query + 16 * warp() + lane() / 4 + 8 * h;
    if (query >= in.T) continue;
    const float factor = total[h] == 0 ? 0.0f : static_cast<float>(in.keep_scale) / total[h];
    E* const row = static_cast<E*>(launch.out) + ((batch * in.T + query) * in.H + head) * in.D;
    PYTBPTT_UNROLL
    for (int n = 0; n < PADDED / 8; ++n) {
      store_two(row, 8 * n + lane() % 4 * 2, static_cast<int>(in.D), out[n][2 * h] * factor,
                out[n][2 * h + 1] * factor);
    }
    if (lane() % 4 == 0) {
      store(launch.log_sum_exp + (batch * in.H + head) * in.T + query,
            total[h] == 0 ? INFINITY : fma(maximum[h], in.log2_scale, log2(total[h])));
    }
  }
}

// The text of an error, or nullptr.
template <typename Kind, int PADDED>
const char* launch_forward(const RelAttentionForward& forward, Stream stream) {
  using T = Tile<Kind, PADDED>;
  const RelAttention& in = forward.inputs;
  const ForwardLaunch parameters{derive(in), forward.out, static_cast<float*>(forward.log_sum_exp)};
  return launch(&rel_attention_forward_kernel<Kind, PADDED>, in.B * in.H * ((in.T + T::size - 1) / T::size), T::threads,
                ForwardMemory<Kind, PADDED>::bytes, stream, parameters);
}

template <Arithmetic ARITHMETIC>
const char* rel_attention_forward(const RelAttentionForward& launch, CUstream_st* stream) {
  return with_head_size(launch.inputs.D,
                        [&](auto padded) { return launch_forward<KindOf<ARITHMETIC>, padded.value>(launch, stream); });
}

}  // namespace pytbptt::cuda
