// lstm on every device: checks, allocation, and what its kernels are given.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "lstm/params.h"

namespace pytbptt {

// Parameters common to forward and backward. Keeps contiguous copies alive where an argument's last dimension is not
// contiguous.
struct LstmInputs {
  Lstm launch{};
  ScalarType dtype, cell_dtype;  // of gates and h, and of cells
  TensorDevice device;
  std::vector<Tensor> held;

  // `shaped` (T, B, …) gives T, B and the dtype and device expected of the other tensors.
  LstmInputs(const char* name, const Tensor& shaped, std::int64_t H, const Tensor& weight_hh, const Tensor& h0,
             const Tensor& c0, const std::optional<Tensor>& reset)
      : dtype(operand_type(op, name, shaped)),
        cell_dtype(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        device(device_of(shaped)) {
    launch.T = shaped.size(0);
    launch.B = shaped.size(1);
    launch.H = H;
    launch.dtype = scalar_of(dtype);
    held.reserve(8);
    const Tensor weight = rows("weight_hh", weight_hh, {4 * H, H}, dtype);
    launch.weight_hh = weight.const_data_ptr();
    launch.weight_stride = weight.stride(0);
    launch.h0 = state_rows("h0", h0, dtype);
    launch.c0 = state_rows("c0", c0, cell_dtype);
    if (reset) {
      launch.reset = static_cast<const bool*>(hold("reset", *reset, {launch.T, launch.B}, ScalarType::Bool));
    }
  }

  ChunkRows chunk_rows(const char* name, const Tensor& tensor, std::int64_t width) {
    const Tensor given = rows(name, tensor, {launch.T, launch.B, width}, dtype);
    return {given.const_data_ptr(), given.stride(0), given.stride(1)};
  }

  StateRows state_rows(const char* name, const Tensor& tensor, ScalarType type) {
    const Tensor given = rows(name, tensor, {launch.B, launch.H}, type);
    return {given.const_data_ptr(), given.stride(0)};
  }

  // The address of its elements, contiguous.
  const void* hold(const char* name, const Tensor& tensor, Shape shape, ScalarType type) {
    check(op, name, tensor, shape, type, device);
    held.push_back(as_contiguous(tensor));
    return held.back().const_data_ptr();
  }

 private:
  static constexpr const char* op = "lstm";

  Tensor rows(const char* name, const Tensor& tensor, Shape shape, ScalarType type) {
    check(op, name, tensor, shape, type, device);
    held.push_back(with_contiguous_rows(tensor));
    return held.back();
  }
};

// Backend is a device's implementation: check(name, tensor, H) throws if it does not support them; forward(inputs,
// launch, tf32); backward(inputs, launch, tf32, grad_gates, h0, output, reset) returns the weights' gradient. Neither
// is called for empty tensors.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(const Tensor& gates, const Tensor& weight_hh, const Tensor& h0,
                                                        const Tensor& c0, const std::optional<Tensor>& reset, bool save,
                                                        bool tf32) {
  if (gates.dim() != 3 || gates.size(2) % 4 != 0) {
    reject("lstm: gates: found shape ", text(gates.sizes()), ", expected (T, B, 4H)");
  }
  const std::int64_t H = gates.size(2) / 4;
  Backend::check("gates", gates, H);
  LstmInputs inputs("gates", gates, H, weight_hh, h0, c0, reset);
  const Lstm& in = inputs.launch;
  const ScalarType dtype = inputs.dtype, cell_dtype = inputs.cell_dtype;
  const TensorDevice device = inputs.device;
  const Tensor output = allocate({in.T, in.B, in.H}, dtype, device);
  const Tensor activated = save ? allocate(gates.sizes(), dtype, device) : allocate({0}, dtype, device);
  const Tensor cells = save ? allocate(output.sizes(), cell_dtype, device) : allocate({0}, cell_dtype, device);
  if (output.numel() == 0) return {output, contiguous_copy(h0), contiguous_copy(c0), activated, cells};

  const Tensor h_n = allocate({in.B, in.H}, dtype, device), c_n = allocate({in.B, in.H}, cell_dtype, device);
  LstmForward launch{};
  launch.gates = inputs.chunk_rows("gates", gates, 4 * in.H);
  launch.inputs = in;
  launch.output = output.mutable_data_ptr();
  launch.h_n = h_n.mutable_data_ptr();
  launch.c_n = c_n.mutable_data_ptr();
  launch.activated = save ? activated.mutable_data_ptr() : nullptr;
  launch.cells = save ? cells.mutable_data_ptr() : nullptr;
  Backend::forward(inputs, launch, tf32);
  return {output, h_n, c_n, activated, cells};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_backward(const std::optional<Tensor>& grad_output,
                                                         const std::optional<Tensor>& grad_h_n,
                                                         const std::optional<Tensor>& grad_c_n, const Tensor& weight_hh,
                                                         const Tensor& h0, const Tensor& c0,
                                                         const std::optional<Tensor>& reset, const Tensor& output,
                                                         const Tensor& activated, const Tensor& cells, bool tf32) {
  if (output.dim() != 3) reject("lstm: output: found shape ", text(output.sizes()), ", expected (T, B, H)");
  Backend::check("output", output, output.size(2));
  LstmInputs inputs("output", output, output.size(2), weight_hh, h0, c0, reset);
  const Lstm& in = inputs.launch;
  const ScalarType dtype = inputs.dtype, cell_dtype = inputs.cell_dtype;
  const TensorDevice device = inputs.device;
  LstmBackward launch{};
  if (grad_output) launch.grad_output = inputs.chunk_rows("grad_output", *grad_output, in.H);
  if (grad_h_n) launch.grad_h_n = inputs.state_rows("grad_h_n", *grad_h_n, dtype);
  if (grad_c_n) launch.grad_c_n = inputs.state_rows("grad_c_n", *grad_c_n, cell_dtype);
  launch.output = inputs.hold("output", output, {in.T, in.B, in.H}, dtype);
  launch.activated = inputs.hold("activated", activated, {in.T, in.B, 4 * in.H}, dtype);
  launch.cells = inputs.hold("cells", cells, {in.T, in.B, in.H}, cell_dtype);
  launch.inputs = in;

  const Tensor grad_gates = allocate({in.T, in.B, 4 * in.H}, dtype, device);
  if (output.numel() == 0) {
    const auto state = [&](const std::optional<Tensor>& grad, ScalarType type) {
      return grad ? contiguous_copy(*grad) : zeros({in.B, in.H}, type, device);
    };
    return {grad_gates, zeros({4 * in.H, in.H}, dtype, device), state(grad_h_n, dtype), state(grad_c_n, cell_dtype)};
  }
  const Tensor grad_h0 = allocate({in.B, in.H}, dtype, device), grad_c0 = allocate({in.B, in.H}, cell_dtype, device);
  launch.grad_gates = grad_gates.mutable_data_ptr();
  launch.grad_h0 = grad_h0.mutable_data_ptr();
  launch.grad_c0 = grad_c0.mutable_data_ptr();
  const Tensor grad_weight = Backend::backward(inputs, launch, tf32, grad_gates, h0, output, reset);
  return {grad_gates, grad_weight, grad_h0, grad_c0};
}

}  // namespace pytbptt
