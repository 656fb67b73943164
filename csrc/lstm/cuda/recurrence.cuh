// The recurrence loop of forward and backward: phases 0 … T, each in passes over the block's streams (plan.h).
//
//   one pass of phase p, in block b:
//
//     load inputs        gates, cells … of the block's own units, which need nothing from other blocks
//     wait for producers flags of those blocks whose units are in the warp's depth, until they have published this pass
//                        of phase p - 1
//     accumulate         weights (weights.cuh) times the exchanged values, by each warp over its own depth
//     reduce             the 8 warps' sums in shared memory, two tiles of rows at a time
//     pointwise          Cell::finish: the new h, or gates' gradients, of the block's own units
//     publish            to the exchange buffer of phase p; block barrier; then the block's flag is raised
//
//   exchange buffers     phase    0   1   2   3   …        A block that has published a pass of phase p has read that
//                        buffer   0   1   0   1   …        pass of phase p - 1, so phase p + 1 may overwrite it.
//   flag of block b      number of passes that it has published: phase · passes + pass + 1
//
// A buffer is (groups · stream tiles, depth tiles, 8 streams, depth of a tile). Threads: a thread has one of a pass's
// streams and, of every 8 of the block's units (an "octet"), one.
#pragma once
#include "lstm/cuda/launch.h"
#include "lstm/cuda/weights.cuh"

namespace pytbptt::cuda {

// Address of element k of a stream in the exchange buffer of a phase.
template <typename Kind>
PYTBPTT_DEVICE typename Fragments<Kind>::Element* exchange_address(const Recurrence& r, int phase, int stream, int k) {
  using F = Fragments<Kind>;
  const int64_t row = phase % 2 * r.plan.groups * r.plan.stream_tiles + stream / lstm_tile_streams;
  const int64_t in_tiles = (row * r.plan.depth_tiles + k / F::depth) * lstm_tile_streams + stream % lstm_tile_streams;
  return static_cast<typename F::Element*>(r.exchange) + in_tiles * F::depth + k % F::depth;
}

// Accumulates this warp's part of k for `count` (<= N) tiles of 8 streams.
template <typename Kind, int M, int N, typename Weights>
PYTBPTT_DEVICE void accumulate_products(float (&sums)[M][N][4], const Weights& weights, const Recurrence& r,
                                        const BlockPartition& share, int phase, int first_stream, int count) {
  using F = Fragments<Kind>;
  using Piece = typename F::Piece;
  using Streams = typename F::Streams;
  constexpr int tile = lstm_tile_streams * F::depth / F::in_piece;  // pieces
  const auto* const from =
      reinterpret_cast<const Piece*>(exchange_address<Kind>(r, phase, first_stream, share.first_tile * F::depth));
  const auto fetch = [&](Streams(&to)[N], int i) {
    PYTBPTT_UNROLL
    for (int n = 0; n < N; ++n) {
      PYTBPTT_UNROLL
      for (int p = 0; p < F::stream_pieces; ++p) {
        if (n >= count || i >= share.tiles) continue;
        const Piece piece = load(from + ((n * static_cast<int>(r.plan.depth_tiles) + i) * tile + F::stream_slot(p)));
        PYTBPTT_UNROLL
        for (int w = 0; w < 4; ++w) to[n].words[p][w] = piece.words[w];
      }
    }
  };
  Streams now[N] = {}, next[N] = {};
  fetch(now, 0);
  weights.for_each(share, [&](int i, auto rows) {
    fetch(next, i + 1);
    PYTBPTT_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename F::Weights of_rows = rows(m);
      PYTBPTT_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n < count) F::multiply(sums[m][n], of_rows, now[n]);
      }
    }
    PYTBPTT_UNROLL
    for (int n = 0; n < N; ++n) now[n] = next[n];
  });
}

// Waits until the blocks that produce this warp's range of k have raised their flags.
PYTBPTT_DEVICE void wait_for_producers(const Recurrence& r, const BlockPartition& share, int depth, int k_per_unit,
                                       std::uint32_t flag_value) {
  const int k_end = k_per_unit * static_cast<int>(r.in.H), k_per_block = k_per_unit * static_cast<int>(r.plan.units);
  const int last = smaller((share.first_tile + share.tiles) * depth, k_end) - 1;
  const std::uint32_t* const flags = r.flags + (block() - share.block_of_group);  // of the group's first block
  if (share.tiles > 0) {
    for (int b = share.first_tile * depth / k_per_block + lane(); b <= last / k_per_block; b += warp_size) {
      wait_at_least(flags + b, flag_value);
    }
  }
  sync_warp();
}

// Whether h and c are zero before step t.
PYTBPTT_DEVICE bool is_reset(const Lstm& in, int64_t t, int b) {
  return in.reset != nullptr && load(in.reset + t * in.B + b);
}

// c (or grad_c) of this thread's units: in registers, or between phases in the output tensor (c_n or grad_c0).
template <int OCTETS>
class CellState {
  static_assert(max_register_passes == 2, "registers_ has two entries");

 public:
  PYTBPTT_DEVICE explicit CellState(const LstmPlan& plan) : in_registers_(plan.cells_in_registers) {}

  // At the beginning of a pass; `first`: initial value; `last`: address of the final value.
  template <typename First>
  PYTBPTT_DEVICE void fetch(int phase, int pass, int octet, First first, const float* last) {
    if (phase == 0) {
      set(pass, octet, first());
    } else if (!in_registers_) {
      set(pass, octet, load(last));
    }
  }

  PYTBPTT_DEVICE float before(int pass, int octet) const {
    return second(pass) ? registers_[1][octet] : registers_[0][octet];
  }

  PYTBPTT_DEVICE void after(int pass, int octet, float value, float* last, bool is_last) {
    set(pass, octet, value);
    if (!in_registers_ || is_last) store(last, value);
  }

 private:
  // If state is in memory, registers_[0] holds it during a pass.
  PYTBPTT_DEVICE bool second(int pass) const { return in_registers_ && pass == 1; }
  PYTBPTT_DEVICE void set(int pass, int octet, float value) {
    if (second(pass)) {
      registers_[1][octet] = value;
    } else {
      registers_[0][octet] = value;
    }
  }

  bool in_registers_;
  float registers_[max_register_passes][OCTETS] = {};
};

// All phases of a launch, for a block with M tiles of rows and at most N tiles of streams in a pass.
//
//   Cell::k_per_unit                      entries along the depth for each hidden unit
//   Cell::units                           hidden units for each tile of rows
//   Cell::octets_per_round                octets whose sums fit into two tiles of rows
//   Cell::sums_tile(o), sums_row(o, gate) where this thread finds the sums of the round's octet o
//   Cell::is_backward                     if so, rows, not entries of the depth, are contiguous in weight_hh
//   Cell::weight(in, first_unit, row, k)  index in weight_hh of entry k of a block's row; -1 if there is none
//   cell.reset_before(phase, stream)      whether a reset lies between this phase's step and that of the phase before
//   cell.first(stream, unit)              initial value of the cell state
//   cell.last(stream, unit)               address of its final value
//   cell.fetch(phase, stream, unit)       Cell::Inputs: what can be loaded before the sums are ready
//   cell.finish(phase, stream, unit, reset, inputs, cell_state, total, to)
//                                         returns the new cell state; total(gate) is the sum, `to` the address where
//                                         the unit is published
template <typename Kind, int M, int N, typename Cell>
PYTBPTT_DEVICE void run_phases(const Recurrence& r, const Cell& cell) {
  using F = Fragments<Kind>;
  constexpr int tiles_per_round = M < 2 ? M : 2, rounds = (M + 1) / 2;
  constexpr int units = M * Cell::units, octets = (units + 7) / 8;
  const BlockPartition share(r);
  const auto all_sums = shared<float>(0, lstm_warps * tiles_per_round * lstm_sums_tile);
  const WarpWeights<Kind, M, Cell> weights(r, share);
  CellState<octets> cell_state(r.plan);
  PYTBPTT_LOOP
  for (int phase = r.first; phase < r.end; ++phase) {
    PYTBPTT_LOOP
    for (int pass = 0; pass < share.passes; ++pass) {
      const int first_tile = pass * static_cast<int>(r.plan.pass_tiles);
      const int count = smaller(share.stream_tiles - first_tile, static_cast<int>(r.plan.pass_tiles));

      const int first_stream = share.first_stream + lstm_tile_streams * first_tile;
      const int stream_of_pass = thread() / 8;
      const int stream = first_stream + stream_of_pass;
      const bool has_stream = stream_of_pass < lstm_tile_streams * count && stream < r.in.B;
      // Unit of the first octet; those of the others are at constant offsets.
      const int first_unit = share.first_unit + thread() % 8;
      const auto has_unit = [&](int octet) {
        return has_stream && 8 * octet + thread() % 8 < units && first_unit + 8 * octet < r.in.H;
      };
      const bool reset = has_stream && cell.reset_before(phase, stream);
      typename Cell::Inputs inputs[octets];
      PYTBPTT_UNROLL
      for (int octet = 0; octet < octets; ++octet) {
        if (!has_unit(octet)) continue;
        const int unit = first_unit + 8 * octet;
        inputs[octet] = cell.fetch(phase, stream, unit);
        cell_state.fetch(phase, pass, octet, [&] { return cell.first(stream, unit); }, cell.last(stream, unit));
      }
      float sums[M][N][4] = {};
      if (phase > 0) {
        const auto flag_value = static_cast<std::uint32_t>((phase - 1) * share.passes + pass + 1);
        wait_for_producers(r, share, F::depth, Cell::k_per_unit, flag_value);
        accumulate_products<Kind>(sums, weights, r, share, phase - 1, first_stream, count);
      }
      PYTBPTT_UNROLL
      for (int round = 0; round < rounds; ++round) {
        if (phase > 0) {
          PYTBPTT_UNROLL
          for (int m = 2 * round; m < M && m < 2 * round + 2; ++m) {
            const auto own = all_sums + ((warp() * tiles_per_round + m % 2) * lstm_sums_tile + lane() % 4 * 2);
            PYTBPTT_UNROLL
            for (int n = 0; n < N; ++n) {
              if (n >= count) continue;
              const int at = lane() / 4 * lstm_sums_row + 8 * n;
              own.template store_many<Pair>(at, Pair{sums[m][n][0], sums[m][n][1]});
              own.template store_many<Pair>(at + 8 * lstm_sums_row, Pair{sums[m][n][2], sums[m][n][3]});
            }
          }
          sync_threads();
        }
        const auto total = [&](int tile, int row) {
          float sum = 0;
          PYTBPTT_UNROLL
          for (int w = 0; w < lstm_warps; ++w) {
            sum += all_sums.load((w * tiles_per_round + tile) * lstm_sums_tile + row * lstm_sums_row + stream_of_pass);
          }
          return sum;
        };
        PYTBPTT_UNROLL
        for (int o = 0; o < Cell::octets_per_round; ++o) {
          const int octet = round * Cell::octets_per_round + o;
          if (octet >= octets || !has_unit(octet)) continue;
          const int unit = first_unit + 8 * octet;
          const float cell_after = cell.finish(
              phase, stream, unit, reset, inputs[octet], reset ? 0.0f : cell_state.before(pass, octet),
              [&](int gate) { return total(Cell::sums_tile(o), Cell::sums_row(o, gate)); },
              exchange_address<Kind>(r, phase, stream, Cell::k_per_unit * unit));
          cell_state.after(pass, octet, cell_after, cell.last(stream, unit), phase == r.in.T);
        }
        sync_threads();
      }
      if (phase < r.in.T && thread() == 0) {
        const auto flag_value = static_cast<std::uint32_t>(phase * share.passes + pass + 1);
        store_release(r.flags + block(), flag_value);
      }
    }
  }
}

// Whether a kernel can run as planned: all blocks at once, or phase by phase.
template <typename Launch>
bool fits(void (*kernel)(Launch), const LstmPlan& plan) {
  return !plan.persistent ||
         device::fit_together(kernel, plan.blocks(), lstm_threads, static_cast<int>(plan.shared_bytes));
}

// Runs a kernel through all phases, in one launch or in one for each phase. `launch.recurrence` has the inputs and the
// plan; `workspace`: see launch.h.
template <typename Launch>
const char* launch_phases(void (*kernel)(Launch), Launch launch, void* workspace, Stream stream) {
  Recurrence& r = launch.recurrence;
  auto* const bytes = static_cast<char*>(workspace);
  r.exchange = bytes;
  r.flags = reinterpret_cast<std::uint32_t*>(bytes + r.plan.exchange_bytes - r.plan.flags_bytes());
  r.streamed = bytes + r.plan.exchange_bytes;
  r.end = static_cast<int>(r.in.T) + 1;
  const auto shared_bytes = static_cast<int>(r.plan.shared_bytes);
  // Padding past H is multiplied with zero weights and must be finite.
  const char* error = device::clear(workspace, r.plan.exchange_bytes, stream);
  if (r.plan.persistent && error == nullptr) {
    error = device::launch_together(kernel, r.plan.blocks(), lstm_threads, shared_bytes, stream, launch);
  } else {
    for (int phase = 0; error == nullptr && phase <= r.in.T; ++phase) {
      r.first = phase;
      r.end = phase + 1;
      error = device::launch(kernel, r.plan.blocks(), lstm_threads, shared_bytes, stream, launch);
    }
  }
  return error;
}

// sigmoid without overflow, and NaN for NaN.
PYTBPTT_DEVICE float sigmoid(float x) {
  return 1 / (1 + device::exp(-x));
}

}  // namespace pytbptt::cuda
