#include "rel_attention/cpu/tasks.h"

namespace pytbptt::cpu {

std::int64_t queries_per_tile(std::int64_t queries) {
  const std::int64_t tiles = (queries + tile_queries - 1) / tile_queries;
  if (tiles <= 1) return tile_queries;
  const std::int64_t even = (queries + tiles - 1) / tiles;
  return (even + tile_step - 1) / tile_step * tile_step;
}

const RelAttentionForwardKernel& rel_attention_forward_kernel(Isa isa) {
  return PYTBPTT_KERNEL_FOR(isa, rel_attention_forward);
}

const RelAttentionBackwardKernel& rel_attention_backward_kernel(Isa isa) {
  return PYTBPTT_KERNEL_FOR(isa, rel_attention_backward);
}

}  // namespace pytbptt::cpu
