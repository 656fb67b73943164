// The gradients of rel_attention that are sums over streams: of position, content_bias and position_bias. For example,
// with 4 streams to a task:
//
//   task of streams 0 … 3   partial sum 0 |
//   task of streams 4 … 7   partial sum 1 |  added in this order (reduce_parts), then rounded to the operands' dtype
//   …                                     |
#pragma once
#include "common/cpu/storage.h"
#include "rel_attention/cpu/sizes.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// Kahan summation, because these gradients cancel heavily.
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

}  // namespace pytbptt::cpu::PYTBPTT_ISA
