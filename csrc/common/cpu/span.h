// Index ranges: intersection, bounding range, even partition.
#pragma once
#include "common/cpu/vector.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

using std::int64_t;

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
};

PYTBPTT_INLINE Span intersect(Span a, Span b) {
  return {larger(a.begin, b.begin), smaller(a.end, b.end)};
}

// The smallest span that holds both.
PYTBPTT_INLINE Span bounding_range(Span a, Span b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

// Range `index` of `parts` near-equal parts of [0, count); longer parts first.
PYTBPTT_INLINE Span part(int64_t count, int64_t index, int64_t parts) {
  const int64_t length = count / parts, longer = count % parts;
  const int64_t begin = index * length + smaller(index, longer);
  return {begin, begin + length + (index < longer ? 1 : 0)};
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
