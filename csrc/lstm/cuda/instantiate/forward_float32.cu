#include "lstm/cuda/forward.cuh"

template pytbptt::cuda::LstmPlan pytbptt::cuda::lstm_forward_plan<pytbptt::cuda::ComputeType::float32>(
    const Lstm& inputs, const GpuLimits& limits);
template const char* pytbptt::cuda::lstm_forward<pytbptt::cuda::ComputeType::float32>(const LstmForward& launch,
                                                                                      const LstmPlan& plan,
                                                                                      void* workspace,
                                                                                      CUstream_st* stream);
