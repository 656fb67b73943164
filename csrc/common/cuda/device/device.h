// Device primitives and all inline PTX. With nvcc: GPUs of compute capability 8.0+. Otherwise: the CPU emulator in
// tests/emulator, with the same functions and checks of their use.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pytbptt::device {

constexpr int warp_size = 32;

// Two-byte floating point as it is stored; computed with in float.
struct half {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};
struct alignas(8) Pair {
  float x, y;
};
struct alignas(16) Quad {
  float x, y, z, w;
};
struct alignas(16) Words {
  std::uint32_t x, y, z, w;
};

// WGMMA operand rows: 128 bytes = 64 two-byte elements, in 16-byte chunks (8 elements).
constexpr int row_elements = 64, chunk_elements = 8;

}  // namespace pytbptt::device

#ifndef __CUDACC__

#include "emulator.h"

#else

#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <type_traits>
#include <utility>

#define PYTBPTT_DEVICE __device__ __forceinline__
// UNROLL: full unrolling, so that indexed arrays stay in registers. LOOP: no unrolling.
#define PYTBPTT_UNROLL _Pragma("unroll")
#define PYTBPTT_LOOP _Pragma("unroll 1")
// __global__ with launch bounds: threads per block, minimum blocks per SM.
#define PYTBPTT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A kernel that uses WGMMA. Compiled for other architectures it gets a launch bound of 32 threads, by which
// `offers_warpgroups` recognises that it cannot run.
#define PYTBPTT_WARPGROUP_KERNEL(threads, blocks) PYTBPTT_KERNEL(has_warpgroups ? (threads) : warp_size, blocks)

namespace pytbptt::device {

using Stream = cudaStream_t;

PYTBPTT_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
PYTBPTT_DEVICE int block() {
  return static_cast<int>(blockIdx.x);
}
PYTBPTT_DEVICE int lane() {
  return thread() % warp_size;
}
PYTBPTT_DEVICE int warp() {
  return thread() / warp_size;
}

PYTBPTT_DEVICE void sync_threads() {
  asm volatile("bar.sync 0;" ::: "memory");
}
// Block barrier of producer and consumer warps, which call it from different lines of code, equally often.
PYTBPTT_DEVICE void sync_roles() {
  sync_threads();
}
PYTBPTT_DEVICE void sync_warp() {
  asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
}

template <typename T>
PYTBPTT_DEVICE T shfl(T value, int source) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return __shfl_sync(0xffffffffu, value, source);
}
template <typename T>
PYTBPTT_DEVICE T shfl_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Global memory. Within one launch, blocks may share a global address only if it is synchronised with store_release and
// wait_at_least.
template <typename T>
PYTBPTT_DEVICE T load(const T* from) {
  return *from;
}
template <typename T>
PYTBPTT_DEVICE void store(T* to, T value) {
  *to = value;
}

// Atomic add without return value (red). If threads of a block add to the same address, separate them by a barrier to
// keep the order deterministic.
PYTBPTT_DEVICE void add_to(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
PYTBPTT_DEVICE void add_to(Pair* to, Pair value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(value.x), "f"(value.y) : "memory");
#else
  add_to(&to->x, value.x);
  add_to(&to->y, value.y);
#endif
}

// Inter-block synchronisation in cooperative launches. Producer: all threads write, block barrier, one thread calls
// store_release(flag, value). Consumer: one thread calls wait_at_least(flag, value), then a block (or warp) barrier
// makes the writes visible. Flags only increase. The wait traps after 2^26 polls (about a minute) instead of hanging.
PYTBPTT_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
[[noreturn]] __device__ __noinline__ inline void give_up_waiting(std::uint32_t found, std::uint32_t value) {
  printf("pytbptt: block %d, thread %d: timed out waiting for a flag: found %u, expected at least %u\n", block(),
         thread(), found, value);
  __trap();
}
PYTBPTT_DEVICE void wait_at_least(const std::uint32_t* flag, std::uint32_t value) {
  constexpr std::uint32_t max_polls = 1u << 26;
  std::uint32_t found;
  for (std::uint32_t polls = 0; polls < max_polls; ++polls) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
    if (found >= value) return;
  }
  give_up_waiting(found, value);
}

// Typed pointer into shared memory. Bounds are checked only in the emulator.
template <typename T>
class Smem {
 public:
  PYTBPTT_DEVICE explicit Smem(T* first) : first_(first) {}
  PYTBPTT_DEVICE T load(int index) const { return first_[index]; }
  PYTBPTT_DEVICE void store(int index, T value) const { first_[index] = value; }
  // Several neighbours at once, read as `Many`; the index is a multiple of their number.
  template <typename Many>
  PYTBPTT_DEVICE Many load_many(int index) const {
    return *reinterpret_cast<const Many*>(first_ + index);
  }
  template <typename Many>
  PYTBPTT_DEVICE void store_many(int index, Many value) const {
    *reinterpret_cast<Many*>(first_ + index) = value;
  }
  PYTBPTT_DEVICE Smem operator+(int elements) const { return Smem(first_ + elements); }
  PYTBPTT_DEVICE std::uint32_t address() const { return static_cast<std::uint32_t>(__cvta_generic_to_shared(first_)); }

 private:
  T* first_;
};

// View of `count` elements of the block's dynamic shared memory (1024-byte aligned) at byte offset `first_byte`, a
// multiple of 16.
template <typename T>
PYTBPTT_DEVICE Smem<T> shared(int first_byte, [[maybe_unused]] int count) {
  extern __shared__ __align__(1024) char memory[];
  return Smem<T>(reinterpret_cast<T*>(memory + first_byte));
}

// An asynchronous copy of 16 bytes, global to shared. The first `valid` ones are copied, the rest zeroed; both
// addresses are multiples of 16, and `from` must be readable even if `valid` is 0.
template <typename T>
PYTBPTT_DEVICE void cp_async_16(Smem<T> to, const T* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(valid) : "memory");
}
// Waits for all of this thread's copies; other threads see them after a barrier.
PYTBPTT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four matrices of 8x8 two-byte elements. Lanes 8i to 8i+7 hold the addresses of the rows of matrix i, 16 bytes each;
// lane l receives elements 2(l%4) and 2(l%4)+1 of row l/4 of every matrix (of column l/4 if TRANSPOSED).
template <bool TRANSPOSED, typename E>
PYTBPTT_DEVICE void ldmatrix_x4(std::uint32_t (&to)[4], Smem<E> row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row.address())
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row.address())
                 : "memory");
  }
}

// d += a·b by one warp: 16x16 times 16x8. With g = lane / 4 and q = lane % 4, each register of a and b holding two
// elements: a[0] is row g, columns 2q and 2q+1; a[1] row g+8; a[2] and a[3] the same, 8 columns further; b[0] is rows
// 2q and 2q+1 of column g, b[1] 8 rows further; d[0] and d[1] are row g, columns 2q and 2q+1, d[2] and d[3] row g+8.
template <typename E>
PYTBPTT_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <>
PYTBPTT_DEVICE void mma<half>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
PYTBPTT_DEVICE void mma<bfloat16>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for 16x8 times 8x8 floats, rounded to TF32 by `to_tf32`: a[0] is row g, column q; a[1] row g+8; a[2] and
// a[3] the same, 4 columns further; b[0] is row q of column g, b[1] 4 rows further; d as above.
PYTBPTT_DEVICE void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYTBPTT_DEVICE std::uint32_t to_tf32(float value) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}
// The TF32 MMA reads the upper 19 bits.
PYTBPTT_DEVICE float from_tf32(std::uint32_t bits) {
  return __uint_as_float(bits & 0xffffe000u);
}

}  // namespace pytbptt::device

#include "common/cuda/device/warpgroup.h"

namespace pytbptt::device {

// Conversions round to the nearest, ties to even.
PYTBPTT_DEVICE float to_float(float value) {
  return value;
}
PYTBPTT_DEVICE float to_float(half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
PYTBPTT_DEVICE float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
template <typename E>
PYTBPTT_DEVICE E from_float(float value);
template <>
PYTBPTT_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
PYTBPTT_DEVICE half from_float<half>(float value) {
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
PYTBPTT_DEVICE bfloat16 from_float<bfloat16>(float value) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
// Two elements in one register, the first in its low half.
template <typename E>
PYTBPTT_DEVICE std::uint32_t pack(float first, float second);
template <>
PYTBPTT_DEVICE std::uint32_t pack<half>(float first, float second) {
  std::uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}
template <>
PYTBPTT_DEVICE std::uint32_t pack<bfloat16>(float first, float second) {
  std::uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

PYTBPTT_DEVICE float exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
PYTBPTT_DEVICE float log2(float value) {
  return ::log2f(value);
}
PYTBPTT_DEVICE float exp(float value) {
  return ::expf(value);
}
PYTBPTT_DEVICE float tanh(float value) {
  return ::tanhf(value);
}
PYTBPTT_DEVICE float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
PYTBPTT_DEVICE float largest(float a, float b) {
  return ::fmaxf(a, b);
}
PYTBPTT_DEVICE std::uint32_t high_word(std::uint32_t a, std::uint32_t b) {
  return __umulhi(a, b);
}

namespace detail {

// Sets the kernel's dynamic shared memory limit to the device maximum, not to this launch's size: a smaller limit could
// break a concurrent launch of the same kernel. Cached per kernel and device.
template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Parameters...), int> > allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || allowed.count({kernel, device}) != 0) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const auto* const function = reinterpret_cast<const void*>(kernel);
  status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status == cudaSuccess) allowed.insert({kernel, device});
  return status;
}

template <typename... Parameters, typename... Arguments>
const char* launch(bool together, void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes,
                   Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more blocks than a grid can have";
  cudaError_t status = allow_shared(kernel, shared_bytes);
  if (status == cudaSuccess) {
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t grid{};
    grid.gridDim = dim3(static_cast<unsigned>(blocks));
    grid.blockDim = dim3(static_cast<unsigned>(threads));
    grid.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    grid.stream = stream;
    grid.attrs = &cooperative;
    grid.numAttrs = together ? 1 : 0;
    status = cudaLaunchKernelEx(&grid, kernel, arguments...);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, or the next cudaGetLastError on this thread would report it
  return cudaGetErrorString(status);
}

}  // namespace detail

// Launches the kernel asynchronously. Returns an error message or nullptr.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, Stream stream,
                   const Arguments&... arguments) {
  return detail::launch(false, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

// Whether the current device runs the sm_90a version of a WGMMA kernel. Cached per kernel and device.
template <typename... Parameters>
bool offers_warpgroups(void (*kernel)(Parameters...)) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Parameters...), int>, bool> offered;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const auto found = offered.find({kernel, device});
  if (found != offered.end()) return found->second;
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) cudaGetLastError();  // it is not the error of a later launch
  return offered[{kernel, device}] = status == cudaSuccess && attributes.maxThreadsPerBlock > warp_size;
}

// Whether all blocks can be co-resident on the current device (cooperative launch). Cached per kernel, device and block
// size.
template <typename... Parameters>
bool fit_together(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Parameters...), int, int, int>, std::int64_t> max_blocks;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0, multiprocessors = 0, together = 0, of_each = 0;
  bool known = cudaGetDevice(&device) == cudaSuccess;
  const auto found = max_blocks.find({kernel, device, threads, shared_bytes});
  if (known && found != max_blocks.end()) return blocks <= found->second;
  known = known && cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
          cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
          detail::allow_shared(kernel, shared_bytes) == cudaSuccess &&
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads,
                                                        static_cast<std::size_t>(shared_bytes)) == cudaSuccess;
  if (!known) {
    cudaGetLastError();  // it is not the error of a later launch
    return false;
  }
  const auto most = together != 0 ? std::int64_t{of_each} * multiprocessors : 0;
  max_blocks[{kernel, device, threads, shared_bytes}] = most;
  return blocks <= most;
}

// Cooperative launch.
template <typename... Parameters, typename... Arguments>
const char* launch_together(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes,
                            Stream stream, const Arguments&... arguments) {
  return detail::launch(true, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

// Zeroes memory, in the stream's order.
inline const char* clear(void* data, std::int64_t bytes, Stream stream) {
  const cudaError_t status = cudaMemsetAsync(data, 0, static_cast<std::size_t>(bytes), stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace pytbptt::device

#endif
