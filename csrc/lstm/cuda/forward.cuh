// The forward of the LSTM: the phases of recurrence.cuh. Each thread keeps c.
//
//   phase      0    1        2        …   T
//   computes        step 0   step 1   …   step T - 1
//   publishes  h0   h        h        …              h of all units (depth H); 0 if the next step is reset
#pragma once
#include "lstm/cuda/recurrence.cuh"

namespace pytbptt::cuda {

struct ForwardPhases {
  Recurrence recurrence;
  LstmForward forward;
};

template <typename Kind>
struct ForwardCell {
  using F = Fragments<Kind>;
  using E = typename F::Element;
  static constexpr int k_per_unit = 1, units = lstm_tile_rows / 4, octets_per_round = 1;
  static constexpr bool is_backward = false;
  struct Inputs {
    float gates[4];
  };

  PYTBPTT_DEVICE bool reset_before(int phase, int b) const {
    return phase > 0 && is_reset(forward.inputs, phase - 1, b);
  }

  static PYTBPTT_DEVICE int sums_tile(int) { return thread() % 8 / units; }
  static PYTBPTT_DEVICE int sums_row(int, int gate) { return gate * units + thread() % units; }

  static PYTBPTT_DEVICE int64_t weight(const Lstm& in, int first_unit, int row, int k) {
    const int unit = first_unit + row / lstm_tile_rows * units + row % units;
    const int gate = row % lstm_tile_rows / units;
    return unit < in.H && k < in.H ? (gate * in.H + unit) * in.weight_stride + k : -1;
  }

  PYTBPTT_DEVICE float first(int b, int unit) const {
    const StateRows& c0 = forward.inputs.c0;
    return load(static_cast<const float*>(c0.data) + b * c0.stream + unit);
  }

  PYTBPTT_DEVICE float* last(int b, int unit) const {
    return static_cast<float*>(forward.c_n) + b * forward.inputs.H + unit;
  }

  PYTBPTT_DEVICE Inputs fetch(int phase, int b, int unit) const {
    const Lstm& in = forward.inputs;
    Inputs inputs{};
    if (phase == 0) return inputs;
    const int64_t t = phase - 1;
    const E* const gates =
        static_cast<const E*>(forward.gates.data) + t * forward.gates.step + b * forward.gates.stream;
    PYTBPTT_UNROLL
    for (int gate = 0; gate < 4; ++gate) inputs.gates[gate] = to_float(load(gates + gate * in.H + unit));
    return inputs;
  }

  template <typename Total>
  PYTBPTT_DEVICE float finish(int phase, int b, int unit, bool /*reset*/, const Inputs& inputs, float cell, Total total,
                              E* to) const {
    const Lstm& in = forward.inputs;
    // Read here, not in fetch(): a register held during the products would spill on sm_80.
    const bool reset_after = phase < in.T && is_reset(in, phase, b);
    // After a reset, publish zeros. 0 times a non-finite weight is NaN, as in PyTorch.
    if (phase == 0) {
      const float h0 = to_float(load(static_cast<const E*>(in.h0.data) + b * in.h0.stream + unit));
      F::publish(to, reset_after ? 0.0f : h0);
      return cell;
    }
    const int64_t t = phase - 1, row = t * in.B + b;
    float gates[4];
    PYTBPTT_UNROLL
    for (int gate = 0; gate < 4; ++gate) gates[gate] = inputs.gates[gate] + total(gate);
    const float i = sigmoid(gates[0]), f = sigmoid(gates[1]), g = device::tanh(gates[2]), o = sigmoid(gates[3]);
    const float c = fma(f, cell, i * g), h = o * device::tanh(c);
    store(static_cast<E*>(forward.output) + row * in.H + unit, from_float<E>(h));
    if (t + 1 == in.T) {
      store(static_cast<E*>(forward.h_n) + b * in.H + unit, from_float<E>(h));
    } else {
      F::publish(to, reset_after ? 0.0f : h);
    }
    if (forward.activated == nullptr) return c;
    E* const activated = static_cast<E*>(forward.activated) + row * 4 * in.H + unit;
    store(activated, from_float<E>(i));
    store(activated + in.H, from_float<E>(f));
    store(activated + 2 * in.H, from_float<E>(g));
    store(activated + 3 * in.H, from_float<E>(o));
    store(static_cast<float*>(forward.cells) + row * in.H + unit, c);
    return c;
  }

  const LstmForward& forward;
};

template <typename Kind, int M, int N>
PYTBPTT_KERNEL(lstm_threads, 1)
lstm_forward_kernel(const ForwardPhases launch) {
  run_phases<Kind, M, N>(launch.recurrence, ForwardCell<Kind>{launch.forward});
}

template <typename Kind, int N>
auto forward_kernel_of_pass(const LstmPlan& plan) {
  static_assert(max_forward_tiles == 5, "the largest kernel");
  switch (plan.row_tiles) {
    case 1:
      return &lstm_forward_kernel<Kind, 1, N>;
    case 2:
      return &lstm_forward_kernel<Kind, 2, N>;
    case 3:
      return &lstm_forward_kernel<Kind, 3, N>;
    case 4:
      return &lstm_forward_kernel<Kind, 4, N>;
    default:
      return &lstm_forward_kernel<Kind, 5, N>;
  }
}

template <typename Kind>
auto forward_kernel(const LstmPlan& plan) {
  return plan.pass_tiles == 1 ? forward_kernel_of_pass<Kind, 1>(plan)
                              : forward_kernel_of_pass<Kind, max_pass_tiles>(plan);
}

template <ComputeType COMPUTE_TYPE>
LstmPlan lstm_forward_plan(const Lstm& in, const GpuLimits& limits) {
  const LstmPlan plan = plan_lstm(false, in.H, in.B, COMPUTE_TYPE, limits);
  return fits(forward_kernel<KindOf<COMPUTE_TYPE>>(plan), plan)
             ? plan
             : plan_lstm_per_step(false, in.H, in.B, COMPUTE_TYPE, limits);
}

template <ComputeType COMPUTE_TYPE>
const char* lstm_forward(const LstmForward& forward, const LstmPlan& plan, void* workspace, CUstream_st* stream) {
  const ForwardPhases launch{{forward.inputs, plan}, forward};
  return launch_phases(forward_kernel<KindOf<COMPUTE_TYPE>>(plan), launch, workspace, stream);
}

}  // namespace pytbptt::cuda
