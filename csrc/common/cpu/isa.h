// Which instruction sets the CPU kernels were built for, and which one this machine should run.
#pragma once

namespace pytbptt::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that was built and that this processor and operating system support; PYTBPTT_CPU_ISA
// (baseline, avx2 or avx512) selects a lower one, so that every build can be tested on one machine. It is read once;
// other values are ignored here and rejected in pytbptt/ops/dispatch.py.
Isa selected_isa();

const char* isa_name(Isa isa);

// The names of all that were built, from the least to the best, ended by nullptr.
const char* const* built_isas();

}  // namespace pytbptt::cpu

// Declares `const Kernel name` in every ISA's namespace; PYTBPTT_KERNEL_FOR selects one at run time.
#if defined(__x86_64__)
#define PYTBPTT_DECLARE_KERNEL(Kernel, name) \
  namespace baseline {                       \
  extern const Kernel name;                  \
  }                                          \
  namespace avx2 {                           \
  extern const Kernel name;                  \
  }                                          \
  namespace avx512 {                         \
  extern const Kernel name;                  \
  }
#define PYTBPTT_KERNEL_FOR(isa, name) \
  ((isa) == Isa::avx512 ? avx512::name : (isa) == Isa::avx2 ? avx2::name : baseline::name)
#else
#define PYTBPTT_DECLARE_KERNEL(Kernel, name) \
  namespace baseline {                       \
  extern const Kernel name;                  \
  }
#define PYTBPTT_KERNEL_FOR(isa, name) (static_cast<void>(isa), baseline::name)
#endif
