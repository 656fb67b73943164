// Vectors of the target that the including file chose (target_*.h), through the vector extensions that GCC and clang
// share: the same source is SSE2, AVX2, AVX-512 or NEON code. MSVC has no vector extensions, so Windows needs clang-cl,
// with -fno-delayed-template-parsing: otherwise lambdas are parsed after target_end.h and compiled for the baseline.
#pragma once
#include <cstddef>
#include <cstdint>

#define PYTBPTT_INLINE inline __attribute__((always_inline))

namespace pytbptt::cpu::PYTBPTT_ISA {

template <int BYTES>
struct IntegerOf;
template <>
struct IntegerOf<4> {
  using type = std::int32_t;
};
template <>
struct IntegerOf<8> {
  using type = std::int64_t;
};

// type: a vector of T; unaligned: the same at addresses of any alignment; integers: as many signed integers of T's
// size; halves: as many uint16.
template <typename T>
struct Vec {
  static constexpr int lanes = PYTBPTT_VECTOR_BYTES / sizeof(T);
  using Integer = typename IntegerOf<sizeof(T)>::type;
  typedef T type __attribute__((vector_size(PYTBPTT_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(PYTBPTT_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef Integer integers __attribute__((vector_size(PYTBPTT_VECTOR_BYTES)));
  typedef std::uint16_t halves
      __attribute__((vector_size(PYTBPTT_VECTOR_BYTES / sizeof(T) * 2), aligned(2), may_alias));
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

// max(a, least) per lane; NaN stays NaN.
template <typename T>
PYTBPTT_INLINE typename Vec<T>::type at_least(typename Vec<T>::type a, T least) {
  const typename Vec<T>::type bound = broadcast(least);
  return a < bound ? bound : a;
}

// Reductions over the lanes, in a tree: adds the upper half to the lower until one lane is left.
template <typename T, int LANES>
struct Lanes {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
  struct Halves {
    typename Lanes<T, LANES / 2>::type low, high;
  };
  static PYTBPTT_INLINE Halves halve(type vector) {
    Halves halves;
    __builtin_memcpy(&halves, &vector, sizeof(halves));
    return halves;
  }
  static PYTBPTT_INLINE T sum(type vector) {
    const Halves halves = halve(vector);
    return Lanes<T, LANES / 2>::sum(halves.low + halves.high);
  }
  static PYTBPTT_INLINE T largest(type vector) {
    const Halves halves = halve(vector);
    return Lanes<T, LANES / 2>::largest(halves.low > halves.high ? halves.low : halves.high);
  }
};
template <typename T>
struct Lanes<T, 2> {
  typedef T type __attribute__((vector_size(2 * sizeof(T))));
  static PYTBPTT_INLINE T sum(type vector) { return vector[0] + vector[1]; }
  static PYTBPTT_INLINE T largest(type vector) { return vector[0] > vector[1] ? vector[0] : vector[1]; }
};

template <typename T>
PYTBPTT_INLINE T sum_of_lanes(typename Vec<T>::type vector) {
  return Lanes<T, Vec<T>::lanes>::sum(vector);
}

template <typename T>
PYTBPTT_INLINE T largest_lane(typename Vec<T>::type vector) {
  return Lanes<T, Vec<T>::lanes>::largest(vector);
}

// 2^x for x <= 0, exactly 0 below the normal numbers, NaN for NaN. Adding 1.5 * 2^23 + 127 leaves the biased integer
// exponent in the low bits; a polynomial (relative error 2e-9) gives the fraction.
PYTBPTT_INLINE Vec<float>::type exp2_of_negative(Vec<float>::type x) {
  using Integers = Vec<float>::integers;
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23
  x = at_least<float>(x, -127.0f);
  const Vec<float>::type shifted = x + shift;
  const Vec<float>::type f = x - (shifted - shift);
  Vec<float>::type y = f * 0.0001534580806037411f + 0.0013399930903688073f;
  y = y * f + 0.009618489071726799f;
  y = y * f + 0.05550328642129898f;
  y = y * f + 0.24022646248340607f;
  y = y * f + 0.6931472f;
  y = y * f + 1.0f;
  return y * reinterpret_cast<Vec<float>::type>(reinterpret_cast<Integers>(shifted) << 23);
}

// The same in double: the Taylor series to the 13th power, good to 4e-18 on [-1/2, 1/2].
PYTBPTT_INLINE Vec<double>::type exp2_of_negative(Vec<double>::type x) {
  using Integers = Vec<double>::integers;
  constexpr double shift = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
  constexpr double series[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                               4.44553827187081e-10,   7.054911620801121e-09,
                               1.0178086009239696e-07, 1.3215486790144305e-06,
                               1.5252733804059838e-05, 0.00015403530393381606,
                               0.0013333558146428441,  0.009618129107628477,
                               0.055504108664821576,   0.2402265069591007,
                               0.6931471805599453,     1.0};
  x = at_least<double>(x, -1023.0);
  const Vec<double>::type shifted = x + shift;
  const Vec<double>::type f = x - (shifted - shift);
  Vec<double>::type y = f * series[0] + series[1];
  for (int power = 2; power < 14; ++power) y = y * f + series[power];
  return y * reinterpret_cast<Vec<double>::type>(reinterpret_cast<Integers>(shifted) << 52);
}

// Indices that interleave two vectors: 0, n, 1, n + 1, ... for the lower halves, from n / 2 on for the upper.
template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

template <typename T, int FIRST, int... I>
PYTBPTT_INLINE typename Vec<T>::type interleave(typename Vec<T>::type a, typename Vec<T>::type b, Indices<I...>) {
  constexpr int n = Vec<T>::lanes;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + (I % 2) * n)...);
#else
  return __builtin_shuffle(a, b, typename Vec<T>::integers{(FIRST + I / 2 + (I % 2) * n)...});
#endif
}

// Transposes a lanes x lanes tile in place, in log2(lanes) rounds of interleaving row i with row i + lanes / 2.
template <typename T>
PYTBPTT_INLINE void transpose(typename Vec<T>::type (&rows)[Vec<T>::lanes]) {
  constexpr int n = Vec<T>::lanes;
  using All = typename CountTo<n>::type;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    typename Vec<T>::type next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, 0>(rows[i], rows[i + n / 2], All{});
      next[2 * i + 1] = interleave<T, n / 2>(rows[i], rows[i + n / 2], All{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
