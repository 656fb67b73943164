// How threads share one lstm call, and the functions that each instruction set supplies for it.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "lstm/params.h"

namespace pytbptt::cpu {

// Counts arrivals and never goes back, so that one word serves every step. On a cache line of its own.
struct alignas(64) Barrier {
  std::int64_t arrivals;  // starts at 0
};

// Waits until `arrivals` threads have arrived in all, the caller included, and sees what they wrote before. Spins for
// a while and then yields, so that more threads than processors make it slow and not stuck.
void arrive_and_wait(Barrier& barrier, std::int64_t arrivals);

// One thread's place: streams are cut into at most as many stream_groups, which need nothing from one another, and the
// hidden units of each among the unit_groups threads that serve it, which meet once per step.
struct LstmMember {
  int rank, stream_groups, unit_groups;
  Barrier* everyone;  // of all stream_groups * unit_groups threads
  Barrier* by_group;  // stream_groups of them
};

// A workspace is so many bytes, aligned to 64, that all threads of one call share; run is what each of them calls.
struct LstmForwardKernel {
  std::int64_t (*workspace)(const LstmForward&, int threads);
  void (*run)(const LstmForward&, const LstmMember&, void* workspace);
};
struct LstmBackwardKernel {
  std::int64_t (*workspace)(const LstmBackward&, int threads);
  void (*run)(const LstmBackward&, const LstmMember&, void* workspace);
};

const LstmForwardKernel& lstm_forward_kernel(Isa isa);
const LstmBackwardKernel& lstm_backward_kernel(Isa isa);

PYTBPTT_DECLARE_KERNEL(LstmForwardKernel, lstm_forward)
PYTBPTT_DECLARE_KERNEL(LstmBackwardKernel, lstm_backward)

}  // namespace pytbptt::cpu
