// lstm forward on one thread of its team, for the target of the including file (target_*.h).
//
// Each thread computes blocks of `lanes` hidden units (thread_partition.h). Step t, for each block:
//
//   tile (streams, 4 gates, lanes) = hidden[t % 2] · packed weights of the block       stays in L1
//   pointwise part: c, and h to output and to hidden[(t + 1) % 2]
//
// and barrier_group, after which hidden[(t + 1) % 2] is complete.
#pragma once
#include "common/cpu/arena.h"
#include "common/cpu/stored_lanes.h"
#include "lstm/cpu/activations.h"
#include "lstm/cpu/product.h"
#include "lstm/cpu/thread_partition.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

template <typename T>
struct ForwardWorkspace {
  // Whether all weights are packed before the first step. For T = 1 each slice is packed just before use, since packing
  // all of them first would write them to memory only to read them once.
  bool packs_ahead;
  int64_t hidden_stride, tile_size, slice_size, bytes;
  T* weights;    // (blocks, 4 / vectors, H, vectors, lanes), or a slice of each thread's own: (threads, slice_size)
  T* hidden[2];  // (B, hidden_stride) before the even and the odd steps; zero where reset
  T* cell;       // (B, hidden_stride) before the next step; zero where reset
  T* tiles;      // (threads, tile_size)

  ForwardWorkspace(const Lstm& inputs, int threads, void* memory) {
    constexpr int64_t lanes = Vec<T>::lanes;
    Arena arena(memory);
    hidden_stride = row_stride<T>(blocks_of<T>(inputs) * lanes);
    tile_size = inputs.B * 4 * lanes;
    packs_ahead = inputs.T > 1;
    slice_size = slice_depth * 4 * lanes;
    weights = arena.allocate<T>(packs_ahead ? blocks_of<T>(inputs) * 4 * lanes * inputs.H : threads * slice_size);
    for (T*& state : hidden) state = arena.allocate<T>(inputs.B * hidden_stride);
    cell = arena.allocate<T>(inputs.B * hidden_stride);
    tiles = arena.allocate<T>(threads * tile_size);
    bytes = arena.used();
  }
};

// Lays out `terms` of the rows of weight_hh that belong to one block of units, of `vectors` gates side by side:
// (terms, vectors, lanes).
template <typename T, typename S>
void pack_for_forward(const Lstm& inputs, int64_t block, int first_gate, int vectors, Span terms, T* to) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const auto* weight = static_cast<const S*>(inputs.weight_hh);
  const int64_t units = smaller(lanes, inputs.H - block * lanes);
  for (int v = 0; v < vectors; ++v, to += lanes) {
    const S* rows = weight + ((first_gate + v) * inputs.H + block * lanes) * inputs.weight_stride;
    for (int64_t k = terms.begin; k < terms.end; k += lanes) {
      const int64_t count = smaller(lanes, inputs.H - k), wanted = smaller(lanes, terms.end - k);
      typename Vec<T>::type square[lanes];
      for (int64_t unit = 0; unit < lanes; ++unit) {
        square[unit] =
            unit < units ? load_lanes<T, S>(rows + unit * inputs.weight_stride + k, count) : typename Vec<T>::type{};
      }
      transpose<T>(square);
      T* column = to + (k - terms.begin) * vectors * lanes;
      for (int64_t index = 0; index < wanted; ++index) store(column + index * vectors * lanes, square[index]);
    }
  }
}

// One block of units at one step, in streams [streams.begin, streams.end), which are `rows` of the tile.
template <typename T, typename S>
void forward_block(const LstmForward& p, const ForwardWorkspace<T>& workspace, int64_t t, int64_t block, Span streams,
                   int vectors, int rank) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H, first = block * lanes, count = smaller(lanes, H - first);
  const int64_t rows = streams.size(), stride = workspace.hidden_stride;
  const int64_t width = vectors * lanes, half = rows * width;  // the tile is (4 / vectors, rows, vectors, lanes)
  const T* hidden = workspace.hidden[t % 2] + streams.begin * stride;
  T* const tile = workspace.tiles + rank * workspace.tile_size;

  const S* gates = static_cast<const S*>(p.gates.data) + t * p.gates.step + first;
  for (int64_t b = streams.begin; b < streams.end; ++b) {
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + b * p.gates.stream + gate * H);
  }
  const int64_t slices = slice_count(H, inputs.B);
  for (int first_gate = 0; first_gate < 4; first_gate += vectors) {
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Span k = part(H, slice, slices);
      T* const weights =
          workspace.weights + (workspace.packs_ahead ? (block * 4 + first_gate) * lanes * H + k.begin * width
                                                     : rank * workspace.slice_size);
      if (!workspace.packs_ahead) pack_for_forward<T, S>(inputs, block, first_gate, vectors, k, weights);
      multiply<T>(vectors, rows, k.size(), hidden + k.begin, stride, weights, tile + first_gate / vectors * half, width,
                  slice > 0);
    }
  }

  T* next_hidden = workspace.hidden[(t + 1) % 2];
  // Add the input projection after the sum over k, because starting from the larger term would lose precision.
  const auto gate_of = [&](int64_t row, int gate) {
    const V sum = load(tile + gate / vectors * half + row * width + gate % vectors * lanes);
    return sum + load_lanes<T, S>(gates + (streams.begin + row) * p.gates.stream + gate * H, count);
  };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = streams.begin + row, place = b * stride + first, in_chunk = (t * inputs.B + b) * H + first;
    const V i = sigmoid<T>(gate_of(row, 0)), f = sigmoid<T>(gate_of(row, 1));
    const V g = tanh<T>(gate_of(row, 2)), o = sigmoid<T>(gate_of(row, 3));
    const V c = f * load(workspace.cell + place) + i * g;
    const V h = as_stored<T, S>(o * tanh<T>(c));
    const bool reset = is_reset(inputs, t + 1, b);
    store(workspace.cell + place, reset ? V{} : c);
    store(next_hidden + place, reset ? V{} : h);
    store_lanes<T, S>(static_cast<S*>(p.output) + in_chunk, h, count);
    if (p.activated != nullptr) {
      S* activated = static_cast<S*>(p.activated) + (t * inputs.B + b) * 4 * H + first;
      store_lanes<T, S>(activated, i, count);
      store_lanes<T, S>(activated + H, f, count);
      store_lanes<T, S>(activated + 2 * H, g, count);
      store_lanes<T, S>(activated + 3 * H, o, count);
      store_lanes<T, T>(static_cast<T*>(p.cells) + in_chunk, c, count);
    }
    if (t == inputs.T - 1) {
      store_lanes<T, S>(static_cast<S*>(p.h_n) + b * H + first, h, count);
      store_lanes<T, T>(static_cast<T*>(p.c_n) + b * H + first, c, count);
    }
  }
}

template <typename T, typename S>
void run_forward(const LstmForward& p, const LstmMember& member, void* memory) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t blocks = blocks_of<T>(inputs);
  ThreadPartition own(inputs, blocks, member);
  const ForwardWorkspace<T> workspace(inputs, own.threads(), memory);
  const int vectors = max_microkernel_vectors(inputs);

  const Span packs = workspace.packs_ahead ? part(blocks, member.rank, own.threads()) : Span{0, 0};
  for (int64_t block = packs.begin; block < packs.end; ++block) {
    for (int gate = 0; gate < 4; gate += vectors) {
      pack_for_forward<T, S>(inputs, block, gate, vectors, {0, inputs.H},
                             workspace.weights + (block * 4 + gate) * lanes * inputs.H);
    }
  }
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    const bool reset = is_reset(inputs, 0, b);
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      const int64_t first = block * lanes, count = reset ? 0 : smaller(lanes, inputs.H - first);
      const S* h0 = static_cast<const S*>(inputs.h0.data) + b * inputs.h0.stream + first;
      const T* c0 = static_cast<const T*>(inputs.c0.data) + b * inputs.c0.stream + first;
      store(workspace.hidden[0] + b * workspace.hidden_stride + first, load_lanes<T, S>(h0, count));
      store(workspace.cell + b * workspace.hidden_stride + first, load_lanes<T, T>(c0, count));
    }
  }
  own.barrier_all();

  for (int64_t t = 0; t < inputs.T; ++t) {
    // Alternate direction each step, so that the weights used last are still in L2.
    for (int64_t index = own.blocks.begin; index < own.blocks.end; ++index) {
      const int64_t block = t % 2 == 0 ? index : own.blocks.begin + own.blocks.end - 1 - index;
      forward_block<T, S>(p, workspace, t, block, own.streams, vectors, member.rank);
    }
    own.barrier_group();
  }
}

int64_t forward_workspace(const LstmForward& p, int threads) {
  return p.inputs.dtype == Scalar::float64 ? ForwardWorkspace<double>(p.inputs, threads, nullptr).bytes
                                           : ForwardWorkspace<float>(p.inputs, threads, nullptr).bytes;
}

void forward(const LstmForward& p, const LstmMember& member, void* workspace) {
  switch (p.inputs.dtype) {
    case Scalar::float32:
      return run_forward<float, float>(p, member, workspace);
    case Scalar::float64:
      return run_forward<double, double>(p, member, workspace);
    case Scalar::bfloat16:
      return run_forward<float, Bfloat16>(p, member, workspace);
    case Scalar::float16:
      return run_forward<float, Float16>(p, member, workspace);
  }
}

}  // namespace

const LstmForwardKernel lstm_forward = {forward_workspace, forward};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
