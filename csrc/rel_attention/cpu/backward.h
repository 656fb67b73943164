// rel_attention backward of one task, for the target of the including file (target_*.h). Weights are computed again
// from the log-sum-exp that the forward left.
//
//                  | chunk 0 of keys | chunk 1 | …    a chunk of keys and values is packed once for all queries
//   query tile 0   |                 |         |      per tile and chunk (backward_tile):
//   query tile 1   |                 |         |        weights, and dS, the gradient of the scores
//   …                                                   d value += weightsᵀ · d out, d key += dSᵀ · (query + u)
//                                                       d query += dS · key + (dS by place) · position
//                                                       d position += (dS by place)ᵀ · (query + v)
//
// Each row of dS by place is dS shifted by one more column (tile.h). d key and d value are complete after a chunk,
// d query after a stream, d position and the biases' gradients after the task (or after sums.h has added the parts of
// several tasks).
#pragma once
#include "rel_attention/cpu/packing.h"
#include "rel_attention/cpu/softmax.h"
#include "rel_attention/cpu/sums.h"
#include "rel_attention/cpu/tile.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

template <typename T>
struct BackwardBuffers {
  T *place_rows, *place_panels, *place_gradient;
  T *key_rows, *key_panels, *value_panels, *key_gradient, *value_gradient, *scratch;
  T *grad_out, *content_gradient, *position_gradient, *content_bias_gradient, *position_bias_gradient;
  T *content_bias_lost, *position_bias_lost;
  T *weight_strip, *score_strip;
  T* delta;
  Span *visible, *clipped;
  std::uint16_t* bits;
  BiasedQueries<T> queries;
  int64_t bytes;

  BackwardBuffers(const RelAttention& in, void* workspace) {
    const Widths<T> widths(in);
    Arena arena(workspace);
    const int64_t keys = smaller(chunk_keys<T>, round_up(widths.places, panel_width<T>));
    const int64_t places = round_up(widths.places, panel_width<T>);
    place_rows = arena.allocate<T>(places * widths.padded);
    place_panels = arena.allocate<T>(places * widths.depth);
    place_gradient = arena.allocate<T>((widths.places + 2) * widths.padded);
    content_bias_gradient = place_gradient + widths.places * widths.padded;
    position_bias_gradient = content_bias_gradient + widths.padded;
    content_bias_lost = arena.allocate<T>(widths.padded);
    position_bias_lost = arena.allocate<T>(widths.padded);
    key_rows = arena.allocate<T>(keys * widths.padded);
    key_panels = arena.allocate<T>(keys * widths.depth);
    value_panels = arena.allocate<T>(keys * widths.depth);
    key_gradient = arena.allocate<T>(keys * widths.padded);
    value_gradient = arena.allocate<T>(keys * widths.padded);
    scratch = arena.allocate<T>(larger(panel_width<T>, 2) * widths.padded);
    grad_out = arena.allocate<T>(in.T * widths.padded);
    content_gradient = arena.allocate<T>(in.T * widths.padded);
    position_gradient = arena.allocate<T>(in.T * widths.padded);
    weight_strip = arena.allocate<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    score_strip = arena.allocate<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    delta = arena.allocate<T>(in.T);
    visible = arena.allocate<Span>(in.T);
    clipped = arena.allocate<Span>(tile_queries);
    bits = arena.allocate<std::uint16_t>(dropout_buffer(chunk_keys<T>));
    queries.allocate(arena, in.T, widths);
    bytes = arena.used();
  }
};

template <typename T>
void backward_tile(const RelAttentionBackward& p, int64_t stream, int64_t head, const Tile<T>& tile,
                   const Widths<T>& widths, BackwardBuffers<T>& buffers) {
  const RelAttention& in = p.inputs;
  RowDropout dropout(in, buffers.bits);
  const int64_t i = tile.first_query;
  const Span all{tile.all_keys.begin - tile.first_key, tile.all_keys.end - tile.first_key};
  const auto columns_of = [&](int64_t r, int64_t count) { return tile.columns_of_rows(r, count); };
  const T* content = buffers.queries.content + i * widths.padded;
  const T* position = buffers.queries.position + i * widths.padded;
  const T* grad_out = buffers.grad_out + i * widths.padded;

  score_tile(tile, content, position, buffers.key_panels, buffers.place_panels, widths, buffers.score_strip);
  multiply_by_panels<T>(tile.rows, grad_out, buffers.value_panels, widths, buffers.weight_strip, strip_stride<T>, false,
                        columns_of);
  const T* log_sum_exp = static_cast<const T*>(p.log_sum_exp) + (stream * in.H + head) * in.T + i;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* scores = tile.row(buffers.score_strip, r);
    T* weights = tile.row(buffers.weight_strip, r);
    const Span columns = tile.columns_of_rows(r, 1);
    if (!columns.empty()) {
      if (dropout.active()) dropout.draw(stream * in.H + head, i + r, tile.first_key, columns);
      differentiate_softmax_row(scores, weights, columns, buffers.visible[i + r].size() == 1, Scale<T>(in).log2_of_sums,
                                log_sum_exp[r], buffers.delta[i + r], static_cast<T>(in.keep_scale), dropout);
    }
    zero_outside(weights, columns, all);
    zero_outside(scores, columns, {all.begin - zeroed_margin, all.end + zeroed_margin});
  }

  // First key that needs a gradient.
  const int64_t begin = p.memory_needs_grad ? all.begin : larger(all.begin, in.M - tile.first_key);
  const auto rows_of_columns = [&](int64_t c, int64_t count) {
    const int64_t nearest = tile.first_key + begin + c - in.M - i;  // the row of the first column's own query
    return Span{larger(0, nearest), smaller(tile.rows, nearest + count - 1 + in.window)};
  };
  if (begin < all.end) {
    add_product<T, Layout::column_major>(all.end - begin, buffers.weight_strip + begin, strip_stride<T>, grad_out,
                                         buffers.value_gradient + begin * widths.padded, widths.padded,
                                         rows_of_columns);
    add_product<T, Layout::column_major>(all.end - begin, buffers.score_strip + begin, strip_stride<T>, content,
                                         buffers.key_gradient + begin * widths.padded, widths.padded, rows_of_columns);
  }
  add_product<T, Layout::row_major>(tile.rows, buffers.score_strip, strip_stride<T>, buffers.key_rows,
                                    buffers.content_gradient + i * widths.padded, widths.padded, columns_of);

  T* by_place = tile.by_place(buffers.score_strip);
  add_product<T, Layout::row_major>(tile.rows, by_place, strip_stride<T> + 1, buffers.place_rows,
                                    buffers.position_gradient + i * widths.padded, widths.padded,
                                    [&](int64_t r, int64_t count) { return tile.places_of_rows(r, count); });
  const Span places = tile.places_of_rows(0, tile.rows);
  add_product<T, Layout::column_major>(places.size(), by_place + places.begin, strip_stride<T> + 1, position,
                                       buffers.place_gradient + places.begin * widths.padded, widths.padded,
                                       [&](int64_t place, int64_t count) {
                                         const int64_t shift = in.T - 1 - i - (places.begin + place);
                                         return Span{larger(0, tile.all_keys.begin + shift - (count - 1)),
                                                     smaller(tile.rows, tile.all_keys.end + shift)};
                                       });
}

template <typename T>
void backward_chunk(const RelAttentionBackward& p, int64_t stream, int64_t head, int64_t first_key, Span seen,
                    const Widths<T>& widths, BackwardBuffers<T>& buffers) {
  const RelAttention& in = p.inputs;
  const Span keys = intersect(seen, {first_key, first_key + chunk_keys<T>});
  if (!keys.empty()) {
    const int64_t first = keys.begin / panel_width<T> * panel_width<T>;
    pack<T>(keys.end - first, true, buffers.key_rows + (first - first_key) * widths.padded,
            buffers.key_panels + (first - first_key) * widths.depth, widths,
            [&](int64_t r, T* row) { load_key(in, in.memory_key, in.key, stream, head, first + r, widths, row); });
    pack<T>(keys.end - first, false, buffers.scratch, buffers.value_panels + (first - first_key) * widths.depth, widths,
            [&](int64_t r, T* row) { load_key(in, in.memory_value, in.value, stream, head, first + r, widths, row); });
  }
  const int64_t begin = p.memory_needs_grad ? first_key : larger(first_key, in.M);
  const int64_t end = smaller(first_key + chunk_keys<T>, widths.places);
  if (begin < end) {
    const int64_t from = (begin - first_key) * widths.padded, to = (end - first_key) * widths.padded;
    fill(buffers.key_gradient + from, buffers.key_gradient + to, T{0});
    fill(buffers.value_gradient + from, buffers.value_gradient + to, T{0});
  }
  const int64_t tile_rows = queries_per_tile(in.T);
  for (int64_t i = 0; i < in.T; i += tile_rows) {
    Tile<T> tile{i, smaller(tile_rows, in.T - i), first_key, buffers.clipped, {0, 0}, in.T};
    for (int64_t r = 0; r < tile.rows; ++r) {
      buffers.clipped[r] = intersect(buffers.visible[i + r], {first_key, first_key + chunk_keys<T>});
      tile.all_keys = bounding_range(tile.all_keys, buffers.clipped[r]);
    }
    if (!tile.all_keys.empty()) backward_tile(p, stream, head, tile, widths, buffers);
  }
  const T key_factor = Scale<T>(in).of_sums;
  for (int64_t j = begin; j < end; ++j) {
    const bool memory = j < in.M;
    const int64_t row = memory ? stream * in.M + j : stream * in.T + j - in.M;
    const int64_t offset = (row * in.H + head) * in.D, at = (j - first_key) * widths.padded;
    store_row(buffers.key_gradient + at, in.D, key_factor, in.dtype, offset, memory ? p.memory_key : p.key);
    store_row(buffers.value_gradient + at, in.D, T{1}, in.dtype, offset, memory ? p.memory_value : p.value);
  }
}

template <typename T>
void backward_task(const RelAttentionBackward& p, const BackwardTask& task, void* workspace) {
  const RelAttention& in = p.inputs;
  const Widths<T> widths(in);
  BackwardBuffers<T> buffers(in, workspace);
  if (task.partial_sums != nullptr) {
    buffers.place_gradient = static_cast<T*>(task.partial_sums);
    buffers.content_bias_gradient = buffers.place_gradient + widths.places * widths.padded;
    buffers.position_bias_gradient = buffers.content_bias_gradient + widths.padded;
  }
  fill(buffers.place_gradient, buffers.place_gradient + (widths.places + 2) * widths.padded, T{0});
  fill(buffers.content_bias_lost, buffers.content_bias_lost + widths.padded, T{0});
  fill(buffers.position_bias_lost, buffers.position_bias_lost + widths.padded, T{0});
  pack_positions(in, task.head, true, buffers.place_rows, buffers.place_panels, widths);
  buffers.queries.load_biases(in, task.head, widths);
  const T scale = static_cast<T>(in.scale);
  for (int64_t stream = task.first_stream; stream < task.end_stream; ++stream) {
    Span seen{0, 0};
    for (int64_t i = 0; i < in.T; ++i) {
      buffers.visible[i] = visible_keys(in, stream, i);
      seen = bounding_range(seen, buffers.visible[i]);
      T* gradient = buffers.grad_out + i * widths.padded;
      load_chunk_row(in, p.grad_out, stream, task.head, i, widths, gradient);
      load_chunk_row(in, p.out, stream, task.head, i, widths, buffers.scratch);
      if (p.rounding.data != nullptr) {
        T* rounding = buffers.scratch + widths.padded;
        load_chunk_row(in, p.rounding, stream, task.head, i, widths, rounding);
        for (int64_t d = 0; d < widths.padded; d += Vec<T>::lanes)
          store(buffers.scratch + d, load(buffers.scratch + d) + load(rounding + d));
      }
      typename Vec<T>::type delta{};
      for (int64_t d = 0; d < widths.padded; d += Vec<T>::lanes)
        delta += load(gradient + d) * load(buffers.scratch + d);
      buffers.delta[i] = sum_of_lanes<T>(delta);
    }
    buffers.queries.load_rows(in, stream, task.head, {0, in.T}, widths);
    fill(buffers.content_gradient, buffers.content_gradient + in.T * widths.padded, T{0});
    fill(buffers.position_gradient, buffers.position_gradient + in.T * widths.padded, T{0});
    const int64_t from = p.memory_needs_grad ? 0 : smaller(seen.begin, in.M);
    for (int64_t chunk = from / chunk_keys<T> * chunk_keys<T>; chunk < widths.places; chunk += chunk_keys<T>) {
      backward_chunk(p, stream, task.head, chunk, seen, widths, buffers);
    }
    for (int64_t i = 0; i < in.T; ++i) {
      const T* content = buffers.content_gradient + i * widths.padded;
      const T* position = buffers.position_gradient + i * widths.padded;
      for (int64_t d = 0; d < widths.padded; d += Vec<T>::lanes) {
        const auto by_content = load(content + d) * scale, by_position = load(position + d) * scale;
        store(buffers.scratch + d, by_content + by_position);
        add_compensated(buffers.content_bias_gradient + d, buffers.content_bias_lost + d, by_content);
        add_compensated(buffers.position_bias_gradient + d, buffers.position_bias_lost + d, by_position);
      }
      store_row(buffers.scratch, in.D, T{1}, in.dtype, ((stream * in.T + i) * in.H + task.head) * in.D, p.query);
    }
  }
  if (task.partial_sums == nullptr) write_sums(p, task.head, buffers.place_gradient, buffers.scratch);
}

int64_t backward_workspace(const RelAttention& in) {
  return in.dtype == Scalar::float64 ? BackwardBuffers<double>(in, nullptr).bytes
                                     : BackwardBuffers<float>(in, nullptr).bytes;
}

int64_t partial_sums_size(const RelAttention& in) {
  return in.dtype == Scalar::float64 ? partial_sums_elements<double>(in) * 8 : partial_sums_elements<float>(in) * 4;
}

void backward(const RelAttentionBackward& p, const BackwardTask& task, void* workspace) {
  p.inputs.dtype == Scalar::float64 ? backward_task<double>(p, task, workspace)
                                    : backward_task<float>(p, task, workspace);
}

void reduce(const RelAttentionBackward& p, int64_t head, void* partial_sums, int64_t parts) {
  p.inputs.dtype == Scalar::float64 ? reduce_parts(p, head, static_cast<double*>(partial_sums), parts)
                                    : reduce_parts(p, head, static_cast<float*>(partial_sums), parts);
}

const RelAttentionBackwardKernel rel_attention_backward = {backward_workspace, partial_sums_size, backward, reduce};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
