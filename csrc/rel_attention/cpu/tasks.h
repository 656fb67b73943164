// How the CPU's rel_attention is cut into tasks, and the functions that each instruction set supplies for them.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "rel_attention/params.h"

namespace pytbptt::cpu {

// Maximum queries per tile; with several tiles, sizes are multiples of tile_step.
constexpr std::int64_t tile_queries = 48;
constexpr std::int64_t tile_step = 12;

// For at most this many queries, keys are read unpacked, one query at a time.
constexpr std::int64_t max_decode_queries = 3;

// Tile size for a number of queries. Tasks are split at tile boundaries only, so results do not depend on the number of
// threads.
std::int64_t queries_per_tile(std::int64_t queries);

// Part of a forward: queries [first_query, end_query) of one head in streams [first_stream, end_stream).
struct ForwardTask {
  std::int64_t head, first_stream, end_stream, first_query, end_query;
};

// Part of a backward: one head in streams [first_stream, end_stream). Gradients that are sums over streams go to
// `partial_sums` where the streams of a head are split into several tasks: position (M + T, padded D), largest distance
// first, then content_bias and position_bias (padded D each), in the precision of the sums, fully written. nullptr: the
// task has all streams and writes the gradients itself.
struct BackwardTask {
  std::int64_t head, first_stream, end_stream;
  void* partial_sums;
};

// A workspace is so many bytes, aligned to 64, that a task needs for itself.
struct RelAttentionForwardKernel {
  std::int64_t (*workspace)(const RelAttention&, const ForwardTask&);
  void (*run)(const RelAttentionForward&, const ForwardTask&, void* workspace);
};
struct RelAttentionBackwardKernel {
  std::int64_t (*workspace)(const RelAttention&);
  std::int64_t (*partial_sums_size)(const RelAttention&);  // bytes of one partial_sums
  void (*run)(const RelAttentionBackward&, const BackwardTask&, void* workspace);
  // Adds up the `parts` consecutive partial_sums of a head, in order, and writes the three gradients.
  void (*reduce)(const RelAttentionBackward&, std::int64_t head, void* partial_sums, std::int64_t parts);
};

const RelAttentionForwardKernel& rel_attention_forward_kernel(Isa isa);
const RelAttentionBackwardKernel& rel_attention_backward_kernel(Isa isa);

PYTBPTT_DECLARE_KERNEL(RelAttentionForwardKernel, rel_attention_forward)
PYTBPTT_DECLARE_KERNEL(RelAttentionBackwardKernel, rel_attention_backward)

}  // namespace pytbptt::cpu
