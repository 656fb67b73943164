#include "lstm/cuda/backward.cuh"

template pytbptt::cuda::LstmPlan pytbptt::cuda::lstm_backward_plan<pytbptt::cuda::ComputeType::float16>(
    const Lstm& inputs, const GpuLimits& limits);
template const char* pytbptt::cuda::lstm_backward<pytbptt::cuda::ComputeType::float16>(const LstmBackward& launch,
                                                                                       const LstmPlan& plan,
                                                                                       void* workspace,
                                                                                       CUstream_st* stream);
