#include "rel_attention/cuda/backward.cuh"

template std::int64_t pytbptt::cuda::rel_attention_backward_workspace<pytbptt::cuda::ComputeType::float32>(
    const RelAttentionBackward& launch);
template const char* pytbptt::cuda::rel_attention_backward<pytbptt::cuda::ComputeType::float32>(
    const RelAttentionBackward& launch, void* workspace, CUstream_st* stream);
