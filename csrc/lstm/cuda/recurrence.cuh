// What the forward and the backward of the LSTM do alike: phases, in each of which every block multiplies its slice of
// the recurrent weights with what all blocks handed on in the phase before, works on the hidden units that are its own,
// and hands on what it made of them. plan.h says how that is divided.
//
// What is handed on lies in two buffers, used in turn, in tiles of depth by 8 streams, each stream by stream. A block's
// flag counts the passes that it has handed on; a warp waits for the flags of those blocks alone whose units it reads.
// Nobody writes a buffer before everyone has read it: a block that handed on a pass of this phase had read that of the
// phase before, which lies in the buffer that the next phase takes.
#pragma once
#include "lstm/cuda/launch.h"
#include "lstm/cuda/weights.cuh"

namespace pytbptt::cuda {

// Where place k of a stream's depth lies in the buffer of a phase.
template <typename Kind>
PYTBPTT_DEVICE typename Fragments<Kind>::Element* place_in_exchange(const Recurrence& r, int phase, int stream, int k) {
  using F = Fragments<Kind>;
  const int64_t row = phase % 2 * r.plan.groups * r.plan.stream_tiles + stream / lstm_tile_streams;
  const int64_t in_tiles = (row * r.plan.depth_tiles + k / F::depth) * lstm_tile_streams + stream % lstm_tile_streams;
  return static_cast<typename F::Element*>(r.exchange) + in_tiles * F::depth + k % F::depth;
}

// sums[m][n] += the warp's weights times 8 · `count` streams, at most 8 · N, over the warp's depth.
template <typename Kind, int M, int N, typename Weights>
PYTBPTT_DEVICE void add_products(float (&sums)[M][N][4], const Weights& weights, const Recurrence& r,
                                 const Share& share, int phase, int first_stream, int count) {
  using F = Fragments<Kind>;
  using Piece = typename F::Piece;
  using Streams = typename F::Streams;
  constexpr int tile = lstm_tile_streams * F::depth / F::in_piece;  // pieces
  const auto* const from =
      reinterpret_cast<const Piece*>(place_in_exchange<Kind>(r, phase, first_stream, share.first_tile * F::depth));
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

// Waits for the pass of those blocks whose units are within this warp's depth, of which each unit has `of_unit` places.
PYTBPTT_DEVICE void wait_for_pass(const Recurrence& r, const Share& share, int depth, int of_unit,
                                  std::uint32_t handed_on) {
  const int places = of_unit * static_cast<int>(r.in.H), of_block = of_unit * static_cast<int>(r.plan.units);
  const int last = smaller((share.first_tile + share.tiles) * depth, places) - 1;
  const std::uint32_t* const flags = r.flags + (block() - share.block_of_group);  // of the group's first block
  if (share.tiles > 0) {
    for (int b = share.first_tile * depth / of_block + lane(); b <= last / of_block; b += warp_size) {
      wait_at_least(flags + b, handed_on);
    }
  }
  sync_warp();
}

// Whether h and c are zero before step t.
PYTBPTT_DEVICE bool is_reset(const Lstm& in, int64_t t, int b) {
  return in.reset != nullptr && load(in.reset + t * in.B + b);
}

// What a thread carries from phase to phase for the units of each octet, c or its gradient: in registers, or between
// phases where the last of it goes.
template <int OCTETS>
class Carried {
  static_assert(most_carried_passes == 2, "a first and a second place");

 public:
  PYTBPTT_DEVICE explicit Carried(const LstmPlan& plan) : in_registers_(plan.cells_in_registers) {}

  // At the beginning of a pass; `first` is what phase 0 finds, and `last` where the last phase leaves it.
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
  // Cells that are in memory between phases take the first place during a pass.
  PYTBPTT_DEVICE bool second(int pass) const { return in_registers_ && pass == 1; }
  PYTBPTT_DEVICE void set(int pass, int octet, float value) {
    if (second(pass)) {
      registers_[1][octet] = value;
    } else {
      registers_[0][octet] = value;
    }
  }

  bool in_registers_;
  float registers_[most_carried_passes][OCTETS] = {};
};

// All phases of a launch, of a block with M tiles of rows and at most N of streams in a pass. A thread has one of a
// pass's streams and one unit of each octet.
//
//   Cell::of_unit          how many places in the depth a unit has
//   Cell::units            of a tile of rows
//   Cell::octets_of_round  whose sums two tiles of rows hold
//   Cell::sums_tile(o), Cell::sums_row(o, gate)    where those of the round's octet o are, for this thread
//   Cell::is_backward      if so, not neighbours in the depth but rows lie side by side in weight_hh
//   Cell::weight(in, first_unit, row, k)           the element of weight_hh in a block's row at place k, -1 if none
//   cell.cut(phase, b)                    whether a reset parts this phase's step from that of the phase before
//   cell.first(b, unit)                   what phase 0 finds carried
//   cell.last(b, unit)                    where what the last phase leaves to carry goes
//   cell.fetch(phase, b, unit)            Cell::Inputs: what is there before the sums are
//   cell.finish(phase, b, unit, cut, inputs, carried, total, to)
//                                         what is carried on; total(gate) is the sum, `to` where the unit is handed on
template <typename Kind, int M, int N, typename Cell>
PYTBPTT_DEVICE void run_phases(const Recurrence& r, const Cell& cell) {
  using F = Fragments<Kind>;
  constexpr int tiles_of_round = M < 2 ? M : 2, rounds = (M + 1) / 2;
  constexpr int units = M * Cell::units, octets = (units + 7) / 8;
  const Share share(r);
  const auto all_sums = shared<float>(0, lstm_warps * tiles_of_round * lstm_sums_tile);
  const WarpWeights<Kind, M, Cell> weights(r, share);
  Carried<octets> carried(r.plan);
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
      // Of each octet: addresses are then those of the first one's unit, and a constant more.
      const int first_unit = share.first_unit + thread() % 8;
      const auto has_unit = [&](int octet) {
        return has_stream && 8 * octet + thread() % 8 < units && first_unit + 8 * octet < r.in.H;
      };
      const bool cut = has_stream && cell.cut(phase, stream);
      typename Cell::Inputs inputs[octets];
      PYTBPTT_UNROLL
      for (int octet = 0; octet < octets; ++octet) {
        if (!has_unit(octet)) continue;
        const int unit = first_unit + 8 * octet;
        inputs[octet] = cell.fetch(phase, stream, unit);
        carried.fetch(phase, pass, octet, [&] { return cell.first(stream, unit); }, cell.last(stream, unit));
      }
      float sums[M][N][4] = {};
      if (phase > 0) {
        const auto handed_on = static_cast<std::uint32_t>((phase - 1) * share.passes + pass + 1);
        wait_for_pass(r, share, F::depth, Cell::of_unit, handed_on);
        add_products<Kind>(sums, weights, r, share, phase - 1, first_stream, count);
      }
      PYTBPTT_UNROLL
      for (int round = 0; round < rounds; ++round) {
        if (phase > 0) {
          PYTBPTT_UNROLL
          for (int m = 2 * round; m < M && m < 2 * round + 2; ++m) {
            const auto own = all_sums + ((warp() * tiles_of_round + m % 2) * lstm_sums_tile + lane() % 4 * 2);
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
            sum += all_sums.load((w * tiles_of_round + tile) * lstm_sums_tile + row * lstm_sums_row + stream_of_pass);
          }
          return sum;
        };
        PYTBPTT_UNROLL
        for (int o = 0; o < Cell::octets_of_round; ++o) {
          const int octet = round * Cell::octets_of_round + o;
          if (octet >= octets || !has_unit(octet)) continue;
          const int unit = first_unit + 8 * octet;
          const float carried_on = cell.finish(
              phase, stream, unit, cut, inputs[octet], cut ? 0.0f : carried.before(pass, octet),
              [&](int gate) { return total(Cell::sums_tile(o), Cell::sums_row(o, gate)); },
              place_in_exchange<Kind>(r, phase, stream, Cell::of_unit * unit));
          carried.after(pass, octet, carried_on, cell.last(stream, unit), phase == r.in.T);
        }
        sync_threads();
      }
      if (phase < r.in.T && thread() == 0) {
        const auto handed_on = static_cast<std::uint32_t>(phase * share.passes + pass + 1);
        store_release(r.flags + block(), handed_on);
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

// Runs a kernel through all phases. `launch.recurrence` has the inputs and the plan; `workspace` is as launch.h
// says.
template <typename Launch>
const char* launch_phases(void (*kernel)(Launch), Launch launch, void* workspace, Stream stream) {
  Recurrence& r = launch.recurrence;
  auto* const bytes = static_cast<char*>(workspace);
  r.exchange = bytes;
  r.flags = reinterpret_cast<std::uint32_t*>(bytes + r.plan.exchange_bytes - r.plan.flags_bytes());
  r.streamed = bytes + r.plan.exchange_bytes;
  r.end = static_cast<int>(r.in.T) + 1;
  const auto shared_bytes = static_cast<int>(r.plan.shared_bytes);
  // What lies beyond the last unit is multiplied with weights of 0, and must be finite.
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
