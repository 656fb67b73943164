// Copies operands whose rows are not 16-byte aligned (e.g. head size 41 in 16 bits) into padded rows before the main
// kernels, which use 16-byte loads only. 4-byte cp.async is no alternative: odd rows start at 2-byte offsets.
#pragma once
#include "rel_attention/cuda/pieces.cuh"
#include "rel_attention/params.h"

namespace pytbptt::cuda {

using std::int64_t;

inline int64_t element_bytes(Scalar dtype) {
  return dtype == Scalar::float32 ? 4 : 2;
}

// An operand's rows, copied to `to` (batches, rows, H, D rounded up to pieces).
struct Copy {
  Operand from;
  void* to;
  int64_t batches, rows;
  Operand bias;  // (H, D), added to every row before it is multiplied by `factor`; nothing where its data is nullptr
  float factor;
  bool in_pieces;  // whether rows can be read so
};

struct Packing {
  char* memory;  // starts at a multiple of a piece; not touched before the launch
  int64_t H, D;
  Scalar dtype;
  int64_t bytes = 0, rows = 0;  // of all copies
  int count = 0;
  Copy copies[9] = {};
};

inline bool is_in_pieces(const Packing& packing, const Operand& operand) {
  const int64_t each = 16 / element_bytes(packing.dtype);
  return reinterpret_cast<std::uintptr_t>(operand.data) % 16 == 0 && packing.D % each == 0 &&
         operand.batch % each == 0 && operand.row % each == 0 && operand.head % each == 0;
}

// Queues a copy factor * (row + bias) and returns its view.
inline Operand copy_rows(Packing& packing, const Operand& operand, int64_t batches, int64_t rows, Operand bias = {},
                         float factor = 1) {
  const int64_t each = 16 / element_bytes(packing.dtype), head = (packing.D + each - 1) / each * each;
  const bool in_pieces = is_in_pieces(packing, operand) && is_in_pieces(packing, bias);
  const Operand copy{packing.memory + packing.bytes, rows * packing.H * head, packing.H * head, head};
  packing.copies[packing.count++] = {operand, packing.memory + packing.bytes, batches, rows, bias, factor, in_pieces};
  packing.rows += batches * rows;
  packing.bytes += batches * copy.batch * element_bytes(packing.dtype);
  return copy;
}

// Queues a copy and points the operand to it, unless it is already aligned.
inline void pack_rows(Packing& packing, Operand& operand, int64_t batches, int64_t rows) {
  if (!is_in_pieces(packing, operand)) operand = copy_rows(packing, operand, batches, rows);
}

// The same for keys, values and the table.
inline RelAttention pack_keys(Packing& packing, RelAttention in) {
  pack_rows(packing, in.key, in.B, in.T);
  pack_rows(packing, in.value, in.B, in.T);
  if (in.M > 0) {
    pack_rows(packing, in.memory_key, in.B, in.M);
    pack_rows(packing, in.memory_value, in.B, in.M);
  }
  pack_rows(packing, in.position, 1, in.R);
  return in;
}

// The same for all inputs.
inline RelAttention pack_all(Packing& packing, RelAttention in) {
  pack_rows(packing, in.query, in.B, in.T);
  pack_rows(packing, in.content_bias, 1, 1);
  pack_rows(packing, in.position_bias, 1, 1);
  return pack_keys(packing, in);
}

constexpr int pack_threads = 128;

// A warp copies a row of all heads.
template <typename E>
PYTBPTT_KERNEL(pack_threads, 1)
rel_attention_pack_kernel(const Packing packing) {
  int64_t row = int64_t{block()} * (pack_threads / warp_size) + warp();
  if (row >= packing.rows) return;
  int which = 0;
  while (row >= packing.copies[which].batches * packing.copies[which].rows) {
    row -= packing.copies[which].batches * packing.copies[which].rows;
    ++which;
  }
  const Copy& copy = packing.copies[which];
  const auto depth = static_cast<int>(packing.D);
  const int pieces = (depth + in_piece<E> - 1) / in_piece<E>, of_row = static_cast<int>(packing.H) * pieces;
  const E* const from =
      static_cast<const E*>(copy.from.data) + (row / copy.rows * copy.from.batch + row % copy.rows * copy.from.row);
  E* const to = static_cast<E*>(copy.to) + row * of_row * in_piece<E>;
  for (int p = lane(); p < of_row; p += warp_size) {
    const int first = p % pieces * in_piece<E>;
    const E* const head = from + p / pieces * copy.from.head;
    float values[in_piece<E>], bias[in_piece<E>] = {};
    const E* const of_bias = static_cast<const E*>(copy.bias.data) + p / pieces * copy.bias.head;
    const auto read = [&](float (&piece)[in_piece<E>], const E* row) {
      if (copy.in_pieces) {
        load_piece(piece, row + first);
      } else {
        PYTBPTT_UNROLL
        for (int i = 0; i < in_piece<E>; ++i) piece[i] = first + i < depth ? to_float(load(row + first + i)) : 0.0f;
      }
    };
    read(values, head);
    if (copy.bias.data != nullptr) {
      read(bias, of_bias);
      PYTBPTT_UNROLL
      for (int i = 0; i < in_piece<E>; ++i) values[i] = copy.factor * (values[i] + bias[i]);
    }
    auto* const piece = reinterpret_cast<decltype(piece_of<E>(values))*>(to + p * in_piece<E>);
    store(piece, piece_of<E>(values));
  }
}

// The text of an error, or nullptr.
template <typename E>
const char* launch_pack(const Packing& packing, Stream stream) {
  constexpr int rows_per_block = pack_threads / warp_size;
  return device::launch(&rel_attention_pack_kernel<E>, (packing.rows + rows_per_block - 1) / rows_per_block,
                        pack_threads, 0, stream, packing);
}

}  // namespace pytbptt::cuda
