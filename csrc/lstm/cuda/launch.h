// What the CUDA kernels of lstm offer to code that is compiled without nvcc.
#pragma once
#include "lstm/cuda/plan.h"
#include "lstm/params.h"

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace pytbptt::cuda {

// Kernels count units, places in the depth, and phases times passes in 32 bits.
constexpr std::int64_t most_lstm_units = 1 << 28, most_lstm_rows = 1 << 30;  // H, and T · B

// Each is compiled in instantiate/. T, B and H are at least 1.
//
// The plan for the current device: that of plan_lstm, unless its blocks do not fit there at once after all.
template <Arithmetic ARITHMETIC>
LstmPlan lstm_forward_plan(const Lstm& inputs, const GpuLimits& limits);
template <Arithmetic ARITHMETIC>
LstmPlan lstm_backward_plan(const Lstm& inputs, const GpuLimits& limits);

// Puts its kernels on the stream of the current device without waiting for them, and returns the text of an error, or
// nullptr. `workspace` has the plan's workspace_bytes, starts at a multiple of 16, may hold anything, and is used until
// the last kernel has run.
template <Arithmetic ARITHMETIC>
const char* lstm_forward(const LstmForward& launch, const LstmPlan& plan, void* workspace, CUstream_st* stream);
// All but grad_weight, which is one product of matrices: grad_gates, transposed, times what h was before each step.
template <Arithmetic ARITHMETIC>
const char* lstm_backward(const LstmBackward& launch, const LstmPlan& plan, void* workspace, CUstream_st* stream);

}  // namespace pytbptt::cuda
