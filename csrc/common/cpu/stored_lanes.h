// Vector loads and stores with conversion between storage type (16-bit types) and compute type (float).
#pragma once
#include "common/cpu/span.h"
#include "common/cpu/storage.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

PYTBPTT_INLINE float widen(Bfloat16 value) {
  return from_bfloat16(value.bits);
}
PYTBPTT_INLINE float widen(Float16 value) {
  return from_float16(value.bits);
}
PYTBPTT_INLINE float widen(float value) {
  return value;
}
PYTBPTT_INLINE double widen(double value) {
  return value;
}
PYTBPTT_INLINE void narrow(float value, Bfloat16* to) {
  to->bits = to_bfloat16(value);
}
PYTBPTT_INLINE void narrow(float value, Float16* to) {
  to->bits = to_float16(value);
}
PYTBPTT_INLINE void narrow(float value, float* to) {
  *to = value;
}
PYTBPTT_INLINE void narrow(double value, double* to) {
  *to = value;
}

template <typename T, typename S>
constexpr bool stored_as_computed = false;
template <typename T>
constexpr bool stored_as_computed<T, T> = true;

// The first `count` lanes from memory, the others zero.
template <typename T, typename S>
PYTBPTT_INLINE typename Vec<T>::type load_lanes(const S* from, int64_t count) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (stored_as_computed<T, S>) {
    if (count >= lanes) return load(from);
  }
  alignas(64) T values[lanes] = {};
  if (count >= lanes) {
    for (int lane = 0; lane < lanes; ++lane) values[lane] = widen(from[lane]);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) values[lane] = widen(from[lane]);
  }
  return load(values);
}

// Writes the first `count` lanes.
template <typename T, typename S>
PYTBPTT_INLINE void store_lanes(S* to, typename Vec<T>::type vector, int64_t count) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (stored_as_computed<T, S>) {
    if (count >= lanes) return store(to, vector);
  }
  alignas(64) T values[lanes];
  store(values, vector);
  if (count >= lanes) {
    for (int lane = 0; lane < lanes; ++lane) narrow(values[lane], to + lane);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) narrow(values[lane], to + lane);
  }
}

// Rounds to S and back.
template <typename T, typename S>
PYTBPTT_INLINE typename Vec<T>::type as_stored(typename Vec<T>::type vector) {
  if constexpr (stored_as_computed<T, S>) return vector;
  alignas(64) S stored[Vec<T>::lanes];
  store_lanes<T, S>(stored, vector, Vec<T>::lanes);
  return load_lanes<T, S>(stored, Vec<T>::lanes);
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
