// The lstm kernels on the emulator, for one LSTM_COMPUTE_TYPE and any plan.
#include "lstm/cuda/backward.cuh"
#include "lstm/cuda/forward.cuh"

namespace {

constexpr auto compute_type = pytbptt::cuda::ComputeType::LSTM_COMPUTE_TYPE;

}  // namespace

extern "C" void reset_emulator(unsigned schedule) {
  pytbptt::emulator::clear_error();
  pytbptt::emulator::clear_buffers();
  pytbptt::emulator::set_schedule(schedule);
}

extern "C" void add_buffer(const void* data, std::int64_t bytes, bool writable) {
  pytbptt::emulator::add_buffer(data, static_cast<std::size_t>(bytes), writable);
}

extern "C" void make_plan(bool backward, const pytbptt::Lstm* inputs, const pytbptt::cuda::GpuLimits* limits,
                          pytbptt::cuda::LstmPlan* plan) {
  *plan = backward ? pytbptt::cuda::lstm_backward_plan<compute_type>(*inputs, *limits)
                   : pytbptt::cuda::lstm_forward_plan<compute_type>(*inputs, *limits);
}

// A plan of this many row tiles and groups, which lstm_*_plan may not choose.
extern "C" void make_plan_with_layout(bool backward, const pytbptt::Lstm* inputs,
                                      const pytbptt::cuda::GpuLimits* limits, int row_tiles, std::int64_t groups,
                                      pytbptt::cuda::LstmPlan* plan) {
  *plan = pytbptt::cuda::lstm_plan_detail::make_plan(backward, inputs->H, inputs->B, compute_type, *limits, row_tiles,
                                                     groups, true);
}

extern "C" const char* forward(const pytbptt::LstmForward* launch, const pytbptt::cuda::LstmPlan* plan,
                               void* workspace) {
  return pytbptt::cuda::lstm_forward<compute_type>(*launch, *plan, workspace, nullptr);
}

extern "C" const char* backward(const pytbptt::LstmBackward* launch, const pytbptt::cuda::LstmPlan* plan,
                                void* workspace) {
  return pytbptt::cuda::lstm_backward<compute_type>(*launch, *plan, workspace, nullptr);
}
