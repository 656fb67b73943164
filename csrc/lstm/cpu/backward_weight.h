// grad_weight_hh = sum over t and b of grad_gates · h_prev, after all steps, in float or double:
//
//   grad_weight (4H, H)            each thread has blocks of block_m x block_n
//   = grad_gatesᵀ (4H, T · B) · h_prev (T · B, H)     added up over slices of block_k of the depth T · B, in this order
#pragma once
#include "common/cpu/arena.h"
#include "common/cpu/stored_lanes.h"
#include "lstm/cpu/product.h"
#include "lstm/cpu/thread_partition.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// Sizes of the blocks of this GEMM. A short block_k keeps the rounding error near that of one product per time step.
constexpr int64_t block_m = 192, block_n = 512, block_k = 80;

// Microkernel width in vectors (fewest instructions).
constexpr int weight_vectors = PYTBPTT_ACCUMULATORS >= 24 ? 4 : 2;

template <typename T>
struct WeightWorkspace {
  static constexpr int64_t gates_size = block_m * (block_k + Vec<T>::lanes);
  static constexpr int64_t sums_size = block_m * block_n;
  T* hidden;  // per slice of places and kernel of v vectors: (depth, v, lanes); all threads'
  T* gates;   // (threads, gates_size): (tiles of rows, depth, rows of a tile)
  T* sums;    // (threads, sums_size)

  static int64_t hidden_size(const Lstm& inputs) { return inputs.T * inputs.B * blocks_of<T>(inputs) * Vec<T>::lanes; }

  void allocate(Arena& arena, int threads) {
    gates = arena.allocate<T>(threads * gates_size);
    sums = arena.allocate<T>(threads * sums_size);
  }
};

PYTBPTT_INLINE int64_t weight_slices(const Lstm& inputs) {
  const int64_t places = inputs.T * inputs.B, longest = smaller(block_k, places > 64 ? places / 4 : 16);
  return (places + longest - 1) / longest;
}

// Stride between packed tiles, with one vector of slack for the last store.
template <typename T>
PYTBPTT_INLINE int64_t packed_tile(int64_t depth) {
  return depth * microkernel_rows<weight_vectors> + Vec<T>::lanes;
}

// Lays out gradients of gates [rows.begin, rows.end) at steps and streams [places.begin, places.end), both flat, in
// tiles as high as the microkernel.
template <typename T, typename S>
void pack_grad_gates(const LstmBackward& p, Span rows, Span places, T* to) {
  constexpr int64_t lanes = Vec<T>::lanes, height = microkernel_rows<weight_vectors>;
  // Prefetch distance in rows; the hardware prefetcher does not follow this access pattern.
  constexpr int64_t places_ahead = 8;
  const int64_t tile = packed_tile<T>(places.size());
  for (int64_t place = places.begin; place < places.end; ++place, to += height) {
    const S* from = static_cast<const S*>(p.grad_gates) + place * 4 * p.inputs.H;
    T* to_tile = to;
    for (int64_t first = rows.begin; first < rows.end; first += height, to_tile += tile) {
      __builtin_prefetch(from + places_ahead * 4 * p.inputs.H + first);
      // Full-vector stores: the excess is overwritten by the next row, or falls into the slack.
      for (int64_t row = 0; row < height; row += lanes) {
        store(to_tile + row, load_lanes<T, S>(from + first + row, 4 * p.inputs.H - first - row));
      }
    }
  }
}

// Lays out the hidden states before the same steps, for kernels of at most weight_vectors.
template <typename T, typename S>
void pack_hidden_before(const LstmBackward& p, Span places, T* to) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const Span blocks{0, blocks_of<T>(inputs)};
  for (int64_t place = places.begin; place < places.end; ++place) {
    const bool reset = inputs.reset != nullptr && inputs.reset[place];
    const S* from = place < inputs.B ? static_cast<const S*>(inputs.h0.data) + place * inputs.h0.stream
                                     : static_cast<const S*>(p.output) + (place - inputs.B) * inputs.H;
    for_kernels(blocks, weight_vectors, [&](int64_t block, int vectors) {
      T* row = to + (block * places.size() + (place - places.begin) * vectors) * lanes;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (block + v) * lanes;
        store(row + v * lanes, reset ? V{} : load_lanes<T, S>(from + first, smaller(lanes, inputs.H - first)));
      }
    });
  }
}

// A thread's part of the slices that pack_hidden_before lays out for all.
template <typename T, typename S>
void pack_hidden(const LstmBackward& p, const WeightWorkspace<T>& workspace, int rank, int threads) {
  const Lstm& inputs = p.inputs;
  const int64_t slices = weight_slices(inputs), width = blocks_of<T>(inputs) * Vec<T>::lanes;
  const Span own = part(slices, rank, threads);
  for (int64_t slice = own.begin; slice < own.end; ++slice) {
    const Span places = part(inputs.T * inputs.B, slice, slices);
    pack_hidden_before<T, S>(p, places, workspace.hidden + places.begin * width);
  }
}

template <typename T, int VECTORS>
PYTBPTT_INLINE void add_tile(int64_t rows, int64_t depth, const T* gates, const T* hidden, T* sums, bool accumulate) {
  constexpr int height = microkernel_rows<weight_vectors>;
  tile_rows<T, VECTORS, Layout::column_major, height>(rows, depth, gates, height, hidden, VECTORS * Vec<T>::lanes, sums,
                                                      block_n, accumulate);
}

// Adds what one slice of places contributes to a block of sums, or begins it; `gates` and `hidden` are packed.
template <typename T>
void add_slice(int64_t rows, Span blocks, int64_t depth, const T* gates, const T* hidden, T* sums, bool accumulate) {
  constexpr int64_t lanes = Vec<T>::lanes, height = microkernel_rows<weight_vectors>;
  for_kernels(blocks, weight_vectors, [&](int64_t block, int vectors) {
    const T* b = hidden + block * depth * lanes;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = smaller(height, rows - row);
      const T* a = gates + row / height * packed_tile<T>(depth);
      T* c = sums + row * block_n + (block - blocks.begin) * lanes;
      if constexpr (weight_vectors == 4) {
        if (vectors == 4) {
          add_tile<T, 4>(count, depth, a, b, c, accumulate);
          continue;
        }
      }
      if (vectors == 2) {
        add_tile<T, 2>(count, depth, a, b, c, accumulate);
      } else {
        add_tile<T, 1>(count, depth, a, b, c, accumulate);
      }
    }
  });
}

// A thread's rows of the weight's gradient: the sum over steps and streams of gates' gradient times hidden state.
template <typename T, typename S>
void backward_weight(const LstmBackward& p, const WeightWorkspace<T>& workspace, int rank, int threads) {
  constexpr int64_t lanes = Vec<T>::lanes, height = microkernel_rows<weight_vectors>;
  constexpr int64_t kernels_at_once = block_n / (weight_vectors * lanes);
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H, blocks = blocks_of<T>(inputs), places = inputs.T * inputs.B;
  const int64_t slices = weight_slices(inputs), kernels = (blocks + weight_vectors - 1) / weight_vectors;
  const int64_t panels = (kernels + kernels_at_once - 1) / kernels_at_once;
  T* gates = workspace.gates + rank * workspace.gates_size;
  T* sums = workspace.sums + rank * workspace.sums_size;

  const Span tiles = part((4 * H + height - 1) / height, rank, threads);
  const int64_t end_row = smaller(tiles.end * height, 4 * H);
  for (int64_t first_row = tiles.begin * height; first_row < end_row; first_row += block_m) {
    const Span rows{first_row, smaller(first_row + block_m, end_row)};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Span own = part(kernels, panel, panels);
      const Span columns{weight_vectors * own.begin, smaller(weight_vectors * own.end, blocks)};
      for (int64_t slice = 0; slice < slices; ++slice) {
        const Span summed = part(places, slice, slices);
        pack_grad_gates<T, S>(p, rows, summed, gates);
        add_slice<T>(rows.size(), columns, summed.size(), gates, workspace.hidden + summed.begin * blocks * lanes, sums,
                     slice > 0);
      }
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t block = columns.begin; block < columns.end; ++block) {
          const T* from = sums + (row - rows.begin) * block_n + (block - columns.begin) * lanes;
          store_lanes<T, S>(static_cast<S*>(p.grad_weight) + row * H + block * lanes, load(from),
                            smaller(lanes, H - block * lanes));
        }
      }
    }
  }
}

}  // namespace
}  // namespace pytbptt::cpu::PYTBPTT_ISA
