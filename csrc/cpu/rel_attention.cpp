// rel_attention on CPU tensors: checks, allocation, and the tasks that torch's threads take.
#include "rel_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/rel_attention_tasks.h"

namespace pytbptt::cpu {

using at::Tensor;
using std::int64_t;

namespace {

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr const char* op = "rel_attention";

// An operation's tensors as a launch wants them; holds the copies of those whose rows are not contiguous.
struct Inputs {
  RelAttention launch{};
  std::vector<Tensor> held;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
         const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
         const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key,
         std::optional<int64_t> window, double scale, double dropout_p, const std::optional<Tensor>& seed) {
    TORCH_CHECK_VALUE(query.dim() == 4, "rel_attention: query: found shape ", query.sizes(), ", expected (B, T, H, D)");
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
    TORCH_CHECK_VALUE(keys <= std::numeric_limits<std::int32_t>::max(), "rel_attention: memory and chunk: found ", keys,
                      " keys, expected at most 2147483647");
    const std::vector<int64_t> chunk{launch.B, launch.T, launch.H, launch.D};
    const std::vector<int64_t> memory{launch.B, launch.M, launch.H, launch.D};
    launch.dtype = scalar_of(op, "query", query);
    launch.query = operand("query", query, chunk, query.scalar_type());
    launch.key = operand("key", key, chunk, query.scalar_type());
    launch.value = operand("value", value, chunk, query.scalar_type());
    if (memory_key) {
      launch.memory_key = operand("memory_key", *memory_key, memory, query.scalar_type());
      launch.memory_value = operand("memory_value", *memory_value, memory, query.scalar_type());
    }
    const std::vector<int64_t> bias{launch.H, launch.D};
    launch.position = operand("position", position, {launch.R, launch.H, launch.D}, query.scalar_type());
    launch.content_bias = operand("content_bias", content_bias, bias, query.scalar_type());
    launch.position_bias = operand("position_bias", position_bias, bias, query.scalar_type());
    if (first_key) {
      check(op, "first_key", *first_key, {launch.B, launch.T}, at::kInt, at::kCPU);
      held.push_back(first_key->contiguous());
      launch.first_key = held.back().const_data_ptr<std::int32_t>();
    }
    launch.window = std::min(window.value_or(keys), keys);
    launch.scale = scale;
    launch.dropout_threshold = static_cast<std::uint32_t>(std::min(std::nearbyint(65536 * dropout_p), 65535.0));
    launch.keep_scale = 1 / (1 - launch.dropout_threshold / 65536.0);
    if (launch.dropout_threshold != 0) {
      TORCH_CHECK_VALUE(seed.has_value(), "rel_attention: seed: found None, expected one for dropout_p ", dropout_p);
      check(op, "seed", *seed, {1}, at::kLong, at::kCPU);
      held.push_back(*seed);
      launch.seed = seed->const_data_ptr<int64_t>();
    }
  }

  Operand operand(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
    check(op, name, tensor, shape, dtype, at::kCPU);
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
  const Inputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value, first_key,
                      window, scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  Tensor out = at::empty(query.sizes(), query.options());
  const auto sums_dtype = in.dtype == Scalar::float64 ? at::kDouble : at::kFloat;
  Tensor log_sum_exp = at::empty({in.B, in.H, in.T}, query.options().dtype(sums_dtype));
  if (out.numel() == 0) return {out, log_sum_exp};
  const RelAttentionForward launch{in, out.mutable_data_ptr(), log_sum_exp.mutable_data_ptr()};

  // Streams of one head share its packed positions, so a task has as many as leave every thread a few tasks; queries
  // are cut only where heads and streams do not suffice.
  const int64_t wanted = thread_count() == 1 ? 1 : 4 * thread_count();
  const int64_t stream_parts = std::clamp<int64_t>(ceil_divide(wanted, in.H), 1, in.B);
  const int64_t tile = queries_per_tile(in.T);
  const int64_t tiles = ceil_divide(in.T, tile);
  const int64_t query_parts = std::clamp<int64_t>(thread_count() / (in.H * in.B), 1, tiles);
  const int64_t streams = ceil_divide(in.B, stream_parts), queries = ceil_divide(tiles, query_parts) * tile;
  std::vector<ForwardTask> tasks;
  for (int64_t head = 0; head < in.H; ++head) {
    for (int64_t b = 0; b < in.B; b += streams) {
      for (int64_t i = 0; i < in.T; i += queries) {
        tasks.push_back({head, b, std::min(b + streams, in.B), i, std::min(i + queries, in.T)});
      }
    }
  }
  const RelAttentionForwardKernel& kernel = rel_attention_forward_kernel(selected_isa());
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const ForwardTask& task = tasks[index];
    kernel.run(launch, task, thread_workspace(kernel.workspace(in, task)));
  });
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& position,
    const Tensor& content_bias, const Tensor& position_bias, const std::optional<Tensor>& memory_key,
    const std::optional<Tensor>& memory_value, const std::optional<Tensor>& first_key, std::optional<int64_t> window,
    double scale, double dropout_p, const std::optional<Tensor>& seed, const Tensor& out, const Tensor& log_sum_exp,
    bool memory_needs_grad) {
  Inputs inputs(query, key, value, position, content_bias, position_bias, memory_key, memory_value, first_key, window,
                scale, dropout_p, seed);
  const RelAttention& in = inputs.launch;
  const auto sums_dtype = in.dtype == Scalar::float64 ? at::kDouble : at::kFloat;
  check(op, "log_sum_exp", log_sum_exp, {in.B, in.H, in.T}, sums_dtype, at::kCPU);
  inputs.held.push_back(log_sum_exp.contiguous());
  const void* sums = inputs.held.back().const_data_ptr();

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
  if (in.H == 0 || in.D == 0) return gradients;

  // Gradients that are sums over streams fix the cut: it must depend on sizes alone, or the number of threads would
  // change their last bits.
  constexpr int64_t wanted = 8;
  const int64_t parts = std::clamp<int64_t>(ceil_divide(wanted, in.H), 1, std::max<int64_t>(in.B, 1));
  const int64_t streams = std::max<int64_t>(ceil_divide(in.B, parts), 1);
  const int64_t used_parts = std::max<int64_t>(ceil_divide(in.B, streams), 1);
  const RelAttentionBackwardKernel& kernel = rel_attention_backward_kernel(selected_isa());
  const int64_t partial_size = used_parts > 1 ? kernel.partial_sums_size(in) : 0;
  const Tensor partial_sums = at::empty({in.H * used_parts * partial_size + 64}, query.options().dtype(at::kByte));
  auto* partial = static_cast<char*>(partial_sums.mutable_data_ptr());
  partial += (64 - reinterpret_cast<std::uintptr_t>(partial) % 64) % 64;
  const int64_t workspace = kernel.workspace(in);
  run_tasks(in.H * used_parts, [&](int64_t index) {
    const int64_t head = index / used_parts, first = index % used_parts * streams;
    const BackwardTask task{head, first, std::min(first + streams, in.B),
                            used_parts > 1 ? partial + index * partial_size : nullptr};
    kernel.run(launch, task, thread_workspace(workspace));
  });
  if (used_parts > 1) {
    run_tasks(in.H, [&](int64_t head) {
      kernel.reduce(launch, head, partial + head * used_parts * partial_size, used_parts);
    });
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pytbptt, CPU, library) {
  library.impl("rel_attention", &forward);
  library.impl("rel_attention_backward", &backward);
}

}  // namespace pytbptt::cpu
