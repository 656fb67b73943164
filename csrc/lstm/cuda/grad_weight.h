// grad_weight_hh by aten::mm, after the backward kernels.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensors.h"

namespace pytbptt::cuda {

// One of torch's own ops that returns one tensor.
template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The gradient of weight_hh, (4H, H), one product over the whole chunk: grad_gatesᵀ · h_prev, with h_prev = cat(h0,
// output[:-1]), zero at resets. Rows are padded to 16 bytes where needed, because cuBLAS is slow for unaligned rows.
inline Tensor lstm_grad_weight(const Tensor& grad_gates, const Tensor& h0, Tensor output,
                               const std::optional<Tensor>& reset) {
  namespace stable = torch::stable;
  const std::int64_t T = output.size(0), B = output.size(1), H = output.size(2);
  const std::int64_t piece = 16 / static_cast<std::int64_t>(output.element_size());
  const std::int64_t width = (H + piece - 1) / piece * piece;
  const std::vector<Tensor> parts{stable::unsqueeze(h0, 0), stable::narrow(output, 0, 0, T - 1)};
  Tensor before = call("aten::cat", "", parts, std::int64_t{0});
  if (reset) {
    const Tensor zero =
        zeros({}, output.scalar_type(), TensorDevice{aoti_torch_device_type_cpu(), -1});  // read without waiting
    before = call("aten::masked_fill_", "Tensor", before, stable::unsqueeze(*reset, 2), zero);
  }
  if (width > H) before = stable::pad(before, {0, width - H});
  const Tensor rows = stable::transpose(stable::view(grad_gates, {T * B, 4 * H}), 0, 1);
  Tensor product = call("aten::mm", "", rows, stable::view(before, {T * B, width}));
  return as_contiguous(stable::narrow(product, 1, 0, H));
}

}  // namespace pytbptt::cuda
