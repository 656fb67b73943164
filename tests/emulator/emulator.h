// csrc/common/cuda/device/device.h for a machine without a GPU: the same names, each checking that it is used as the
// GPU demands. A launch runs its blocks one after another, or all at once where they are launched together, their
// threads as fibres that a schedule picks from; what is wrong is said by `emulator::error()` after the launch, with the
// thread and the line of the kernel.
//
// Products by warpgroups leave their sums when they are waited for, and NaN until then.
//
// Found whatever the schedule: two threads touching the same bytes of shared memory (or, of one block, of global
// memory) without a barrier between; blocks that touch what another wrote, or write what it read, unless flags and
// barriers put the one before the other; reads beside and past every buffer; reading a copy that was not waited for;
// warp operations and barriers that not all threads reach, or reach at different places; threads that wait for ever;
// operands of warpgroups' products that no fence has shown them, or that change before the products are waited for.
// Shared memory starts as NaN, so that what was never written shows in the results.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

#define PYTBPTT_DEVICE inline
#define PYTBPTT_UNROLL
#define PYTBPTT_LOOP
#define PYTBPTT_KERNEL(threads, blocks) void
#define PYTBPTT_WARPGROUP_KERNEL(threads, blocks) void

namespace pytbptt::emulator {

using Place = std::source_location;

// The order in which blocks and threads run: 0 first to last, 1 last to first, otherwise a seed of chance.
void set_schedule(unsigned schedule);
// Whether the machine has warpgroups.
void set_warpgroups(bool offered);
bool offers_warpgroups();
// Global memory: kernels may touch these bytes and no others; forgotten by `clear_buffers`.
void add_buffer(const void* data, std::size_t bytes, bool writable);
void clear_buffers();
// What was wrong since the last `clear_error`; empty if nothing.
const std::string& error();
void clear_error();

void run(std::int64_t blocks, bool together, int threads, int shared_bytes, const std::function<void()>& kernel);
// Blocks that fit on the machine at once.
constexpr std::int64_t max_blocks_together = 64;
void clear(void* data, std::size_t bytes);
[[noreturn]] void fail(const std::string& what, const Place& place);

int thread();
int block();
void sync_threads(const Place& place);
void sync_warp(const Place& place);
void sync_warpgroup(const Place& place);
// All 32 lanes call it with an argument each; `perform` is called once, with the 32 arguments.
void together(const char* name, void* argument, void (*perform)(void** arguments), const Place& place);

// The same for the 128 threads of a warpgroup.
void together_in_warpgroup(const char* name, void* argument, void (*perform)(void** arguments), const Place& place);
// Remembers that a product reads 16 bytes of shared memory until it is waited for.
void read_until_wait(const void* data, const Place& place);
// Where the sums of a thread of the running one's warpgroup grow until they are waited for.
float* pending_sums(int thread_of_group, float* sums, int count);
void fence_async_shared();
void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int groups, const Place& place);

void store_release(std::uint32_t* flag, std::uint32_t value, const Place& place);
void wait_at_least(const std::uint32_t* flag, std::uint32_t value, const Place& place);
void check_global(const void* data, std::size_t bytes, bool write, const Place& place);
char* shared_memory(int first_byte, std::size_t bytes);
std::size_t shared_offset(const void* data);  // of the block's shared memory, in bytes
void check_shared(const void* data, std::size_t bytes, bool write, const Place& place);
void copy_later(void* to, const void* from, int bytes, int valid, const Place& place);
void land_copies(const Place& place);

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float value);
std::uint16_t float_to_bfloat16(float value);

}  // namespace pytbptt::emulator

namespace pytbptt::device {

using emulator::Place;
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
inline void sync_threads(Place place = Place::current()) {
  emulator::sync_threads(place);
}
inline void sync_parts() {
  emulator::sync_threads({});
}
inline void sync_warp(Place place = Place::current()) {
  emulator::sync_warp(place);
}

template <typename T>
T shfl(T value, int source, Place place = Place::current()) {
  struct Argument {
    T value, result;
    int source;
  } argument{value, T{}, source};
  emulator::together(
      "shfl", &argument,
      [](void** lanes) {
        for (int lane = 0; lane < warp_size; ++lane) {
          auto& mine = *static_cast<Argument*>(lanes[lane]);
          mine.result = static_cast<Argument*>(lanes[mine.source % warp_size])->value;
        }
      },
      place);
  return argument.result;
}
template <typename T>
T shfl_xor(T value, int mask, Place place = Place::current()) {
  return shfl(value, lane() ^ mask, place);
}

template <typename T>
T load(const T* from, Place place = Place::current()) {
  emulator::check_global(from, sizeof(T), false, place);
  return *from;
}
template <typename T>
void store(T* to, T value, Place place = Place::current()) {
  emulator::check_global(to, sizeof(T), true, place);
  *to = value;
}

inline void add_to(float* to, float value, Place place = Place::current()) {
  store(to, load(to, place) + value, place);
}
inline void add_to(Pair* to, Pair value, Place place = Place::current()) {
  const Pair before = load(to, place);
  store(to, Pair{before.x + value.x, before.y + value.y}, place);
}

inline void store_release(std::uint32_t* flag, std::uint32_t value, Place place = Place::current()) {
  emulator::store_release(flag, value, place);
}
inline void wait_at_least(const std::uint32_t* flag, std::uint32_t value, Place place = Place::current()) {
  emulator::wait_at_least(flag, value, place);
}

template <typename T>
class Smem {
 public:
  Smem(T* first, T* begin, T* end) : first_(first), begin_(begin), end_(end) {}
  T load(int index, Place place = Place::current()) const { return load_many<T>(index, place); }
  void store(int index, T value, Place place = Place::current()) const { store_many<T>(index, value, place); }
  template <typename Many>
  Many load_many(int index, Place place = Place::current()) const {
    Many value;
    std::memcpy(&value, at(index, sizeof(Many), false, place), sizeof(Many));
    return value;
  }
  template <typename Many>
  void store_many(int index, Many value, Place place = Place::current()) const {
    std::memcpy(at(index, sizeof(Many), true, place), &value, sizeof(Many));
  }
  Smem operator+(int elements) const { return {first_ + elements, begin_, end_}; }

  // Where `bytes` bytes from an element on lie, after checking that they may be touched.
  T* at(int index, std::size_t bytes, bool write, const Place& place) const {
    T* const here = inside(index, bytes, place);
    emulator::check_shared(here, bytes, write, place);
    return here;
  }
  T* inside(int index, std::size_t bytes, const Place& place) const {
    T* const here = first_ + index;
    if (here < begin_ || reinterpret_cast<char*>(here) + bytes > reinterpret_cast<char*>(end_)) {
      emulator::fail("outside its part of shared memory, by element " + std::to_string(here - begin_) + " of " +
                         std::to_string(end_ - begin_),
                     place);
    }
    if (reinterpret_cast<std::uintptr_t>(here) % bytes != 0) emulator::fail("misaligned in shared memory", place);
    return here;
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
void cp_async_16(Smem<T> to, const T* from, int valid, Place place = Place::current()) {
  emulator::copy_later(to.inside(0, 16, place), from, 16, valid, place);
}
inline void cp_async_wait(Place place = Place::current()) {
  emulator::land_copies(place);
}

template <bool TRANSPOSED, typename E>
void ldmatrix_x4(std::uint32_t (&to)[4], Smem<E> row, Place place = Place::current()) {
  struct Argument {
    std::uint32_t* to;
    const E* row;
  } argument{to, row.at(0, 16, false, place)};
  emulator::together(
      TRANSPOSED ? "ldmatrix_x4 transposed" : "ldmatrix_x4", &argument,
      [](void** lanes) {
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int row, int column) {
              const E* const from = static_cast<Argument*>(lanes[8 * matrix + row])->row;
              return static_cast<std::uint32_t>(from[column].bits);
            };
            static_cast<Argument*>(lanes[lane])->to[matrix] = TRANSPOSED
                                                                  ? element(2 * q, g) | element(2 * q + 1, g) << 16
                                                                  : element(g, 2 * q) | element(g, 2 * q + 1) << 16;
          }
        }
      },
      place);
}

inline float to_float(float value) {
  return value;
}
inline float to_float(half value) {
  return emulator::half_to_float(value.bits);
}
inline float to_float(bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
template <typename E>
E from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline half from_float<half>(float value) {
  return {emulator::float_to_half(value)};
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  return {emulator::float_to_bfloat16(value)};
}
template <typename E>
std::uint32_t pack(float first, float second) {
  return from_float<E>(first).bits | static_cast<std::uint32_t>(from_float<E>(second).bits) << 16;
}

// The products of one warp, summed in float in the order of k; columns side by side, for the compiler's vectors.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], float (&d)[16][8]) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) d[m][n] = 0;
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
}

struct MmaArgument {
  float* d;
  const std::uint32_t *a, *b;
};

inline void add_products(void** lanes, const float (&products)[16][8]) {
  for (int lane = 0; lane < warp_size; ++lane) {
    const int g = lane / 4, q = lane % 4;
    float* const d = static_cast<MmaArgument*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) d[i] += products[g + i / 2 * 8][2 * q + i % 2];
  }
}

template <typename E>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Place place = Place::current()) {
  MmaArgument argument{d, a, b};
  emulator::together(
      "mma", &argument,
      [](void** lanes) {
        float wide_a[16][16], wide_b[16][8], products[16][8];
        const auto element = [](std::uint32_t packed, int i) {
          return to_float(E{static_cast<std::uint16_t>(packed >> 16 * i)});
        };
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          const auto& mine = *static_cast<MmaArgument*>(lanes[lane]);
          for (int i = 0; i < 2; ++i) {
            for (int part = 0; part < 4; ++part) {
              wide_a[g + part % 2 * 8][2 * q + i + part / 2 * 8] = element(mine.a[part], i);
            }
            for (int part = 0; part < 2; ++part) wide_b[2 * q + i + part * 8][g] = element(mine.b[part], i);
          }
        }
        multiply(wide_a, wide_b, products);
        add_products(lanes, products);
      },
      place);
}

// The tensor cores read the upper 19 bits; `to_tf32` rounds to them, away from zero on ties.
inline float from_tf32(std::uint32_t bits) {
  bits &= 0xffffe000u;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     Place place = Place::current()) {
  MmaArgument argument{d, a, b};
  emulator::together(
      "mma_tf32", &argument,
      [](void** lanes) {
        float wide_a[16][8], wide_b[8][8], products[16][8];
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          const auto& mine = *static_cast<MmaArgument*>(lanes[lane]);
          for (int part = 0; part < 4; ++part) {
            wide_a[g + part % 2 * 8][q + part / 2 * 4] = from_tf32(mine.a[part]);
          }
          for (int part = 0; part < 2; ++part) wide_b[q + part * 4][g] = from_tf32(mine.b[part]);
        }
        multiply(wide_a, wide_b, products);
        add_products(lanes, products);
      },
      place);
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
  emulator::run(blocks, false, threads, shared_bytes, [&] { kernel(arguments...); });
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

template <typename... Parameters>
bool fit_together(void (*)(Parameters...), std::int64_t blocks, int, int) {
  return blocks <= emulator::max_blocks_together;
}

template <typename... Parameters, typename... Arguments>
const char* launch_together(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, Stream,
                            const Arguments&... arguments) {
  emulator::run(blocks, true, threads, shared_bytes, [&] { kernel(arguments...); });
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

inline const char* clear(void* data, std::int64_t bytes, Stream) {
  emulator::clear(data, static_cast<std::size_t>(bytes));
  return emulator::error().empty() ? nullptr : emulator::error().c_str();
}

}  // namespace pytbptt::device

#include "warpgroup.h"
