// rel_attention on CUDA tensors: which kernels are launched.
#include "common/cuda/host.h"
#include "rel_attention/cuda/launch.h"
#include "rel_attention/inputs.h"

namespace pytbptt::cuda {

namespace {

struct Functions {
  decltype(&rel_attention_forward<ComputeType::float16>) forward;
  decltype(&rel_attention_forward_workspace<ComputeType::float16>) forward_workspace;
  decltype(&rel_attention_backward<ComputeType::float16>) backward;
  decltype(&rel_attention_backward_workspace<ComputeType::float16>) backward_workspace;
};

template <ComputeType COMPUTE_TYPE>
Functions make_functions() {
  return {&rel_attention_forward<COMPUTE_TYPE>, &rel_attention_forward_workspace<COMPUTE_TYPE>,
          &rel_attention_backward<COMPUTE_TYPE>, &rel_attention_backward_workspace<COMPUTE_TYPE>};
}

Functions select_functions(Scalar dtype, bool tf32) {
  return dispatch_compute_type(dtype, tf32, [](auto compute_type) { return make_functions<compute_type()>(); });
}

struct Backend {
  static void check(const Tensor& query) {
    check_supported("rel_attention", "query", query);
    if (query.dim() == 4 && query.size(3) > largest_head_size) {
      reject("rel_attention: query: found head size ", query.size(3), ", expected at most ", largest_head_size,
             " on CUDA");
    }
  }

  static void forward(const RelAttentionInputs& inputs, const RelAttentionForward& launch, bool tf32) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.device.index);
    const Functions chosen = select_functions(launch.inputs.dtype, tf32);
    const Tensor workspace = inputs.workspace(chosen.forward_workspace(launch.inputs));
    throw_if("rel_attention", chosen.forward(launch, workspace.mutable_data_ptr(), current_stream(inputs.device)));
  }

  static void backward(const RelAttentionInputs& inputs, const RelAttentionBackward& launch, bool tf32) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.device.index);
    const Functions chosen = select_functions(launch.inputs.dtype, tf32);
    const Tensor workspace = inputs.workspace(chosen.backward_workspace(launch));
    throw_if("rel_attention_backward",
             chosen.backward(launch, workspace.mutable_data_ptr(), current_stream(inputs.device)));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pytbptt, CUDA, library) {
  library.impl("rel_attention", TORCH_BOX(&pytbptt::rel_attention<Backend>));
  library.impl("rel_attention_backward", TORCH_BOX(&pytbptt::rel_attention_backward<Backend>));
}

}  // namespace pytbptt::cuda
