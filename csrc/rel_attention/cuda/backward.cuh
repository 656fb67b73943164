// The backward of rel_attention: every gradient without atomics, each sum in an order that sizes alone decide.
//
//   kernel      a block computes                                                           and writes
//   dots        row sums of grad_out · out, which the softmax's gradient needs             dots (B, H, T)
//   keys        for TILE keys of a stream and head: all queries that see them              d key, d value
//   queries     for several tiles of queries of one head: the keys that they see           d query, and a partial sum
//                                                                                          of d position and d biases
//   positions   sums of a head's partials                                                  d position
//   bias parts  sums of a head's partials, times some rows of the table                    partial sums of d biases
//   biases      sums of a head's bias parts                                                d of both biases
//
// The keys and queries kernels have an mma version and a WGMMA version (sm_90a).
//
// With dS the gradient of the scores before their scale, and `band` the same by distance instead of by key (the inverse
// of the skew in tile.cuh):
//
//   d value = weightsᵀ · d out            d position      = bandᵀ · (query + v)
//   d key   = dSᵀ · (query + u)           d content_bias  = sum of dS · key
//   d query = dS · key + band · position  d position_bias = column sums of band · position
#pragma once
#include "rel_attention/cuda/keys.cuh"
#include "rel_attention/cuda/queries.cuh"
#include "rel_attention/cuda/warpgroup_keys.cuh"
#include "rel_attention/cuda/warpgroup_queries.cuh"

namespace pytbptt::cuda {

constexpr int dots_threads = 128, dots_lanes = 8;  // lanes of a row

// delta = rowsum(grad_out · out). grad_out is rounded as the MMA in `score_gradients` rounds it, so that the rounding
// cancels in dP - delta.
template <typename Kind>
PYTBPTT_KERNEL(dots_threads, 1)
rel_attention_dots_kernel(const BackwardLaunch launch) {
  using E = typename Products<Kind>::Element;
  const KernelInputs& in = launch.in;
  const int64_t row = int64_t{block()} * (dots_threads / dots_lanes) + thread() / dots_lanes;
  const bool exists = row < in.B * in.H * in.T;
  const int64_t query = row % in.T, head = row / in.T % in.H, batch = row / in.T / in.H;
  float sum = 0;
  if (exists) {
    const E* const grad_out = row_of<E>(launch.grad_out, batch, query, head);
    const E* const out = row_of<E>(launch.out, batch, query, head);
    const E* const rounding =
        launch.rounding.data == nullptr ? nullptr : row_of<E>(launch.rounding, batch, query, head);
    const auto read = [&](float (&to)[in_piece<E>], const E* from, int c) {
      if (launch.out_in_pieces) return load_piece(to, from + c);
      PYTBPTT_UNROLL
      for (int i = 0; i < in_piece<E>; ++i) to[i] = c + i < in.D ? to_float(load(from + c + i)) : 0.0f;
    };
    for (int c = lane() % dots_lanes * in_piece<E>; c < in.D; c += dots_lanes * in_piece<E>) {
      float left[in_piece<E>], right[in_piece<E>], lost[in_piece<E>] = {};
      load_piece(left, grad_out + c);
      read(right, out, c);
      if (rounding != nullptr) read(lost, rounding, c);
      PYTBPTT_UNROLL
      for (int i = 0; i < in_piece<E>; ++i) sum = fma(Products<Kind>::factor(left[i]), right[i] + lost[i], sum);
    }
  }
  PYTBPTT_UNROLL
  for (int mask = dots_lanes / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (exists && lane() % dots_lanes == 0) store(launch.dots + row, sum);
}

constexpr int reduce_threads = 256;

template <typename E, int PADDED>
PYTBPTT_KERNEL(reduce_threads, 1)
rel_attention_positions_kernel(const BackwardLaunch launch) {
  const KernelInputs& in = launch.in;
  const int64_t i = int64_t{block()} * reduce_threads + thread();
  if (i >= in.R * in.H * in.D) return;
  const int64_t column = i % in.D, row = i / in.D % in.R, head = i / in.D / in.R;
  const float* const from = launch.sums + (head * in.R + row) * (PADDED + 8) + column;
  float sum = 0;
  for (int64_t partial = 0; partial < launch.partials; ++partial)
    sum += load(from + partial * in.H * in.R * (PADDED + 8));
  E* const to = static_cast<E*>(launch.position) + (row * in.H + head) * in.D + column;
  store(to, from_float<E>(sum * in.sign * static_cast<float>(in.scale)));
}

constexpr int part_rows = 64;  // table rows per block of the bias-parts kernel

inline int64_t count_bias_parts(const RelAttention& in) {
  return (in.R + part_rows - 1) / part_rows;
}

// A block adds up the band's column sums of part_rows distances of a head, and multiplies them by the table's rows.
template <typename E, int PADDED>
PYTBPTT_KERNEL(reduce_threads, 1)
rel_attention_bias_parts_kernel(const BackwardLaunch launch) {
  constexpr int partial_groups = reduce_threads / part_rows, row_groups = reduce_threads / PADDED;
  const KernelInputs& in = launch.in;
  const int64_t head = block() / launch.bias_parts, part = block() % launch.bias_parts;
  const auto first = static_cast<int>(part * part_rows), rows = smaller(part_rows, static_cast<int>(in.R) - first);
  const auto sums = shared<float>(0, reduce_threads);
  float column = 0;
  if (thread() % part_rows < rows) {
    const int64_t row = head * in.R + first + thread() % part_rows;
    for (int64_t partial = thread() / part_rows; partial < launch.partials; partial += partial_groups) {
      column += load(launch.sums + (partial * in.H * in.R + row) * (PADDED + 8) + PADDED);
    }
  }
  sums.store(thread(), column);
  sync_threads();
  const int group = thread() / PADDED, c = thread() % PADDED;
  const PositionRows<E> distances(in, head);
  float position = 0;
  if (group < row_groups && c < in.D) {
    for (int r = group; r < rows; r += row_groups) {
      float total = 0;
      PYTBPTT_UNROLL
      for (int of_group = 0; of_group < partial_groups; ++of_group) total += sums.load(of_group * part_rows + r);
      position = fma(total, to_float(load(distances(-(first + r)) + c)), position);
    }
  }
  sync_threads();
  sums.store(thread(), position);
  sync_threads();
  if (thread() >= PADDED) return;
  float total = 0;
  for (int from = 0; from < row_groups; ++from) total += sums.load(from * PADDED + c);
  store(launch.position_parts + block() * int64_t{PADDED} + c, total);
}

// A block adds up the parts of a head.
template <typename E, int PADDED>
PYTBPTT_KERNEL(reduce_threads, 1)
rel_attention_biases_kernel(const BackwardLaunch launch) {
  constexpr int groups = reduce_threads / PADDED;
  const KernelInputs& in = launch.in;
  const int64_t head = block();
  const auto of_position = shared<float>(0, reduce_threads),
             of_content = shared<float>(reduce_threads * 4, reduce_threads);
  const int group = thread() / PADDED, c = thread() % PADDED;
  float position = 0, content = 0;
  if (group < groups) {
    for (int64_t part = group; part < launch.bias_parts; part += groups) {
      position += load(launch.position_parts + (head * launch.bias_parts + part) * PADDED + c);
    }
    for (int64_t partial = group; partial < launch.partials; partial += groups) {
      content += load(launch.query_sums + (partial * in.H + head) * PADDED + c);
    }
  }
  of_position.store(thread(), position);
  of_content.store(thread(), content);
  sync_threads();
  if (thread() >= in.D) return;
  position = content = 0;
  for (int from = 0; from < groups; ++from) {
    position += of_position.load(from * PADDED + c);
    content += of_content.load(from * PADDED + c);
  }
  const auto scale = static_cast<float>(in.scale);
  store(static_cast<E*>(launch.content_bias) + head * in.D + c, from_float<E>((content - position) * scale));
  store(static_cast<E*>(launch.position_bias) + head * in.D + c, from_float<E>(position * scale));
}

// Launch plan. Depends on sizes and WGMMA support, not on the number of SMs, so that results are the same on GPUs of
// one architecture.
struct BackwardPlan {
  bool warpgroups;     // whether the two large kernels are those by warpgroups
  int64_t partials;    // for each head: blocks of the queries kernel
  int64_t dots;        // floats
  int64_t sums;        // floats of all partials
  int64_t of_queries;  // floats of sums over queries
  int64_t of_biases;   // floats of parts of position_bias

  int64_t bytes() const { return 4 * (dots + sums + of_queries + of_biases); }
};

// Number of partial buffers: query tiles per head spread evenly over at most `most`.
inline int64_t count_partials(const RelAttention& in, int size, int64_t most) {
  const int64_t items = in.B * ((in.T + size - 1) / size);
  if (items == 0) return 0;
  const int64_t each = (items + most - 1) / most;
  return (items + each - 1) / each;
}

template <typename Kind, int PADDED>
BackwardPlan plan_backward(const RelAttention& in) {
  // About two blocks per SM on the largest GPUs (one for WGMMA kernels). More would balance better but need more
  // workspace.
  int64_t partials = count_partials(in, Tile<Kind, PADDED, true>::size, (264 + in.H - 1) / in.H);
  bool warpgroups = false;
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    // Use the WGMMA kernels if at most a third of the padded queries is padding (2 · padded <= 3 · T), or if T is at
    // most half a block (2 · T <= size); otherwise the mma kernels, whose blocks are smaller, are faster.
    constexpr int size = WarpgroupQueriesMemory<Kind, PADDED>::T::block_queries;
    const bool full = 2 * ((in.T + size - 1) / size * size) <= 3 * in.T || 2 * in.T <= size;
    warpgroups = full && offers_warpgroups(&rel_attention_queries_warpgroup_kernel<Kind, PADDED>);
    if (warpgroups) partials = count_partials(in, size, in.H < 132 ? 132 / in.H : 1);
  }
  return {warpgroups,
          partials,
          (in.B * in.H * in.T + 3) / 4 * 4,
          partials * in.H * in.R * (PADDED + 8),
          partials * in.H * PADDED,
          in.H * count_bias_parts(in) * PADDED};
}

template <typename Kind, int PADDED>
const char* launch_keys(const BackwardPlan& plan, const BackwardLaunch& launch, Stream stream) {
  const int64_t keys = launch.in.M + launch.in.T - launch.first_key, heads = launch.in.B * launch.in.H;
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    using Memory = WarpgroupKeysMemory<Kind, PADDED>;
    constexpr int size = Memory::T::block_queries;
    if (plan.warpgroups) {
      return device::launch(&rel_attention_keys_warpgroup_kernel<Kind, PADDED>, heads * ((keys + size - 1) / size),
                            Memory::T::block_threads, Memory::bytes, stream, launch);
    }
  }
  using T = Tile<Kind, PADDED, true>;
  return device::launch(&rel_attention_keys_kernel<Kind, PADDED>, heads * ((keys + T::size - 1) / T::size), T::threads,
                        BackwardMemory<Kind, PADDED>::bytes, stream, launch);
}

template <typename Kind, int PADDED>
const char* launch_queries(const BackwardPlan& plan, const BackwardLaunch& launch, Stream stream) {
  const int64_t blocks = launch.in.H * plan.partials;
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    using Memory = WarpgroupQueriesMemory<Kind, PADDED>;
    if (plan.warpgroups) {
      return device::launch(&rel_attention_queries_warpgroup_kernel<Kind, PADDED>, blocks, Memory::T::block_threads,
                            Memory::bytes, stream, launch);
    }
  }
  return device::launch(&rel_attention_queries_kernel<Kind, PADDED>, blocks, Tile<Kind, PADDED, true>::threads,
                        BackwardMemory<Kind, PADDED>::bytes, stream, launch);
}

// The operands of the two large kernels, as the packing will leave them.
struct Packed {
  KernelInputs in;
  Operand query_u, query_v, grad_out;

  Packed(Packing& packing, const RelAttentionBackward& backward) : grad_out(backward.grad_out) {
    const RelAttention& given = backward.inputs;
    in = make_kernel_inputs(pack_keys(packing, given));
    query_u = copy_rows(packing, given.query, given.B, given.T, given.content_bias, in.sign);
    query_v = copy_rows(packing, given.query, given.B, given.T, given.position_bias, in.sign);
    pack_rows(packing, grad_out, given.B, given.T);
  }
};

// Bytes of memory that `launch_backward` wants, aligned to 16.
template <typename Kind, int PADDED>
int64_t backward_workspace(const RelAttentionBackward& backward) {
  const RelAttention& in = backward.inputs;
  Packing packing{nullptr, in.H, in.D, in.dtype};
  Packed(packing, backward);
  return plan_backward<Kind, PADDED>(in).bytes() + packing.bytes;
}

// The text of an error, or nullptr.
template <typename Kind, int PADDED>
const char* launch_backward(const RelAttentionBackward& backward, void* workspace, Stream stream) {
  using E = typename Products<Kind>::Element;
  const RelAttention& in = backward.inputs;
  const BackwardPlan plan = plan_backward<Kind, PADDED>(in);
  const int64_t rows = in.B * in.H * in.T;
  // Philox blocks cover 8 keys, so the first tile starts at a multiple of 8, possibly inside the memory.
  const int64_t first_key = backward.memory_needs_grad ? 0 : in.M / 8 * 8;
  auto* const dots = static_cast<float*>(workspace);
  float* const sums = dots + plan.dots;
  float* const query_sums = sums + plan.sums;
  Packing packing{static_cast<char*>(workspace) + plan.bytes(), in.H, in.D, in.dtype};
  const Packed packed(packing, backward);
  const BackwardLaunch launch{packed.in,
                              packed.query_u,
                              packed.query_v,
                              packed.grad_out,
                              backward.out,
                              backward.rounding,
                              is_in_pieces(packing, backward.out) && is_in_pieces(packing, backward.rounding),
                              static_cast<const float*>(backward.log_sum_exp),
                              backward.memory_needs_grad,
                              backward.query,
                              backward.key,
                              backward.value,
                              backward.position,
                              backward.content_bias,
                              backward.position_bias,
                              backward.memory_key,
                              backward.memory_value,
                              first_key,
                              plan.partials,
                              count_bias_parts(in),
                              dots,
                              sums,
                              query_sums,
                              query_sums + plan.of_queries};
  constexpr int rows_per_block = dots_threads / dots_lanes;
  const char* error = launch_pack<E>(packing, stream);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_dots_kernel<Kind>, (rows + rows_per_block - 1) / rows_per_block, dots_threads,
                         0, stream, launch);
  if (error != nullptr) return error;
  error = launch_keys<Kind, PADDED>(plan, launch, stream);
  if (error != nullptr) return error;
  error = launch_queries<Kind, PADDED>(plan, launch, stream);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_positions_kernel<E, PADDED>,
                         (in.R * in.H * in.D + reduce_threads - 1) / reduce_threads, reduce_threads, 0, stream, launch);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_bias_parts_kernel<E, PADDED>, in.H * count_bias_parts(in), reduce_threads,
                         reduce_threads * 4, stream, launch);
  if (error != nullptr) return error;
  return device::launch(&rel_attention_biases_kernel<E, PADDED>, in.H, reduce_threads, 2 * reduce_threads * 4, stream,
                        launch);
}

template <ComputeType COMPUTE_TYPE>
std::int64_t rel_attention_backward_workspace(const RelAttentionBackward& launch) {
  return with_head_size(launch.inputs.D,
                        [&](auto padded) { return backward_workspace<KindOf<COMPUTE_TYPE>, padded.value>(launch); });
}

template <ComputeType COMPUTE_TYPE>
const char* rel_attention_backward(const RelAttentionBackward& launch, void* workspace, CUstream_st* stream) {
  return with_head_size(launch.inputs.D, [&](auto padded) {
    return launch_backward<KindOf<COMPUTE_TYPE>, padded.value>(launch, workspace, stream);
  });
}

}  // namespace pytbptt::cuda
