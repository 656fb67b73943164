// lstm on CUDA tensors: checks, allocation, and which kernels are launched.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/dtypes.h"
#include "cuda/lstm_grad_weight.h"
#include "cuda/lstm_launch.h"

namespace pytbptt::cuda {

namespace {

using at::Tensor;
using std::int64_t;

struct Kernels {
  decltype(&lstm_forward_plan<Arithmetic::float16>) forward_plan, backward_plan;
  decltype(&lstm_forward<Arithmetic::float16>) forward;
  decltype(&lstm_backward<Arithmetic::float16>) backward;
};

template <Arithmetic ARITHMETIC>
Kernels kernels_of() {
  return {&lstm_forward_plan<ARITHMETIC>, &lstm_backward_plan<ARITHMETIC>, &lstm_forward<ARITHMETIC>,
          &lstm_backward<ARITHMETIC>};
}

Kernels kernels(Scalar dtype) {
  switch (dtype) {
    case Scalar::float16:
      return kernels_of<Arithmetic::float16>();
    case Scalar::bfloat16:
      return kernels_of<Arithmetic::bfloat16>();
    default:
      return tf32_is_allowed() ? kernels_of<Arithmetic::tf32>() : kernels_of<Arithmetic::float32>();
  }
}

GpuLimits limits_of_this_gpu() {
  const c10::DeviceIndex device = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr which) {
    int found = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&found, which, device));
    return found;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxRegistersPerMultiprocessor)};
}

// What both directions are given, as a launch wants it; holds the copies of tensors that are not laid out so.
struct Inputs {
  Lstm launch{};
  at::TensorOptions like;  // gates and h; cells are float
  std::vector<Tensor> held;

  // `shaped` is (T, B, …) and of the dtype and device that all others must have.
  Inputs(const char* name, const Tensor& shaped, int64_t H, const Tensor& weight_hh, const Tensor& h0, const Tensor& c0,
         const std::optional<Tensor>& reset)
      : like(shaped.options()) {
    launch.T = shaped.size(0);
    launch.B = shaped.size(1);
    launch.H = H;
    launch.dtype = scalar_of("lstm", name, shaped);
    TORCH_CHECK_VALUE(H <= most_lstm_units && launch.T * launch.B <= most_lstm_rows, "lstm: ", name, ": found shape ",
                      shaped.sizes(), ", expected at most ", most_lstm_units, " hidden units and ", most_lstm_rows,
                      " rows on CUDA");
    const Tensor weight = rows("weight_hh", weight_hh, {4 * H, H}, dtype());
    launch.weight_hh = weight.const_data_ptr();
    launch.weight_stride = weight.stride(0);
    launch.h0 = state_rows("h0", h0, dtype());
    launch.c0 = state_rows("c0", c0, at::kFloat);
    if (reset) {
      check("reset", *reset, {launch.T, launch.B}, at::kBool);
      held.push_back(reset->contiguous());
      launch.reset = held.back().const_data_ptr<bool>();
    }
  }

  at::ScalarType dtype() const { return c10::typeMetaToScalarType(like.dtype()); }

  void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType type) const {
    pytbptt::check("lstm", name, tensor, shape, type, like.device());
  }

  Tensor rows(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType type) {
    check(name, tensor, shape, type);
    held.push_back(with_contiguous_rows(tensor));
    return held.back();
  }

  ChunkRows chunk_rows(const char* name, const Tensor& tensor, int64_t width) {
    const Tensor given = rows(name, tensor, {launch.T, launch.B, width}, dtype());
    return {given.const_data_ptr(), given.stride(0), given.stride(1)};
  }

  StateRows state_rows(const char* name, const Tensor& tensor, at::ScalarType type) {
    const Tensor given = rows(name, tensor, {launch.B, launch.H}, type);
    return {given.const_data_ptr(), given.stride(0)};
  }

  const void* contiguous(const char* name, const Tensor& tensor, int64_t width, at::ScalarType type) {
    check(name, tensor, {launch.T, launch.B, width}, type);
    held.push_back(tensor.contiguous());
    return held.back().const_data_ptr();
  }

  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, like); }
  Tensor empty_cells(at::IntArrayRef shape) const { return at::empty(shape, like.dtype(at::kFloat)); }
  Tensor workspace(const LstmPlan& plan) const { return at::empty({plan.workspace_bytes}, like.dtype(at::kByte)); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& gates, const Tensor& weight_hh,
                                                           const Tensor& h0, const Tensor& c0,
                                                           const std::optional<Tensor>& reset, bool save) {
  TORCH_CHECK_VALUE(gates.dim() == 3 && gates.size(2) % 4 == 0, "lstm: gates: found shape ", gates.sizes(),
                    ", expected (T, B, 4H)");
  const c10::cuda::CUDAGuard guard(gates.device());
  Inputs inputs("gates", gates, gates.size(2) / 4, weight_hh, h0, c0, reset);
  const Lstm& in = inputs.launch;
  Tensor output = inputs.empty({in.T, in.B, in.H});
  Tensor activated = inputs.empty(save ? gates.sizes() : at::IntArrayRef{0});
  Tensor cells = inputs.empty_cells(save ? output.sizes() : at::IntArrayRef{0});
  if (output.numel() == 0) {
    return {output, h0.clone(at::MemoryFormat::Contiguous), c0.clone(at::MemoryFormat::Contiguous), activated, cells};
  }
  Tensor h_n = inputs.empty({in.B, in.H}), c_n = inputs.empty_cells({in.B, in.H});
  const LstmForward launch{in,
                           inputs.chunk_rows("gates", gates, 4 * in.H),
                           output.mutable_data_ptr(),
                           h_n.mutable_data_ptr(),
                           c_n.mutable_data_ptr(),
                           save ? activated.mutable_data_ptr() : nullptr,
                           save ? cells.mutable_data_ptr() : nullptr};
  const Kernels chosen = kernels(in.dtype);
  const LstmPlan plan = chosen.forward_plan(in, limits_of_this_gpu());
  const Tensor workspace = inputs.workspace(plan);
  const char* const error =
      chosen.forward(launch, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "lstm: ", error);
  return {output, h_n, c_n, activated, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_output,
                                                    const std::optional<Tensor>& grad_h_n,
                                                    const std::optional<Tensor>& grad_c_n, const Tensor& weight_hh,
                                                    const Tensor& h0, const Tensor& c0,
                                                    const std::optional<Tensor>& reset, const Tensor& output,
                                                    const Tensor& activated, const Tensor& cells) {
  TORCH_CHECK_VALUE(output.dim() == 3, "lstm: output: found shape ", output.sizes(), ", expected (T, B, H)");
  const c10::cuda::CUDAGuard guard(output.device());
  Inputs inputs("output", output, output.size(2), weight_hh, h0, c0, reset);
  const Lstm& in = inputs.launch;
  LstmBackward launch{};
  launch.inputs = in;
  if (grad_output) launch.grad_output = inputs.chunk_rows("grad_output", *grad_output, in.H);
  if (grad_h_n) launch.grad_h_n = inputs.state_rows("grad_h_n", *grad_h_n, inputs.dtype());
  if (grad_c_n) launch.grad_c_n = inputs.state_rows("grad_c_n", *grad_c_n, at::kFloat);
  launch.output = inputs.contiguous("output", output, in.H, inputs.dtype());
  launch.activated = inputs.contiguous("activated", activated, 4 * in.H, inputs.dtype());
  launch.cells = inputs.contiguous("cells", cells, in.H, at::kFloat);

  Tensor grad_gates = inputs.empty({in.T, in.B, 4 * in.H});
  if (output.numel() == 0) {
    const auto state = [](const std::optional<Tensor>& grad, Tensor otherwise) {
      return grad ? grad->clone(at::MemoryFormat::Contiguous) : otherwise.zero_();
    };
    return {grad_gates, inputs.empty({4 * in.H, in.H}).zero_(), state(grad_h_n, inputs.empty({in.B, in.H})),
            state(grad_c_n, inputs.empty_cells({in.B, in.H}))};
  }
  Tensor grad_h0 = inputs.empty({in.B, in.H}), grad_c0 = inputs.empty_cells({in.B, in.H});
  launch.grad_gates = grad_gates.mutable_data_ptr();
  launch.grad_h0 = grad_h0.mutable_data_ptr();
  launch.grad_c0 = grad_c0.mutable_data_ptr();
  const Kernels chosen = kernels(in.dtype);
  const LstmPlan plan = chosen.backward_plan(in, limits_of_this_gpu());
  const Tensor workspace = inputs.workspace(plan);
  const char* const error =
      chosen.backward(launch, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "lstm_backward: ", error);

  return {grad_gates, lstm_grad_weight(grad_gates, h0, output, reset), grad_h0, grad_c0};
}

}  // namespace

TORCH_LIBRARY_IMPL(pytbptt, CUDA, library) {
  library.impl("lstm", &forward);
  library.impl("lstm_backward", &backward);
}

}  // namespace pytbptt::cuda
