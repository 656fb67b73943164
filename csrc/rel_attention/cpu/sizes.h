// How the kernels of rel_attention cut their work: widths of rows, panels and tiles, and what a query sees.
//
// Keys are counted over memory and chunk together, 0 <= j < M + T. Distances are counted from the farthest: place
// `far` = j - i + T - 1 is distance M + T - 1 - far, so that scores by place, [i][far], become scores by key, [i][j],
// by moving row i to the left by T - 1 - i. A product that writes rows of `far` with a stride one larger than the
// rows of the score tile does that move as it stores, and one that reads so undoes it.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/span.h"
#include "rel_attention/cpu/tasks.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

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
