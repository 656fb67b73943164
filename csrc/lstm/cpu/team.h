// How threads share one lstm call, and the functions that each instruction set supplies for it.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "lstm/params.h"

namespace pytbptt::cpu {

// Monotonic arrival counter; never reset. On a cache line of its own.
struct alignas(64) Barrier {
  std::int64_t arrivals;  // starts at 0
};

// Increments the counter and waits until it reaches `arrivals` (acquire/release). Spins, then yields, so that it makes
// progress when oversubscribed.
void arrive_and_wait(Barrier& barrier, std::int64_t arrivals);

// The batch is split into stream_groups independent groups. Within a group, unit_groups threads split the hidden units
// and meet at a barrier once per step.
struct LstmMember {
  int rank, stream_groups, unit_groups;
  Barrier* team_barrier;    // of all stream_groups * unit_groups threads
  Barrier* group_barriers;  // stream_groups of them
};

// workspace: bytes (64-byte aligned) shared by all threads of a call. run: called by each thread.
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
