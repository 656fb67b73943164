// From here to target_end.h, functions are compiled for AVX2 with FMA. Pragmas rather than compiler flags: setuptools
// gives all sources of an extension the same flags. Everything defined here is in namespace pytbptt::cpu::avx2, and
// no header of torch or the standard library may be included: the linker merges inline functions across files and could
// keep the AVX2 copy for all.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define PYTBPTT_ISA avx2
#define PYTBPTT_VECTOR_BYTES 32
#define PYTBPTT_ACCUMULATORS 12
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
