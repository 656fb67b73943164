// rel_attention on every device: checks, allocation, and what its kernels are given.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "rel_attention/params.h"

namespace pytbptt {

// Checked arguments as kernel parameters; keeps contiguous copies alive.
struct RelAttentionInputs {
  RelAttention launch{};
  ScalarType dtype, sums_dtype;  // of the operands, and of log_sum_exp
  TensorDevice device;
  std::vector<Tensor> held;

  RelAttentionInputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
                     const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
                     const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key,
                     std::optional<std::int64_t> window, double scale, double dropout_p,
                     const std::optional<Tensor>& seed)
      : dtype(operand_type(op, "query", query)),
        sums_dtype(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        device(device_of(query)) {
    if (query.dim() != 4) reject(op, ": query: found shape ", text(query.sizes()), ", expected (B, T, H, D)");
    if (position.dim() != 3 || position.size(0) < 1) {
      reject(op, ": position: found shape ", text(position.sizes()), ", expected (R, H, D) with R at least 1");
    }
    if (memory_key.has_value() != memory_value.has_value()) {
      reject(op, ": memory_key and memory_value: found one of them, expected both or neither");
    }
    if (memory_key && memory_key->dim() != 4) reject(op, ": memory_key: expected (B, M, H, D)");
    if (window && *window < 1) reject(op, ": window: found ", *window, ", expected at least 1");
    if (!(dropout_p >= 0 && dropout_p < 1)) {
      reject(op, ": dropout_p: found ", dropout_p, ", expected at least 0 and below 1");
    }
    launch.B = query.size(0);
    launch.T = query.size(1);
    launch.H = query.size(2);
    launch.D = query.size(3);
    launch.M = memory_key ? memory_key->size(1) : 0;
    launch.R = position.size(0);
    // Keys are indexed with 32 bits; 1024 leaves room for the end of the last tile.
    constexpr std::int64_t max_keys = std::numeric_limits<std::int32_t>::max() - 1024;
    const std::int64_t keys = launch.M + launch.T;
    if (keys > max_keys) {
      reject(op, ": memory and chunk: found ", keys, " keys, expected at most ", max_keys);
    }
    launch.dtype = scalar_of(dtype);
    held.reserve(14);
    launch.query = operand("query", query, query.sizes());
    launch.key = operand("key", key, query.sizes());
    launch.value = operand("value", value, query.sizes());
    if (memory_key) {
      launch.memory_key = operand("memory_key", *memory_key, {launch.B, launch.M, launch.H, launch.D});
      launch.memory_value = operand("memory_value", *memory_value, {launch.B, launch.M, launch.H, launch.D});
    }
    launch.position = operand("position", position, {launch.R, launch.H, launch.D});
    launch.content_bias = operand("content_bias", content_bias, {launch.H, launch.D});
    launch.position_bias = operand("position_bias", position_bias, {launch.H, launch.D});
    if (first_key) {
      launch.first_key =
          static_cast<const std::int32_t*>(hold("first_key", *first_key, {launch.B, launch.T}, ScalarType::Int));
    }
    launch.window = std::min(window.value_or(keys), keys);
    launch.scale = scale;
    launch.dropout_threshold = static_cast<std::uint32_t>(std::min(std::nearbyint(65536 * dropout_p), 65535.0));
    launch.keep_scale = 1 / (1 - launch.dropout_threshold / 65536.0);
    if (launch.dropout_threshold != 0) {
      if (!seed) reject(op, ": seed: found None, expected one for dropout_p ", dropout_p);
      launch.seed = static_cast<const std::int64_t*>(hold("seed", *seed, {1}, ScalarType::Long));
    }
  }

  // Whether results are rounded to 16 bits.
  bool rounds() const { return launch.dtype == Scalar::float16 || launch.dtype == Scalar::bfloat16; }

  Operand operand(const char* name, const Tensor& tensor, Shape shape) {
    check(op, name, tensor, shape, dtype, device);
    held.push_back(with_contiguous_rows(tensor));
    const Tensor& rows = held.back();
    const std::int64_t dims = rows.dim();
    return {rows.const_data_ptr(), dims == 4 ? rows.stride(0) : 0, dims >= 3 ? rows.stride(dims - 3) : 0,
            rows.stride(dims - 2)};
  }

  // The address of its elements, contiguous.
  const void* hold(const char* name, const Tensor& tensor, Shape shape, ScalarType type) {
    check(op, name, tensor, shape, type, device);
    held.push_back(as_contiguous(tensor));
    return held.back().const_data_ptr();
  }

  // So many bytes, with any contents.
  Tensor workspace(std::int64_t bytes) const { return allocate({bytes}, ScalarType::Byte, device); }

 private:
  static constexpr const char* op = "rel_attention";
};

// Backend is a device's implementation: check(query) throws if it does not support it; forward(inputs, launch, tf32);
// and backward(inputs, launch, tf32). Not called if H or D is 0; forward is not called for empty queries either.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> rel_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 const Tensor& position, const Tensor& content_bias,
                                                 const Tensor& position_bias, const std::optional<Tensor>& memory_key,
                                                 const std::optional<Tensor>& memory_value,
                                                 const std::optional<Tensor>& first_key,
                                                 std::optional<std::int64_t> window, double scale, double dropout_p,
                                                 const std::optional<Tensor>& seed, bool save, bool tf32) {
  Backend::check(query);
  const RelAttentionInputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value,
                                  first_key, window, scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  const bool rounds = save && inputs.rounds();
  const Tensor out = allocate(query.sizes(), inputs.dtype, inputs.device),
               rounding = rounds ? allocate(query.sizes(), inputs.dtype, inputs.device)
                                 : allocate({0}, inputs.dtype, inputs.device),
               log_sum_exp = allocate({in.B, in.H, in.T}, inputs.sums_dtype, inputs.device);
  if (out.numel() != 0) {
    const RelAttentionForward launch{in, out.mutable_data_ptr(), log_sum_exp.mutable_data_ptr(),
                                     rounds ? rounding.mutable_data_ptr() : nullptr};
    Backend::forward(inputs, launch, tf32);
  }
  return {out, rounding, log_sum_exp};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rel_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
    const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
    const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key,
    std::optional<std::int64_t> window, double scale, double dropout_p, const std::optional<Tensor>& seed,
    const Tensor& out, const Tensor& rounding, const Tensor& log_sum_exp, bool memory_needs_grad, bool tf32) {
  Backend::check(query);
  RelAttentionInputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value,
                            first_key, window, scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  RelAttentionBackward launch{};
  launch.grad_out = inputs.operand("grad_out", grad_out, query.sizes());
  launch.out = inputs.operand("out", out, query.sizes());
  if (inputs.rounds()) launch.rounding = inputs.operand("rounding", rounding, query.sizes());
  launch.log_sum_exp = inputs.hold("log_sum_exp", log_sum_exp, {in.B, in.H, in.T}, inputs.sums_dtype);
  launch.inputs = in;
  launch.memory_needs_grad = memory_needs_grad && memory_key.has_value();

  const auto gradient = [&](const Tensor& tensor, void*& address) {
    const Tensor made = allocate(tensor.sizes(), inputs.dtype, inputs.device);
    address = made.mutable_data_ptr();
    return made;
  };
  const auto memory_gradient = [&](const std::optional<Tensor>& tensor, void*& address) {
    return launch.memory_needs_grad ? gradient(*tensor, address) : allocate({0}, inputs.dtype, inputs.device);
  };
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients{
      gradient(query, launch.query),
      gradient(key, launch.key),
      gradient(value, launch.value),
      gradient(position, launch.position),
      gradient(content_bias, launch.content_bias),
      gradient(position_bias, launch.position_bias),
      memory_gradient(memory_key, launch.memory_key),
      memory_gradient(memory_value, launch.memory_value)};
  if (in.H != 0 && in.D != 0) Backend::backward(inputs, launch, tf32);
  return gradients;
}

}  // namespace pytbptt
