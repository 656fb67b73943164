#include "rel_attention/cuda/forward.cuh"

template std::int64_t pytbptt::cuda::rel_attention_forward_workspace<pytbptt::cuda::ComputeType::float32>(
    const RelAttention& inputs);
template const char* pytbptt::cuda::rel_attention_forward<pytbptt::cuda::ComputeType::float32>(
    const RelAttentionForward& launch, void* workspace, CUstream_st* stream);
