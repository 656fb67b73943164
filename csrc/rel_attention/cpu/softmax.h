// Rows of scores to weights, and the gradients of weights to those of scores; with dropout.
//
//   forward    state (maximum, total), sum of values   -> both rescaled where a chunk of keys has a greater score
//   backward   weights from the log-sum-exp; dS = weights · (keep · d weights - delta)
#pragma once
#include "common/cpu/philox.h"
#include "common/cpu/storage.h"
#include "rel_attention/cpu/sizes.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

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

// Dropout mask of one row.
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

// One step of the online softmax: turns a row of scores into 2^(units * (score - maximum so far)), rescales what was
// accumulated before, and applies dropout to the weights but not to their total.
template <typename T>
void softmax_row(T* row, Span columns, T units, RowState<T>& state, T* sum, int64_t padded, const RowDropout& dropout) {
  constexpr int64_t lanes = Vec<T>::lanes;
  using V = typename Vec<T>::type;
  const int64_t begin = columns.begin / lanes * lanes, end = round_up(columns.end, lanes);
  const T negative_infinity = -static_cast<T>(__builtin_inff());
  fill(row + begin, row + columns.begin, negative_infinity);
  fill(row + columns.end, row + end, negative_infinity);
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
  const T offset = now == negative_infinity ? T{0} : now * units;  // scores that are all -infinity: their weights are 0
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
  const bool none_visible = visible_keys(in, stream, query).empty();
  const T factor = none_visible ? T{0} : static_cast<T>(in.keep_scale) / state.total;
  const int64_t at = ((stream * in.T + query) * in.H + head) * in.D;
  store_row(sum, in.D, factor, in.dtype, at, p.out);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.rounding != nullptr) store_rounding(sum, in.D, factor, in.dtype, at, p.out, p.rounding);
  }
  static_cast<T*>(p.log_sum_exp)[(stream * in.H + head) * in.T + query] =
      none_visible
          ? static_cast<T>(__builtin_inff())
          : static_cast<T>(static_cast<double>(state.largest * Scale<T>(in).log2_of_sums) + log2_of(state.total));
}

// Softmax backward, row by row and in place: from scores and the gradients of the weights to the gradients of the
// scores (natural units) and the weights as the forward used them. A single visible key has the constant weight 1, so
// delta is replaced by that weight's own gradient: dS is then exactly 0 (NaN if the gradient is not finite).
template <typename T>
void differentiate_softmax_row(T* scores, T* weights, Span columns, bool only_key, T units, T log_sum_exp, T delta,
                               T keep_scale, const RowDropout& dropout) {
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
    store(scores + c, weight * (gradient - (only_key ? gradient : broadcast(delta))));
  }
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
