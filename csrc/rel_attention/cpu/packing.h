// Packs the operands of rel_attention's products: padded rows, and panels of transposed rows.
//
//   rows    row 0  | d0 d1 d2 … 0 0 |        panel  d0 | row 0, row 1, … row panel_width - 1 |
//           row 1  | d0 d1 d2 … 0 0 |               d1 | row 0, row 1, …                     |
//           …        D, padded to vectors           …    one vector load takes several rows
#pragma once
#include "common/cpu/arena.h"
#include "common/cpu/storage.h"
#include "rel_attention/cpu/sizes.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

template <typename T>
int64_t panels_of(int64_t rows) {
  return (rows + panel_width<T> - 1) / panel_width<T>;
}

// One panel: rows (panel_width x padded) transposed to (depth x panel_width).
template <typename T>
void pack_panel(const T* rows, const Widths<T>& widths, T* panel) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t d = 0; d < widths.depth; d += lanes) {
    const int64_t count = smaller(lanes, widths.depth - d);
    for (int64_t r = 0; r < panel_width<T>; r += lanes) {
      typename Vec<T>::type square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load(rows + (r + i) * widths.padded + d);
      transpose<T>(square);
      T* to = panel + d * panel_width<T> + r;
      if (count == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + i * panel_width<T>, square[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < count) store(to + i * panel_width<T>, square[i]);
        }
      }
    }
  }
}

// Where row j of memory and chunk together begins.
struct RowPlace {
  const void* data;
  int64_t offset;
};
inline RowPlace key_row(const RelAttention& in, const Operand& memory, const Operand& chunk, int64_t stream,
                        int64_t head, int64_t j) {
  if (j < in.M) return {memory.data, stream * memory.batch + j * memory.row + head * memory.head};
  return {chunk.data, stream * chunk.batch + (j - in.M) * chunk.row + head * chunk.head};
}

// Prefetch distance in rows.
constexpr int64_t prefetch_rows = 8;

template <typename T>
PYTBPTT_INLINE void load_key(const RelAttention& in, const Operand& memory, const Operand& chunk, int64_t stream,
                             int64_t head, int64_t j, const Widths<T>& widths, T* row) {
  const RowPlace later = key_row(in, memory, chunk, stream, head, smaller(j + prefetch_rows, widths.places - 1));
  prefetch_row(later.data, in.dtype, later.offset, widths.depth);
  const RowPlace here = key_row(in, memory, chunk, stream, head, j);
  load_row(here.data, in.dtype, here.offset, widths.depth, widths.padded, row);
}

// Loads row i of a chunk's operand, padded with zeros.
template <typename T>
PYTBPTT_INLINE void load_chunk_row(const RelAttention& in, const Operand& chunk, int64_t stream, int64_t head,
                                   int64_t i, const Widths<T>& widths, T* row) {
  const int64_t start = stream * chunk.batch + head * chunk.head;
  prefetch_row(chunk.data, in.dtype, start + smaller(i + prefetch_rows, in.T - 1) * chunk.row, widths.depth);
  load_row(chunk.data, in.dtype, start + i * chunk.row, widths.depth, widths.padded, row);
}

inline int64_t position_offset(const RelAttention& in, int64_t head, int64_t distance) {
  return smaller(distance, in.R - 1) * in.position.row + head * in.position.head;
}

// Rows [0, count) of a source, padded, and their panels; `kept` rows stay where `rows` points, otherwise `rows` is
// scratch for one panel. Rows up to a whole panel are zeros.
template <typename T, typename Load>
void pack(int64_t count, bool kept, T* rows, T* panels, const Widths<T>& widths, const Load& load_into) {
  for (int64_t first = 0; first < count; first += panel_width<T>) {
    T* here = kept ? rows + first * widths.padded : rows;
    for (int64_t r = 0; r < panel_width<T>; ++r) {
      T* row = here + r * widths.padded;
      if (first + r < count) {
        load_into(first + r, row);
      } else {
        for (int64_t d = 0; d < widths.padded; ++d) row[d] = 0;
      }
    }
    pack_panel(here, widths, panels + first * widths.depth);
  }
}

// First distance index that any query can see, rounded down to a panel.
template <typename T>
int64_t first_place(const RelAttention& in) {
  return larger(0, in.M + in.T - in.window) / panel_width<T> * panel_width<T>;
}

template <typename T>
void pack_positions(const RelAttention& in, int64_t head, bool kept, T* rows, T* panels, const Widths<T>& widths) {
  const int64_t first = first_place<T>(in);
  pack<T>(widths.places - first, kept, kept ? rows + first * widths.padded : rows, panels + first * widths.depth,
          widths, [&](int64_t place, T* row) {
            const int64_t distance = widths.places - 1 - (first + place);
            prefetch_row(in.position.data, in.dtype, position_offset(in, head, larger(distance - prefetch_rows, 0)),
                         widths.depth);
            load_row(in.position.data, in.dtype, position_offset(in, head, distance), widths.depth, widths.padded, row);
          });
}

// (query + content_bias) and (query + position_bias), times the scale's sign.
template <typename T>
struct BiasedQueries {
  T *content, *position;            // (rows, padded)
  T *content_bias, *position_bias;  // (padded)

  void allocate(Arena& arena, int64_t rows, const Widths<T>& widths) {
    content = arena.allocate<T>(rows * widths.padded);
    position = arena.allocate<T>(rows * widths.padded);
    content_bias = arena.allocate<T>(widths.padded);
    position_bias = arena.allocate<T>(widths.padded);
  }
  void load_biases(const RelAttention& in, int64_t head, const Widths<T>& widths) {
    load_row(in.content_bias.data, in.dtype, head * in.content_bias.head, widths.depth, widths.padded, content_bias);
    load_row(in.position_bias.data, in.dtype, head * in.position_bias.head, widths.depth, widths.padded, position_bias);
  }
  void load_rows(const RelAttention& in, int64_t stream, int64_t head, Span queries, const Widths<T>& widths) {
    const T sign = Scale<T>(in).of_queries;
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      T* with_content = content + (i - queries.begin) * widths.padded;
      T* with_position = position + (i - queries.begin) * widths.padded;
      load_chunk_row(in, in.query, stream, head, i, widths, with_content);
      for (int64_t d = 0; d < widths.padded; d += Vec<T>::lanes) {
        const auto query = load(with_content + d);
        store(with_content + d, (query + load(content_bias + d)) * sign);
        store(with_position + d, (query + load(position_bias + d)) * sign);
      }
    }
  }
};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
