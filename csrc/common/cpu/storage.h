// Converts rows between tensor dtypes and the zero-padded float/double rows that the kernels compute with.
#pragma once
#include "common/cpu/vector.h"
#include "common/scalar.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

template <typename To, typename From>
PYTBPTT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

PYTBPTT_INLINE float from_bfloat16(std::uint16_t bits) {
  return bits_as<float>(std::uint32_t{bits} << 16);
}

// To the nearest, ties to even; any NaN becomes the quiet one.
PYTBPTT_INLINE std::uint16_t to_bfloat16(float value) {
  const auto bits = bits_as<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Shifted into float position, the value is 2^112 too small. Infinity and NaN need all exponent bits set.
PYTBPTT_INLINE float from_float16(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  std::uint32_t bits = bits_as<std::uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_as<float>(bits | (static_cast<std::uint32_t>(half & 0x8000u) << 16));
}

// Rounds to nearest even. Subnormals: in 0.5 + x the float's last mantissa bit is the half's subnormal step, so the
// addition rounds.
PYTBPTT_INLINE std::uint16_t to_float16(float value) {
  const auto bits = bits_as<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
}

template <typename T>
void fill(T* begin, T* end, T value) {
  for (; begin < end; ++begin) *begin = value;
}

// Copies `count` elements; the last vector overlaps the one before instead of leaving a scalar tail.
template <typename T>
PYTBPTT_INLINE void copy_scaled(const T* from, std::int64_t count, T factor, T* to) {
  constexpr int lanes = Vec<T>::lanes;
  if (count < lanes) {
    for (std::int64_t d = 0; d < count; ++d) to[d] = from[d] * factor;
    return;
  }
  for (std::int64_t d = 0; d + lanes < count; d += lanes) store(to + d, load(from + d) * factor);
  store(to + count - lanes, load(from + count - lanes) * factor);
}

// Prefetches a row; consecutive rows of one head are far apart in memory.
template <bool WRITE = false>
PYTBPTT_INLINE void prefetch_row(const void* data, Scalar dtype, std::int64_t offset, std::int64_t count) {
  const std::int64_t size = dtype == Scalar::float64 ? 8 : dtype == Scalar::float32 ? 4 : 2;
  const char* row = static_cast<const char*>(data) + offset * size;
  for (std::int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(row + byte, WRITE);
  __builtin_prefetch(row + count * size - 1, WRITE);
}

// Reads `count` elements from `offset` on, and fills up to `padded`, the next multiple of a vector, with zeros.
template <typename T>
PYTBPTT_INLINE void load_row(const void* data, Scalar dtype, std::int64_t offset, std::int64_t count,
                             std::int64_t padded, T* to) {
  if (count == 0) return;
  store(to + padded - Vec<T>::lanes, typename Vec<T>::type{});
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto* halves = static_cast<const std::uint16_t*>(data) + offset;
    if (dtype == Scalar::bfloat16) {
      for (std::int64_t d = 0; d < count; ++d) to[d] = from_bfloat16(halves[d]);
      return;
    }
    if (dtype == Scalar::float16) {
      for (std::int64_t d = 0; d < count; ++d) to[d] = from_float16(halves[d]);
      return;
    }
  }
  copy_scaled(static_cast<const T*>(data) + offset, count, T{1}, to);
}

// Writes `count` elements, each times `factor`.
template <typename T>
PYTBPTT_INLINE void store_row(const T* from, std::int64_t count, T factor, Scalar dtype, std::int64_t offset,
                              void* data) {
  if constexpr (sizeof(T) == sizeof(float)) {
    auto* halves = static_cast<std::uint16_t*>(data) + offset;
    if (dtype == Scalar::bfloat16) {
      for (std::int64_t d = 0; d < count; ++d) halves[d] = to_bfloat16(from[d] * factor);
    } else if (dtype == Scalar::float16) {
      for (std::int64_t d = 0; d < count; ++d) halves[d] = to_float16(from[d] * factor);
    } else {
      copy_scaled(from, count, factor, static_cast<T*>(data) + offset);
    }
  } else {
    copy_scaled(from, count, factor, static_cast<T*>(data) + offset);
  }
}

// Writes the rounding error of store_row (exact value minus stored value) for float16 and bfloat16.
inline void store_rounding(const float* from, std::int64_t count, float factor, Scalar dtype, std::int64_t offset,
                           const void* stored, void* rounding) {
  const auto* halves = static_cast<const std::uint16_t*>(stored) + offset;
  auto* lost = static_cast<std::uint16_t*>(rounding) + offset;
  if (dtype == Scalar::bfloat16) {
    for (std::int64_t d = 0; d < count; ++d) lost[d] = to_bfloat16(from[d] * factor - from_bfloat16(halves[d]));
  } else {
    for (std::int64_t d = 0; d < count; ++d) lost[d] = to_float16(from[d] * factor - from_float16(halves[d]));
  }
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
