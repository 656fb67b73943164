// rel_attention forward and backward of one task, for the target of the including file (target_*.h).
//
// Keys are counted over memory and chunk together, 0 <= j < M + T. Distances are counted from the farthest: place
// `far` = j - i + T - 1 is distance M + T - 1 - far, so that scores by place, [i][far], become scores by key, [i][j],
// by moving row i to the left by T - 1 - i. A product that writes rows of `far` with a stride one larger than the
// rows of the score tile does that move as it stores, and one that reads so undoes it.
#pragma once
#include "cpu/gemm.h"
#include "cpu/philox.h"
#include "cpu/rel_attention_tasks.h"
#include "cpu/storage.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

using std::int64_t;

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Scores are summed without their scale, which one multiply-add of the exponential's argument brings in: rounding the
// scaled queries would add an error to every term. Only its sign goes into the queries, so that the largest sum is the
// largest score; a scale of 0 does so as a whole.
template <typename T>
struct Scale {
  explicit Scale(const RelAttention& in)
      : of_queries(static_cast<T>(in.scale > 0   ? 1
                                  : in.scale < 0 ? -1
                                                 : 0)),
        of_sums(static_cast<T>(in.scale < 0 ? -in.scale : in.scale)),
        log2_of_sums(static_cast<T>(in.scale == 0 ? 1 : of_sums * 1.4426950408889634)) {}
  T of_queries, of_sums;
  T log2_of_sums;  // of_sums * log2(e)
};

// The microkernel for scores is this many vectors wide, and transposed operands are packed in panels of that width.
constexpr int score_vectors = 2;
constexpr int score_rows = rows_per_tile(score_vectors);
template <typename T>
constexpr int64_t panel_width = score_vectors * Vec<T>::lanes;

// Keys that are packed at a time.
template <typename T>
constexpr int64_t chunk_keys = 512 / panel_width<T> * panel_width<T>;

// Columns that must be zero on both sides of what a tile can see, because row groups read diagonally across them.
constexpr int64_t zeroed_margin = 32;
static_assert(zeroed_margin >= PYTBPTT_ACCUMULATORS && zeroed_margin >= PYTBPTT_VECTOR_BYTES / 4);

// Columns between the rows of a tile: a panel of the position term may stand out by its width and a group's rows.
template <typename T>
constexpr int64_t strip_margin =
    round_up(larger(panel_width<T> + score_rows, zeroed_margin), Vec<T>::lanes) + Vec<T>::lanes;
template <typename T>
constexpr int64_t strip_stride = chunk_keys<T> + strip_margin<T>;

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
};

inline Span intersect(Span a, Span b) {
  return {larger(a.begin, b.begin), smaller(a.end, b.end)};
}

// The smallest span that holds both.
inline Span hull(Span a, Span b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

inline Span visible_keys(const RelAttention& in, int64_t stream, int64_t query) {
  const int64_t end = in.M + query + 1;
  const int64_t first = in.first_key == nullptr ? 0 : in.first_key[stream * in.T + query];
  return {larger(larger(first, 0), end - in.window), end};
}

// Hands out parts of a workspace; with no workspace, adds up what will be needed.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <typename U>
  U* take(int64_t count) {
    char* here = start_ == nullptr ? nullptr : start_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(here);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

template <typename T>
struct Widths {
  explicit Widths(const RelAttention& in) : depth(in.D), padded(round_up(in.D, Vec<T>::lanes)), places(in.M + in.T) {}
  int64_t depth;   // D
  int64_t padded;  // D, to whole vectors
  int64_t places;  // distances there are
};

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

// Rows ahead of the one being read that are asked for.
constexpr int64_t prefetch_rows = 8;

template <typename T>
PYTBPTT_INLINE void load_key(const RelAttention& in, const Operand& memory, const Operand& chunk, int64_t stream,
                             int64_t head, int64_t j, const Widths<T>& widths, T* row) {
  const RowPlace later = key_row(in, memory, chunk, stream, head, smaller(j + prefetch_rows, widths.places - 1));
  prefetch_row(later.data, in.dtype, later.offset, widths.depth);
  const RowPlace here = key_row(in, memory, chunk, stream, head, j);
  load_row(here.data, in.dtype, here.offset, widths.depth, widths.padded, row);
}

// Row i of a chunk's operand, likewise.
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

// The farthest place that any query can see, down to a whole panel: what lies before is not packed.
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

  void take(Arena& arena, int64_t rows, const Widths<T>& widths) {
    content = arena.take<T>(rows * widths.padded);
    position = arena.take<T>(rows * widths.padded);
    content_bias = arena.take<T>(widths.padded);
    position_bias = arena.take<T>(widths.padded);
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

// The scores of a tile of queries against a chunk of keys, or their gradients.
template <typename T>
struct Tile {
  int64_t first_query, rows;
  int64_t first_key;  // of column 0
  const Span* keys;   // what each row sees of this chunk
  Span all_keys;      // their hull
  int64_t T_;         // the chunk's queries in all

  // Element (row, column 0) of the strip that holds the tile.
  T* row(T* strip, int64_t r) const { return strip + r * strip_stride<T>; }
  // Element (row 0, place 0), were it there, of the same strip read by place: rows are strip_stride + 1 apart.
  T* by_place(T* strip) const { return strip + first_query - (T_ - 1) - first_key; }

  Span keys_of_rows(int64_t first, int64_t count) const {
    Span all{0, 0};
    for (int64_t r = first; r < first + count; ++r) all = hull(all, keys[r]);
    return all;
  }
  Span columns_of_rows(int64_t first, int64_t count) const {
    const Span all = keys_of_rows(first, count);
    return all.empty() ? Span{0, 0} : Span{all.begin - first_key, all.end - first_key};
  }
  Span places_of_rows(int64_t first, int64_t count) const {
    Span all{0, 0};
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t shift = T_ - 1 - (first_query + r);
      if (!keys[r].empty()) all = hull(all, {keys[r].begin + shift, keys[r].end + shift});
    }
    return all;
  }
};

// strip = queries by panels, for every pair of a group of rows and a panel that `columns_of` does not leave out.
template <typename T, typename ColumnsOf>
void multiply_by_panels(int64_t rows, const T* queries, const T* panels, const Widths<T>& widths, T* strip,
                        int64_t stride, bool accumulate, const ColumnsOf& columns_of) {
  constexpr int64_t width = panel_width<T>;
  Span wanted[tile_queries];
  Span all{0, 0};
  for (int64_t r = 0, group = 0; r < rows; r += score_rows, ++group) {
    wanted[group] = columns_of(r, smaller(score_rows, rows - r));
    all = hull(all, wanted[group]);
  }
  if (all.empty()) return;
  for (int64_t column = all.begin / width * width; column < all.end; column += width) {
    const T* panel = panels + column * widths.depth;
    for (int64_t r = 0, group = 0; r < rows; r += score_rows, ++group) {
      const Span here = intersect(wanted[group], {column, column + width});
      if (here.empty()) continue;
      const int64_t count = smaller(score_rows, rows - r);
      const T* from = queries + r * widths.padded;
      T* to = strip + r * stride + column;
      const int64_t middle = column + Vec<T>::lanes;
      if (here.begin < middle && here.end > middle) {
        tile_rows<T, 2, Layout::row_major>(count, widths.depth, from, widths.padded, panel, width, to, stride,
                                           accumulate);
      } else {
        const int64_t half = here.begin < middle ? 0 : Vec<T>::lanes;
        tile_rows<T, 1, Layout::row_major>(count, widths.depth, from, widths.padded, panel + half, width, to + half,
                                           stride, accumulate);
      }
    }
  }
}

// The scores of a tile before their scale: what lies outside a row's visible keys is undefined.
template <typename T>
void score_tile(const Tile<T>& tile, const T* content, const T* position, const T* key_panels, const T* place_panels,
                const Widths<T>& widths, T* strip) {
  multiply_by_panels<T>(tile.rows, position, place_panels, widths, tile.by_place(strip), strip_stride<T> + 1, false,
                        [&](int64_t r, int64_t count) { return tile.places_of_rows(r, count); });
  multiply_by_panels<T>(tile.rows, content, key_panels, widths, strip, strip_stride<T>, true,
                        [&](int64_t r, int64_t count) { return tile.columns_of_rows(r, count); });
}

template <typename T, int VECTORS, Layout LAYOUT, typename DepthOf>
void add_product_columns(int64_t rows, const T* a, int64_t lda, const T* b, T* c, int64_t stride,
                         const DepthOf& depth_of) {
  constexpr int64_t step = rows_per_tile(VECTORS);
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t count = smaller(step, rows - r);
    const Span depth = depth_of(r, count);
    if (depth.empty()) continue;
    const T* from = LAYOUT == Layout::row_major ? a + r * lda + depth.begin : a + r + depth.begin * lda;
    tile_rows<T, VECTORS, LAYOUT>(count, depth.size(), from, lda, b + depth.begin * stride, stride, c + r * stride,
                                  stride, true);
  }
}

// C (rows x width) += A B, B and C with rows `width` apart, where of the depth only depth_of(row, count) matters to
// rows [row, row + count).
template <typename T, Layout LAYOUT, typename DepthOf>
void add_product(int64_t rows, const T* a, int64_t lda, const T* b, T* c, int64_t width, const DepthOf& depth_of) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t vectors = width / lanes;
  const int64_t panels = (vectors + widest_tile - 1) / widest_tile;
  const int64_t each = (vectors + panels - 1) / panels;
  for (int64_t first = 0; first < vectors; first += each) {
    const T* columns_b = b + first * lanes;
    T* columns_c = c + first * lanes;
    switch (smaller(each, vectors - first)) {
      case 1:
        add_product_columns<T, 1, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      case 2:
        add_product_columns<T, 2, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      case 3:
        add_product_columns<T, 3, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      default:
        if constexpr (widest_tile >= 4) {
          add_product_columns<T, 4, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        }
    }
  }
}

template <typename T>
void fill(T* begin, T* end, T value) {
  for (; begin < end; ++begin) *begin = value;
}

// Sets a row to zero in `around`, but for `inside`; both in columns.
template <typename T>
void zero_outside(T* row, Span inside, Span around) {
  fill(row + around.begin, row + smaller(inside.begin, around.end), T{0});
  fill(row + larger(inside.end, around.begin), row + around.end, T{0});
}

template <typename T>
T exp2_of_one(T x) {
  return exp2_of_negative(broadcast(x))[0];
}

inline double log2_of(double x) {
  return __builtin_log2(x);
}

// The random bits of one row's weights, and what they say of a vector of columns.
class RowDropout {
 public:
  RowDropout(const RelAttention& in, std::uint16_t* bits)
      : bits_(bits),
        threshold_(static_cast<std::int32_t>(in.dropout_threshold)),
        seed_(in.dropout_threshold == 0 ? 0 : *in.seed) {}
  bool active() const { return threshold_ != 0; }
  // `columns` of the row of `query`, counted from key `first_key`, a multiple of 8.
  void draw(int64_t sequence, int64_t query, int64_t first_key, Span columns) {
    first_column_ = columns.begin / 8 * 8;
    dropout_bits(seed_, sequence, query, (first_key + first_column_) / 8, (first_key + columns.end + 7) / 8, bits_);
  }
  template <typename T>
  typename Vec<T>::type apply(typename Vec<T>::type weights, int64_t column) const {
    const auto mask = kept<T>(bits_ + (column - first_column_), threshold_);
    return reinterpret_cast<typename Vec<T>::type>(reinterpret_cast<typename Vec<T>::integers>(weights) & mask);
  }

 private:
  std::uint16_t* bits_;
  std::int32_t threshold_;
  int64_t seed_;
  int64_t first_column_ = 0;
};

// Elements that RowDropout writes for `columns` columns.
constexpr int64_t dropout_buffer(int64_t columns) {
  return columns + 16 + 16 * PYTBPTT_VECTOR_BYTES;
}

template <typename T>
struct RowState {
  T largest;  // of the scores so far
  T total;    // of 2^(units * (score - largest))
};

// Turns a row of scores into 2^(units * (score - largest so far)), takes what was summed before to the same scale, and
// applies dropout to the weights but not to their total.
template <typename T>
void softmax_row(T* row, Span columns, T units, RowState<T>& state, T* sum, int64_t padded, const RowDropout& dropout) {
  constexpr int64_t lanes = Vec<T>::lanes;
  using V = typename Vec<T>::type;
  const int64_t begin = columns.begin / lanes * lanes, end = round_up(columns.end, lanes);
  const T nothing = -static_cast<T>(__builtin_inff());
  fill(row + begin, row + columns.begin, nothing);
  fill(row + columns.end, row + end, nothing);
  V largest = broadcast(state.largest), largest_odd = largest;
  int64_t c = begin;
  for (; c + lanes < end; c += 2 * lanes) {
    const V even = load(row + c), odd = load(row + c + lanes);
    largest = even > largest ? even : largest;
    largest_odd = odd > largest_odd ? odd : largest_odd;
  }
  if (c < end) largest = load(row + c) > largest ? load(row + c) : largest;
  largest = largest_odd > largest ? largest_odd : largest;
  const T now = largest_lane<T>(largest);
  if (now != state.largest && state.total != 0) {
    const T factor = exp2_of_one((state.largest - now) * units);
    state.total *= factor;
    for (int64_t d = 0; d < padded; d += lanes) store(sum + d, load(sum + d) * factor);
  }
  state.largest = now;
  const T offset = now * units;
  V total{};
  if (dropout.active()) {
    for (c = begin; c < end; c += lanes) {
      const V weight = exp2_of_negative(load(row + c) * units - offset);
      total += weight;
      store(row + c, dropout.template apply<T>(weight, c));
    }
  } else {
    V total_odd{};
    for (c = begin; c + lanes < end; c += 2 * lanes) {
      const V even = exp2_of_negative(load(row + c) * units - offset),
              odd = exp2_of_negative(load(row + c + lanes) * units - offset);
      store(row + c, even);
      store(row + c + lanes, odd);
      total += even;
      total_odd += odd;
    }
    if (c < end) {
      const V weight = exp2_of_negative(load(row + c) * units - offset);
      store(row + c, weight);
      total += weight;
    }
    total += total_odd;
  }
  state.total += sum_of_lanes<T>(total);
}

// Writes a finished row: the sum of weighted values, over the total of the weights.
template <typename T>
void finish_row(const RelAttentionForward& p, int64_t stream, int64_t head, int64_t query, const T* sum,
                const RowState<T>& state) {
  const RelAttention& in = p.inputs;
  const bool sees_nothing = visible_keys(in, stream, query).empty();
  const T factor = sees_nothing ? T{0} : static_cast<T>(in.keep_scale) / state.total;
  store_row(sum, in.D, factor, in.dtype, ((stream * in.T + query) * in.H + head) * in.D, p.out);
  static_cast<T*>(p.log_sum_exp)[(stream * in.H + head) * in.T + query] =
      sees_nothing
          ? static_cast<T>(__builtin_inff())
          : static_cast<T>(static_cast<double>(state.largest * Scale<T>(in).log2_of_sums) + log2_of(state.total));
}

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
    place_panels = arena.take<T>(panels_of<T>(widths.places) * panel_width<T> * widths.depth);
    key_panels = arena.take<T>(keys * widths.depth);
    values = arena.take<T>(keys * widths.padded);
    scratch = arena.take<T>(panel_width<T> * widths.padded);
    sums = arena.take<T>(rows * widths.padded);
    strip = arena.take<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    states = arena.take<RowState<T>>(rows);
    visible = arena.take<Span>(rows);
    clipped = arena.take<Span>(tile_queries);
    bits = arena.take<std::uint16_t>(dropout_buffer(chunk_keys<T>));
    queries.take(arena, rows, widths);
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
      tile.all_keys = hull(tile.all_keys, buffers.clipped[r]);
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
      seen = hull(seen, buffers.visible[r]);
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

// Rows of keys, values and positions as vectors, wherever they lie: in place where they are of type T and fill a
// vector, otherwise through a padded copy. In place, the last vector is drawn back to end with the row.
template <typename T>
class RowReader {
 public:
  RowReader(const RelAttention& in, const Widths<T>& widths)
      : dtype_(in.dtype),
        widths_(widths),
        in_place_((in.dtype == Scalar::float32 || in.dtype == Scalar::float64) && in.D >= Vec<T>::lanes) {}
  int64_t vectors() const { return widths_.padded / Vec<T>::lanes; }
  int64_t offset(int64_t vector) const {
    const int64_t usual = vector * Vec<T>::lanes;
    return in_place_ ? smaller(usual, widths_.depth - Vec<T>::lanes) : usual;
  }
  const T* row(const void* data, int64_t at, T* copy) const {
    if (in_place_) return static_cast<const T*>(data) + at;
    load_row(data, dtype_, at, widths_.depth, widths_.padded, copy);
    return copy;
  }
  // Lays out a padded row so that its vectors meet those of row(): elements that two of them hold count once.
  void align(const T* padded, T* vectors_of_row) const {
    constexpr int64_t lanes = Vec<T>::lanes;
    for (int64_t v = 0; v < vectors(); ++v) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t d = offset(v) + lane;
        vectors_of_row[v * lanes + lane] = d >= v * lanes ? padded[d] : T{0};
      }
    }
  }

 private:
  Scalar dtype_;
  Widths<T> widths_;
  bool in_place_;
};

template <typename T>
struct FewBuffers {
  T *scores, *sum, *content, *position, *copies;
  std::uint16_t* bits;
  BiasedQueries<T> queries;
  int64_t bytes;

  FewBuffers(const RelAttention& in, void* workspace) {
    const Widths<T> widths(in);
    Arena arena(workspace);
    scores = arena.take<T>(round_up(widths.places, Vec<T>::lanes) + Vec<T>::lanes);
    sum = arena.take<T>(widths.padded);
    content = arena.take<T>(widths.padded);
    position = arena.take<T>(widths.padded);
    copies = arena.take<T>(2 * widths.padded);
    bits = arena.take<std::uint16_t>(dropout_buffer(widths.places));
    queries.take(arena, 1, widths);
    bytes = arena.used();
  }
};

// Scores of one query against keys in place, a vector of keys at a time.
template <typename T>
void score_one(const RelAttention& in, int64_t stream, int64_t head, int64_t query, Span keys,
               const RowReader<T>& reader, const Widths<T>& widths, FewBuffers<T>& buffers) {
  constexpr int64_t lanes = Vec<T>::lanes;
  reader.align(buffers.queries.content, buffers.content);
  reader.align(buffers.queries.position, buffers.position);
  for (int64_t j = keys.begin / lanes * lanes; j < keys.end; j += lanes) {
    typename Vec<T>::type products[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t visible = larger(keys.begin, smaller(j + lane, keys.end - 1));  // others are overwritten later
      const RowPlace place = key_row(in, in.memory_key, in.key, stream, head, visible);
      const T* key = reader.row(place.data, place.offset, buffers.copies);
      const T* position = reader.row(in.position.data, position_offset(in, head, in.M + query - visible),
                                     buffers.copies + widths.padded);
      typename Vec<T>::type product{};
      for (int64_t v = 0; v < reader.vectors(); ++v) {
        product += load(key + reader.offset(v)) * load(buffers.content + v * lanes);
        product += load(position + reader.offset(v)) * load(buffers.position + v * lanes);
      }
      products[lane] = product;
    }
    transpose<T>(products);
    typename Vec<T>::type sum = products[0];
    for (int64_t lane = 1; lane < lanes; ++lane) sum += products[lane];
    store(buffers.scores + j, sum);
  }
}

// buffers.sum = sum of weights times values, for VECTORS vectors of every row from `first` on.
template <typename T, int VECTORS>
void sum_values(const RelAttention& in, int64_t stream, int64_t head, Span keys, const RowReader<T>& reader,
                int64_t first, const Widths<T>& widths, FewBuffers<T>& buffers) {
  typename Vec<T>::type sums[2][VECTORS] = {};  // two, so that additions need not wait for one another
  for (int64_t j = keys.begin; j < keys.end; j += 2) {
    for (int64_t odd = 0; odd < smaller(2, keys.end - j); ++odd) {
      const RowPlace place = key_row(in, in.memory_value, in.value, stream, head, j + odd);
      const T* value = reader.row(place.data, place.offset, buffers.copies + odd * widths.padded);
      for (int v = 0; v < VECTORS; ++v)
        sums[odd][v] += load(value + reader.offset(first + v)) * buffers.scores[j + odd];
    }
  }
  for (int v = 0; v < VECTORS; ++v) store(buffers.sum + reader.offset(first + v), sums[0][v] + sums[1][v]);
}

template <typename T>
void forward_few(const RelAttentionForward& p, const ForwardTask& task, void* workspace) {
  const RelAttention& in = p.inputs;
  const Widths<T> widths(in);
  const RowReader<T> reader(in, widths);
  FewBuffers<T> buffers(in, workspace);
  RowDropout dropout(in, buffers.bits);
  buffers.queries.load_biases(in, task.head, widths);
  for (int64_t stream = task.first_stream; stream < task.end_stream; ++stream) {
    for (int64_t i = task.first_query; i < task.end_query; ++i) {
      const Span keys = visible_keys(in, stream, i);
      RowState<T> state{-static_cast<T>(__builtin_inff()), T{0}};
      fill(buffers.sum, buffers.sum + widths.padded, T{0});
      if (!keys.empty()) {
        buffers.queries.load_rows(in, stream, task.head, {i, i + 1}, widths);
        score_one(in, stream, task.head, i, keys, reader, widths, buffers);
        if (dropout.active()) dropout.draw(stream * in.H + task.head, i, 0, keys);
        softmax_row(buffers.scores, keys, Scale<T>(in).log2_of_sums, state, buffers.sum, widths.padded, dropout);
        for (int64_t v = 0; v < reader.vectors(); v += 3) {
          switch (smaller(3, reader.vectors() - v)) {
            case 1:
              sum_values<T, 1>(in, stream, task.head, keys, reader, v, widths, buffers);
              break;
            case 2:
              sum_values<T, 2>(in, stream, task.head, keys, reader, v, widths, buffers);
              break;
            default:
              sum_values<T, 3>(in, stream, task.head, keys, reader, v, widths, buffers);
          }
        }
      }
      finish_row(p, stream, task.head, i, buffers.sum, state);
    }
  }
}

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
    place_rows = arena.take<T>(places * widths.padded);
    place_panels = arena.take<T>(places * widths.depth);
    place_gradient = arena.take<T>((widths.places + 2) * widths.padded);
    content_bias_gradient = place_gradient + widths.places * widths.padded;
    position_bias_gradient = content_bias_gradient + widths.padded;
    content_bias_lost = arena.take<T>(widths.padded);
    position_bias_lost = arena.take<T>(widths.padded);
    key_rows = arena.take<T>(keys * widths.padded);
    key_panels = arena.take<T>(keys * widths.depth);
    value_panels = arena.take<T>(keys * widths.depth);
    key_gradient = arena.take<T>(keys * widths.padded);
    value_gradient = arena.take<T>(keys * widths.padded);
    scratch = arena.take<T>(larger(panel_width<T>, 2) * widths.padded);
    grad_out = arena.take<T>(in.T * widths.padded);
    content_gradient = arena.take<T>(in.T * widths.padded);
    position_gradient = arena.take<T>(in.T * widths.padded);
    weight_strip = arena.take<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    score_strip = arena.take<T>(tile_queries * strip_stride<T> + 2 * strip_margin<T>) + strip_margin<T>;
    delta = arena.take<T>(in.T);
    visible = arena.take<Span>(in.T);
    clipped = arena.take<Span>(tile_queries);
    bits = arena.take<std::uint16_t>(dropout_buffer(chunk_keys<T>));
    queries.take(arena, in.T, widths);
    bytes = arena.used();
  }
};

// From scores and the gradients of the weights to the gradients of the scores (natural units) and the weights as the
// forward used them, row by row and in place.
template <typename T>
void differentiate_softmax_row(T* scores, T* weights, Span columns, T units, T log_sum_exp, T delta, T keep_scale,
                               const RowDropout& dropout) {
  constexpr int64_t lanes = Vec<T>::lanes;
  using V = typename Vec<T>::type;
  for (int64_t c = columns.begin / lanes * lanes; c < columns.end; c += lanes) {
    const V weight = exp2_of_negative(load(scores + c) * units - log_sum_exp);
    V gradient = load(weights + c);
    V used = weight;
    if (dropout.active()) {
      gradient = dropout.template apply<T>(gradient, c) * keep_scale;
      used = dropout.template apply<T>(weight, c) * keep_scale;
    }
    store(weights + c, used);
    store(scores + c, weight * (gradient - delta));
  }
}

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
      differentiate_softmax_row(scores, weights, columns, Scale<T>(in).log2_of_sums, log_sum_exp[r],
                                buffers.delta[i + r], static_cast<T>(in.keep_scale), dropout);
    }
    zero_outside(weights, columns, all);
    zero_outside(scores, columns, {all.begin - zeroed_margin, all.end + zeroed_margin});
  }

  // Keys and values: from the first one that wants a gradient on.
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
      tile.all_keys = hull(tile.all_keys, buffers.clipped[r]);
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

// sum += value, with what rounding lost carried over to the next addition (Kahan): where many terms cancel, as the
// gradients of the biases and of a clamped position do, a plain sum would keep little but rounding errors.
template <typename T>
PYTBPTT_INLINE void add_compensated(T* sum, T* lost, typename Vec<T>::type value) {
  const auto before = load(sum), corrected = value - load(lost);
  const auto after = before + corrected;
  store(lost, (after - before) - corrected);
  store(sum, after);
}

// Writes the gradients of position and biases out of sums over all streams; `sums` as in BackwardTask.
template <typename T>
void write_sums(const RelAttentionBackward& p, int64_t head, T* sums, T* scratch) {
  const RelAttention& in = p.inputs;
  const Widths<T> widths(in);
  const T factor = Scale<T>(in).of_sums;
  for (int64_t distance = 0; distance < in.R; ++distance) {
    const int64_t offset = (distance * in.H + head) * in.D;
    if (distance >= widths.places) {
      fill(scratch, scratch + widths.padded, T{0});
      store_row(scratch, in.D, T{1}, in.dtype, offset, p.position);
      continue;
    }
    T* row = sums + (widths.places - 1 - distance) * widths.padded;
    if (distance == in.R - 1) {  // also the row of every farther distance
      fill(scratch, scratch + widths.padded, T{0});
      for (int64_t place = widths.places - 2 - distance; place >= 0; --place) {
        const T* farther = sums + place * widths.padded;
        for (int64_t d = 0; d < widths.padded; d += Vec<T>::lanes) {
          add_compensated(row + d, scratch + d, load(farther + d));
        }
      }
    }
    store_row(row, in.D, factor, in.dtype, offset, p.position);
  }
  const T* bias_sums = sums + widths.places * widths.padded;
  store_row(bias_sums, in.D, T{1}, in.dtype, head * in.D, p.content_bias);
  store_row(bias_sums + widths.padded, in.D, T{1}, in.dtype, head * in.D, p.position_bias);
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
      seen = hull(seen, buffers.visible[i]);
      T* gradient = buffers.grad_out + i * widths.padded;
      load_chunk_row(in, p.grad_out, stream, task.head, i, widths, gradient);
      load_chunk_row(in, p.out, stream, task.head, i, widths, buffers.scratch);
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

template <typename T>
int64_t partial_sums_elements(const RelAttention& in) {
  const Widths<T> widths(in);
  return round_up((widths.places + 2) * widths.padded, 64 / sizeof(T));
}

template <typename T>
void reduce_parts(const RelAttentionBackward& p, int64_t head, T* sums, int64_t parts) {
  const Widths<T> widths(p.inputs);
  const int64_t size = partial_sums_elements<T>(p.inputs), used = (widths.places + 2) * widths.padded;
  for (int64_t part = 1; part < parts; ++part) {
    const T* other = sums + part * size;
    for (int64_t d = 0; d < used; d += Vec<T>::lanes) store(sums + d, load(sums + d) + load(other + d));
  }
  // The second part has been added and may serve as scratch.
  write_sums(p, head, sums, sums + size);
}

int64_t forward_workspace(const RelAttention& in, const ForwardTask& task) {
  const bool few = in.T <= few_queries;
  const int64_t rows = task.end_query - task.first_query;
  if (in.dtype == Scalar::float64) {
    return few ? FewBuffers<double>(in, nullptr).bytes : ForwardBuffers<double>(in, rows, nullptr).bytes;
  }
  return few ? FewBuffers<float>(in, nullptr).bytes : ForwardBuffers<float>(in, rows, nullptr).bytes;
}

int64_t backward_workspace(const RelAttention& in) {
  return in.dtype == Scalar::float64 ? BackwardBuffers<double>(in, nullptr).bytes
                                     : BackwardBuffers<float>(in, nullptr).bytes;
}

int64_t partial_sums_size(const RelAttention& in) {
  return in.dtype == Scalar::float64 ? partial_sums_elements<double>(in) * 8 : partial_sums_elements<float>(in) * 4;
}

void forward(const RelAttentionForward& p, const ForwardTask& task, void* workspace) {
  const bool few = p.inputs.T <= few_queries;
  if (p.inputs.dtype == Scalar::float64) {
    few ? forward_few<double>(p, task, workspace) : forward_many<double>(p, task, workspace);
  } else {
    few ? forward_few<float>(p, task, workspace) : forward_many<float>(p, task, workspace);
  }
}

void backward(const RelAttentionBackward& p, const BackwardTask& task, void* workspace) {
  p.inputs.dtype == Scalar::float64 ? backward_task<double>(p, task, workspace)
                                    : backward_task<float>(p, task, workspace);
}

void reduce(const RelAttentionBackward& p, int64_t head, void* partial_sums, int64_t parts) {
  p.inputs.dtype == Scalar::float64 ? reduce_parts(p, head, static_cast<double*>(partial_sums), parts)
                                    : reduce_parts(p, head, static_cast<float*>(partial_sums), parts);
}

extern const RelAttentionKernels rel_attention_kernels = {forward_workspace, backward_workspace, partial_sums_size,
                                                          forward,           backward,           reduce};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
