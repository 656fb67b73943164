// How the recurrence of an LSTM is laid out on a GPU: pure arithmetic, in every build.
//
// Every step multiplies a slice of the recurrent weights with what all blocks made in the step before: h in the
// forward, the gradients of the gates in the backward. A block has some hidden units of some streams:
//
//   rows     of its slice, in tiles of 16. Forward: 4 units' four gates. Backward: 16 units' columns of weight_hh.
//   depth    H in the forward, 4H in the backward, in tiles of 32 (two-byte types), 16 (tf32) or 4 (float32), which its
//            warps share out; each keeps the weights of its own in registers, then in shared memory, and reads the rest
//            from L2 at every step.
//   streams  in tiles of 8, of which a pass takes up to `most_pass_tiles`: while what one pass hands on is on its way,
//            the next computes. Where one is enough there are smaller kernels. Groups of streams have blocks of their
//            own and need nothing from one another.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/cuda/arithmetic.h"

namespace pytbptt::cuda {

// What decides of a GPU, as its properties say.
struct GpuLimits {
  std::int64_t multiprocessors;
  std::int64_t shared_bytes;  // that one block may have
  std::int64_t registers;     // of a multiprocessor
};

constexpr int lstm_warps = 8, lstm_threads = 32 * lstm_warps;
constexpr int lstm_tile_rows = 16, lstm_tile_streams = 8, most_pass_tiles = 4;
constexpr int most_forward_tiles = 5, most_backward_tiles = 2;  // of rows, that there are kernels for

// Where warps leave their sums for one another: two tiles of rows at a time, each row of `lstm_sums_row` floats, no two
// of which a warp touches at once in the same bank.
constexpr int lstm_sums_row = lstm_tile_streams * most_pass_tiles + 8;
constexpr int lstm_sums_tile = lstm_tile_rows * lstm_sums_row + 4;

constexpr int lstm_depth(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float32 ? 4 : arithmetic == Arithmetic::tf32 ? 16 : 32;
}

// How many of its tiles of depth a warp keeps in registers, 8 registers each for every tile of rows: 64 in all, but
// fewer beside the sums of many rows or, in the backward, the inputs of 32 units. Without tensor cores four lanes would
// hold the same.
constexpr int lstm_held_tiles(bool tensor_cores, bool backward, int row_tiles) {
  return !tensor_cores || row_tiles > 4 ? 0 : backward && row_tiles > 1 ? 3 : 8 / row_tiles;
}

// A thread carries c, or its gradient, in registers from step to step where its block has no more passes than these:
// one of every 8 units (an octet) in each pass.
constexpr int most_carried_passes = 2;

struct LstmPlan {
  bool persistent;  // one launch for all steps, all blocks at once on the GPU; otherwise one launch for each step
  bool cells_in_registers;        // c, or its gradient; otherwise in memory between steps
  std::int64_t row_tiles, units;  // of a block
  std::int64_t groups, blocks_of_group;
  std::int64_t depth_tiles, tiles_of_warp;  // of all, and of the warps that have the most
  std::int64_t held;                        // of a warp's tiles of depth: those in registers
  std::int64_t resident;  // of the others, each of `row_tiles` parts: how many parts are in shared memory
  std::int64_t stream_tiles, pass_tiles;                    // of a group, and of a pass
  std::int64_t shared_bytes;                                // of a block
  std::int64_t held_bytes, resident_bytes, streamed_bytes;  // of a block's weights
  std::int64_t exchange_bytes;                              // of what all blocks exchange, and of their flags
  std::int64_t workspace_bytes;                             // exchange_bytes, and the weights that are read from L2

  std::int64_t blocks() const { return groups * blocks_of_group; }
  std::int64_t flags_bytes() const { return (4 * blocks() + 15) / 16 * 16; }
};

namespace lstm_plan_detail {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// `keep` says whether weights stay on chip.
inline LstmPlan lay_out(bool backward, std::int64_t H, std::int64_t B, Arithmetic arithmetic, const GpuLimits& limits,
                        int row_tiles, std::int64_t groups, bool keep) {
  const bool floats = arithmetic == Arithmetic::float32 || arithmetic == Arithmetic::tf32;
  const std::int64_t bytes = floats ? 4 : 2, depth = lstm_depth(arithmetic);
  LstmPlan plan{};
  plan.persistent = keep;
  plan.row_tiles = row_tiles;
  plan.units = (backward ? lstm_tile_rows : lstm_tile_rows / 4) * row_tiles;
  plan.blocks_of_group = divide_up(H, plan.units);
  const std::int64_t all_stream_tiles = divide_up(B, lstm_tile_streams);
  plan.stream_tiles = divide_up(all_stream_tiles, groups);
  plan.groups = divide_up(all_stream_tiles, plan.stream_tiles);
  plan.pass_tiles = divide_up(plan.stream_tiles, divide_up(plan.stream_tiles, most_pass_tiles));

  plan.depth_tiles = divide_up(backward ? 4 * H : H, depth);
  plan.tiles_of_warp = divide_up(plan.depth_tiles, lstm_warps);
  const std::int64_t sums = lstm_warps * std::min(row_tiles, 2) * lstm_sums_tile * std::int64_t{sizeof(float)};
  // Of every warp, a tile of rows over a tile of depth.
  const std::int64_t part = lstm_warps * lstm_tile_rows * depth * bytes, parts = plan.tiles_of_warp * row_tiles;
  if (keep) {
    const std::int64_t passes = divide_up(plan.stream_tiles, plan.pass_tiles);
    plan.cells_in_registers = passes <= most_carried_passes;
    const int most_held = lstm_held_tiles(arithmetic != Arithmetic::float32, backward, row_tiles);
    plan.held = std::min<std::int64_t>(plan.tiles_of_warp, most_held);
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

// Cycles of a step on one multiprocessor, by arithmetic: rates are an A100's, latencies round guesses.
inline std::int64_t estimate(const LstmPlan& plan, Arithmetic arithmetic) {
  const std::int64_t multiplications_per_cycle = arithmetic == Arithmetic::float32 ? 64
                                                 : arithmetic == Arithmetic::tf32  ? 512
                                                                                   : 1024;
  constexpr std::int64_t shared_per_cycle = 128, l2_per_cycle = 32, barrier = 250, exchange = 1500;
  const std::int64_t passes = divide_up(plan.stream_tiles, plan.pass_tiles);
  const std::int64_t sums = plan.row_tiles * lstm_tile_rows * plan.stream_tiles * lstm_tile_streams;
  const std::int64_t products = sums * plan.depth_tiles * lstm_depth(arithmetic) / multiplications_per_cycle;
  const std::int64_t shared = (passes * plan.resident_bytes + 2 * lstm_warps * sums * 4) / shared_per_cycle;
  const std::int64_t l2 = (plan.exchange_bytes / (2 * plan.groups) + passes * plan.streamed_bytes) / l2_per_cycle;
  return std::max(products, shared) + l2 + passes * divide_up(plan.row_tiles, 2) * barrier + exchange;
}

}  // namespace lstm_plan_detail

// For a GPU on which the blocks of a persistent launch do not all fit: all weights are read from L2 at every step.
inline LstmPlan plan_lstm_by_step(bool backward, std::int64_t H, std::int64_t B, Arithmetic arithmetic,
                                  const GpuLimits& limits) {
  return lstm_plan_detail::lay_out(backward, H, B, arithmetic, limits, backward ? 1 : 4, 1, false);
}

// H and B are at least 1. Of all layouts that put at most one block on a multiprocessor, the one that is estimated to
// take the least time for a step.
inline LstmPlan plan_lstm(bool backward, std::int64_t H, std::int64_t B, Arithmetic arithmetic,
                          const GpuLimits& limits) {
  constexpr std::int64_t most_registers = 255;  // of a thread
  LstmPlan best = plan_lstm_by_step(backward, H, B, arithmetic, limits);
  if (limits.registers < lstm_threads * most_registers) return best;
  for (int row_tiles = 1; row_tiles <= (backward ? most_backward_tiles : most_forward_tiles); ++row_tiles) {
    for (std::int64_t groups = 1; groups <= lstm_plan_detail::divide_up(B, lstm_tile_streams); ++groups) {
      const LstmPlan plan = lstm_plan_detail::lay_out(backward, H, B, arithmetic, limits, row_tiles, groups, true);
      if (plan.groups < groups) continue;  // as another number of groups
      if (plan.blocks() > limits.multiprocessors || plan.shared_bytes > limits.shared_bytes) break;
      const bool better = lstm_plan_detail::estimate(plan, arithmetic) < lstm_plan_detail::estimate(best, arithmetic);
      if (!best.persistent || better) best = plan;
    }
  }
  return best;
}

}  // namespace pytbptt::cuda
