// rel_attention on CPU tensors: the tasks that torch's threads take.
#include <algorithm>
#include <vector>

#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "rel_attention/cpu/tasks.h"
#include "rel_attention/inputs.h"

namespace pytbptt::cpu {

using std::int64_t;

namespace {

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Backend {
  static void check(const Tensor& /*query*/) {}

  static void forward(const RelAttentionInputs& /*inputs*/, const RelAttentionForward& launch, bool /*tf32*/) {
    // A task takes several streams of one head, which share its packed positions, but leaves about 4 tasks per thread.
    // Queries are split only if there are fewer heads and streams than threads.
    const RelAttention& in = launch.inputs;
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
      kernel.run(launch, task, Workspace(kernel.workspace(in, task)).data());
    });
  }

  static void backward(const RelAttentionInputs& inputs, const RelAttentionBackward& launch, bool /*tf32*/) {
    // The batch split determines the summation order of reduced gradients, so it depends on sizes only, not on the
    // thread count (bitwise reproducible).
    constexpr int64_t wanted = 8;
    const RelAttention& in = launch.inputs;
    const int64_t parts = std::clamp<int64_t>(ceil_divide(wanted, in.H), 1, std::max<int64_t>(in.B, 1));
    const int64_t streams = std::max<int64_t>(ceil_divide(in.B, parts), 1);
    const int64_t used_parts = std::max<int64_t>(ceil_divide(in.B, streams), 1);
    const RelAttentionBackwardKernel& kernel = rel_attention_backward_kernel(selected_isa());
    const int64_t partial_size = used_parts > 1 ? kernel.partial_sums_size(in) : 0;
    const Tensor partial_sums = inputs.workspace(in.H * used_parts * partial_size + 64);
    auto* partial = static_cast<char*>(partial_sums.mutable_data_ptr());
    partial += (64 - reinterpret_cast<std::uintptr_t>(partial) % 64) % 64;
    const int64_t workspace = kernel.workspace(in);
    run_tasks(in.H * used_parts, [&](int64_t index) {
      const int64_t head = index / used_parts, first = index % used_parts * streams;
      const BackwardTask task{head, first, std::min(first + streams, in.B),
                              used_parts > 1 ? partial + index * partial_size : nullptr};
      kernel.run(launch, task, Workspace(workspace).data());
    });
    if (used_parts > 1) {
      run_tasks(in.H, [&](int64_t head) {
        kernel.reduce(launch, head, partial + head * used_parts * partial_size, used_parts);
      });
    }
  }
};

}  // namespace

// The ops are documented in pytbptt/ops/rel_attention. tf32: whether float32 products on CUDA may round their
// operands to TF32.
STABLE_TORCH_LIBRARY_FRAGMENT(pytbptt, library) {
  // log_sum_exp (B, H, T) is in units of log2 and has +inf where a query sees no key. rounding is what was rounded off
  // out, for the backward: empty unless save, and where out is not of 16 bits.
  library.def(
      "rel_attention(Tensor query, Tensor key, Tensor value, Tensor position, Tensor content_bias, "
      "Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, int? window, "
      "float scale, float dropout_p, Tensor? seed, bool save, bool tf32) "
      "-> (Tensor out, Tensor rounding, Tensor log_sum_exp)");
  // The last two results are empty unless memory_needs_grad.
  library.def(
      "rel_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor position, "
      "Tensor content_bias, Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, "
      "int? window, float scale, float dropout_p, Tensor? seed, Tensor out, Tensor rounding, "
      "Tensor log_sum_exp, bool memory_needs_grad, bool tf32) -> (Tensor query, Tensor key, Tensor value, "
      "Tensor position, Tensor content_bias, Tensor position_bias, Tensor memory_key, Tensor memory_value)");
}

STABLE_TORCH_LIBRARY_IMPL(pytbptt, CPU, library) {
  library.impl("rel_attention", TORCH_BOX(&rel_attention<Backend>));
  library.impl("rel_attention_backward", TORCH_BOX(&rel_attention_backward<Backend>));
}

}  // namespace pytbptt::cpu
