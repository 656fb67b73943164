// Dispatch on head size.
#pragma once
#include <type_traits>

#include "common/cuda/products.cuh"
#include "rel_attention/cuda/launch.h"

namespace pytbptt::cuda {

// use(std::integral_constant<int, PADDED>) with the least head size that there are kernels for and D fits into. 48
// exists so that the paper's head size 41 is not padded to 64.
template <typename Use>
auto with_head_size(std::int64_t D, Use use) {
  if (D <= 32) return use(std::integral_constant<int, 32>{});
  if (D <= 48) return use(std::integral_constant<int, 48>{});
  if (D <= 64) return use(std::integral_constant<int, 64>{});
  if (D <= 96) return use(std::integral_constant<int, 96>{});
  static_assert(largest_head_size == 128, "the largest kernels");
  return use(std::integral_constant<int, 128>{});
}

}  // namespace pytbptt::cuda
