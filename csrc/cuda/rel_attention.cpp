// rel_attention on CUDA tensors: checks, allocation, and which kernels are launched.
#include "cuda/rel_attention_launch.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/dtypes.h"

namespace pytbptt::cuda {

using at::Tensor;
using std::int64_t;

namespace {

struct Kernels {
  decltype(&rel_attention_forward<Arithmetic::float16>) forward;
  decltype(&rel_attention_forward_workspace<Arithmetic::float16>) forward_workspace;
  decltype(&rel_attention_backward<Arithmetic::float16>) backward;
  decltype(&rel_attention_backward_workspace<Arithmetic::float16>) backward_workspace;
};

template <Arithmetic ARITHMETIC>
Kernels kernels_of() {
  return {&rel_attention_forward<ARITHMETIC>, &rel_attention_forward_workspace<ARITHMETIC>,
          &rel_attention_backward<ARITHMETIC>, &rel_attention_backward_workspace<ARITHMETIC>};
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

// An operation's tensors as a launch wants them; holds the copies of those whose rows are not contiguous.
struct Inputs {
  RelAttention launch{};
  at::Device device;
  std::vector<Tensor> held;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
         const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
         const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key,
         std::optional<int64_t> window, double scale, double dropout_p, const std::optional<Tensor>& seed)
      : device(query.device()) {
    TORCH_CHECK_VALUE(query.dim() == 4, "rel_attention: query: found shape ", query.sizes(), ", expected (B, T, H, D)");
    TORCH_CHECK_VALUE(query.size(3) <= largest_head_size, "rel_attention: query: found head size ", query.size(3),
                      ", expected at most ", largest_head_size, " on CUDA");
    TORCH_CHECK_VALUE(position.dim() == 3 && position.size(0) >= 1, "rel_attention: position: found shape ",
                      position.sizes(), ", expected (R, H, D) with R at least 1");
    TORCH_CHECK_VALUE(memory_key.has_value() == memory_value.has_value(),
                      "rel_attention: memory_key and memory_value: found one of them, expected both or neither");
    TORCH_CHECK_VALUE(!memory_key || memory_key->dim() == 4, "rel_attention: memory_key: expected (B, M, H, D)");
    TORCH_CHECK_VALUE(!window || *window >= 1, "rel_attention: window: found ", *window, ", expected at least 1");
    TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, "rel_attention: dropout_p: found ", dropout_p,
                      ", expected at least 0 and below 1");
    launch.B = query.size(0);
    launch.T = query.size(1);
    launch.H = query.size(2);
    launch.D = query.size(3);
    launch.M = memory_key ? memory_key->size(1) : 0;
    launch.R = position.size(0);
    const int64_t keys = launch.M + launch.T;
    // Kernels count keys in 32 bits, and a tile may begin before the last one and end behind it.
    constexpr int64_t most_keys = std::numeric_limits<std::int32_t>::max() - 1024;
    TORCH_CHECK_VALUE(keys <= most_keys, "rel_attention: memory and chunk: found ", keys, " keys, expected at most ",
                      most_keys);
    const std::vector<int64_t> chunk{launch.B, launch.T, launch.H, launch.D};
    const std::vector<int64_t> memory{launch.B, launch.M, launch.H, launch.D};
    const std::vector<int64_t> bias{launch.H, launch.D};
    const at::ScalarType dtype = query.scalar_type();
    launch.dtype = scalar_of("rel_attention", "query", query);
    launch.query = operand("query", query, chunk, dtype);
    launch.key = operand("key", key, chunk, dtype);
    launch.value = operand("value", value, chunk, dtype);
    if (memory_key) {
      launch.memory_key = operand("memory_key", *memory_key, memory, dtype);
      launch.memory_value = operand("memory_value", *memory_value, memory, dtype);
    }
    launch.position = operand("position", position, {launch.R, launch.H, launch.D}, dtype);
    launch.content_bias = operand("content_bias", content_bias, bias, dtype);
    launch.position_bias = operand("position_bias", position_bias, bias, dtype);
    if (first_key) {
      check("first_key", *first_key, {launch.B, launch.T}, at::kInt);
      held.push_back(first_key->contiguous());
      launch.first_key = held.back().const_data_ptr<std::int32_t>();
    }
    launch.window = std::min(window.value_or(keys), keys);
    launch.scale = scale;
    launch.dropout_threshold = static_cast<std::uint32_t>(std::min(std::nearbyint(65536 * dropout_p), 65535.0));
    launch.keep_scale = 1 / (1 - launch.dropout_threshold / 65536.0);
    if (launch.dropout_threshold != 0) {
      TORCH_CHECK_VALUE(seed.has_value(), "rel_attention: seed: found None, expected one for dropout_p ", dropout_p);
      check("seed", *seed, {1}, at::kLong);
      held.push_back(*seed);
      launch.seed = seed->const_data_ptr<int64_t>();
    }
  }

  void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) const {
    pytbptt::check("rel_attention", name, tensor, shape, dtype, device);
  }

  Operand operand(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
    check(name, tensor, shape, dtype);
    held.push_back(with_contiguous_rows(tensor));
    const Tensor& rows = held.back();
    const int64_t dims = rows.dim();
    return {rows.const_data_ptr(), dims == 4 ? rows.stride(0) : 0, dims >= 3 ? rows.stride(dims - 3) : 0,
            rows.stride(dims - 2)};
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
                                   const Tensor& content_bias, const Tensor& position_bias,
                                   const std::optional<Tensor>& memory_key, const std::optional<Tensor>& memory_value,
                                   const std::optional<Tensor>& first_key, std::optional<int64_t> window, double scale,
                                   double dropout_p, const std::optional<Tensor>& seed) {
  const c10::cuda::CUDAGuard guard(query.device());
  const Inputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value, first_key,
                      window, scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  Tensor out = at::empty(query.sizes(), query.options());
  Tensor log_sum_exp = at::empty({in.B, in.H, in.T}, query.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, log_sum_exp};
  const Kernels chosen = kernels(in.dtype);
  const Tensor workspace = at::empty({chosen.forward_workspace(in)}, query.options().dtype(at::kByte));
  const char* const error = chosen.forward({in, out.mutable_data_ptr(), log_sum_exp.mutable_data_ptr()},
                                           workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "rel_attention: ", error);
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
    const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
    const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key, std::optional<int64_t> window,
    double scale, double dropout_p, const std::optional<Tensor>& seed, const Tensor& out, const Tensor& log_sum_exp,
    bool memory_needs_grad) {
  const c10::cuda::CUDAGuard guard(query.device());
  Inputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value, first_key, window,
                scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  inputs.check("log_sum_exp", log_sum_exp, {in.B, in.H, in.T}, at::kFloat);
  inputs.held.push_back(log_sum_exp.contiguous());
  const void* const sums = inputs.held.back().const_data_ptr();

  const auto like = [](const Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); };
  const auto memory_like = [&](const std::optional<Tensor>& tensor) {
    return memory_needs_grad && tensor ? like(*tensor) : at::empty({0}, query.options());
  };
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients{like(query),
                                                                                       like(key),
                                                                                       like(value),
                                                                                       like(position),
                                                                                       like(content_bias),
                                                                                       like(position_bias),
                                                                                       memory_like(memory_key),
                                                                                       memory_like(memory_value)};
  if (in.H == 0 || in.D == 0) return gradients;
  const auto& [d_query, d_key, d_value, d_position, d_content_bias, d_position_bias, d_memory_key, d_memory_value] =
      gradients;
  const RelAttentionBackward launch{in,
                                    inputs.operand("grad_out", grad_out, query.sizes(), query.scalar_type()),
                                    inputs.operand("out", out, query.sizes(), query.scalar_type()),
                                    sums,
                                    memory_needs_grad && memory_key.has_value(),
                                    d_query.mutable_data_ptr(),
                                    d_key.mutable_data_ptr(),
                                    d_value.mutable_data_ptr(),
                                    d_position.mutable_data_ptr(),
                                    d_content_bias.mutable_data_ptr(),
                                    d_position_bias.mutable_data_ptr(),
                                    d_memory_key.mutable_data_ptr(),
                                    d_memory_value.mutable_data_ptr()};
  const Kernels chosen = kernels(in.dtype);
  const Tensor workspace = at::empty({chosen.backward_workspace(launch)}, query.options().dtype(at::kByte));
  const char* const error = chosen.backward(launch, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "rel_attention_backward: ", error);
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pytbptt, CUDA, library) {
  library.impl("rel_attention", &forward);
  library.impl("rel_attention_backward", &backward);
}

}  // namespace pytbptt::cuda
