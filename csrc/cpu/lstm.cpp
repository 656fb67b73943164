// lstm on the CPU: checks, allocation, and the team of threads.
#include "lstm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/lstm_team.h"
#include "cpu/parallel.h"

namespace pytbptt::cpu {

namespace {

using at::Tensor;
using c10::optional;

constexpr const char* op = "lstm";

at::ScalarType cell_type(at::ScalarType gates) {
  return gates == at::kDouble ? at::kDouble : at::kFloat;
}

ChunkRows chunk_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

StateRows state_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

const bool* reset_data(const optional<Tensor>& reset) {
  return reset ? reset->const_data_ptr<bool>() : nullptr;
}

optional<Tensor> checked_reset(const optional<Tensor>& reset, std::int64_t T, std::int64_t B) {
  if (!reset) return std::nullopt;
  check(op, "reset", *reset, {T, B}, at::kBool, at::kCPU);
  return reset->contiguous();
}

// Streams need no meeting of threads, but every group of them reads all weights: worth it while these fit L2, and never
// for a single step, for which every group would lay them out.
int stream_groups(const Lstm& inputs, int threads) {
  constexpr std::int64_t weights_in_l2 = 200 * 200, fewest_streams = 16;
  const bool splits = inputs.T > 1 && inputs.H * inputs.H <= weights_in_l2 && inputs.B >= fewest_streams * threads;
  return splits ? threads : 1;
}

template <typename Kernel, typename Parameters>
void run(const Kernel& kernel, const Parameters& parameters) {
  // All memory is there before the team starts: a thread that failed to get some would leave the others waiting.
  const int most = thread_count();
  std::vector<Barrier> barriers(static_cast<std::size_t>(most) + 1, Barrier{0});
  void* workspace = thread_workspace(kernel.workspace(parameters, most));  // fewer threads need no more
  run_team(most, [&](int rank, int threads) {
    const int groups = stream_groups(parameters.inputs, threads);
    kernel.run(parameters, {rank, groups, threads / groups, barriers.data(), barriers.data() + 1}, workspace);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(const Tensor& gates_given, const Tensor& weight_given,
                                                        const Tensor& h0_given, const Tensor& c0_given,
                                                        const optional<Tensor>& reset_given, bool save) {
  TORCH_CHECK_VALUE(gates_given.dim() == 3 && gates_given.size(2) % 4 == 0, "lstm: gates: found shape ",
                    gates_given.sizes(), ", expected (T, B, 4H)");
  const std::int64_t T = gates_given.size(0), B = gates_given.size(1), H = gates_given.size(2) / 4;
  const at::ScalarType dtype = gates_given.scalar_type(), cell_dtype = cell_type(dtype);
  const Scalar scalar = scalar_of(op, "gates", gates_given);
  check(op, "weight_hh", weight_given, {4 * H, H}, dtype, at::kCPU);
  check(op, "h0", h0_given, {B, H}, dtype, at::kCPU);
  check(op, "c0", c0_given, {B, H}, cell_dtype, at::kCPU);
  const optional<Tensor> reset = checked_reset(reset_given, T, B);

  const auto like = gates_given.options();
  Tensor output = at::empty({T, B, H}, like);
  if (output.numel() == 0) {
    return {output, h0_given.clone(at::MemoryFormat::Contiguous), c0_given.clone(at::MemoryFormat::Contiguous),
            at::empty(save ? gates_given.sizes() : at::IntArrayRef{0}, like),
            at::empty(save ? output.sizes() : at::IntArrayRef{0}, like.dtype(cell_dtype))};
  }
  const Tensor gates = with_contiguous_rows(gates_given), weight = with_contiguous_rows(weight_given);
  const Tensor h0 = with_contiguous_rows(h0_given), c0 = with_contiguous_rows(c0_given);
  Tensor h_n = at::empty({B, H}, like), c_n = at::empty({B, H}, like.dtype(cell_dtype));
  Tensor activated = at::empty(save ? gates.sizes() : at::IntArrayRef{0}, like);
  Tensor cells = at::empty(save ? output.sizes() : at::IntArrayRef{0}, like.dtype(cell_dtype));

  LstmForward p{};
  p.inputs = {
      T, B, H, scalar, weight.const_data_ptr(), weight.stride(0), state_rows(h0), state_rows(c0), reset_data(reset)};
  p.gates = chunk_rows(gates);
  p.output = output.mutable_data_ptr();
  p.h_n = h_n.mutable_data_ptr();
  p.c_n = c_n.mutable_data_ptr();
  p.activated = save ? activated.mutable_data_ptr() : nullptr;
  p.cells = save ? cells.mutable_data_ptr() : nullptr;
  run(lstm_forward_kernel(selected_isa()), p);
  return {output, h_n, c_n, activated, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_backward(const optional<Tensor>& grad_output_given,
                                                         const optional<Tensor>& grad_h_n_given,
                                                         const optional<Tensor>& grad_c_n_given,
                                                         const Tensor& weight_given, const Tensor& h0_given,
                                                         const Tensor& c0_given, const optional<Tensor>& reset_given,
                                                         const Tensor& output_given, const Tensor& activated_given,
                                                         const Tensor& cells_given) {
  TORCH_CHECK_VALUE(output_given.dim() == 3, "lstm: output: found shape ", output_given.sizes(),
                    ", expected (T, B, H)");
  const std::int64_t T = output_given.size(0), B = output_given.size(1), H = output_given.size(2);
  const at::ScalarType dtype = output_given.scalar_type(), cell_dtype = cell_type(dtype);
  check(op, "weight_hh", weight_given, {4 * H, H}, dtype, at::kCPU);
  check(op, "h0", h0_given, {B, H}, dtype, at::kCPU);
  check(op, "c0", c0_given, {B, H}, cell_dtype, at::kCPU);
  check(op, "activated", activated_given, {T, B, 4 * H}, dtype, at::kCPU);
  check(op, "cells", cells_given, {T, B, H}, cell_dtype, at::kCPU);
  if (grad_output_given) check(op, "grad_output", *grad_output_given, {T, B, H}, dtype, at::kCPU);
  if (grad_h_n_given) check(op, "grad_h_n", *grad_h_n_given, {B, H}, dtype, at::kCPU);
  if (grad_c_n_given) check(op, "grad_c_n", *grad_c_n_given, {B, H}, cell_dtype, at::kCPU);
  const optional<Tensor> reset = checked_reset(reset_given, T, B);

  const auto like = output_given.options();
  Tensor grad_gates = at::empty({T, B, 4 * H}, like), grad_weight = at::empty({4 * H, H}, like);
  if (output_given.numel() == 0) {
    const auto state = [&](const optional<Tensor>& grad, at::ScalarType type) {
      return grad ? grad->clone(at::MemoryFormat::Contiguous) : at::empty({B, H}, like.dtype(type)).zero_();
    };
    return {grad_gates, grad_weight.zero_(), state(grad_h_n_given, dtype), state(grad_c_n_given, cell_dtype)};
  }
  const Tensor weight = with_contiguous_rows(weight_given);
  const Tensor h0 = with_contiguous_rows(h0_given), c0 = with_contiguous_rows(c0_given);
  const Tensor output = output_given.contiguous(), activated = activated_given.contiguous();
  const Tensor cells = cells_given.contiguous();
  const auto rows_of = [](const optional<Tensor>& grad) { return grad ? with_contiguous_rows(*grad) : Tensor(); };
  const Tensor grad_output = rows_of(grad_output_given);
  const Tensor grad_h_n = rows_of(grad_h_n_given), grad_c_n = rows_of(grad_c_n_given);
  Tensor grad_h0 = at::empty({B, H}, like), grad_c0 = at::empty({B, H}, like.dtype(cell_dtype));

  LstmBackward p{};
  p.inputs = {T,
              B,
              H,
              scalar_of(op, "output", output_given),
              weight.const_data_ptr(),
              weight.stride(0),
              state_rows(h0),
              state_rows(c0),
              reset_data(reset)};
  if (grad_output.defined()) p.grad_output = chunk_rows(grad_output);
  if (grad_h_n.defined()) p.grad_h_n = state_rows(grad_h_n);
  if (grad_c_n.defined()) p.grad_c_n = state_rows(grad_c_n);
  p.output = output.const_data_ptr();
  p.activated = activated.const_data_ptr();
  p.cells = cells.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_h0 = grad_h0.mutable_data_ptr();
  p.grad_c0 = grad_c0.mutable_data_ptr();
  run(lstm_backward_kernel(selected_isa()), p);
  return {grad_gates, grad_weight, grad_h0, grad_c0};
}

}  // namespace

TORCH_LIBRARY_IMPL(pytbptt, CPU, library) {
  library.impl("lstm", &lstm);
  library.impl("lstm_backward", &lstm_backward);
}

}  // namespace pytbptt::cpu
