// The forward of rel_attention, in the manner of FlashAttention: a block has TILE queries of one head and stream, walks
// over the tiles of keys that they see (tile.cuh has the picture of one), and keeps an online softmax; scores exist as
// tiles in registers only. With too few blocks for a GPU the keys are split among several (split-KV), and a second
// kernel joins their partial outputs.
//
//   keys        | tile 0 | tile 1 | tile 2 | tile 3 |      a stage holds one tile of keys and one of values:
//   stage           0        1        0        1           tile t + 1 is copied while tile t is computed
//   table       | group 0 | group 1 | group 2 | group 3 | group 4 |      of TILE distances, the farthest first
//   slot            0         1         2         0         1            tile t uses groups t (upper) and t + 1 (lower)
#pragma once
#include "rel_attention/cuda/forward_tile.cuh"
#include "rel_attention/cuda/head_size.cuh"
#include "rel_attention/cuda/warpgroup_forward.cuh"

namespace pytbptt::cuda {

// How a block's shared memory is laid out, in bytes.
template <typename Kind, int PADDED>
struct ForwardMemory {
  using T = Tile<Kind, PADDED>;
  // Two stages: double buffering, as in the picture. One for four-byte kinds and large head sizes (shared memory).
  static constexpr int stages = T::floats || PADDED > 64 ? 1 : 2;
  static constexpr int keys = 0;
  static constexpr int values = keys + stages * T::bytes;
  static constexpr int table = values + stages * T::bytes;  // circular buffer of stages + 1 groups of TILE table rows
  static constexpr int skew = table + (stages + 1) * T::bytes;
  // Only for FP32/TF32; 16-bit queries are loaded through the last stage into registers.
  static constexpr int queries = skew + T::warps * T::skew_elements * 4;
  static constexpr int bytes = queries + (T::floats ? 2 * T::bytes : 0);
  static_assert(bytes <= max_shared_bytes, "a block must fit on every GPU");
};

// Head size <= 48: three blocks per SM.
template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED>::threads), (PADDED <= 48 && !Tile<Kind, PADDED>::floats ? 3 : 1))
rel_attention_forward_kernel(const ForwardLaunch launch) {
  using T = Tile<Kind, PADDED>;
  using E = typename T::Element;
  using Memory = ForwardMemory<Kind, PADDED>;
  using Rows = typename Products<Kind>::template Rows<PADDED>;
  const KernelInputs& in = launch.in;
  const auto [first_query, head, batch, split] = BlockOfQueries(in, T::size);

  const auto keys = shared<E>(Memory::keys, Memory::stages * T::elements);
  const auto values = shared<E>(Memory::values, Memory::stages * T::elements);
  const auto table = shared<E>(Memory::table, (Memory::stages + 1) * T::elements);
  const auto skew = shared<float>(Memory::skew + warp() * T::skew_elements * 4, T::skew_elements);

  const auto query_u =
      T::floats ? shared<E>(Memory::bytes - 2 * T::bytes, T::elements) : keys + (Memory::stages - 1) * T::elements;
  const auto query_v =
      T::floats ? shared<E>(Memory::bytes - T::bytes, T::elements) : values + (Memory::stages - 1) * T::elements;
  load_biased_queries<T>(query_u, query_v, in, batch, first_query, head);
  sync_threads();
  const Rows content_rows(query_u + 16 * warp() * T::stride, T::stride);
  const Rows position_rows(query_v + 16 * warp() * T::stride, T::stride);

  const Visibility visibility(in, batch, first_query + 16 * warp());
  // Philox blocks cover 8 keys: tiles start at a multiple of 8.
  const int first_start = first_visible_to_tile<T>(in, batch, first_query) / 8 * 8;
  const auto end = static_cast<int>(in.M + smaller64(first_query + T::size, in.T));
  const int all_tiles = end > first_start ? (end - first_start + T::size - 1) / T::size : 0;
  const int each = (all_tiles + launch.splits - 1) / launch.splits;
  const int tiles = larger(0, smaller(each, all_tiles - split * each));
  const int start = first_start + split * each * T::size;
  const auto far = static_cast<int>(in.M + first_query + T::size - 1 - start);  // at place 0 of the first tile
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);

  const KeyRows<E> key_rows(in.memory_key, in.key, in, batch, head);
  const KeyRows<E> value_rows(in.memory_value, in.value, in, batch, head);
  const PositionRows<E> distances(in, head);
  const auto fetch_group = [&](int group) {
    fetch<T>(table + group % (Memory::stages + 1) * T::elements, in, distances, group * T::size - far);
  };
  const auto fetch_tile = [&](int tile) {
    const int first_key = start + tile * T::size;
    const int stage = tile % Memory::stages * T::elements;
    fetch<T>(keys + stage, in, key_rows, first_key);
    fetch<T>(values + stage, in, value_rows, first_key);
    fetch_group(tile + 1);
  };

  float out[PADDED / 8][4] = {};
  RunningSoftmax<T, PADDED> softmax;
  if (tiles > 0) {
    fetch_group(0);
    if (Memory::stages == 2) fetch_tile(0);
  }
  PYTBPTT_LOOP
  for (int tile = 0; tile < tiles; ++tile) {
    if constexpr (Memory::stages == 2) {
      cp_async_wait();
      sync_threads();  // tile loaded; all threads have finished reading the stage that is overwritten next
      if (tile + 1 < tiles) fetch_tile(tile + 1);
    } else {
      sync_threads();
      fetch_tile(tile);
      cp_async_wait();
      sync_threads();
    }
    const int first_key = start + tile * T::size;
    if (visibility.none_visible<T>(first_key)) continue;

    const int stage = tile % Memory::stages * T::elements;
    const auto upper = table + tile % (Memory::stages + 1) * T::elements;
    const auto lower = table + (tile + 1) % (Memory::stages + 1) * T::elements;
    const bool all_clamped = far - (tile + 2) * T::size + 2 >= in.R - 1;
    float sums[T::size / 8][4];
    compute_scores<Kind, T, PADDED>(sums, Preloaded<Rows>{content_rows}, Preloaded<Rows>{position_rows}, keys + stage,
                                    upper, lower, all_clamped, skew);
    visibility.mask<T>(sums, first_key);

    softmax.add(sums, out, in.log2_scale);
    drop_weights<T>(sums, in, seed, batch, first_query + 16 * warp(), first_key, head);
    Products<Kind>::template weights_times<PADDED / 8, T::size>(out, sums, values + stage, T::stride);
  }

  store_output<E, PADDED>(launch, out, softmax.maximum, softmax.total, batch, first_query + 16 * warp(), head, split);
}

constexpr int join_threads = 128;

// A warp joins the parts of one query's output.
template <typename E>
PYTBPTT_KERNEL(join_threads, 1)
rel_attention_join_kernel(const ForwardLaunch launch) {
  const KernelInputs& in = launch.in;
  const int64_t rows = in.B * in.H * in.T;
  const int64_t index = int64_t{block()} * (join_threads / warp_size) + warp();
  if (index >= rows) return;
  float maximum = -INFINITY, total = 0;
  for (int split = 0; split < launch.splits; ++split) {
    maximum = largest(maximum, load(launch.part_sums + split * rows + index));
  }
  const float offset = maximum == -INFINITY ? 0.0f : maximum;
  for (int split = 0; split < launch.splits; ++split) {
    total += exp2(load(launch.part_sums + split * rows + index) - offset);
  }
  const float factor = total == 0 ? 0.0f : static_cast<float>(in.keep_scale) / total;
  const int64_t query = index % in.T, head = index / in.T % in.H, batch = index / in.T / in.H;
  const int64_t at = ((batch * in.T + query) * in.H + head) * in.D;
  for (int c = lane(); c < in.D; c += warp_size) {
    float sum = 0;
    for (int split = 0; split < launch.splits; ++split) {
      const int64_t part = split * rows + index;
      sum = fma(exp2(load(launch.part_sums + part) - offset), load(launch.parts + part * in.D + c), sum);
    }
    store(static_cast<E*>(launch.out) + at + c, from_float<E>(sum * factor));
    if (sizeof(E) == 2 && launch.rounding != nullptr) {
      store(static_cast<E*>(launch.rounding) + at + c, from_float<E>(rounded_off<E>(sum * factor)));
    }
  }
  if (lane() == 0) store(launch.log_sum_exp + index, total == 0 ? INFINITY : maximum + log2(total));
}

// Number of splits of the keys of a block of `size` queries: as many as give `wanted_blocks`, each with at least two
// tiles of keys.
inline int count_splits(const RelAttention& in, int size, int tile, int64_t wanted_blocks) {
  const int64_t blocks = in.B * in.H * ((in.T + size - 1) / size);
  const int64_t keys = in.window < in.M + in.T ? in.window + size - 1 : in.M + in.T;  // that a block's queries see
  const int64_t most = (keys + tile - 1) / tile / 2;
  if (blocks == 0 || 2 * blocks > wanted_blocks || most < 2) return 1;
  return static_cast<int>(most < wanted_blocks / blocks ? most : wanted_blocks / blocks);
}

// Launch plan of a forward. Depends on sizes and WGMMA support, not on the number of SMs, and so do the results.
struct ForwardPlan {
  bool warpgroups;  // whether the kernel is the one by warpgroups
  int queries;      // of a block
  int splits;

  int64_t blocks(const RelAttention& in) const { return splits * in.B * in.H * ((in.T + queries - 1) / queries); }
  int64_t parts_bytes(const RelAttention& in) const {
    return splits == 1 ? 0 : (splits * in.B * in.H * in.T * (in.D + 1) + 3) / 4 * 16;
  }
};

template <typename Kind, int PADDED>
ForwardPlan plan_forward(const RelAttention& in) {
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    using T = typename WarpgroupForwardMemory<Kind, PADDED>::T;
    if (offers_warpgroups(&rel_attention_forward_warpgroup_kernel<Kind, PADDED>)) {
      // One block for each multiprocessor of the largest GPUs.
      return {true, T::block_queries, count_splits(in, T::block_queries, T::size, 132)};
    }
  }
  using T = Tile<Kind, PADDED>;
  return {false, T::size, count_splits(in, T::size, T::size, 264)};  // two blocks for each
}

// Bytes of memory that `launch_forward` wants, aligned to 16.
template <typename Kind, int PADDED>
int64_t forward_workspace(const RelAttention& in) {
  Packing packing{nullptr, in.H, in.D, in.dtype};
  pack_all(packing, in);
  return plan_forward<Kind, PADDED>(in).parts_bytes(in) + packing.bytes;
}

template <typename Kind, int PADDED>
const char* launch_attention(const ForwardPlan& plan, const ForwardLaunch& launch, Stream stream) {
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    using Memory = WarpgroupForwardMemory<Kind, PADDED>;
    if (plan.warpgroups) {
      return device::launch(&rel_attention_forward_warpgroup_kernel<Kind, PADDED>, plan.blocks(launch.in),
                            Memory::T::block_threads, Memory::bytes, stream, launch);
    }
  }
  return device::launch(&rel_attention_forward_kernel<Kind, PADDED>, plan.blocks(launch.in),
                        Tile<Kind, PADDED>::threads, ForwardMemory<Kind, PADDED>::bytes, stream, launch);
}

// The text of an error, or nullptr.
template <typename Kind, int PADDED>
const char* launch_forward(const RelAttentionForward& forward, void* workspace, Stream stream) {
  using E = typename Products<Kind>::Element;
  const RelAttention& in = forward.inputs;
  const ForwardPlan plan = plan_forward<Kind, PADDED>(in);
  const int64_t rows = in.B * in.H * in.T;
  auto* const parts = static_cast<float*>(workspace);
  Packing packing{static_cast<char*>(workspace) + plan.parts_bytes(in), in.H, in.D, in.dtype};
  const ForwardLaunch launch{make_kernel_inputs(pack_all(packing, in)),
                             forward.out,
                             forward.rounding,
                             static_cast<float*>(forward.log_sum_exp),
                             plan.splits,
                             parts,
                             plan.splits == 1 ? nullptr : parts + plan.splits * rows * in.D};
  const char* error = launch_pack<E>(packing, stream);
  if (error == nullptr) error = launch_attention<Kind, PADDED>(plan, launch, stream);
  if (error != nullptr || plan.splits == 1) return error;
  constexpr int rows_per_block = join_threads / warp_size;
  return device::launch(&rel_attention_join_kernel<E>, (rows + rows_per_block - 1) / rows_per_block, join_threads, 0,
                        stream, launch);
}

template <ComputeType COMPUTE_TYPE>
std::int64_t rel_attention_forward_workspace(const RelAttention& inputs) {
  return with_head_size(inputs.D,
                        [&](auto padded) { return forward_workspace<KindOf<COMPUTE_TYPE>, padded.value>(inputs); });
}

template <ComputeType COMPUTE_TYPE>
const char* rel_attention_forward(const RelAttentionForward& launch, void* workspace, CUstream_st* stream) {
  return with_head_size(launch.inputs.D, [&](auto padded) {
    return launch_forward<KindOf<COMPUTE_TYPE>, padded.value>(launch, workspace, stream);
  });
}

}  // namespace pytbptt::cuda
