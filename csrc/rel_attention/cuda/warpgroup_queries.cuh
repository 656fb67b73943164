// The queries kernel of rel_attention's backward by warpgroups: what queries.cuh gives, bands as in warpgroup_tile.cuh.
// Warpgroups are staggered by one key tile each, the last one first, so that all work on the same distances in a step.
//
// A step, of each warpgroup but what is said of the block:
//   scores      (query + u) · keyᵀ and, of one more group of the table, (query + v) · rᵀ; d weights = d out · valueᵀ
//   gradients   dS, by the softmax
//   content     d query += dS · key
//   scatter     dS by distance, except what belongs to the table's last row, into the ring; this completes the step's
//               first group
//   position    d query += ring · r of that group, and, by the block together, d r = ringᵀ · (query + v) over the
//               queries of all warpgroups, each computing a part of the columns
#pragma once
#include "rel_attention/cuda/backward_tile.cuh"
#include "rel_attention/cuda/warpgroup_tile.cuh"

namespace pytbptt::cuda {

constexpr int groups_of_queries = 2;

// How a block's shared memory is laid out, in bytes.
template <typename Kind, int PADDED>
struct WarpgroupQueriesMemory {
  using T = WarpgroupTile<Kind, PADDED, groups_of_queries>;
  static constexpr int warpgroups = groups_of_queries, stages = warpgroups + 1;
  static constexpr int table_groups = 3;         // in a ring: two in use, one on its way
  static constexpr int slots = 2 * T::elements;  // of a warpgroup's ring of dS
  static constexpr int keys = 0;
  static constexpr int values = keys + stages * T::bytes;
  static constexpr int table = values + stages * T::bytes;
  static constexpr int query_u = table + table_groups * T::bytes;
  static constexpr int grad_out = query_u + warpgroups * T::bytes;
  static constexpr int query_v = grad_out + warpgroups * T::bytes;
  static constexpr int rings = query_v + warpgroups * T::bytes;
  static constexpr int ones = rings + warpgroups * slots * 2;  // 16 rows whose every eighth element is 1, the others 0
  static constexpr int bands = ones + 16 * row_elements * 2;
  static constexpr int query_sums = bands + T::warps * BandRing::bytes;
  static constexpr int clamped_sums = query_sums + T::warps * PADDED * 4;
  static constexpr int bytes = clamped_sums + 16 * T::warps * 4;
  static_assert(bytes <= 227 * 1024, "a block must fit");
};

// Writes a warpgroup's dS, packed, to the places of a tile whose upper group is given; `ring` is two tiles side by
// side.
template <typename T>
PYTBPTT_DEVICE void scatter(Smem<typename T::Element> ring, const std::uint32_t (&packed)[4][4], int group) {
  using E = typename T::Element;
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * (warp() % warps_per_warpgroup) + lane() / 4 + 8 * h;
    PYTBPTT_UNROLL
    for (int i = 0; i < 2; ++i) {
      // Unsigned, as then quotients and remainders are single instructions.
      const auto column = static_cast<unsigned>(ring_column(group, row) + lane() % 4 * 2 + i);
      const auto to = ring + (row * row_elements + static_cast<int>(column % chunk_elements));
      const unsigned first = column / chunk_elements, of_row = static_cast<unsigned>(row) % 8;
      PYTBPTT_UNROLL
      for (unsigned n = 0; n < 8; ++n) {
        const std::uint32_t two = packed[n / 2][n % 2 * 2 + h];
        const unsigned chunk = ((first + n) ^ of_row) % 16;  // 16 chunks: two adjacent 128-byte rows, circular
        const unsigned here = chunk * chunk_elements + chunk / 8 * (T::elements - row_elements);
        to.store(static_cast<int>(here), E{static_cast<std::uint16_t>(i == 0 ? two & 0xffffu : two >> 16)});
      }
    }
  }
}

// A block's partial sum of the table's gradient, over the block's queries.
struct PartialGradient {
  float* first;
  int stride, lane_row, lane_column;
  int64_t last_row;

  // Adds the sums of dS, in the first of eight columns.
  PYTBPTT_DEVICE void add_sums(const float (&sums)[1][4], int farthest) const {
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int distance = farthest - lane_row - 8 * h;
      if (lane_column != 0 || distance < 0 || distance >= last_row) continue;
      add_to(first + distance * int64_t{stride} + stride - 8, sums[0][2 * h]);
    }
  }
  // Adds columns from `column` on of the rows of a group's 64 places, place 0 at distance `farthest`.
  template <int COLUMNS>
  PYTBPTT_DEVICE void add(const float (&sums)[COLUMNS / 8][4], int column, int farthest) const {
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int distance = farthest - lane_row - 8 * h;
      if (distance < 0 || distance >= last_row) continue;
      float* const row = first + distance * int64_t{stride} + column + lane_column;
      PYTBPTT_UNROLL
      for (int n = 0; n < COLUMNS / 8; ++n) {
        add_to(reinterpret_cast<Pair*>(row + 8 * n), Pair{sums[n][2 * h], sums[n][2 * h + 1]});
      }
    }
  }
};

// The block's schedule for an item of its queries, computed redundantly by every thread.
template <typename T>
struct BackwardSteps {
  int64_t batch, first_query;
  int lead;   // number of the last warpgroup that has queries: it is ahead of warpgroup w by lead - w tiles of keys
  int start;  // the first key
  int far;    // the distance at place 0 of group 0
  int count;  // steps until the group with distance 0 is complete

  PYTBPTT_DEVICE BackwardSteps(const KernelInputs& in, int64_t item) {
    constexpr int size = T::block_queries;
    batch = item % in.B;
    first_query = ((in.T + size - 1) / size - 1 - item / in.B) * size;
    lead = smaller(groups_of_queries, static_cast<int>((in.T - first_query + T::size - 1) / T::size)) - 1;
    start = first_visible_to_block<T>(in, batch, first_query) / 8 * 8;
    far = static_cast<int>(in.M + first_query + T::size * (lead + 1) - 1 - start);
    count = far < 0 ? 0 : far / T::size + 1;
  }
  static PYTBPTT_DEVICE int64_t items(const KernelInputs& in) {
    constexpr int size = T::block_queries;
    return in.B * ((in.T + size - 1) / size);
  }
  // Whether all places of a step's whole group use the table's last row.
  PYTBPTT_DEVICE bool all_clamped(const KernelInputs& in, int step) const {
    return far - step * T::size - (T::size - 1) >= in.R - 1;
  }
  PYTBPTT_DEVICE bool has_clamped(const KernelInputs& in) const { return far >= in.R - 1; }
};

// Producer warpgroup: loads the next step's tiles while a step is computed.
template <typename Memory, typename Kind>
PYTBPTT_DEVICE void load_tiles(const BackwardLaunch& launch, int64_t partial_index, int64_t head, Smem<Kind> keys,
                               Smem<Kind> values, Smem<Kind> table) {
  using T = typename Memory::T;
  const KernelInputs& in = launch.in;
  const PositionRows<Kind> table_rows(in, head);
  PYTBPTT_LOOP
  for (int64_t item = partial_index; item < BackwardSteps<T>::items(in); item += launch.partials) {
    const BackwardSteps<T> steps(in, item);
    const KeyRows<Kind> key_rows(in.memory_key, in.key, in, steps.batch, head);
    const KeyRows<Kind> value_rows(in.memory_value, in.value, in, steps.batch, head);
    const auto fetch_group = [&](int group) {
      fetch_by_warpgroup<T>(table + group % Memory::table_groups * T::elements, in, table_rows,
                            group * T::size - steps.far);
    };
    sync_roles();  // the item before is done
    if (steps.count > 0) fetch_group(0);
    PYTBPTT_LOOP
    for (int step = 0; step < steps.count; ++step) {
      const int stage = step % Memory::stages * T::elements, first_key = steps.start + step * T::size;
      fetch_by_warpgroup<T>(keys + stage, in, key_rows, first_key);
      fetch_by_warpgroup<T>(values + stage, in, value_rows, first_key);
      fetch_group(step + 1);
      // Barrier: the previous step's group is complete.
      if (step > 0 && !steps.all_clamped(in, step - 1)) sync_roles();
      cp_async_wait();
      fence_async_shared();
      sync_roles();
    }
    if (steps.count > 0 && !steps.all_clamped(in, steps.count - 1)) sync_roles();
    if (steps.has_clamped(in)) sync_roles();
  }
  sync_roles();
}

template <typename Kind, int PADDED>
PYTBPTT_DEVICE void queries_by_warpgroups(const BackwardLaunch& launch) {
  using Memory = WarpgroupQueriesMemory<Kind, PADDED>;
  using T = typename Memory::T;
  constexpr int warpgroups = Memory::warpgroups, partial_stride = PADDED + 8, half_columns = PADDED / 2;
  const KernelInputs& in = launch.in;
  const int64_t head = block() % in.H, partial_index = block() / in.H;
  const auto keys = shared<Kind>(Memory::keys, Memory::stages * T::elements);
  const auto values = shared<Kind>(Memory::values, Memory::stages * T::elements);
  const auto table = shared<Kind>(Memory::table, Memory::table_groups * T::elements);
  const int own_group = warpgroup();
  if (own_group == warpgroups) {
    warpgroup_reg_dealloc<T::producer_registers>();
    return load_tiles<Memory>(launch, partial_index, head, keys, values, table);
  }
  warpgroup_reg_alloc<T::consumer_registers>();
  const auto query_u = shared<Kind>(Memory::query_u, warpgroups * T::elements);
  const auto grad_out = shared<Kind>(Memory::grad_out, warpgroups * T::elements);
  const auto query_v = shared<Kind>(Memory::query_v, warpgroups * T::elements);
  const auto rings = shared<Kind>(Memory::rings, warpgroups * Memory::slots);
  const BandRing band{shared<float>(Memory::bands + warp() * BandRing::bytes, BandRing::elements)};
  const auto query_sums = shared<float>(Memory::query_sums, T::warps * PADDED);
  const auto clamped_sums = shared<float>(Memory::clamped_sums, 16 * T::warps);
  const auto own_ring = rings + own_group * Memory::slots;
  const auto query_u_rows = query_u + own_group * T::elements;
  const auto query_v_rows = query_v + own_group * T::elements;
  const auto grad_out_rows = grad_out + own_group * T::elements;
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);
  const PositionRows<Kind> table_rows(in, head);
  const auto keys_of = [&](int tile) { return keys + tile % Memory::stages * T::elements; };
  const auto values_of = [&](int tile) { return values + tile % Memory::stages * T::elements; };
  const auto table_group = [&](int group) { return table + group % Memory::table_groups * T::elements; };

  float* const partial_sums = launch.sums + (partial_index * in.H + head) * in.R * partial_stride;
  for (int64_t i = thread(); i < in.R * partial_stride; i += T::threads) store(partial_sums + i, 0.0f);
  const PartialGradient partial{partial_sums, partial_stride, 16 * (warp() % warps_per_warpgroup) + lane() / 4,
                                lane() % 4 * 2, in.R - 1};
  for (int i = thread(); i < T::warps * PADDED; i += T::threads) query_sums.store(i, 0.0f);
  const auto ones = shared<Kind>(Memory::ones, 16 * row_elements);
  for (int i = thread(); i < 16 * row_elements / 8; i += T::threads) {
    ones.template store_many<Words>(8 * i, Words{pack<Kind>(1, 0), 0, 0, 0});
  }

  PYTBPTT_LOOP
  for (int64_t item = partial_index; item < BackwardSteps<T>::items(in); item += launch.partials) {
    const BackwardSteps<T> steps(in, item);
    const int64_t batch = steps.batch, group_query = steps.first_query + T::size * own_group;
    const int64_t own_query = group_query + 16 * (warp() % warps_per_warpgroup);
    const int lag = steps.lead - own_group, group_first = first_visible_to_tile<T>(in, batch, group_query);
    sync_roles();  // the item before is done
    const auto first_row = static_cast<int>(group_query);
    fetch_by_warpgroup<T>(query_u_rows, in, ChunkRows<Kind>(launch.query_u, in, batch, head), first_row);
    fetch_by_warpgroup<T>(grad_out_rows, in, ChunkRows<Kind>(launch.grad_out, in, batch, head), first_row);
    fetch_by_warpgroup<T>(query_v_rows, in, ChunkRows<Kind>(launch.query_v, in, batch, head), first_row);
    for (int i = thread(); i < warpgroups * Memory::slots / 8; i += T::threads) {
      rings.template store_many<Words>(8 * i, Words{0, 0, 0, 0});
    }
    const Visibility visibility(in, batch, own_query);
    const Softmax softmax(launch, batch, own_query, head);
    cp_async_wait();
    fence_async_shared();

    float d_query[PADDED / 8][4] = {};
    float clamped_total[2] = {};  // of dS over the keys that use the table's last row
    int newest = -1;              // group in the band's ring
    PYTBPTT_LOOP
    for (int step = 0; step < steps.count; ++step) {
      sync_roles();  // the step's tiles are here, and everyone is done with those that the next ones replace
      const int tile = step - lag, first_key = steps.start + tile * T::size, farthest = steps.far - step * T::size;
      const bool active = own_group <= steps.lead && tile >= 0;
      const bool sees = active && first_key + T::size > group_first;
      std::uint32_t packed[4][4] = {};
      if (sees) {
        float sums[8][4] = {}, gradients[8][4] = {}, products[8][4] = {};
        if (newest != step) {
          warpgroup_arrive(products);
          start_scores<T>(products, query_v_rows, table_group(step));
          warpgroup_wait<0>(products);
          band.store(step, products);
          PYTBPTT_UNROLL
          for (int n = 0; n < 8; ++n) products[n][0] = products[n][1] = products[n][2] = products[n][3] = 0;
        }
        newest = step + 1;
        warpgroup_arrive(products, sums, gradients);
        start_scores<T>(products, query_v_rows, table_group(step + 1));
        start_scores<T>(sums, query_u_rows, keys_of(tile));
        start_scores<T>(gradients, grad_out_rows, values_of(tile));
        warpgroup_wait<2>(products);
        band.store(newest, products);
        sync_warp();
        warpgroup_wait<1>(sums);
        band.add_to(sums, step);
        recompute_weights<T>(sums, in, softmax, visibility, first_key);
        warpgroup_wait<0>(gradients);
        softmax_backward<false, T>(sums, gradients, in, softmax, visibility, seed, batch, own_query, first_key, head);

        // Clamped distances are excluded from the scatter, but included in dQ += dS·K.
        pack_sums<Kind>(packed, gradients);
        warpgroup_arrive(d_query, packed);
        start_sums<T>(d_query, packed, keys_of(tile));
        if (farthest >= in.R - 1) {
          std::uint32_t unclamped[4][4];
          extract_clamped<T>(clamped_total, gradients, farthest - (T::size - 1) + 16 * (warp() % warps_per_warpgroup),
                             in.R);
          pack_sums<Kind>(unclamped, gradients);
          scatter<T>(own_ring, unclamped, step);
        } else {
          scatter<T>(own_ring, packed, step);
        }
        warpgroup_wait<0>(d_query, packed);
      } else if (active) {
        scatter<T>(own_ring, packed, step);
      }
      if (steps.all_clamped(in, step)) continue;
      fence_async_shared();
      sync_roles();

      const int slot = step % 2 * T::elements;
      const Matrix<Kind> own_places(own_ring + slot), rows(table_group(step));
      float d_rows[half_columns / 8][4] = {};
      warpgroup_arrive(d_rows, d_query);
      PYTBPTT_UNROLL
      for (int group = 0; group < warpgroups; ++group) {
        const Matrix<Kind> places(rings + (group * Memory::slots + slot)), queries(query_v + group * T::elements);
        PYTBPTT_UNROLL
        for (int k = 0; k < T::size; k += 16) {
          warpgroup_mma<true, true>(d_rows, places.from(k, 0), queries.from(k, own_group * half_columns));
        }
      }
      PYTBPTT_UNROLL
      for (int k = 0; k < T::size; k += 16) {
        warpgroup_mma<false, true>(d_query, own_places.from(0, k), rows.from(k, 0));
      }
      warpgroup_commit_batch();
      if (own_group == 0) {
        float place_sums[1][4] = {};
        warpgroup_arrive(place_sums);
        PYTBPTT_UNROLL
        for (int group = 0; group < warpgroups; ++group) {
          const Matrix<Kind> places(rings + (group * Memory::slots + slot));
          PYTBPTT_UNROLL
          for (int k = 0; k < T::size; k += 16) {
            warpgroup_mma<true, true>(place_sums, places.from(k, 0), Matrix<Kind>(ones));
          }
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>(place_sums);
        partial.add_sums(place_sums, farthest);
      }
      warpgroup_wait<0>(d_rows, d_query);
      partial.add<half_columns>(d_rows, own_group * half_columns, farthest);
    }

    if (steps.has_clamped(in)) {
      add_clamped_to_query<PADDED>(d_query, clamped_total, clamped_sums, table_rows(-steps.far),
                                   static_cast<int>(in.D));
      sync_roles();
      add_clamped_to_position<T, PADDED>(partial_sums + (in.R - 1) * partial_stride, clamped_sums, [&](int r, int c) {
        return to_float(query_v.load(r / T::size * T::elements + T::index(r % T::size, c)));
      });
    }
    add_query_sums<PADDED>(query_sums, d_query);
    store_queries<Kind, PADDED>(launch, d_query, batch, own_query, head);
  }

  sync_roles();
  store_query_sums<T, PADDED>(launch, query_sums, partial_index, head);
}

template <typename Kind, int PADDED>
PYTBPTT_WARPGROUP_KERNEL((WarpgroupQueriesMemory<Kind, PADDED>::T::block_threads), 1)
rel_attention_queries_warpgroup_kernel(const BackwardLaunch launch) {
  if constexpr (has_warpgroups) queries_by_warpgroups<Kind, PADDED>(launch);
}

}  // namespace pytbptt::cuda
