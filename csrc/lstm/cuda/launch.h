// Host interface of the lstm CUDA kernels.
#pragma once
#include "lstm/cuda/plan.h"
#include "lstm/params.h"

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace pytbptt::cuda {

// Limits of the kernels' 32-bit indices: hidden size, 4H along k, phases × passes.
constexpr std::int64_t max_lstm_units = 1 << 28, max_lstm_rows = 1 << 30;  // H, and T · B

// Each is compiled in instantiate/. T, B and H are at least 1.
//
// The plan for the current device: plan_lstm's plan, or the per-step plan if the grid cannot be co-resident.
template <ComputeType COMPUTE_TYPE>
LstmPlan lstm_forward_plan(const Lstm& inputs, const GpuLimits& limits);
template <ComputeType COMPUTE_TYPE>
LstmPlan lstm_backward_plan(const Lstm& inputs, const GpuLimits& limits);

// Puts its kernels on the stream of the current device without waiting for them, and returns the text of an error, or
// nullptr. `workspace` has the plan's workspace_bytes, starts at a multiple of 16, uninitialised, and is used until the
// last kernel has run.
template <ComputeType COMPUTE_TYPE>
const char* lstm_forward(const LstmForward& launch, const LstmPlan& plan, void* workspace, CUstream_st* stream);
// All but grad_weight, which is one product of matrices: grad_gates, transposed, times what h was before each step.
template <ComputeType COMPUTE_TYPE>
const char* lstm_backward(const LstmBackward& launch, const LstmPlan& plan, void* workspace, CUstream_st* stream);

}  // namespace pytbptt::cuda
