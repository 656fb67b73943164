// The keys kernel of rel_attention's backward (backward.cuh): d key and d value of TILE keys.
//
//   queries  | tile 0 | tile 1 | tile 2 |    walked from the nearest query on
//
// Per tile: each warp, for its 16 queries: scores, weights and dS, to shared memory; then each warp, for its 16 keys,
// over all queries of the tile:
//
//   d value += weightsᵀ · d out
//   d key   += dSᵀ · (query + u)
//
// Distances grow from tile to tile: a tile's first group of the table is the next tile's second one.
#pragma once
#include "rel_attention/cuda/backward_tile.cuh"

namespace pytbptt::cuda {

// Writes the gradients of a warp's 16 keys and values.
template <typename E, int PADDED>
PYTBPTT_DEVICE void store_keys(const BackwardLaunch& launch, const float (&d_key)[PADDED / 8][4],
                               const float (&d_value)[PADDED / 8][4], int64_t batch, int64_t first_key, int64_t head) {
  const KernelInputs& in = launch.in;
  const float scale = in.sign * static_cast<float>(in.scale);
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t j = first_key + lane() / 4 + 8 * h;
    if (j >= in.M + in.T || (j < in.M && !launch.memory_needs_grad)) continue;
    const int64_t row = j < in.M ? batch * in.M + j : batch * in.T + j - in.M;
    E* const key = static_cast<E*>(j < in.M ? launch.memory_key : launch.key) + (row * in.H + head) * in.D;
    E* const value = static_cast<E*>(j < in.M ? launch.memory_value : launch.value) + (row * in.H + head) * in.D;
    PYTBPTT_UNROLL
    for (int n = 0; n < PADDED / 8; ++n) {
      const int column = 8 * n + lane() % 4 * 2, depth = static_cast<int>(in.D);
      store_two(key, column, depth, d_key[n][2 * h] * scale, d_key[n][2 * h + 1] * scale);
      store_two(value, column, depth, d_value[n][2 * h], d_value[n][2 * h + 1]);
    }
  }
}

template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED, true>::threads), 1)
rel_attention_keys_kernel(const BackwardLaunch launch) {
  using T = Tile<Kind, PADDED, true>;
  using E = typename T::Element;
  using P = Products<Kind>;
  using Rows = typename P::template Rows<PADDED>;
  using Memory = BackwardMemory<Kind, PADDED>;
  const KernelInputs& in = launch.in;
  const int64_t tiles_of_keys = (in.M + in.T - launch.first_key + T::size - 1) / T::size;
  const auto first_key = static_cast<int>(launch.first_key + block() % tiles_of_keys * T::size);
  // 32-bit loop variables: FP32's 128 accumulators leave no registers.
  const auto head = static_cast<int>(block() / tiles_of_keys % in.H);
  const auto batch = static_cast<int>(block() / tiles_of_keys / in.H);

  const auto keys = shared<E>(Memory::keys, T::elements), values = shared<E>(Memory::values, T::elements);
  const auto table = shared<E>(Memory::upper, 2 * T::elements);  // groups of TILE places: this tile's and the next
  const auto query_u = shared<E>(Memory::query_u, T::elements);
  const auto query_v = shared<E>(Memory::query_v, T::elements);
  const auto grad_out = shared<E>(Memory::grad_out, T::elements);
  const auto skew = shared<float>(Memory::warps + warp() * Memory::own, T::skew_elements);
  // The weights of a warp's queries, and after them the gradients of their scores.
  const auto weights_of = [](int of_warp) {
    return shared<E>(Memory::warps + of_warp * Memory::own, 2 * 16 * Memory::weights_stride);
  };
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);

  const KeyRows<E> key_rows(in.memory_key, in.key, in, batch, head);
  const KeyRows<E> value_rows(in.memory_value, in.value, in, batch, head);
  fetch<T>(keys, in, key_rows, first_key);
  fetch<T>(values, in, value_rows, first_key);
  const ChunkRows<E> content_rows(launch.query_u, in, batch, head);
  const ChunkRows<E> position_rows(launch.query_v, in, batch, head);
  const ChunkRows<E> grad_out_rows(launch.grad_out, in, batch, head);
  const PositionRows<E> distances(in, head);

  float d_key[PADDED / 8][4] = {}, d_value[PADDED / 8][4] = {};
  int far_before = -T::size - 1;  // sentinel: not adjacent to any tile
  const auto last_key = static_cast<int>(smaller64(first_key + T::size, in.M + in.T) - 1);
  const auto end = static_cast<int>(smaller64(last_key + in.window - in.M, in.T));
  PYTBPTT_LOOP
  for (auto first_query = static_cast<int>(larger64(0, first_key - in.M)); first_query < end; first_query += T::size) {
    if (first_visible_to_tile<T>(in, batch, first_query) > last_key) continue;
    sync_threads();
    const auto far = static_cast<int>(in.M + first_query + T::size - 1 - first_key);
    fetch<T>(query_u, in, content_rows, first_query);
    fetch<T>(query_v, in, position_rows, first_query);
    fetch<T>(grad_out, in, grad_out_rows, first_query);
    // The previous tile's first table group is this tile's second one.
    const int first_group = first_query / T::size % 2;
    const auto upper = table + first_group * T::elements, lower = table + (1 - first_group) * T::elements;
    fetch<T>(upper, in, distances, -far);
    if (far != far_before + T::size) fetch<T>(lower, in, distances, T::size - far);
    far_before = far;
    cp_async_wait();
    sync_threads();

    const int64_t own_query = first_query + 16 * warp();
    const Visibility visibility(in, batch, own_query);
    const Softmax softmax(launch, batch, own_query, head);
    float weights[T::size / 8][4], gradients[T::size / 8][4];
    compute_scores<Kind, T, PADDED>(
        weights, [&] { return Rows(query_u + 16 * warp() * T::stride, T::stride); },
        [&] { return Rows(query_v + 16 * warp() * T::stride, T::stride); }, keys, upper, lower,
        far - 2 * T::size + 2 >= in.R - 1, skew);
    score_gradients<true, Kind, T, PADDED>(weights, gradients, launch, softmax, visibility, grad_out, values, seed,
                                           batch, own_query, first_key, head);
    sync_warp();  // the skew has been read
    const auto mine = weights_of(warp());
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int index = (lane() / 4 + 8 * h) * Memory::weights_stride + 8 * n + lane() % 4 * 2;
        keep_two(mine, index, weights[n][2 * h], weights[n][2 * h + 1]);
        keep_two(mine, index + 16 * Memory::weights_stride, gradients[n][2 * h], gradients[n][2 * h + 1]);
      }
    }
    sync_threads();
    PYTBPTT_LOOP
    for (int of_warp = 0; of_warp < T::warps; ++of_warp) {
      const auto theirs = weights_of(of_warp) + 16 * warp();
      const int rows = 16 * of_warp * T::stride;
      P::template transposed_times<PADDED / 8>(d_value, theirs, Memory::weights_stride, grad_out + rows, T::stride);
      P::template transposed_times<PADDED / 8>(d_key, theirs + 16 * Memory::weights_stride, Memory::weights_stride,
                                               query_u + rows, T::stride);
    }
  }
  cp_async_wait();

  store_keys<E, PADDED>(launch, d_key, d_value, batch, first_key + 16 * warp(), head);
}

}  // namespace pytbptt::cuda
