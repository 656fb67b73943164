// As target_avx2.h, for AVX-512 F, BW, VL and DQ.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define PYTBPTT_ISA avx512
#define PYTBPTT_VECTOR_BYTES 64
#define PYTBPTT_ACCUMULATORS 24
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
