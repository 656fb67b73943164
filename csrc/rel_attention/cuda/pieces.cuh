// Rows are read and written in pieces of 16 bytes, as many as one instruction moves.
#pragma once
#include "common/cuda/device/device.h"

namespace pytbptt::cuda {

using namespace device;

template <typename E>
constexpr int in_piece = 16 / static_cast<int>(sizeof(E));  // elements

// Both addresses are multiples of 16.
template <typename E>
PYTBPTT_DEVICE void load_piece(float (&to)[in_piece<E>], const E* from) {
  if constexpr (sizeof(E) == 4) {
    const Quad four = load(reinterpret_cast<const Quad*>(from));
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  } else {
    const Words four = load(reinterpret_cast<const Words*>(from));
    const std::uint32_t words[4] = {four.x, four.y, four.z, four.w};
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = to_float(E{static_cast<std::uint16_t>(words[i] & 0xffffu)});
      to[2 * i + 1] = to_float(E{static_cast<std::uint16_t>(words[i] >> 16)});
    }
  }
}

// What `store` and `store_many` take.
template <typename E>
PYTBPTT_DEVICE auto piece_of(const float (&values)[in_piece<E>]) {
  if constexpr (sizeof(E) == 4) {
    return Quad{values[0], values[1], values[2], values[3]};
  } else {
    return Words{pack<E>(values[0], values[1]), pack<E>(values[2], values[3]), pack<E>(values[4], values[5]),
                 pack<E>(values[6], values[7])};
  }
}

}  // namespace pytbptt::cuda
