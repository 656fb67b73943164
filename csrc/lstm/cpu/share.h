// A thread's part of an lstm call: which streams and units are its own, and where it waits for the others.
#pragma once
#include "common/cpu/span.h"
#include "lstm/cpu/team.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

// Elements from one row to the next: an odd number of cache lines, or rows whose length is a power of two would all
// compete for the same few places in the cache.
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

struct Share {
  Span streams, blocks;
  const LstmMember& member;
  int64_t group, meetings_of_everyone = 0, meetings_of_group = 0;

  Share(const Lstm& inputs, int64_t block_count, const LstmMember& member)
      : member(member), group(member.rank / member.unit_groups) {
    streams = part(inputs.B, group, member.stream_groups);
    blocks = part(block_count, member.rank % member.unit_groups, member.unit_groups);
  }

  int threads() const { return member.stream_groups * member.unit_groups; }

  void meet_everyone() {
    if (threads() > 1) arrive_and_wait(*member.everyone, ++meetings_of_everyone * threads());
  }

  void meet_group() {
    if (member.unit_groups > 1) arrive_and_wait(member.by_group[group], ++meetings_of_group * member.unit_groups);
  }
};

PYTBPTT_INLINE bool resets(const Lstm& inputs, int64_t t, int64_t b) {
  return inputs.reset != nullptr && t < inputs.T && inputs.reset[t * inputs.B + b];
}

}  // namespace
}  // namespace pytbptt::cpu::PYTBPTT_ISA
