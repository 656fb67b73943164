// What is left of the LSTM's backward once its kernels have run: torch's own product, on the device of its tensors.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>

#include <cstdint>
#include <optional>

namespace pytbptt::cuda {

// The gradient of weight_hh, (4H, H), one product over the whole chunk: every row of grad_gates (T, B, 4H), contiguous,
// with h before its step, which h0 (B, H) begins, output (T, B, H) goes on with, and reset (T, B), if any, sets to
// zero. Where rows of H elements are no multiple of 16 bytes, it is a product of padded rows: for others cuBLAS has
// slow kernels alone.
inline at::Tensor lstm_grad_weight(const at::Tensor& grad_gates, const at::Tensor& h0, const at::Tensor& output,
                                   const std::optional<at::Tensor>& reset) {
  const std::int64_t T = output.size(0), B = output.size(1), H = output.size(2), piece = 16 / output.element_size();
  const std::int64_t width = (H + piece - 1) / piece * piece;
  at::Tensor before = at::cat({h0.unsqueeze(0), output.narrow(0, 0, T - 1)});
  if (reset) before.masked_fill_(reset->unsqueeze(2), 0);
  if (width > H) before = at::constant_pad_nd(before, {0, width - H});
  return at::mm(grad_gates.view({T * B, 4 * H}).t(), before.view({T * B, width})).narrow(1, 0, H).contiguous();
}

}  // namespace pytbptt::cuda
