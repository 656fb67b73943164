// The random bits of pytbptt/ops/philox.py.
#pragma once
#include "common/cuda/device/device.h"

namespace pytbptt::device {

// The Philox-4x32-10 block with counter (block, query, sequence, 0).
PYTBPTT_DEVICE void philox(std::int64_t seed, std::uint32_t block, std::uint32_t query, std::uint32_t sequence,
                           std::uint32_t (&words)[4]) {
  std::uint32_t c0 = block, c1 = query, c2 = sequence, c3 = 0;
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  PYTBPTT_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t high0 = high_word(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const std::uint32_t high1 = high_word(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace pytbptt::device
