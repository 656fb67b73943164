#include "lstm/cpu/team.h"

#include <thread>

namespace pytbptt::cpu {

void arrive_and_wait(Barrier& barrier, std::int64_t arrivals) {
  constexpr int spins_before_yielding = 4000;
  __atomic_fetch_add(&barrier.arrivals, 1, __ATOMIC_ACQ_REL);
  for (int spins = 0; __atomic_load_n(&barrier.arrivals, __ATOMIC_ACQUIRE) < arrivals; ++spins) {
    if (spins >= spins_before_yielding) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

const LstmForwardKernel& lstm_forward_kernel(Isa isa) {
  return PYTBPTT_KERNEL_FOR(isa, lstm_forward);
}

const LstmBackwardKernel& lstm_backward_kernel(Isa isa) {
  return PYTBPTT_KERNEL_FOR(isa, lstm_backward);
}

}  // namespace pytbptt::cpu
