// The backward of the LSTM: the phases of recurrence.cuh. Each thread keeps grad_c.
//
//   phase      0             1             …   T - 1    T
//   computes   step T - 1    step T - 2    …   step 0   grad_h0
//   publishes  grad_gates    grad_gates    …   grad_gates        of the step (depth 4H)
#pragma once
#include "lstm/cuda/recurrence.cuh"

namespace pytbptt::cuda {

struct BackwardPhases {
  Recurrence recurrence;
  LstmBackward backward;
};

template <typename Kind>
struct BackwardCell {
  using F = Fragments<Kind>;
  using E = typename F::Element;
  static constexpr int k_per_unit = 4, units = lstm_tile_rows, octets_per_round = 4;
  static constexpr bool is_backward = true;
  struct Inputs {
    float activated[4], cell, cell_before, grad_h;
  };

  // Phase p - 1 computed step t + 1 = T - p.
  PYTBPTT_DEVICE bool reset_before(int phase, int b) const {
    return phase > 0 && is_reset(backward.inputs, backward.inputs.T - phase, b);
  }

  static PYTBPTT_DEVICE int sums_tile(int octet) { return octet / 2; }
  static PYTBPTT_DEVICE int sums_row(int octet, int) { return octet % 2 * 8 + thread() % 8; }

  // k index: gate k % 4 of unit k / 4.
  static PYTBPTT_DEVICE int64_t weight(const Lstm& in, int first_unit, int row, int k) {
    const int unit = first_unit + row;
    return unit < in.H && k < 4 * in.H ? (k % 4 * in.H + k / 4) * in.weight_stride + unit : -1;
  }

  PYTBPTT_DEVICE float first(int b, int unit) const {
    const StateRows& grad_c_n = backward.grad_c_n;
    if (grad_c_n.data == nullptr) return 0;
    return load(static_cast<const float*>(grad_c_n.data) + b * grad_c_n.stream + unit);
  }

  PYTBPTT_DEVICE float* last(int b, int unit) const {
    return static_cast<float*>(backward.grad_c0) + b * backward.inputs.H + unit;
  }

  PYTBPTT_DEVICE Inputs fetch(int phase, int b, int unit) const {
    const Lstm& in = backward.inputs;
    const int64_t t = in.T - 1 - phase, row = t * in.B + b;
    Inputs inputs{};
    if (phase == in.T) return inputs;

    const E* const activated = static_cast<const E*>(backward.activated) + row * 4 * in.H + unit;
    PYTBPTT_UNROLL
    for (int gate = 0; gate < 4; ++gate) inputs.activated[gate] = to_float(load(activated + gate * in.H));
    const auto* const cells = static_cast<const float*>(backward.cells) + row * in.H;
    inputs.cell = load(cells + unit);
    if (!is_reset(in, t, b)) {
      const float* const before =
          t > 0 ? cells - in.B * in.H : static_cast<const float*>(in.c0.data) + b * in.c0.stream;
      inputs.cell_before = load(before + unit);
    }
    const ChunkRows& grad_output = backward.grad_output;
    if (grad_output.data != nullptr) {
      const E* const grads = static_cast<const E*>(grad_output.data) + t * grad_output.step + b * grad_output.stream;
      inputs.grad_h = to_float(load(grads + unit));
    }
    const StateRows& grad_h_n = backward.grad_h_n;
    if (phase == 0 && grad_h_n.data != nullptr) {
      inputs.grad_h += to_float(load(static_cast<const E*>(grad_h_n.data) + b * grad_h_n.stream + unit));
    }
    return inputs;
  }

  template <typename Total>
  PYTBPTT_DEVICE float finish(int phase, int b, int unit, bool reset, const Inputs& inputs, float grad_cell,
                              Total total, E* to) const {
    const Lstm& in = backward.inputs;
    const float from_next = phase == 0 || reset ? 0.0f : total(0);
    if (phase == in.T) {
      store(static_cast<E*>(backward.grad_h0) + b * in.H + unit, from_float<E>(from_next));
      return grad_cell;
    }
    const float grad_h = inputs.grad_h + from_next;
    const float i = inputs.activated[0], f = inputs.activated[1], g = inputs.activated[2], o = inputs.activated[3];
    const float tanh_c = device::tanh(inputs.cell);
    const float grad_c = grad_cell + grad_h * o * (1 - tanh_c * tanh_c);
    const float grads[4] = {grad_c * g * i * (1 - i), grad_c * inputs.cell_before * f * (1 - f),
                            grad_c * i * (1 - g * g), grad_h * tanh_c * o * (1 - o)};
    E* const grad_gates = static_cast<E*>(backward.grad_gates) + ((in.T - 1 - phase) * in.B + b) * 4 * in.H + unit;
    PYTBPTT_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      store(grad_gates + gate * in.H, from_float<E>(grads[gate]));
      F::publish(to + gate, grads[gate]);
    }
    return grad_c * f;
  }

  const LstmBackward& backward;
};

template <typename Kind, int M, int N>
PYTBPTT_KERNEL(lstm_threads, 1)
lstm_backward_kernel(const BackwardPhases launch) {
  run_phases<Kind, M, N>(launch.recurrence, BackwardCell<Kind>{launch.backward});
}

template <typename Kind, int N>
auto backward_kernel_of_pass(const LstmPlan& plan) {
  static_assert(max_backward_tiles == 2, "the largest kernel");
  return plan.row_tiles == 1 ? &lstm_backward_kernel<Kind, 1, N> : &lstm_backward_kernel<Kind, 2, N>;
}

template <typename Kind>
auto backward_kernel(const LstmPlan& plan) {
  return plan.pass_tiles == 1 ? backward_kernel_of_pass<Kind, 1>(plan)
                              : backward_kernel_of_pass<Kind, max_pass_tiles>(plan);
}

template <ComputeType COMPUTE_TYPE>
LstmPlan lstm_backward_plan(const Lstm& in, const GpuLimits& limits) {
  const LstmPlan plan = plan_lstm(true, in.H, in.B, COMPUTE_TYPE, limits);
  return fits(backward_kernel<KindOf<COMPUTE_TYPE>>(plan), plan)
             ? plan
             : plan_lstm_per_step(true, in.H, in.B, COMPUTE_TYPE, limits);
}

template <ComputeType COMPUTE_TYPE>
const char* lstm_backward(const LstmBackward& backward, const LstmPlan& plan, void* workspace, CUstream_st* stream) {
  const BackwardPhases launch{{backward.inputs, plan}, backward};
  return launch_phases(backward_kernel<KindOf<COMPUTE_TYPE>>(plan), launch, workspace, stream);
}

}  // namespace pytbptt::cuda
