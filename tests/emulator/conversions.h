// Rounding to and from half, bfloat16 and TF32 as the cvt instruction does it; included by emulator.h.
#pragma once

namespace pytbptt::device {

inline float to_float(float value) {
  return value;
}
inline float to_float(half value) {
  const std::uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const bool finite = magnitude < 0x7c00u;
  const std::uint32_t wide = finite ? magnitude << 13 : sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  float result;
  std::memcpy(&result, &wide, 4);
  if (!finite) return result;
  result *= 0x1p112f;  // the difference of the exponents' biases
  return sign != 0 ? -result : result;
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
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return {0x7fff};  // the NaN that cvt gives
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  // Halves are the multiples of 2^-24 below 2^-14, and of 2^(e-10) from 2^e on.
  int exponent = -14;
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<std::uint16_t>(sign | ((static_cast<std::uint32_t>(exponent + 14) << 10) + units))};
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  if (std::isnan(value)) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <typename E>
std::uint32_t pack(float first, float second) {
  return from_float<E>(first).bits | static_cast<std::uint32_t>(from_float<E>(second).bits) << 16;
}

// Tensor cores read the upper 19 bits; `to_tf32` rounds to them, ties away from zero.
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

}  // namespace pytbptt::device
