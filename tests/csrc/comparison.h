// Shared by the C++ tests: comparison with a reference in double, for every instruction set of this machine.
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

// The initial value of results: an element that a kernel does not write fails every comparison.
template <typename T>
constexpr T nan_fill = std::numeric_limits<T>::quiet_NaN();

template <typename T>
void compare(const std::string& name, const std::vector<T>& found, const std::vector<double>& expected) {
  // The results are sums of up to a few hundred terms of magnitude 1.
  const double tolerance = 500 * static_cast<double>(std::numeric_limits<T>::epsilon());
  double max_error = 0;
  for (std::size_t n = 0; n < expected.size(); ++n) {
    const double error = std::abs(found[n] - expected[n]) / std::max(1.0, std::abs(expected[n]));
    max_error = error <= max_error ? max_error : error;  // NaN if any error is
  }
  if (!(max_error <= tolerance)) {
    ++failures;
    std::printf("FAILED %s: error %g, expected at most %g\n", name.c_str(), max_error, tolerance);
  }
}

// Calls check(isa, T{}) for every instruction set and T = float, double.
template <typename Check>
void for_isas_and_precisions(const Check& check) {
  for (const cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (isa > cpu::selected_isa()) continue;
    check(isa, float{});
    check(isa, double{});
  }
}

constexpr std::align_val_t workspace_alignment{64};

struct AlignedDeleter {
  void operator()(void* memory) const { ::operator delete(memory, workspace_alignment); }
};

// No larger than needed, except for the alignment, so that AddressSanitizer detects overruns.
inline std::unique_ptr<void, AlignedDeleter> allocate_workspace(std::int64_t bytes) {
  return std::unique_ptr<void, AlignedDeleter>(
      ::operator new(static_cast<std::size_t>((bytes + 63) / 64 * 64), workspace_alignment));
}

inline int report() {
  std::printf("%s\n", failures == 0 ? "all correct" : "failures above");
  return failures == 0 ? 0 : 1;
}

}  // namespace pytbptt
