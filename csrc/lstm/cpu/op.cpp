// lstm on CPU tensors: the team of threads.
#include <algorithm>
#include <vector>

#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "lstm/cpu/team.h"
#include "lstm/inputs.h"

namespace pytbptt::cpu {

namespace {

// Splitting over the batch needs no barrier per step, but every group reads all weights. Worth it only if these fit in
// L2 and T > 1 (for T = 1 every group would pack all weights).
int stream_groups(const Lstm& inputs, int threads) {
  constexpr std::int64_t weights_in_l2 = 200 * 200, fewest_streams = 16;
  const bool splits = inputs.T > 1 && inputs.H * inputs.H <= weights_in_l2 && inputs.B >= fewest_streams * threads;
  return splits ? threads : 1;
}

template <typename Kernel, typename Parameters>
void run(const Kernel& kernel, const Parameters& parameters) {
  // Allocate before starting the threads: an exception in one thread would deadlock the others at a barrier.
  const int most = thread_count();
  std::vector<Barrier> barriers(static_cast<std::size_t>(most) + 1, Barrier{0});
  const Workspace workspace(kernel.workspace(parameters, most));  // fewer threads need no more
  run_team(most, [&](int rank, int threads) {
    const int groups = stream_groups(parameters.inputs, threads);
    kernel.run(parameters, {rank, groups, threads / groups, barriers.data(), barriers.data() + 1}, workspace.data());
  });
}

struct Backend {
  static void check(const char* /*name*/, const Tensor& /*shaped*/, std::int64_t /*H*/) {}

  static void forward(const LstmInputs& /*inputs*/, const LstmForward& launch, bool /*tf32*/) {
    run(lstm_forward_kernel(selected_isa()), launch);
  }

  static Tensor backward(const LstmInputs& inputs, LstmBackward launch, bool /*tf32*/, const Tensor& /*grad_gates*/,
                         const Tensor& /*h0*/, const Tensor& /*output*/, const std::optional<Tensor>& /*reset*/) {
    const std::int64_t H = inputs.launch.H;
    const Tensor grad_weight = allocate({4 * H, H}, inputs.dtype, inputs.device);
    launch.grad_weight = grad_weight.mutable_data_ptr();
    run(lstm_backward_kernel(selected_isa()), launch);
    return grad_weight;
  }
};

}  // namespace

// The ops are documented in pytbptt/ops/lstm. tf32: whether float32 products on CUDA may round their operands to TF32.
STABLE_TORCH_LIBRARY_FRAGMENT(pytbptt, library) {
  // activated holds i f g o after their non-linearities, (T, B, 4H), and cells every c, (T, B, H), for the backward;
  // both are empty unless save.
  library.def(
      "lstm(Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0, Tensor? reset, bool save, bool tf32) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor activated, Tensor cells)");
  library.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor weight_hh, Tensor h0, "
      "Tensor c0, Tensor? reset, Tensor output, Tensor activated, Tensor cells, bool tf32) "
      "-> (Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0)");
}

STABLE_TORCH_LIBRARY_IMPL(pytbptt, CPU, library) {
  library.impl("lstm", TORCH_BOX(&lstm<Backend>));
  library.impl("lstm_backward", TORCH_BOX(&lstm_backward<Backend>));
}

}  // namespace pytbptt::cpu
