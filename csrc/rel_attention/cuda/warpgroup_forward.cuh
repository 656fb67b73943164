// The forward of rel_attention by warpgroups: forward.cuh's walk over the keys, bands as in warpgroup_tile.cuh. All
// consumer warpgroups process the same key tile, so that each group of table rows is used by one after another:
//
//   step, key tile       s             s + 1         s + 2
//   warpgroup 2 reads    s, s + 1      s + 1, s + 2  s + 2, s + 3   groups of the table
//   warpgroup 1 reads    s + 1, s + 2  s + 2, s + 3  …
//   warpgroup 0 reads    s + 2, s + 3  s + 3, s + 4  …
//
// In a step it multiplies with the second group only: the products with the first are in its BandRing already, except
// in its first step, which multiplies with both.
#pragma once
#include "rel_attention/cuda/forward_tile.cuh"
#include "rel_attention/cuda/warpgroup_tile.cuh"

namespace pytbptt::cuda {

constexpr int groups_of_forward = 3;

// How a block's shared memory is laid out, in bytes.
template <typename Kind, int PADDED>
struct WarpgroupForwardMemory {
  using T = WarpgroupTile<Kind, PADDED, groups_of_forward>;
  static constexpr int stages = 2;  // of keys and values: one in use, one on its way
  // Groups of the table, in a ring: neighbouring warpgroups share one; one more is on its way.
  static constexpr int table_groups = groups_of_forward + 2;
  static constexpr int keys = 0;
  static constexpr int values = keys + stages * T::bytes;
  static constexpr int table = values + stages * T::bytes;
  static constexpr int bands = table + table_groups * T::bytes;
  static constexpr int query_u = bands + T::warps * BandRing::bytes;
  static constexpr int query_v = query_u + groups_of_forward * T::bytes;
  static constexpr int bytes = query_v + groups_of_forward * T::bytes;
  static_assert(bytes <= 227 * 1024, "a block must fit");
};

// The block's schedule, computed redundantly by every thread.
template <typename T>
struct ForwardSteps {
  BlockOfQueries at;
  int first_start, each, before, lead;
  int start;  // the first key
  int far;    // the distance at place 0 of group 0, of the last warpgroup with queries
  int count;

  PYTBPTT_DEVICE ForwardSteps(const KernelInputs& in, int splits) : at(in, T::block_queries) {
    // Philox blocks cover 8 keys: tiles start at a multiple of 8.
    first_start = first_visible_to_block<T>(in, at.batch, at.first_query) / 8 * 8;
    lead = smaller(groups_of_forward, static_cast<int>((in.T - at.first_query + T::size - 1) / T::size)) - 1;
    each = (all_tiles(in, lead) + splits - 1) / splits;
    before = at.split * each;
    start = first_start + before * T::size;
    far = static_cast<int>(in.M + at.first_query + T::size * (lead + 1) - 1 - start);
    count = larger(0, tiles(in, lead));
  }
  // Tiles of keys that a warpgroup's queries see, and those of them that the block has.
  PYTBPTT_DEVICE int all_tiles(const KernelInputs& in, int group) const {
    const auto end = static_cast<int>(in.M + smaller64(at.first_query + T::size * (group + 1), in.T));
    return end > first_start ? (end - first_start + T::size - 1) / T::size : 0;
  }
  PYTBPTT_DEVICE int tiles(const KernelInputs& in, int group) const {
    return group > lead ? 0 : smaller(each, all_tiles(in, group) - before);
  }
};

// Producer warpgroup: loads the next step's tiles.
template <typename Memory, typename Kind>
PYTBPTT_DEVICE void load_tiles(const KernelInputs& in, const ForwardSteps<typename Memory::T>& steps, Smem<Kind> keys,
                               Smem<Kind> values, Smem<Kind> table) {
  using T = typename Memory::T;
  const KeyRows<Kind> key_rows(in.memory_key, in.key, in, steps.at.batch, steps.at.head);
  const KeyRows<Kind> value_rows(in.memory_value, in.value, in, steps.at.batch, steps.at.head);
  const PositionRows<Kind> table_rows(in, steps.at.head);
  const auto fetch_group = [&](int group) {
    fetch_by_warpgroup<T>(table + group % Memory::table_groups * T::elements, in, table_rows,
                          group * T::size - steps.far);
  };
  if (steps.count > 0) {
    for (int group = 0; group <= steps.lead; ++group) fetch_group(group);
  }
  PYTBPTT_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const int stage = step % Memory::stages * T::elements, first_key = steps.start + step * T::size;
    fetch_by_warpgroup<T>(keys + stage, in, key_rows, first_key);
    fetch_by_warpgroup<T>(values + stage, in, value_rows, first_key);
    fetch_group(step + steps.lead + 1);
    cp_async_wait();
    fence_async_shared();
    sync_roles();
  }
}

template <typename Kind, int PADDED>
PYTBPTT_DEVICE void forward_by_warpgroups(const ForwardLaunch& launch) {
  using Memory = WarpgroupForwardMemory<Kind, PADDED>;
  using T = typename Memory::T;
  constexpr int warpgroups = groups_of_forward;
  const KernelInputs& in = launch.in;
  const ForwardSteps<T> steps(in, launch.splits);
  const BlockOfQueries& at = steps.at;
  const auto keys = shared<Kind>(Memory::keys, Memory::stages * T::elements);
  const auto values = shared<Kind>(Memory::values, Memory::stages * T::elements);
  const auto table = shared<Kind>(Memory::table, Memory::table_groups * T::elements);
  const int own_group = warpgroup();
  if (own_group == warpgroups) {
    warpgroup_reg_dealloc<T::producer_registers>();
    return load_tiles<Memory>(in, steps, keys, values, table);
  }
  warpgroup_reg_alloc<T::consumer_registers>();
  const BandRing band{shared<float>(Memory::bands + warp() * BandRing::bytes, BandRing::elements)};
  const auto query_u = shared<Kind>(Memory::query_u, warpgroups * T::elements);
  const auto query_v = shared<Kind>(Memory::query_v, warpgroups * T::elements);
  for (int of_group = 0; of_group < warpgroups; ++of_group) {
    load_biased_queries<T>(query_u + of_group * T::elements, query_v + of_group * T::elements, in, at.batch,
                           at.first_query + T::size * of_group, at.head);
  }
  fence_async_shared();
  const auto query_u_rows = query_u + own_group * T::elements, query_v_rows = query_v + own_group * T::elements;

  const int64_t group_query = at.first_query + T::size * own_group,
                own_query = group_query + 16 * (warp() % warps_per_warpgroup);
  const Visibility visibility(in, at.batch, own_query);
  const int group_first = first_visible_to_tile<T>(in, at.batch, group_query);
  const int lag = steps.lead - own_group, tiles = steps.tiles(in, own_group);  // in groups of the table
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);
  const auto table_group = [&](int group) { return table + group % Memory::table_groups * T::elements; };

  float out[PADDED / 8][4] = {};
  RunningSoftmax<T, PADDED> softmax;
  int newest = -1;  // group in the band's ring
  PYTBPTT_LOOP
  for (int step = 0; step < steps.count; ++step) {
    sync_roles();  // the step's tiles are here, and everyone is done with those that the next ones replace
    const int first_key = steps.start + step * T::size, upper = step + lag;  // group of the table
    if (step >= tiles || first_key + T::size <= group_first) continue;

    const int stage = step % Memory::stages * T::elements;
    float sums[8][4] = {}, products[8][4] = {};
    if (newest != upper) {
      warpgroup_arrive(products);
      start_scores<T>(products, query_v_rows, table_group(upper));
      warpgroup_wait<0>(products);
      band.store(upper, products);
      PYTBPTT_UNROLL
      for (int n = 0; n < 8; ++n) products[n][0] = products[n][1] = products[n][2] = products[n][3] = 0;
    }
    newest = upper + 1;
    warpgroup_arrive(products, sums);
    start_scores<T>(products, query_v_rows, table_group(newest));
    start_scores<T>(sums, query_u_rows, keys + stage);
    warpgroup_wait<1>(products);
    band.store(newest, products);
    sync_warp();
    warpgroup_wait<0>(sums);
    band.add_to(sums, upper);

    visibility.mask<T>(sums, first_key);
    softmax.add(sums, out, in.log2_scale);
    drop_weights<T>(sums, in, seed, at.batch, own_query, first_key, at.head);
    std::uint32_t weights[4][4];
    pack_sums<Kind>(weights, sums);
    warpgroup_arrive(out, weights);
    start_sums<T>(out, weights, values + stage);
    warpgroup_wait<0>(out, weights);
  }
  store_output<Kind, PADDED>(launch, out, softmax.maximum, softmax.total, at.batch, own_query, at.head, at.split);
}

template <typename Kind, int PADDED>
PYTBPTT_WARPGROUP_KERNEL((WarpgroupForwardMemory<Kind, PADDED>::T::block_threads), 1)
rel_attention_forward_warpgroup_kernel(const ForwardLaunch launch) {
  if constexpr (has_warpgroups) forward_by_warpgroups<Kind, PADDED>(launch);
}

}  // namespace pytbptt::cuda
