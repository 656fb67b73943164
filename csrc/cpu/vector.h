// Vectors of the target that the including file chose (target_*.h), through the vector extensions that GCC and clang
// share: the same source is SSE2, AVX2, AVX-512 or NEON code.
#pragma once
#include <cstddef>
#include <cstdint>

#define PYTBPTT_INLINE inline __attribute__((always_inline))

namespace pytbptt::cpu::PYTBPTT_ISA {

// A vector type of T: lanes, and an alias of the same type that may be loaded from any address.
template <typename T>
struct Vec {
  static constexpr int lanes = PYTBPTT_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(PYTBPTT_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(PYTBPTT_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
PYTBPTT_INLINE typename Vec<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vec<T>::unaligned*>(from);
}

template <typename T>
PYTBPTT_INLINE void store(T* to, typename Vec<T>::type vector) {
  *reinterpret_cast<typename Vec<T>::unaligned*>(to) = vector;
}

template <typename T>
PYTBPTT_INLINE typename Vec<T>::type broadcast(T value) {
  return value - typename Vec<T>::type{};
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
