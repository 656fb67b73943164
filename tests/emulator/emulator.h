// Emulator of csrc/common/cuda/device/device.h on a CPU: the same names, with checks of their use. Blocks run one after
// another, or all at once in a cooperative launch; threads are fibers that a scheduler runs in a chosen order. The
// first error is in `emulator::error()` after the launch, with the thread and the line of the kernel.
//
// Detected under every schedule:
// * races: threads that access the same bytes of shared memory, or of global memory within a block, with no barrier
//   between; blocks that access what another wrote, or write what another read, unless flags and barriers order them;
// * accesses outside a buffer or outside a view of shared memory, misaligned accesses, writes to inputs;
// * use of a copy that was not waited for;
// * barriers and warp operations that not all threads reach, or reach at different lines; deadlocks;
// * operands of WGMMAs that no fence_async_shared precedes, or that change before the WGMMA is waited for.
// Shared memory starts as NaN and WGMMA accumulators are NaN until warpgroup_wait, so that wrong use shows in results.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator_api.h"

#define PYTBPTT_DEVICE inline
#define PYTBPTT_UNROLL
#define PYTBPTT_LOOP
#define PYTBPTT_KERNEL(threads, blocks) void
#define PYTBPTT_WARPGROUP_KERNEL(threads, blocks) void

namespace pytbptt::device {

using emulator::SourceLocation;
using Stream = struct CUstream_st*;  // always nullptr

inline int thread() {
  return emulator::thread();
}
inline int block() {
  return emulator::block();
}
inline int lane() {
  return thread() % warp_size;
}
inline int warp() {
  return thread() / warp_size;
}
inline void sync_threads(SourceLocation location = SourceLocation::current()) {
  emulator::sync_threads(location);
}
inline void sync_roles() {
  emulator::sync_threads({});
}
inline void sync_warp(SourceLocation location = SourceLocation::current()) {
  emulator::sync_warp(location);
}

template <typename T>
T shfl(T value, int source, SourceLocation location = SourceLocation::current()) {
  struct Argument {
    T value, result;
    int source;
  } argument{value, T{}, source};
  emulator::warp_collective(
      "shfl", &argument,
      [](void** lanes) {
        for (int lane = 0; lane < warp_size; ++lane) {
          auto& argument = *static_cast<Argument*>(lanes[lane]);
          argument.result = static_cast<Argument*>(lanes[argument.source % warp_size])->value;
        }
      },
      location);
  return argument.result;
}
template <typename T>
T shfl_xor(T value, int mask, SourceLocation location = SourceLocation::current()) {
  return shfl(value, lane() ^ mask, location);
}

template <typename T>
T load(const T* from, SourceLocation location = SourceLocation::current()) {
  emulator::check_global(from, sizeof(T), false, location);
  return *from;
}
template <typename T>
void store(T* to, T value, SourceLocation location = SourceLocation::current()) {
  emulator::check_global(to, sizeof(T), true, location);
  *to = value;
}

inline void add_to(float* to, float value, SourceLocation location = SourceLocation::current()) {
  store(to, load(to, location) + value, location);
}
inline void add_to(Pair* to, Pair value, SourceLocation location = SourceLocation::current()) {
  const Pair before = load(to, location);
  store(to, Pair{before.x + value.x, before.y + value.y}, location);
}

inline void store_release(std::uint32_t* flag, std::uint32_t value,
                          SourceLocation location = SourceLocation::current()) {
  emulator::store_release(flag, value, location);
}
inline void wait_at_least(const std::uint32_t* flag, std::uint32_t value,
                          SourceLocation location = SourceLocation::current()) {
  emulator::wait_at_least(flag, value, location);
}

template <typename T>
class Smem {
 public:
  Smem(T* first, T* begin, T* end) : first_(first), begin_(begin), end_(end) {}
  T load(int index, SourceLocation location = SourceLocation::current()) const { return load_many<T>(index, location); }
  void store(int index, T value, SourceLocation location = SourceLocation::current()) const {
    store_many<T>(index, value, location);
  }
  template <typename Many>
  Many load_many(int index, SourceLocation location = SourceLocation::current()) const {
    Many value;
    std::memcpy(&value, at(index, sizeof(Many), false, location), sizeof(Many));
    return value;
  }
  template <typename Many>
  void store_many(int index, Many value, SourceLocation location = SourceLocation::current()) const {
    std::memcpy(at(index, sizeof(Many), true, location), &value, sizeof(Many));
  }
  Smem operator+(int elements) const { return {first_ + elements, begin_, end_}; }

  // Address of `bytes` bytes from an element on, after the checks of an access.
  T* at(int index, std::size_t bytes, bool write, const SourceLocation& location) const {
    T* const address = inside(index, bytes, location);
    emulator::check_shared(address, bytes, write, location);
    return address;
  }
  // The same without the check for races.
  T* inside(int index, std::size_t bytes, const SourceLocation& location) const {
    T* const address = first_ + index;
    if (address < begin_ || reinterpret_cast<char*>(address) + bytes > reinterpret_cast<char*>(end_)) {
      emulator::fail("outside its view of shared memory, at element " + std::to_string(address - begin_) + " of " +
                         std::to_string(end_ - begin_),
                     location);
    }
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) emulator::fail("misaligned in shared memory", location);
    return address;
  }

 private:
  T *first_, *begin_, *end_;
};

template <typename T>
Smem<T> shared(int first_byte, int count) {
  T* const first = reinterpret_cast<T*>(emulator::shared_memory(first_byte, count * sizeof(T)));
  return {first, first, first + count};
}

template <typename T>
void cp_async_16(Smem<T> to, const T* from, int valid, SourceLocation location = SourceLocation::current()) {
  emulator::issue_async_copy(to.inside(0, 16, location), from, 16, valid, location);
}
inline void cp_async_wait(SourceLocation location = SourceLocation::current()) {
  emulator::complete_async_copies(location);
}

inline float exp2(float value) {
  return ::exp2f(value);
}
inline float log2(float value) {
  return ::log2f(value);
}
inline float exp(float value) {
  return ::expf(value);
}
inline float tanh(float value) {
  return ::tanhf(value);
}
inline float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
inline float largest(float a, float b) {
  return ::fmaxf(a, b);
}
inline std::uint32_t high_word(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(static_cast<std::uint64_t>(a) * b >> 32);
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, Stream,
                   const Arguments&... arguments) {
  emulator::run_grid(blocks, false, threads, shared_bytes, [&] { kernel(arguments...); });
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

template <typename... Parameters>
bool fit_together(void (*)(Parameters...), std::int64_t blocks, int, int) {
  return blocks <= emulator::max_coresident_blocks;
}

template <typename... Parameters, typename... Arguments>
const char* launch_together(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, Stream,
                            const Arguments&... arguments) {
  emulator::run_grid(blocks, true, threads, shared_bytes, [&] { kernel(arguments...); });
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

inline const char* clear(void* data, std::int64_t bytes, Stream) {
  emulator::zero_memory(data, static_cast<std::size_t>(bytes));
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

}  // namespace pytbptt::device

#include "conversions.h"
#include "warp_mma.h"
#include "warpgroup.h"
