// The rel_attention kernels on the emulator, for one KIND and one HEAD_SIZE.
#include "rel_attention/cuda/backward.cuh"
#include "rel_attention/cuda/forward.cuh"

namespace pytbptt::cuda {
using Kind = KIND;
}

extern "C" void reset_emulator(unsigned schedule, bool wgmma) {
  pytbptt::emulator::clear_error();
  pytbptt::emulator::clear_buffers();
  pytbptt::emulator::set_schedule(schedule);
  pytbptt::emulator::set_wgmma_support(wgmma);
}

extern "C" void add_buffer(const void* data, std::int64_t bytes, bool writable) {
  pytbptt::emulator::add_buffer(data, static_cast<std::size_t>(bytes), writable);
}

extern "C" std::int64_t forward_workspace(const pytbptt::RelAttention* inputs) {
  return pytbptt::cuda::forward_workspace<pytbptt::cuda::Kind, HEAD_SIZE>(*inputs);
}

extern "C" const char* forward(const pytbptt::RelAttentionForward* launch, void* workspace) {
  return pytbptt::cuda::launch_forward<pytbptt::cuda::Kind, HEAD_SIZE>(*launch, workspace, nullptr);
}

extern "C" std::int64_t backward_workspace(const pytbptt::RelAttentionBackward* launch) {
  return pytbptt::cuda::backward_workspace<pytbptt::cuda::Kind, HEAD_SIZE>(*launch);
}

extern "C" const char* backward(const pytbptt::RelAttentionBackward* launch, void* workspace) {
  return pytbptt::cuda::launch_backward<pytbptt::cuda::Kind, HEAD_SIZE>(*launch, workspace, nullptr);
}
