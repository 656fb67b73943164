// The gradient of lstm's weight, which follows when the gates' gradients of all steps are there.
#pragma once
#include "cpu/arena.h"
#include "cpu/lstm_product.h"
#include "cpu/lstm_share.h"
#include "cpu/stored_lanes.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// The weight's gradient is made block by block, each block whole before the next: rows and columns of a block, and how
// many of the T * B products of a gates' gradient and a hidden state are packed and added up at a time. So few keep the
// chains of additions about as short as those of one product per step.
constexpr int64_t weight_rows = 192, weight_columns = 256, weight_depth = 80;

// A thread's buffers for its blocks of the weight's gradient.
template <typename T>
struct WeightWorkspace {
  static constexpr int64_t gates_size = weight_rows * (weight_depth + Vec<T>::lanes);
  static constexpr int64_t hidden_size = weight_depth * weight_columns, sums_size = weight_rows * weight_columns;
  T* gates;   // (threads, gates_size): (tiles of rows, depth, rows of a tile)
  T* hidden;  // (threads, hidden_size): per kernel of v vectors (depth, v, lanes)
  T* sums;    // (threads, sums_size)

  void take(Arena& arena, int threads) {
    gates = arena.take<T>(threads * gates_size);
    hidden = arena.take<T>(threads * hidden_size);
    sums = arena.take<T>(threads * sums_size);
  }
};

// Elements from one packed tile of gates' gradients to the next: room for the last vector to write too far.
template <typename T>
PYTBPTT_INLINE int64_t packed_tile(int64_t depth) {
  return depth * rows_of_kernel<2> + Vec<T>::lanes;
}

// Lays out gradients of gates [rows.begin, rows.end) at steps and streams [places.begin, places.end), both flat, in
// tiles as high as the microkernel.
template <typename T, typename S>
void pack_grad_gates(const LstmBackward& p, Span rows, Span places, T* to) {
  constexpr int64_t lanes = Vec<T>::lanes, height = rows_of_kernel<2>;
  const int64_t tile = packed_tile<T>(places.size());
  for (int64_t place = places.begin; place < places.end; ++place, to += height) {
    const S* from = static_cast<const S*>(p.grad_gates) + place * 4 * p.inputs.H;
    T* to_tile = to;
    for (int64_t first = rows.begin; first < rows.end; first += height, to_tile += tile) {
      // Whole vectors: what they write too far is written again at the next place, or is spare.
      for (int64_t row = 0; row < height; row += lanes) {
        store(to_tile + row, load_lanes<T, S>(from + first + row, 4 * p.inputs.H - first - row));
      }
    }
  }
}

// Lays out blocks of units of the hidden states before the same steps, for kernels of at most two vectors.
template <typename T, typename S>
void pack_hidden_before(const LstmBackward& p, Span blocks, Span places, T* to) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t depth = places.size();
  for (int64_t place = places.begin; place < places.end; ++place) {
    const bool forgets = inputs.reset != nullptr && inputs.reset[place];
    const S* from = place < inputs.B ? static_cast<const S*>(inputs.h0.data) + place * inputs.h0.stream
                                     : static_cast<const S*>(p.output) + (place - inputs.B) * inputs.H;
    for_kernels(blocks, 2, [&](int64_t block, int vectors) {
      T* row = to + ((block - blocks.begin) * depth + (place - places.begin) * vectors) * lanes;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (block + v) * lanes;
        store(row + v * lanes, forgets ? V{} : load_lanes<T, S>(from + first, smaller(lanes, inputs.H - first)));
      }
    });
  }
}

// A thread's rows of the weight's gradient: the sum over steps and streams of gates' gradient times hidden state.
template <typename T, typename S>
void backward_weight(const LstmBackward& p, const WeightWorkspace<T>& workspace, int rank, int threads) {
  constexpr int64_t lanes = Vec<T>::lanes, height = rows_of_kernel<2>;
  constexpr int64_t blocks_at_once = weight_columns / lanes;
  const int64_t H = p.inputs.H, blocks = blocks_of<T>(p.inputs), places = p.inputs.T * p.inputs.B;
  const int64_t longest = smaller(weight_depth, places > 64 ? places / 4 : 16);
  const int64_t slices = (places + longest - 1) / longest;
  T* gates = workspace.gates + rank * workspace.gates_size;
  T* hidden = workspace.hidden + rank * workspace.hidden_size;
  T* sums = workspace.sums + rank * workspace.sums_size;

  const Span tiles = part((4 * H + height - 1) / height, rank, threads);
  const int64_t end_row = smaller(tiles.end * height, 4 * H);
  for (int64_t first_row = tiles.begin * height; first_row < end_row; first_row += weight_rows) {
    const Span rows{first_row, smaller(first_row + weight_rows, end_row)};
    for (int64_t first_block = 0; first_block < blocks; first_block += blocks_at_once) {
      const Span columns{first_block, smaller(first_block + blocks_at_once, blocks)};
      for (int64_t slice = 0; slice < slices; ++slice) {
        const Span summed = part(places, slice, slices);
        const int64_t depth = summed.size();
        pack_grad_gates<T, S>(p, rows, summed, gates);
        pack_hidden_before<T, S>(p, columns, summed, hidden);
        for_kernels(columns, 2, [&](int64_t block, int vectors) {
          const T* packed = hidden + (block - first_block) * depth * lanes;
          for (int64_t row = rows.begin; row < rows.end; row += height) {
            const int64_t count = smaller(height, rows.end - row);
            const T* a = gates + (row - rows.begin) / height * packed_tile<T>(depth);
            T* c = sums + (row - rows.begin) * weight_columns + (block - first_block) * lanes;
            if (vectors == 2) {
              tile_rows<T, 2, Layout::column_major, height>(count, depth, a, height, packed, 2 * lanes, c,
                                                            weight_columns, slice > 0);
            } else {
              tile_rows<T, 1, Layout::column_major, height>(count, depth, a, height, packed, lanes, c, weight_columns,
                                                            slice > 0);
            }
          }
        });
      }
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t block = columns.begin; block < columns.end; ++block) {
          const T* from = sums + (row - rows.begin) * weight_columns + (block - first_block) * lanes;
          store_lanes<T, S>(static_cast<S*>(p.grad_weight) + row * H + block * lanes, load(from),
                            smaller(lanes, H - block * lanes));
        }
      }
    }
  }
}

}  // namespace
}  // namespace pytbptt::cpu::PYTBPTT_ISA
