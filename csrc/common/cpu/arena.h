// Memory of the kernels, which allocate none themselves.
#pragma once
#include "common/cpu/span.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// Hands out parts of a workspace, each from a multiple of 64 bytes on; with no workspace, adds up what will be needed.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <typename U>
  U* take(int64_t count) {
    char* here = start_ == nullptr ? nullptr : start_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(here);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
