// Launch plan of the LSTM recurrence. Host code without CUDA dependency.
//
// Every step multiplies weight_hh with what all blocks computed in the step before: h (forward) or the gates' gradients
// (backward). A block keeps a slice of the weights on chip and computes some hidden units of some streams:
//
//                          depth (k): H or 4H                    streams of one group
//                    warp 0    warp 1   …   warp 7               pass 0     pass 1
//                  |- tiles -|- tiles -|  |- tiles -|          |- tiles -|- tiles -|
//            +-----------------------------------------+      +---------+---------+
//   block 0  |  rows: M tiles of 16                    |      |         |         |
//            +-----------------------------------------+   x  |  k x 8 streams    |
//   block 1  |                                         |      |  a tile           |
//            +-----------------------------------------+      +---------+---------+
//      :
//
//   rows     of a slice, in tiles of 16. Forward: four gates of 4 units. Backward: columns of weight_hh of 16 units.
//   depth    H in the forward, 4H in the backward, in tiles of 32 (two-byte types), 16 (tf32) or 4 (float32), split
//            over the 8 warps. Each warp keeps its first tiles in registers ("held"), more in shared memory
//            ("resident"), and reads the rest from L2 in every step ("streamed").
//   streams  in tiles of 8. A pass takes up to `max_pass_tiles` of them: while the blocks exchange the results of one
//            pass, they compute the next. There are smaller kernels for a single tile. Groups of streams have separate
//            blocks, and need nothing from one another.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/cuda/compute_type.h"

namespace pytbptt::cuda {

// Device properties that the plan depends on.
struct GpuLimits {
  std::int64_t multiprocessors;
  std::int64_t shared_bytes;  // that one block may have
  std::int64_t registers;     // of a multiprocessor
};

constexpr int lstm_warps = 8, lstm_threads = 32 * lstm_warps;
constexpr int lstm_tile_rows = 16, lstm_tile_streams = 8, max_pass_tiles = 4;
constexpr int max_forward_tiles = 5, max_backward_tiles = 2;  // of rows, that there are kernels for

// Shared-memory buffer for the reduction over warps: two row tiles at a time; row stride chosen to avoid bank
// conflicts.
constexpr int lstm_sums_row = lstm_tile_streams * max_pass_tiles + 8;
constexpr int lstm_sums_tile = lstm_tile_rows * lstm_sums_row + 4;

constexpr int lstm_depth(ComputeType compute_type) {
  return compute_type == ComputeType::float32 ? 4 : compute_type == ComputeType::tf32 ? 16 : 32;
}

// Tiles of depth that a warp keeps in registers, 8 registers each for every tile of rows: 64 registers in all, fewer if
// the accumulators or the backward's inputs need them. None for float32, where four lanes would hold copies.
constexpr int lstm_held_tiles(bool tensor_cores, bool backward, int row_tiles) {
  return !tensor_cores || row_tiles > 4 ? 0 : backward && row_tiles > 1 ? 3 : 8 / row_tiles;
}

// c (or grad_c) stays in registers if the block has at most this many passes; a thread has one of every 8 units per
// pass.
constexpr int max_register_passes = 2;

struct LstmPlan {
  bool persistent;  // one launch for all steps, all blocks at once on the GPU; otherwise one launch for each step
  bool cells_in_registers;        // c, or its gradient; otherwise in memory between steps
  std::int64_t row_tiles, units;  // of a block
  std::int64_t groups, blocks_per_group;
  std::int64_t depth_tiles, tiles_per_warp;  // k tiles in total, and per warp (maximum)
  std::int64_t held;                         // k tiles per warp in registers
  std::int64_t resident;  // of a warp's other k tiles, `row_tiles` parts each: number of parts in shared memory
  std::int64_t stream_tiles, pass_tiles;                    // of a group, and of a pass
  std::int64_t shared_bytes;                                // of a block
  std::int64_t held_bytes, resident_bytes, streamed_bytes;  // of a block's weights
  std::int64_t exchange_bytes;                              // of what all blocks exchange, and of their flags
  std::int64_t workspace_bytes;                             // exchange_bytes, and the weights that are read from L2

  std::int64_t blocks() const { return groups * blocks_per_group; }
  std::int64_t flags_bytes() const { return (4 * blocks() + 15) / 16 * 16; }
};

namespace lstm_plan_detail {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// persistent: weights stay in registers and shared memory.
inline LstmPlan make_plan(bool backward, std::int64_t H, std::int64_t B, ComputeType compute_type,
                          const GpuLimits& limits, int row_tiles, std::int64_t groups, bool persistent) {
  const bool floats = compute_type == ComputeType::float32 || compute_type == ComputeType::tf32;
  const std::int64_t bytes = floats ? 4 : 2, depth = lstm_depth(compute_type);
  LstmPlan plan{};
  plan.persistent = persistent;
  plan.row_tiles = row_tiles;
  plan.units = (backward ? lstm_tile_rows : lstm_tile_rows / 4) * row_tiles;
  plan.blocks_per_group = divide_up(H, plan.units);
  const std::int64_t all_stream_tiles = divide_up(B, lstm_tile_streams);
  plan.stream_tiles = divide_up(all_stream_tiles, groups);
  plan.groups = divide_up(all_stream_tiles, plan.stream_tiles);
  plan.pass_tiles = divide_up(plan.stream_tiles, divide_up(plan.stream_tiles, max_pass_tiles));

  plan.depth_tiles = divide_up(backward ? 4 * H : H, depth);
  plan.tiles_per_warp = divide_up(plan.depth_tiles, lstm_warps);
  const std::int64_t sums = lstm_warps * std::min(row_tiles, 2) * lstm_sums_tile * std::int64_t{sizeof(float)};
  // Of every warp, a tile of rows over a tile of depth.
  const std::int64_t part = lstm_warps * lstm_tile_rows * depth * bytes, parts = plan.tiles_per_warp * row_tiles;
  if (persistent) {
    const std::int64_t passes = divide_up(plan.stream_tiles, plan.pass_tiles);
    plan.cells_in_registers = passes <= max_register_passes;
    const int max_held = lstm_held_tiles(compute_type != ComputeType::float32, backward, row_tiles);
    plan.held = std::min<std::int64_t>(plan.tiles_per_warp, max_held);
    plan.resident = std::clamp<std::int64_t>((limits.shared_bytes - sums) / part, 0, parts - plan.held * row_tiles);
  }
  plan.held_bytes = plan.held * row_tiles * part;
  plan.resident_bytes = plan.resident * part;
  plan.streamed_bytes = parts * part - plan.held_bytes - plan.resident_bytes;
  plan.shared_bytes = sums + plan.resident_bytes;
  const std::int64_t exchanged = 2 * plan.groups * plan.stream_tiles * lstm_tile_streams * plan.depth_tiles * depth;
  plan.exchange_bytes = exchanged * bytes + plan.flags_bytes();
  plan.workspace_bytes = plan.exchange_bytes + plan.blocks() * plan.streamed_bytes;
  return plan;
}

// Cost model: cycles per step on one SM. A100 throughputs; latencies are rough estimates.
inline std::int64_t estimate(const LstmPlan& plan, ComputeType compute_type) {
  const std::int64_t multiplications_per_cycle = compute_type == ComputeType::float32 ? 64
                                                 : compute_type == ComputeType::tf32  ? 512
                                                                                      : 1024;
  constexpr std::int64_t shared_per_cycle = 128, l2_per_cycle = 32, barrier = 250, exchange = 1500;
  const std::int64_t passes = divide_up(plan.stream_tiles, plan.pass_tiles);
  const std::int64_t sums = plan.row_tiles * lstm_tile_rows * plan.stream_tiles * lstm_tile_streams;
  const std::int64_t products = sums * plan.depth_tiles * lstm_depth(compute_type) / multiplications_per_cycle;
  const std::int64_t shared = (passes * plan.resident_bytes + 2 * lstm_warps * sums * 4) / shared_per_cycle;
  const std::int64_t l2 = (plan.exchange_bytes / (2 * plan.groups) + passes * plan.streamed_bytes) / l2_per_cycle;
  return std::max(products, shared) + l2 + passes * divide_up(plan.row_tiles, 2) * barrier + exchange;
}

}  // namespace lstm_plan_detail

// For a GPU on which the blocks of a persistent launch do not all fit: all weights are read from L2 at every step.
inline LstmPlan plan_lstm_per_step(bool backward, std::int64_t H, std::int64_t B, ComputeType compute_type,
                                   const GpuLimits& limits) {
  return lstm_plan_detail::make_plan(backward, H, B, compute_type, limits, backward ? 1 : 4, 1, false);
}

// H and B are at least 1. Of all layouts that put at most one block on a multiprocessor, the one that is estimated to
// take the least time for a step.
inline LstmPlan plan_lstm(bool backward, std::int64_t H, std::int64_t B, ComputeType compute_type,
                          const GpuLimits& limits) {
  constexpr std::int64_t max_registers = 255;  // of a thread
  LstmPlan best = plan_lstm_per_step(backward, H, B, compute_type, limits);
  if (limits.registers < lstm_threads * max_registers) return best;
  for (int row_tiles = 1; row_tiles <= (backward ? max_backward_tiles : max_forward_tiles); ++row_tiles) {
    for (std::int64_t groups = 1; groups <= lstm_plan_detail::divide_up(B, lstm_tile_streams); ++groups) {
      const LstmPlan plan = lstm_plan_detail::make_plan(backward, H, B, compute_type, limits, row_tiles, groups, true);
      if (plan.groups < groups) continue;  // duplicate of a smaller number of groups
      if (plan.blocks() > limits.multiprocessors || plan.shared_bytes > limits.shared_bytes) break;
      const bool better =
          lstm_plan_detail::estimate(plan, compute_type) < lstm_plan_detail::estimate(best, compute_type);
      if (!best.persistent || better) best = plan;
    }
  }
  return best;
}

}  // namespace pytbptt::cuda
