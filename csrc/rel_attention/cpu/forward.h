// rel_attention forward of one task, for the target of the including file (target_*.h).
//
//                  | chunk 0 of keys | chunk 1 | …    a chunk of keys and values is packed once for all queries
//   query tile 0   |                 |         |      per tile and chunk: scores (score_tile), a step of the online
//   query tile 1   |                 |         |      softmax for each row (softmax_row), sums += weights · values
//   …
#pragma once
#include "rel_attention/cpu/decode.h"
#include "rel_attention/cpu/packing.h"
#include "rel_attention/cpu/softmax.h"
#include "rel_attention/cpu/tile.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

template <typename T>
struct ForwardBuffers {
  T *place_panels, *key_panels, *values, *scratch, *sums, *strip;
  RowState<T>* states;
  Span *visible, *clipped;
  std::uint16_t* bits;
  BiasedQueries<T> queries;
  int64_t bytes;

  ForwardBuffers(const RelAttention& in, int64_t rows, void* workspace) {
    const Widths<T> widths(in);
    Arena arena(workspace);
    const int64_t keys = smaller(chunk_keys<T>, round_up(widths.places, panel_width<T>));
    place_panels = arena.allocate<T>(panels_of<T>(widths.places) * panel_width<T> * widths.depth);
    key_panels = arena.allocate<T>(keys * widths.depth);
    values = arena.allocate<T>(keys * widths.padded);
    scratch = arena.allocate<T>(panel_width<T> * widths.padded);
    sums = arena.allocate<T>(rows * widths.padded);
    strip = arena.allocate<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    states = arena.allocate<RowState<T>>(rows);
    visible = arena.allocate<Span>(rows);
    clipped = arena.allocate<Span>(tile_queries);
    bits = arena.allocate<std::uint16_t>(dropout_buffer(chunk_keys<T>));
    queries.allocate(arena, rows, widths);
    bytes = arena.used();
  }
};

template <typename T>
void forward_chunk(const RelAttention& in, int64_t stream, int64_t head, Span task_queries, int64_t first_key,
                   const Widths<T>& widths, ForwardBuffers<T>& buffers) {
  const int64_t tile_rows = queries_per_tile(in.T);
  const T units = Scale<T>(in).log2_of_sums;
  RowDropout dropout(in, buffers.bits);
  for (int64_t i = task_queries.begin; i < task_queries.end; i += tile_rows) {
    const int64_t at = i - task_queries.begin;
    Tile<T> tile{i, smaller(tile_rows, task_queries.end - i), first_key, buffers.clipped, {0, 0}, in.T};
    for (int64_t r = 0; r < tile.rows; ++r) {
      buffers.clipped[r] = intersect(buffers.visible[at + r], {first_key, first_key + chunk_keys<T>});
      tile.all_keys = bounding_range(tile.all_keys, buffers.clipped[r]);
    }
    if (tile.all_keys.empty()) continue;
    const Span all{tile.all_keys.begin - first_key, tile.all_keys.end - first_key};
    score_tile(tile, buffers.queries.content + at * widths.padded, buffers.queries.position + at * widths.padded,
               buffers.key_panels, buffers.place_panels, widths, buffers.strip);
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* row = tile.row(buffers.strip, r);
      const Span columns = tile.columns_of_rows(r, 1);
      if (!columns.empty()) {
        if (dropout.active()) dropout.draw(stream * in.H + head, i + r, first_key, columns);
        softmax_row(row, columns, units, buffers.states[at + r], buffers.sums + (at + r) * widths.padded, widths.padded,
                    dropout);
      }
      zero_outside(row, columns, all);
    }
    add_product<T, Layout::row_major>(tile.rows, buffers.strip, strip_stride<T>, buffers.values,
                                      buffers.sums + at * widths.padded, widths.padded,
                                      [&](int64_t r, int64_t count) { return tile.columns_of_rows(r, count); });
  }
}

template <typename T>
void forward_many(const RelAttentionForward& p, const ForwardTask& task, void* workspace) {
  const RelAttention& in = p.inputs;
  const Widths<T> widths(in);
  const Span queries{task.first_query, task.end_query};
  ForwardBuffers<T> buffers(in, queries.size(), workspace);
  pack_positions(in, task.head, false, buffers.scratch, buffers.place_panels, widths);
  buffers.queries.load_biases(in, task.head, widths);
  for (int64_t stream = task.first_stream; stream < task.end_stream; ++stream) {
    Span seen{0, 0};
    for (int64_t r = 0; r < queries.size(); ++r) {
      buffers.visible[r] = visible_keys(in, stream, queries.begin + r);
      buffers.states[r] = {-static_cast<T>(__builtin_inff()), T{0}};
      seen = bounding_range(seen, buffers.visible[r]);
    }
    buffers.queries.load_rows(in, stream, task.head, queries, widths);
    fill(buffers.sums, buffers.sums + queries.size() * widths.padded, T{0});
    for (int64_t chunk = seen.begin / chunk_keys<T> * chunk_keys<T>; chunk < seen.end; chunk += chunk_keys<T>) {
      const Span keys = intersect(seen, {chunk, chunk + chunk_keys<T>});
      const int64_t first = keys.begin / panel_width<T> * panel_width<T>;
      pack<T>(
          keys.end - first, false, buffers.scratch, buffers.key_panels + (first - chunk) * widths.depth, widths,
          [&](int64_t r, T* row) { load_key(in, in.memory_key, in.key, stream, task.head, first + r, widths, row); });
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        load_key(in, in.memory_value, in.value, stream, task.head, j, widths,
                 buffers.values + (j - chunk) * widths.padded);
      }
      forward_chunk(in, stream, task.head, queries, chunk, widths, buffers);
    }
    for (int64_t r = 0; r < queries.size(); ++r) {
      finish_row(p, stream, task.head, queries.begin + r, buffers.sums + r * widths.padded, buffers.states[r]);
    }
  }
}

int64_t forward_workspace(const RelAttention& in, const ForwardTask& task) {
  const bool few = in.T <= max_decode_queries;
  const int64_t rows = task.end_query - task.first_query;
  if (in.dtype == Scalar::float64) {
    return few ? DecodeBuffers<double>(in, nullptr).bytes : ForwardBuffers<double>(in, rows, nullptr).bytes;
  }
  return few ? DecodeBuffers<float>(in, nullptr).bytes : ForwardBuffers<float>(in, rows, nullptr).bytes;
}

void forward(const RelAttentionForward& p, const ForwardTask& task, void* workspace) {
  const bool few = p.inputs.T <= max_decode_queries;
  if (p.inputs.dtype == Scalar::float64) {
    few ? forward_decode<double>(p, task, workspace) : forward_many<double>(p, task, workspace);
  } else {
    few ? forward_decode<float>(p, task, workspace) : forward_many<float>(p, task, workspace);
  }
}

const RelAttentionForwardKernel rel_attention_forward = {forward_workspace, forward};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
