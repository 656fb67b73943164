// The keys kernel of rel_attention's backward by warpgroups: what keys.cuh gives, bands as in warpgroup_tile.cuh. Here
// a warpgroup has 64 keys and iterates over tiles of 64 queries: distances increase, and position scores cannot be
// reused between steps.
//
// A step, of each warpgroup:
//   scores      (query + u) · keyᵀ and, of two groups of the table, (query + v) · rᵀ; d weights = d out · valueᵀ
//   gradients   the weights and dS, by the softmax, to shared memory
//   sums        d value += weightsᵀ · d out, d key += dSᵀ · (query + u)
#pragma once
#include "rel_attention/cuda/keys.cuh"
#include "rel_attention/cuda/warpgroup_tile.cuh"

namespace pytbptt::cuda {

constexpr int groups_of_keys = 2;

// How a block's shared memory is laid out, in bytes.
template <typename Kind, int PADDED>
struct WarpgroupKeysMemory {
  using T = WarpgroupTile<Kind, PADDED, groups_of_keys>;
  static constexpr int stages = 2;  // of queries: one in use, one on its way
  // Groups of the table, in a ring: the two warpgroups share one; one more is on its way.
  static constexpr int table_groups = groups_of_keys + 2;
  static constexpr int keys = 0;
  static constexpr int values = keys + groups_of_keys * T::bytes;
  static constexpr int query_u = values + groups_of_keys * T::bytes;
  static constexpr int query_v = query_u + stages * T::bytes;
  static constexpr int grad_out = query_v + stages * T::bytes;
  static constexpr int table = grad_out + stages * T::bytes;
  static constexpr int weights = table + table_groups * T::bytes;
  static constexpr int gradients = weights + groups_of_keys * T::bytes;
  static constexpr int bands = gradients + groups_of_keys * T::bytes;
  static constexpr int bytes = bands + T::warps * BandRing::bytes;
  static_assert(bytes <= 227 * 1024, "a block must fit");
};

// The block's schedule, computed redundantly by every thread.
template <typename T>
struct KeysSteps {
  int64_t head, batch;
  int first_key, first_query, count;
  int near;  // smallest distance of group 0, the first warpgroup's upper group in the last step; group numbers grow as
             // distances shrink

  PYTBPTT_DEVICE explicit KeysSteps(const BackwardLaunch& launch) {
    constexpr int size = T::block_queries;  // keys, here
    const KernelInputs& in = launch.in;
    const int64_t blocks = (in.M + in.T - launch.first_key + size - 1) / size;
    head = block() / blocks % in.H;
    batch = block() / blocks / in.H;
    first_key = static_cast<int>(launch.first_key + block() % blocks * size);
    first_query = static_cast<int>(larger64(0, first_key - in.M));
    const auto last_key = static_cast<int>(smaller64(first_key + size, in.M + in.T) - 1);
    const auto end = static_cast<int>(smaller64(last_key + in.window - in.M, in.T));
    count = end > first_query ? (end - first_query + T::size - 1) / T::size : 0;
    near = static_cast<int>(in.M + first_query - first_key) + count * T::size - T::size;
  }
  // The upper group of the first warpgroup's keys; a later one's is greater by its number.
  PYTBPTT_DEVICE int upper(int step) const { return count - 1 - step; }
};

// Producer warpgroup: loads the next step's tiles while a step is computed.
template <typename Memory, typename Kind>
PYTBPTT_DEVICE void load_tiles(const BackwardLaunch& launch, const KeysSteps<typename Memory::T>& steps,
                               Smem<Kind> query_u, Smem<Kind> query_v, Smem<Kind> grad_out, Smem<Kind> table) {
  using T = typename Memory::T;
  const KernelInputs& in = launch.in;
  const ChunkRows<Kind> query_u_rows(launch.query_u, in, steps.batch, steps.head);
  const ChunkRows<Kind> query_v_rows(launch.query_v, in, steps.batch, steps.head);
  const ChunkRows<Kind> grad_out_rows(launch.grad_out, in, steps.batch, steps.head);
  const PositionRows<Kind> table_rows(in, steps.head);
  const auto fetch_group = [&](int group) {
    fetch_by_warpgroup<T>(table + group % Memory::table_groups * T::elements, in, table_rows,
                          group * T::size - (steps.near + T::size - 1));
  };
  if (steps.count > 0) {
    for (int group = 1; group <= groups_of_keys; ++group) fetch_group(steps.upper(0) + group);
  }
  PYTBPTT_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const int stage = step % Memory::stages * T::elements, first_query = steps.first_query + step * T::size;
    fetch_by_warpgroup<T>(query_u + stage, in, query_u_rows, first_query);
    fetch_by_warpgroup<T>(query_v + stage, in, query_v_rows, first_query);
    fetch_by_warpgroup<T>(grad_out + stage, in, grad_out_rows, first_query);
    fetch_group(steps.upper(step));
    cp_async_wait();
    fence_async_shared();
    sync_roles();
  }
}

// Writes a warp's 16 rows of sums to a tile, rounded.
template <typename T>
PYTBPTT_DEVICE void store_rows(Smem<typename T::Element> tile, const float (&sums)[8][4]) {
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * (warp() % warps_per_warpgroup) + lane() / 4 + 8 * h;
    PYTBPTT_UNROLL
    for (int n = 0; n < 8; ++n) {
      keep_two(tile, T::index(row, 8 * n) + lane() % 4 * 2, sums[n][2 * h], sums[n][2 * h + 1]);
    }
  }
}

template <typename Kind, int PADDED>
PYTBPTT_DEVICE void keys_by_warpgroups(const BackwardLaunch& launch) {
  using Memory = WarpgroupKeysMemory<Kind, PADDED>;
  using T = typename Memory::T;
  const KernelInputs& in = launch.in;
  const KeysSteps<T> steps(launch);
  const auto query_u = shared<Kind>(Memory::query_u, Memory::stages * T::elements);
  const auto query_v = shared<Kind>(Memory::query_v, Memory::stages * T::elements);
  const auto grad_out = shared<Kind>(Memory::grad_out, Memory::stages * T::elements);
  const auto table = shared<Kind>(Memory::table, Memory::table_groups * T::elements);
  const int own_group = warpgroup();
  if (own_group == groups_of_keys) {
    warpgroup_reg_dealloc<T::producer_registers>();
    return load_tiles<Memory>(launch, steps, query_u, query_v, grad_out, table);
  }
  warpgroup_reg_alloc<T::consumer_registers>();
  const int of_group = own_group * T::elements;
  const auto keys = shared<Kind>(Memory::keys, groups_of_keys * T::elements) + of_group;
  const auto values = shared<Kind>(Memory::values, groups_of_keys * T::elements) + of_group;
  const auto weights_tile = shared<Kind>(Memory::weights, groups_of_keys * T::elements) + of_group;
  const auto gradients_tile = shared<Kind>(Memory::gradients, groups_of_keys * T::elements) + of_group;
  const BandRing band{shared<float>(Memory::bands + warp() * BandRing::bytes, BandRing::elements)};
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);
  const int first_key = steps.first_key + T::size * own_group;
  const auto last_key = static_cast<int>(smaller64(first_key + T::size, in.M + in.T) - 1);
  fetch_by_warpgroup<T>(keys, in, KeyRows<Kind>(in.memory_key, in.key, in, steps.batch, steps.head), first_key);
  fetch_by_warpgroup<T>(values, in, KeyRows<Kind>(in.memory_value, in.value, in, steps.batch, steps.head), first_key);
  cp_async_wait();
  fence_async_shared();
  const auto table_group = [&](int group) { return table + group % Memory::table_groups * T::elements; };

  float d_key[PADDED / 8][4] = {}, d_value[PADDED / 8][4] = {};
  PYTBPTT_LOOP
  for (int step = 0; step < steps.count; ++step) {
    sync_roles();  // the step's tiles are here, and everyone is done with those that the next ones replace
    const int first_query = steps.first_query + step * T::size,
              own_query = first_query + 16 * (warp() % warps_per_warpgroup);
    const int upper = steps.upper(step) + own_group;
    const bool sees = first_key <= last_key && in.M + first_query + T::size > first_key &&
                      first_visible_to_tile<T>(in, steps.batch, first_query) <= last_key;
    if (!sees) continue;
    const Visibility visibility(in, steps.batch, own_query);
    const Softmax softmax(launch, steps.batch, own_query, steps.head);

    const int stage = step % Memory::stages * T::elements;
    float sums[8][4] = {}, farther[8][4] = {}, nearer[8][4] = {}, gradients[8][4] = {};
    warpgroup_arrive(farther, nearer, sums);
    start_scores<T>(farther, query_v + stage, table_group(upper));
    start_scores<T>(nearer, query_v + stage, table_group(upper + 1));
    start_scores<T>(sums, query_u + stage, keys);
    warpgroup_wait<2>(farther);
    band.store(upper, farther);
    warpgroup_wait<1>(nearer);
    band.store(upper + 1, nearer);
    warpgroup_arrive(gradients);
    start_scores<T>(gradients, grad_out + stage, values);
    sync_warp();
    warpgroup_wait<1>(sums);
    band.add_to(sums, upper);
    recompute_weights<T>(sums, in, softmax, visibility, first_key);
    warpgroup_wait<0>(gradients);
    softmax_backward<true, T>(sums, gradients, in, softmax, visibility, seed, steps.batch, own_query, first_key,
                              steps.head);
    store_rows<T>(weights_tile, sums);
    store_rows<T>(gradients_tile, gradients);
    fence_async_shared();
    sync_warpgroup();

    const Matrix<Kind> weights(weights_tile), score_gradients(gradients_tile);
    const Matrix<Kind> out_gradients(grad_out + stage), queries(query_u + stage);
    warpgroup_arrive(d_value, d_key);
    PYTBPTT_UNROLL
    for (int k = 0; k < T::size; k += 16) {
      warpgroup_mma<true, true>(d_value, weights.from(k, 0), out_gradients.from(k, 0));
    }
    PYTBPTT_UNROLL
    for (int k = 0; k < T::size; k += 16) {
      warpgroup_mma<true, true>(d_key, score_gradients.from(k, 0), queries.from(k, 0));
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>(d_value, d_key);
  }
  store_keys<Kind, PADDED>(launch, d_key, d_value, steps.batch, first_key + 16 * (warp() % warps_per_warpgroup),
                           steps.head);
}

template <typename Kind, int PADDED>
PYTBPTT_WARPGROUP_KERNEL((WarpgroupKeysMemory<Kind, PADDED>::T::block_threads), 1)
rel_attention_keys_warpgroup_kernel(const BackwardLaunch launch) {
  if constexpr (has_warpgroups) keys_by_warpgroups<Kind, PADDED>(launch);
}

}  // namespace pytbptt::cuda
