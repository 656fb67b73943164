// The work of one thread of an lstm call: its streams, its hidden units, its barriers.
//
//                hidden units, in blocks of `lanes`
//                block 0   block 1   block 2   block 3
//   group 0    | thread 0          | thread 1          |      a group has some of the streams; its threads need one
//   group 1    | thread 2          | thread 3          |      another's h (or gates' gradients) at every step
//
// barrier_group separates the steps of a group; barrier_all ends what all threads share, such as packing the weights.
#pragma once
#include "common/cpu/span.h"
#include "lstm/cpu/team.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// Row stride in elements: an odd number of cache lines, to avoid cache set conflicts.
template <typename T>
PYTBPTT_INLINE int64_t row_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (width + line - 1) / line;
  return (lines | 1) * line;
}

template <typename T>
PYTBPTT_INLINE int64_t blocks_of(const Lstm& inputs) {
  return (inputs.H + Vec<T>::lanes - 1) / Vec<T>::lanes;
}

struct ThreadPartition {
  Span streams, blocks;
  const LstmMember& member;
  int64_t group, barriers_passed = 0, group_barriers_passed = 0;

  ThreadPartition(const Lstm& inputs, int64_t block_count, const LstmMember& member)
      : member(member), group(member.rank / member.unit_groups) {
    streams = part(inputs.B, group, member.stream_groups);
    blocks = part(block_count, member.rank % member.unit_groups, member.unit_groups);
  }

  int threads() const { return member.stream_groups * member.unit_groups; }

  void barrier_all() {
    if (threads() > 1) arrive_and_wait(*member.team_barrier, ++barriers_passed * threads());
  }

  void barrier_group() {
    if (member.unit_groups > 1)
      arrive_and_wait(member.group_barriers[group], ++group_barriers_passed * member.unit_groups);
  }
};

PYTBPTT_INLINE bool is_reset(const Lstm& inputs, int64_t t, int64_t b) {
  return inputs.reset != nullptr && t < inputs.T && inputs.reset[t * inputs.B + b];
}

}  // namespace
}  // namespace pytbptt::cpu::PYTBPTT_ISA
