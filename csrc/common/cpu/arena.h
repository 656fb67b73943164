// Splits a preallocated workspace into buffers.
#pragma once
#include "common/cpu/span.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// Bump allocator with 64-byte alignment. With a null start it only counts the bytes needed.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <typename U>
  U* allocate(int64_t count) {
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
