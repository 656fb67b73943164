// WGMMA: asynchronous matrix multiply by a warpgroup (four consecutive warps, the first a multiple of four) of compute
// capability 9.0 (sm_90a); PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". Included by device.h only.
//
// A is in registers or shared memory, B in shared memory; the threads continue while the tensor cores read them:
//
//   fence_async_shared      fence.proxy.async, by every thread that wrote an operand to shared memory, before the
//                           barrier that makes it visible to the others
//   warpgroup_arrive        wgmma.fence, before the first product, and after writing registers that products use
//   warpgroup_mma           wgmma.mma_async: d += a · b, 64x16 times 16xN; warp w has rows 16w to 16w + 15 of d, in the
//                           layout of mma's accumulators
//   warpgroup_commit_batch  wgmma.commit_group: the products issued since the last commit become one group
//   warpgroup_wait<n>(d…)   wgmma.wait_group: until at most the last n groups are pending. The accumulators d may not
//                           be accessed before
#pragma once

namespace pytbptt::device {

// Shared-memory operand with 128-byte swizzle: rows of 128 bytes; every group of eight rows is 1024-byte aligned;
// 16-byte chunk c of row r is stored as chunk c ^ (r % 8), so that a column of chunks is in different banks. One wgmma
// (k = 16) reads 16 columns of a K-major operand, or 16 rows of an MN-major (TRANSPOSED) one.
//
//   row 0  | 0  1  2  3  4  5  6  7 |  chunks of 8 two-byte elements
//       1  | 1  0  3  2  5  4  7  6 |
//       2  | 2  3  0  1  6  7  4  5 |
//       :  | :                      |
//       7  | 7  6  5  4  3  2  1  0 |
PYTBPTT_DEVICE constexpr int swizzled(int row, int chunk) {
  return chunk ^ row % 8;
}

template <typename E>
class Matrix {
 public:
  // Descriptor: layout type 1 (128-byte swizzle) in bits 62–63, stride byte offset 1024 between groups of eight rows.
  PYTBPTT_DEVICE explicit Matrix(Smem<E> first)
      : bits_(static_cast<std::uint64_t>(first.address() >> 4) | std::uint64_t{1} << 16 | std::uint64_t{64} << 32 |
              std::uint64_t{1} << 62) {}
  // From another row, a multiple of eight, and another column, a multiple of a chunk, on.
  PYTBPTT_DEVICE Matrix from(int row, int column) const {
    Matrix moved(*this);
    moved.bits_ += (row * row_elements + column) / chunk_elements;
    return moved;
  }
  PYTBPTT_DEVICE std::uint64_t bits() const { return bits_; }

 private:
  std::uint64_t bits_;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYTBPTT_WARPGROUPS 1
#else
#define PYTBPTT_WARPGROUPS 0
#endif

// True in sm_90a device code; otherwise the functions below are empty.
constexpr bool has_warpgroups = PYTBPTT_WARPGROUPS != 0;

namespace detail {

// Compiler fence on the registers: WGMMA accesses them asynchronously, which the compiler does not know.
template <int COUNT>
PYTBPTT_DEVICE void pin(float (&d)[COUNT][4]) {
  PYTBPTT_UNROLL
  for (int n = 0; n < COUNT; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}
template <int COUNT>
PYTBPTT_DEVICE void pin(std::uint32_t (&a)[COUNT][4]) {
  PYTBPTT_UNROLL
  for (int n = 0; n < COUNT; ++n) {
    asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
  }
}

#if PYTBPTT_WARPGROUPS
#define PYTBPTT_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PYTBPTT_8(n) PYTBPTT_4(n), PYTBPTT_4(n + 1)
#define PYTBPTT_TEXT_8 "%0, %1, %2, %3"
#define PYTBPTT_TEXT_16 PYTBPTT_TEXT_8 ", %4, %5, %6, %7"
#define PYTBPTT_TEXT_24 PYTBPTT_TEXT_16 ", %8, %9, %10, %11"
#define PYTBPTT_TEXT_32 PYTBPTT_TEXT_24 ", %12, %13, %14, %15"
#define PYTBPTT_TEXT_48 PYTBPTT_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PYTBPTT_TEXT_64 PYTBPTT_TEXT_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PYTBPTT_SUMS_8 PYTBPTT_4(0)
#define PYTBPTT_SUMS_16 PYTBPTT_8(0)
#define PYTBPTT_SUMS_24 PYTBPTT_8(0), PYTBPTT_4(2)
#define PYTBPTT_SUMS_32 PYTBPTT_8(0), PYTBPTT_8(2)
#define PYTBPTT_SUMS_48 PYTBPTT_SUMS_32, PYTBPTT_8(4)
#define PYTBPTT_SUMS_64 PYTBPTT_SUMS_32, PYTBPTT_8(4), PYTBPTT_8(6)
// P0–P6: asm operand numbers that follow the accumulator's.
#define PYTBPTT_FROM_REGISTERS(N, TYPE, P0, P1, P2, P3, P4, P5, P6)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" PYTBPTT_TEXT_##N "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n}"   \
               : PYTBPTT_SUMS_##N                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1), "n"(TRANSPOSED)                       \
               : "memory")
#define PYTBPTT_FROM_SHARED(N, TYPE, P0, P1, P2, P3, P4)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" PYTBPTT_TEXT_##N "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}"                     \
               : PYTBPTT_SUMS_##N                                                                                  \
               : "l"(a), "l"(b), "r"(1), "n"(TRANSPOSED_A), "n"(TRANSPOSED)                                        \
               : "memory")
#define PYTBPTT_PRODUCTS(N, P0, P1, P2, P3, P4, P5, P6)                                              \
  template <typename E, int TRANSPOSED>                                                              \
  PYTBPTT_DEVICE void products(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b) { \
    if constexpr (std::is_same_v<E, half>) {                                                         \
      PYTBPTT_FROM_REGISTERS(N, "f16", P0, P1, P2, P3, P4, P5, P6);                                  \
    } else {                                                                                         \
      PYTBPTT_FROM_REGISTERS(N, "bf16", P0, P1, P2, P3, P4, P5, P6);                                 \
    }                                                                                                \
  }                                                                                                  \
  template <typename E, int TRANSPOSED_A, int TRANSPOSED>                                            \
  PYTBPTT_DEVICE void products(float (&d)[N / 8][4], std::uint64_t a, std::uint64_t b) {             \
    if constexpr (std::is_same_v<E, half>) {                                                         \
      PYTBPTT_FROM_SHARED(N, "f16", P0, P1, P2, P3, P4);                                             \
    } else {                                                                                         \
      PYTBPTT_FROM_SHARED(N, "bf16", P0, P1, P2, P3, P4);                                            \
    }                                                                                                \
  }
PYTBPTT_PRODUCTS(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
PYTBPTT_PRODUCTS(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
PYTBPTT_PRODUCTS(24, "%12", "%13", "%14", "%15", "%16", "%17", "%18")
PYTBPTT_PRODUCTS(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
PYTBPTT_PRODUCTS(48, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
PYTBPTT_PRODUCTS(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
#undef PYTBPTT_4
#undef PYTBPTT_8
#undef PYTBPTT_FROM_REGISTERS
#undef PYTBPTT_FROM_SHARED
#undef PYTBPTT_PRODUCTS
#endif

}  // namespace detail

// Named barrier of the warpgroup (id 1 + warpgroup; id 0 is __syncthreads).
PYTBPTT_DEVICE void sync_warpgroup() {
  asm volatile("bar.sync %0, 128;" ::"r"(thread() / 128 + 1) : "memory");
}

// setmaxnreg: registers per thread from here on. inc blocks until enough registers have been released. REGISTERS is a
// multiple of 8 in [24, 256].
template <int REGISTERS>
PYTBPTT_DEVICE void warpgroup_reg_alloc() {
#if PYTBPTT_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
PYTBPTT_DEVICE void warpgroup_reg_dealloc() {
#if PYTBPTT_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

PYTBPTT_DEVICE void fence_async_shared() {
#if PYTBPTT_WARPGROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Arguments: the register arrays that the next wgmma use.
template <typename... Registers>
PYTBPTT_DEVICE void warpgroup_arrive(Registers&... used) {
  (detail::pin(used), ...);
#if PYTBPTT_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
PYTBPTT_DEVICE void warpgroup_commit_batch() {
#if PYTBPTT_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int GROUPS, typename... Registers>
PYTBPTT_DEVICE void warpgroup_wait(Registers&... used) {
#if PYTBPTT_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
  (detail::pin(used), ...);
}

// A in registers, in the mma.m16n8k16 fragment layout.
template <bool TRANSPOSED, typename E, int N>
PYTBPTT_DEVICE void warpgroup_mma([[maybe_unused]] float (&d)[N][4], [[maybe_unused]] const std::uint32_t (&a)[4],
                                  [[maybe_unused]] const Matrix<E>& b) {
#if PYTBPTT_WARPGROUPS
  detail::products<E, TRANSPOSED ? 1 : 0>(d, a, b.bits());
#endif
}
template <bool TRANSPOSED_A, bool TRANSPOSED, typename E, int N>
PYTBPTT_DEVICE void warpgroup_mma([[maybe_unused]] float (&d)[N][4], [[maybe_unused]] const Matrix<E>& a,
                                  [[maybe_unused]] const Matrix<E>& b) {
#if PYTBPTT_WARPGROUPS
  detail::products<E, TRANSPOSED_A ? 1 : 0, TRANSPOSED ? 1 : 0>(d, a.bits(), b.bits());
#endif
}

}  // namespace pytbptt::device
