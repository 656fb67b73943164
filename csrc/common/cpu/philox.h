// The dropout mask of pytbptt/ops/rel_attention/reference.py, many counters at once.
#pragma once
#include "common/cpu/vector.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

using Words = Vec<std::int64_t>::type;  // 32-bit words in the low halves of 64-bit lanes; the high halves are undefined

// 32 x 32 -> 64-bit product of the low halves of each lane. clang compiles the plain expression to one instruction, and
// clang-cl does not declare the AVX intrinsics here. maskz, because GCC 12 warns about an uninitialised value in the
// unmasked intrinsic.
PYTBPTT_INLINE Words multiply_words(Words a, std::uint32_t b) {
#if PYTBPTT_VECTOR_BYTES == 64 && !defined(__clang__)
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif PYTBPTT_VECTOR_BYTES == 32 && !defined(__clang__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  return (a & 0xffffffff) * static_cast<std::int64_t>(b);
#endif
}

PYTBPTT_INLINE Words high_words(Words a) {
  using Unsigned = Vec<std::uint64_t>::type;
  return reinterpret_cast<Words>(reinterpret_cast<Unsigned>(a) >> 32);
}

// 16 random bits for each attention weight (sequence, query, j), j in [8 * first_block, 8 * end_block); sequence is
// b * H + h. May write up to 8 * Vec<int64>::lanes elements past the end.
PYTBPTT_INLINE void dropout_bits(std::int64_t seed, std::int64_t sequence, std::int64_t query, std::int64_t first_block,
                                 std::int64_t end_block, std::uint16_t* bits) {
  constexpr int lanes = Vec<std::int64_t>::lanes;
  using All = CountTo<lanes>::type;
  constexpr std::int64_t low = 0xffffffff;
  for (std::int64_t block = first_block; block < end_block; block += lanes) {
    Words c0{}, c1 = broadcast<std::int64_t>(query), c2 = broadcast<std::int64_t>(sequence), c3 = Words{};
    for (int lane = 0; lane < lanes; ++lane) c0[lane] = block + lane;
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words product0 = multiply_words(c0, 0xD2511F53u), product1 = multiply_words(c2, 0xCD9E8D57u);
      c0 = high_words(product1) ^ c1 ^ static_cast<std::int64_t>(k0);
      c1 = product1;
      c2 = high_words(product0) ^ c3 ^ static_cast<std::int64_t>(k1);
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // A little-endian store of the 64-bit pairs puts words and half-words in ascending order.
    const Words first = (c0 & low) | (c1 << 32), second = (c2 & low) | (c3 << 32);
    auto* to = reinterpret_cast<Vec<std::int64_t>::unaligned*>(bits + 8 * (block - first_block));
    to[0] = interleave<std::int64_t, 0>(first, second, All{});
    to[1] = interleave<std::int64_t, lanes / 2>(first, second, All{});
  }
}

// Mask of the lanes that dropout keeps.
template <typename T>
PYTBPTT_INLINE typename Vec<T>::integers kept(const std::uint16_t* bits, std::int32_t threshold) {
  using Integers = typename Vec<T>::integers;
  const auto wide = __builtin_convertvector(*reinterpret_cast<const typename Vec<T>::halves*>(bits), Integers);
  return wide >= static_cast<typename Vec<T>::Integer>(threshold);
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
