// How the kernels of rel_attention split their work: widths of rows, panels and tiles, and what a query sees.
//
// Keys are counted over memory and chunk together, 0 <= j < M + T. Place p = j - i + T - 1 is distance M + T - 1 - p:
// the farthest come first. For T = 3 and M = 3:
//
//   key j       0  1  2  3  4  5                place p     0  1  2  3  4  5
//   query 0     x  x  x  x                      query 0     .  .  x  x  x  x
//         1     x  x  x  x  x                         1     .  x  x  x  x  x
//         2     x  x  x  x  x  x                      2     x  x  x  x  x  x
//
// Transformer-XL's relative shift moves row i to the left by T - 1 - i. The products by place are written straight into
// the tile of scores by key, with a row stride one larger than the tile's: each row lands one column further to the
// left relative to the next. Reading the tile with that stride undoes the shift (backward).
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/span.h"
#include "rel_attention/cpu/tasks.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// Scores are computed unscaled; |scale| is applied in the exponential's argument (scaling the queries would round every
// term). Only the sign, or 0, is multiplied into the queries, so that the maximum stays the maximum.
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

// Zero padding on both sides of a tile's visible columns, which skewed reads touch.
constexpr int64_t zeroed_margin = 32;
static_assert(zeroed_margin >= PYTBPTT_ACCUMULATORS && zeroed_margin >= PYTBPTT_VECTOR_BYTES / 4);

// Padding between the rows of a score tile: skewed position panels may overhang by a panel's width plus the
// microkernel's rows.
template <typename T>
constexpr int64_t strip_margin =
    round_up(larger(panel_width<T> + score_rows, zeroed_margin), Vec<T>::lanes) + Vec<T>::lanes;
template <typename T>
constexpr int64_t strip_stride = chunk_keys<T> + strip_margin<T>;

inline Span visible_keys(const RelAttention& in, int64_t stream, int64_t query) {
  const int64_t end = in.M + query + 1;
  const int64_t first = in.first_key == nullptr ? 0 : in.first_key[stream * in.T + query];
  return {larger(larger(first, 0), end - in.window), end};
}

template <typename T>
struct Widths {
  explicit Widths(const RelAttention& in) : depth(in.D), padded(round_up(in.D, Vec<T>::lanes)), places(in.M + in.T) {}
  int64_t depth;   // D
  int64_t padded;  // D, to whole vectors
  int64_t places;  // distances there are
};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
