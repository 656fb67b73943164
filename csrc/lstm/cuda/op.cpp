// lstm on CUDA tensors: which kernels are launched.
#include <cuda_runtime_api.h>

#include "common/cuda/host.h"
#include "lstm/cuda/grad_weight.h"
#include "lstm/cuda/launch.h"
#include "lstm/inputs.h"

namespace pytbptt::cuda {

namespace {

struct Functions {
  decltype(&lstm_forward_plan<ComputeType::float16>) forward_plan, backward_plan;
  decltype(&lstm_forward<ComputeType::float16>) forward;
  decltype(&lstm_backward<ComputeType::float16>) backward;
};

template <ComputeType COMPUTE_TYPE>
Functions make_functions() {
  return {&lstm_forward_plan<COMPUTE_TYPE>, &lstm_backward_plan<COMPUTE_TYPE>, &lstm_forward<COMPUTE_TYPE>,
          &lstm_backward<COMPUTE_TYPE>};
}

Functions select_functions(Scalar dtype, bool tf32) {
  return dispatch_compute_type(dtype, tf32, [](auto compute_type) { return make_functions<compute_type()>(); });
}

GpuLimits limits_of(const TensorDevice& device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int found = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&found, which, device.index);
    throw_if("lstm", error == cudaSuccess ? nullptr : cudaGetErrorString(error));
    return found;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxRegistersPerMultiprocessor)};
}

struct Backend {
  static void check(const char* name, const Tensor& shaped, std::int64_t H) {
    check_supported("lstm", name, shaped);
    if (H > max_lstm_units || shaped.size(0) * shaped.size(1) > max_lstm_rows) {
      reject("lstm: ", name, ": found shape ", text(shaped.sizes()), ", expected at most ", max_lstm_units,
             " hidden units and ", max_lstm_rows, " rows on CUDA");
    }
  }

  static void forward(const LstmInputs& inputs, const LstmForward& launch, bool tf32) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.device.index);
    const Functions chosen = select_functions(launch.inputs.dtype, tf32);
    const LstmPlan plan = chosen.forward_plan(launch.inputs, limits_of(inputs.device));
    const Tensor workspace = allocate({plan.workspace_bytes}, ScalarType::Byte, inputs.device);
    throw_if("lstm", chosen.forward(launch, plan, workspace.mutable_data_ptr(), current_stream(inputs.device)));
  }

  static Tensor backward(const LstmInputs& inputs, const LstmBackward& launch, bool tf32, const Tensor& grad_gates,
                         const Tensor& h0, const Tensor& output, const std::optional<Tensor>& reset) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.device.index);
    const Functions chosen = select_functions(launch.inputs.dtype, tf32);
    const LstmPlan plan = chosen.backward_plan(launch.inputs, limits_of(inputs.device));
    const Tensor workspace = allocate({plan.workspace_bytes}, ScalarType::Byte, inputs.device);
    throw_if("lstm_backward",
             chosen.backward(launch, plan, workspace.mutable_data_ptr(), current_stream(inputs.device)));
    return lstm_grad_weight(grad_gates, h0, output, reset);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pytbptt, CUDA, library) {
  library.impl("lstm", TORCH_BOX(&pytbptt::lstm<Backend>));
  library.impl("lstm_backward", TORCH_BOX(&pytbptt::lstm_backward<Backend>));
}

}  // namespace pytbptt::cuda
