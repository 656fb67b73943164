// What the CUDA kernels of rel_attention offer to code that is compiled without nvcc.
#pragma once
#include "common/cuda/compute_type.h"
#include "rel_attention/params.h"

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace pytbptt::cuda {

constexpr std::int64_t largest_head_size = 128;

// Each is compiled in instantiate/, puts its kernels on the stream of the current device without waiting for them, and
// returns the text of an error, or nullptr. H, D and R are at least 1 and D at most `largest_head_size`. `workspace`
// starts at a multiple of 16, may hold anything, and is used until the last kernel has run.
template <ComputeType COMPUTE_TYPE>
const char* rel_attention_forward(const RelAttentionForward& launch, void* workspace, CUstream_st* stream);
template <ComputeType COMPUTE_TYPE>
std::int64_t rel_attention_forward_workspace(const RelAttention& inputs);  // bytes

template <ComputeType COMPUTE_TYPE>
const char* rel_attention_backward(const RelAttentionBackward& launch, void* workspace, CUstream_st* stream);
template <ComputeType COMPUTE_TYPE>
std::int64_t rel_attention_backward_workspace(const RelAttentionBackward& launch);  // bytes

}  // namespace pytbptt::cuda
