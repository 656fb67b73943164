// rel_attention forward for few queries: scores one query at a time, from keys and values in place.
//
//   keys        | lanes | lanes | …       a vector of keys at a time: one row of products per key, transposed, summed
//   scores      | x x x x | x x x x | …   -> softmax_row
//   values      | row j | row j + 1 | …   sum += weight · row, two rows at a time, up to three vectors of each
#pragma once
#include "rel_attention/cpu/packing.h"
#include "rel_attention/cpu/softmax.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// Reads rows of keys, values and positions as vectors: directly if the dtype is T and D >= lanes, else from a padded
// copy. When read directly, the last vector overlaps the one before so that it ends with the row.
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
  // Arranges a padded row to match row()'s vectors; elements in the overlap are zero in one of the two, so that they
  // count once.
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
struct DecodeBuffers {
  T *scores, *sum, *content, *position, *copies;
  std::uint16_t* bits;
  BiasedQueries<T> queries;
  int64_t bytes;

  DecodeBuffers(const RelAttention& in, void* workspace) {
    const Widths<T> widths(in);
    Arena arena(workspace);
    scores = arena.allocate<T>(round_up(widths.places, Vec<T>::lanes) + Vec<T>::lanes);
    sum = arena.allocate<T>(widths.padded);
    content = arena.allocate<T>(widths.padded);
    position = arena.allocate<T>(widths.padded);
    copies = arena.allocate<T>(2 * widths.padded);
    bits = arena.allocate<std::uint16_t>(dropout_buffer(widths.places));
    queries.allocate(arena, 1, widths);
    bytes = arena.used();
  }
};

// Scores of one query against keys in place, a vector of keys at a time.
template <typename T>
void score_one(const RelAttention& in, int64_t stream, int64_t head, int64_t query, Span keys,
               const RowReader<T>& reader, const Widths<T>& widths, DecodeBuffers<T>& buffers) {
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
      typename Vec<T>::type by_content{}, by_position{};  // two, so that one addition need not wait for the other
      for (int64_t v = 0; v < reader.vectors(); ++v) {
        by_content += load(key + reader.offset(v)) * load(buffers.content + v * lanes);
        by_position += load(position + reader.offset(v)) * load(buffers.position + v * lanes);
      }
      products[lane] = by_content + by_position;
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
                int64_t first, const Widths<T>& widths, DecodeBuffers<T>& buffers) {
  typename Vec<T>::type sums[2][VECTORS] = {};  // two, so that additions need not wait for one another
  int64_t offsets[VECTORS];
  for (int v = 0; v < VECTORS; ++v) offsets[v] = reader.offset(first + v);
  const auto add = [&](auto& to, int64_t j, T* copy) {
    const RowPlace place = key_row(in, in.memory_value, in.value, stream, head, j);
    const T* value = reader.row(place.data, place.offset, copy);
    for (int v = 0; v < VECTORS; ++v) to[v] += load(value + offsets[v]) * buffers.scores[j];
  };
  int64_t j = keys.begin;
  for (; j + 1 < keys.end; j += 2) {
    add(sums[0], j, buffers.copies);
    add(sums[1], j + 1, buffers.copies + widths.padded);
  }
  if (j < keys.end) add(sums[0], j, buffers.copies);
  for (int v = 0; v < VECTORS; ++v) store(buffers.sum + offsets[v], sums[0][v] + sums[1][v]);
}

template <typename T>
void forward_decode(const RelAttentionForward& p, const ForwardTask& task, void* workspace) {
  const RelAttention& in = p.inputs;
  const Widths<T> widths(in);
  const RowReader<T> reader(in, widths);
  DecodeBuffers<T> buffers(in, workspace);
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

}  // namespace pytbptt::cpu::PYTBPTT_ISA
