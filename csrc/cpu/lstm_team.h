// How threads share one lstm call, and the functions that each instruction set supplies for it.
#pragma once
#include <cstdint>

#include "lstm.h"

namespace pytbptt::cpu {

// Counts arrivals and never goes back, so that one word serves every step. On a cache line of its own.
struct alignas(64) Barrier {
  std::int64_t arrivals;  // starts at 0
};

// Waits until `arrivals` threads have arrived in all, the caller included, and sees what they wrote before. Spins for
// a while and then yields, so that more threads than processors make it slow and not stuck.
void arrive_and_wait(Barrier& barrier, std::int64_t arrivals);

// One thread's place: streams are cut into stream_groups, which need nothing from one another, and the hidden units
// of each among the unit_groups threads that serve it, which meet once per step.
struct LstmMember {
  int rank, stream_groups, unit_groups;
  Barrier* everyone;  // of all stream_groups * unit_groups threads
  Barrier* by_group;  // stream_groups of them
};

struct LstmKernels {
  // Bytes, aligned to 64, that all threads of one call share.
  std::int64_t (*forward_workspace)(const LstmForward&, int threads);
  std::int64_t (*backward_workspace)(const LstmBackward&, int threads);
  // What every thread of the team runs, with the same workspace.
  void (*forward)(const LstmForward&, const LstmMember&, void* workspace);
  void (*backward)(const LstmBackward&, const LstmMember&, void* workspace);
};

namespace baseline {
extern const LstmKernels lstm_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LstmKernels lstm_kernels;
}
namespace avx512 {
extern const LstmKernels lstm_kernels;
}
#endif

}  // namespace pytbptt::cpu
