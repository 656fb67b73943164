// lstm backward on one thread of its team, for the target of the including file (target_*.h).
//
// Each thread computes blocks of `lanes` hidden units (thread_partition.h). Step t, from the last to the first:
//
//   pointwise part: the gates' gradients of the thread's units, to grad_gates[t % 2]
//   barrier_group
//   the thread's columns of grad_hidden = grad_gates[t % 2] · packed weights
#pragma once
#include "common/cpu/arena.h"
#include "common/cpu/stored_lanes.h"
#include "lstm/cpu/activations.h"
#include "lstm/cpu/backward_weight.h"
#include "lstm/cpu/product.h"
#include "lstm/cpu/thread_partition.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

template <typename T>
struct BackwardWorkspace {
  int64_t depth, gates_stride, hidden_stride, bytes;
  T* weights;        // per kernel of v blocks: (depth, v, lanes); kernels one after another
  T* grad_gates[2];  // (B, gates_stride) of the even and the odd steps, each row (blocks, 4, lanes)
  T* grad_hidden;    // gradient of h without grad_output's term
  T* grad_cell;      // (B, hidden_stride)
  WeightWorkspace<T> weight;

  BackwardWorkspace(const Lstm& inputs, int threads, void* memory) {
    constexpr int64_t lanes = Vec<T>::lanes;
    const int64_t blocks = blocks_of<T>(inputs);
    Arena arena(memory);
    depth = blocks * 4 * lanes;
    gates_stride = row_stride<T>(depth);
    hidden_stride = row_stride<T>(blocks * lanes);
    // The packed weights are no longer needed when grad_weight is computed, so `weight.hidden` reuses their memory.
    weights = arena.allocate<T>(larger(blocks * lanes * depth, weight.hidden_size(inputs)));
    weight.hidden = weights;
    for (T*& gates : grad_gates) gates = arena.allocate<T>(inputs.B * gates_stride);
    grad_hidden = arena.allocate<T>(inputs.B * hidden_stride);
    grad_cell = arena.allocate<T>(inputs.B * hidden_stride);
    weight.allocate(arena, threads);
    bytes = arena.used();
  }
};

// Copies the columns of weight_hh that belong to some blocks of units, rows in the order of grad_gates. Read row by
// row: reading by columns would touch a new page for every element.
template <typename T, typename S>
void pack_for_backward(const Lstm& inputs, Span packed_blocks, int widest, T* weights) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const auto* weight = static_cast<const S*>(inputs.weight_hh);
  const int64_t H = inputs.H, depth = blocks_of<T>(inputs) * 4 * lanes;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t gate = k / lanes % 4, unit = k / (4 * lanes) * lanes + k % lanes;
    const S* row = weight + (gate * H + unit) * inputs.weight_stride;
    for_kernels(packed_blocks, widest, [&](int64_t block, int vectors) {
      T* to = weights + (block * depth + k * vectors) * lanes;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (block + v) * lanes;
        store(to + v * lanes, unit < H ? load_lanes<T, S>(row + first, smaller(lanes, H - first)) : V{});
      }
    });
  }
}

// Gate gradients of this thread's units at step t; updates grad_cell to the gradient of c_{t-1}.
template <typename T, typename S>
void backward_pointwise(const LstmBackward& p, const BackwardWorkspace<T>& workspace, const ThreadPartition& own,
                        int64_t t) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H, B = inputs.B;
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    const bool reset = is_reset(inputs, t, b);
    const int64_t row = t * B + b;
    const S* activated_row = static_cast<const S*>(p.activated) + row * 4 * H;
    const T* cells = static_cast<const T*>(p.cells) + row * H;
    const T* cells_before = t > 0 ? cells - B * H : static_cast<const T*>(inputs.c0.data) + b * inputs.c0.stream;
    S* grad_row = static_cast<S*>(p.grad_gates) + row * 4 * H;
    T* own_grad_row = workspace.grad_gates[t % 2] + b * workspace.gates_stride;
    const S* grad_output = static_cast<const S*>(p.grad_output.data);
    if (grad_output != nullptr) grad_output += t * p.grad_output.step + b * p.grad_output.stream;
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      const int64_t first = block * lanes, count = smaller(lanes, H - first);
      const int64_t place = b * workspace.hidden_stride + first;
      const S* activated = activated_row + first;
      const V i = load_lanes<T, S>(activated, count), f = load_lanes<T, S>(activated + H, count);
      const V g = load_lanes<T, S>(activated + 2 * H, count), o = load_lanes<T, S>(activated + 3 * H, count);
      const V tanh_c = tanh<T>(load_lanes<T, T>(cells + first, count));
      const V c_before = reset ? V{} : load_lanes<T, T>(cells_before + first, count);
      // Lanes past H must be finite: they are multiplied with zero weights, and inf * 0 = NaN.
      V dh = load_lanes<T, T>(workspace.grad_hidden + place, count);
      if (grad_output != nullptr) dh += load_lanes<T, S>(grad_output + first, count);
      const V dc = load_lanes<T, T>(workspace.grad_cell + place, count) + dh * o * (T{1} - tanh_c * tanh_c);
      const V grads[4] = {dc * g * i * (T{1} - i), dc * c_before * f * (T{1} - f), dc * i * (T{1} - g * g),
                          dh * tanh_c * o * (T{1} - o)};
      store(workspace.grad_cell + place, reset ? V{} : dc * f);
      for (int gate = 0; gate < 4; ++gate) {
        store(own_grad_row + (block * 4 + gate) * lanes, grads[gate]);
        store_lanes<T, S>(grad_row + gate * H + first, grads[gate], count);
      }
    }
  }
}

// The hidden state's gradient before a step, own columns: the step's gates' gradients times weight_hh.
template <typename T>
void backward_product(const Lstm& inputs, const BackwardWorkspace<T>& workspace, const ThreadPartition& own, int64_t t,
                      int widest) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t stride = workspace.hidden_stride, rows = own.streams.size();
  const T* grads = workspace.grad_gates[t % 2] + own.streams.begin * workspace.gates_stride;
  T* hidden = workspace.grad_hidden + own.streams.begin * stride;
  const int64_t slices = slice_count(workspace.depth, inputs.B);
  // k slices keep the gradients in L2 across this thread's columns. The direction alternates from step to step, as in
  // the forward.
  for (int64_t index = 0; index < slices; ++index) {
    const Span k = part(workspace.depth, t % 2 == 0 ? index : slices - 1 - index, slices);
    for_kernels(own.blocks, widest, [&](int64_t block, int vectors) {
      const T* weights = workspace.weights + (block * workspace.depth + k.begin * vectors) * lanes;
      multiply<T>(vectors, rows, k.size(), grads + k.begin, workspace.gates_stride, weights, hidden + block * lanes,
                  stride, index > 0);
    });
  }
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    if (!is_reset(inputs, t, b)) continue;
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      store(workspace.grad_hidden + b * stride + block * lanes, V{});
    }
  }
}

template <typename T, typename S>
void run_backward(const LstmBackward& p, const LstmMember& member, void* memory) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H;
  ThreadPartition own(inputs, blocks_of<T>(inputs), member);
  const BackwardWorkspace<T> workspace(inputs, own.threads(), memory);
  const int widest = max_microkernel_vectors(inputs);

  // All batch groups share the packed weights; each packs some of the column tiles.
  const Span packed = part((own.blocks.size() + widest - 1) / widest, own.group, member.stream_groups);
  pack_for_backward<T, S>(
      inputs,
      {own.blocks.begin + packed.begin * widest, smaller(own.blocks.begin + packed.end * widest, own.blocks.end)},
      widest, workspace.weights);
  const auto for_own = [&](const auto& use) {
    for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
      for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
        const int64_t first = block * lanes;
        use(b, first, smaller(lanes, H - first), b * workspace.hidden_stride + first);
      }
    }
  };
  for_own([&](int64_t b, int64_t first, int64_t count, int64_t place) {
    const auto* grad_h_n = static_cast<const S*>(p.grad_h_n.data);
    const auto* grad_c_n = static_cast<const T*>(p.grad_c_n.data);
    store(workspace.grad_hidden + place,
          load_lanes<T, S>(grad_h_n + b * p.grad_h_n.stream + first, grad_h_n == nullptr ? 0 : count));
    store(workspace.grad_cell + place,
          load_lanes<T, T>(grad_c_n + b * p.grad_c_n.stream + first, grad_c_n == nullptr ? 0 : count));
  });
  own.barrier_all();

  for (int64_t t = inputs.T - 1; t >= 0; --t) {
    backward_pointwise<T, S>(p, workspace, own, t);
    own.barrier_group();
    backward_product<T>(inputs, workspace, own, t, widest);
  }
  for_own([&](int64_t b, int64_t first, int64_t count, int64_t place) {
    store_lanes<T, S>(static_cast<S*>(p.grad_h0) + b * H + first, load(workspace.grad_hidden + place), count);
    store_lanes<T, T>(static_cast<T*>(p.grad_c0) + b * H + first, load(workspace.grad_cell + place), count);
  });
  own.barrier_all();
  pack_hidden<T, S>(p, workspace.weight, member.rank, own.threads());
  own.barrier_all();
  backward_weight<T, S>(p, workspace.weight, member.rank, own.threads());
}

int64_t backward_workspace(const LstmBackward& p, int threads) {
  return p.inputs.dtype == Scalar::float64 ? BackwardWorkspace<double>(p.inputs, threads, nullptr).bytes
                                           : BackwardWorkspace<float>(p.inputs, threads, nullptr).bytes;
}

void backward(const LstmBackward& p, const LstmMember& member, void* workspace) {
  switch (p.inputs.dtype) {
    case Scalar::float32:
      return run_backward<float, float>(p, member, workspace);
    case Scalar::float64:
      return run_backward<double, double>(p, member, workspace);
    case Scalar::bfloat16:
      return run_backward<float, Bfloat16>(p, member, workspace);
    case Scalar::float16:
      return run_backward<float, Float16>(p, member, workspace);
  }
}

}  // namespace

const LstmBackwardKernel lstm_backward = {backward_workspace, backward};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
