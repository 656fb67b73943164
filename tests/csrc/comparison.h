// What the C++ tests share: results beside those of the formulas in double, for every instruction set that runs here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "common/cpu/isa.h"

namespace pytbptt {

inline int failures = 0;

// An element that a kernel forgot to write stays NaN, which no comparison lets pass.
template <typename T>
constexpr T unwritten = std::numeric_limits<T>::quiet_NaN();

template <typename T>
void compare(const std::string& what, const std::vector<T>& found, const std::vector<double>& wanted) {
  // Sums of up to a few hundred terms of size about 1: a few hundred roundings.
  const double tolerance = 500 * static_cast<double>(std::numeric_limits<T>::epsilon());
  double worst = 0;
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    const double error = std::abs(found[n] - wanted[n]) / std::max(1.0, std::abs(wanted[n]));
    worst = error <= worst ? worst : error;  // NaN wins
  }
  if (!(worst <= tolerance)) {
    ++failures;
    std::printf("FAILED %s: error %g, expected at most %g\n", what.c_str(), worst, tolerance);
  }
}

// Calls check(isa, element) for every instruction set, with an element of either precision.
template <typename Check>
void for_isas_and_precisions(const Check& check) {
  for (const cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (isa > cpu::selected_isa()) continue;
    check(isa, float{});
    check(isa, double{});
  }
}

constexpr std::align_val_t workspace_alignment{64};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, workspace_alignment); }
};

// Exactly as long as asked for, up to its alignment, so that AddressSanitizer sees what goes beyond.
inline std::unique_ptr<void, Free> workspace_of(std::int64_t bytes) {
  return std::unique_ptr<void, Free>(
      ::operator new(static_cast<std::size_t>((bytes + 63) / 64 * 64), workspace_alignment));
}

inline int report() {
  std::printf("%s\n", failures == 0 ? "all correct" : "failures above");
  return failures == 0 ? 0 : 1;
}

}  // namespace pytbptt
