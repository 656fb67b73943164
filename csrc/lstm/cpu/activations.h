// sigmoid and tanh of whole vectors, good to about an ulp, NaN for NaN.
#pragma once
#include "common/cpu/vector.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// e^x = power * (1 + rest), power = 2^n, rest in [-0.3, 0.42]; e^x - 1 can be computed from these without cancellation
// near 0.
template <typename T>
struct SplitExponential {
  typename Vec<T>::type power, rest;
};

template <typename T>
struct ExponentialConstants;

template <>
struct ExponentialConstants<float> {
  static constexpr float largest = 87.0f;        // |x| up to which power is a normal number
  static constexpr float overflow = 88.722839f;  // x beyond which e^x is infinite
  static constexpr float shift = 12582912.0f;    // 1.5 * 2^23: a sum with it has the nearest integer in its low bits
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // short mantissa: n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
  // (e^r - 1 - r) / r^2, highest power first: Cephes' expf.
  static constexpr float series[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct ExponentialConstants<double> {
  static constexpr double largest = 708.0;
  static constexpr double overflow = 709.782712893384;
  static constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693145751953125;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023;
  // The Taylor series: what follows is below 1e-17 for |r| <= ln 2 / 2.
  static constexpr double series[] = {1.6059043836821613e-10, 2.08767569878681e-09,   2.505210838544172e-08,
                                      2.755731922398589e-07,  2.7557319223985893e-06, 2.48015873015873e-05,
                                      0.0001984126984126984,  0.001388888888888889,   0.008333333333333333,
                                      0.041666666666666664,   0.16666666666666666,    0.5};
};

// |x| must not exceed ExponentialConstants<T>::largest.
template <typename T>
PYTBPTT_INLINE SplitExponential<T> split_exponential(typename Vec<T>::type x) {
  using C = ExponentialConstants<T>;
  using V = typename Vec<T>::type;
  using Integers = typename Vec<T>::integers;
  const V shifted = x * C::log2_e + C::shift;
  const V n = shifted - C::shift;
  const V r = x - n * C::ln2_high - n * C::ln2_low;
  V series = r * C::series[0] + C::series[1];
#pragma GCC unroll 16
  for (unsigned power = 2; power < sizeof(C::series) / sizeof(T); ++power) series = series * r + C::series[power];
  SplitExponential<T> result;
  result.rest = r * r * series + r;
  result.power = reinterpret_cast<V>((reinterpret_cast<Integers>(shifted) + C::bias) << C::mantissa);
  return result;
}

template <typename T>
PYTBPTT_INLINE typename Vec<T>::type sigmoid(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  constexpr T largest = ExponentialConstants<T>::largest;
  const V bound = broadcast(largest);
  const V clamped = at_least<T>(x > bound ? bound : x, -largest);
  const SplitExponential<T> e = split_exponential<T>(-clamped);
  const V result = T{1} / ((T{1} + e.power) + e.power * e.rest);
  // Return exactly 0 where e^-x overflows, as 1 / (1 + e^-x) does, so that 0 * inf gives NaN as in PyTorch.
  return x < -broadcast(ExponentialConstants<T>::overflow) ? V{} : result;
}

// tanh(|x|) = -e/(2 + e) with e = e^(-2|x|) - 1 computed without cancellation.
PYTBPTT_INLINE Vec<double>::type magnitude_of_tanh(Vec<double>::type magnitude) {
  using V = Vec<double>::type;
  const SplitExponential<double> e =
      split_exponential<double>(at_least<double>(magnitude * -2.0, -ExponentialConstants<double>::largest));
  const V e_minus_1 = (e.power - 1.0) + e.power * e.rest;
  return -e_minus_1 / (2.0 + e_minus_1);
}

// Good to 0.7 ulp: a polynomial up to 1, fitted at Chebyshev's points,
// whose first term is exact, and 1 minus a small quotient beyond.
PYTBPTT_INLINE Vec<float>::type magnitude_of_tanh(Vec<float>::type magnitude) {
  using V = Vec<float>::type;
  constexpr float series[] = {1.438288195e-04f, -9.271475265e-04f, 3.211853739e-03f, -8.701321082e-03f,
                              2.183077769e-02f, -5.396362237e-02f, 1.333331198e-01f, -3.333333317e-01f};
  const V square = magnitude * magnitude;
  V fitted = square * series[0] + series[1];
#pragma GCC unroll 8
  for (int power = 2; power < 8; ++power) fitted = fitted * square + series[power];
  fitted = magnitude + magnitude * square * fitted;
  const SplitExponential<float> e =
      split_exponential<float>(at_least<float>(magnitude * -2.0f, -ExponentialConstants<float>::largest));
  const V decayed = e.power + e.power * e.rest;
  const V saturating = 1.0f - 2.0f * decayed / (1.0f + decayed);
  return magnitude < 1.0f ? fitted : saturating;
}

template <typename T>
PYTBPTT_INLINE typename Vec<T>::type tanh(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using Integers = typename Vec<T>::integers;
  const Integers sign_bit = reinterpret_cast<Integers>(broadcast(T{-0.0}));
  const Integers sign = reinterpret_cast<Integers>(x) & sign_bit;
  const V result = magnitude_of_tanh(reinterpret_cast<V>(reinterpret_cast<Integers>(x) & ~sign_bit));
  return reinterpret_cast<V>(reinterpret_cast<Integers>(result) | sign);
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
