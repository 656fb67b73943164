// What a rel_attention launch is given, on every device. Sizes as in the documentation: B streams, T chunk length,
// M memory length, H heads, D head size, R rows of the distance table.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace pytbptt {

// Element (b, t, h, d) is at data + b * batch + t * row + h * head + d, counted in elements: any strides over a
// contiguous last dimension, 0 (an expanded dimension) included. Read only; may overlap other inputs.
struct Operand {
  const void* data;
  std::int64_t batch, row, head;
};

struct RelAttention {
  std::int64_t B, T, M, H, D, R;
  Scalar dtype;                   // of every Operand and of every result but log_sum_exp
  Operand query;                  // (B, T, H, D)
  Operand key, value;             // (B, T, H, D)
  Operand memory_key;             // (B, M, H, D), oldest first; not read where M is 0
  Operand memory_value;           // likewise
  Operand position;               // (R, H, D): batch is 0; row d is for distance d, row R - 1 for all greater ones too
  Operand content_bias;           // (H, D): batch and row are 0
  Operand position_bias;          // likewise
  const std::int32_t* first_key;  // (B, T) contiguous, lowest visible key; any value; nullptr means 0 everywhere
  std::int64_t window;            // how many keys a query sees at most, at least 1; M + T where there is no limit
  double scale;                   // of the scores
  std::uint32_t dropout_threshold;  // a weight is kept where its 16 random bits are at least this; 0 keeps all
  double keep_scale;                // 1 / (1 - dropout_threshold / 65536)
  const std::int64_t* seed;         // one element on the launch's device; not read where dropout_threshold is 0
};

struct RelAttentionForward {
  RelAttention inputs;
  void* out;          // (B, T, H, D) contiguous, wholly written, overlaps no input
  void* log_sum_exp;  // (B, H, T) contiguous, float (double for float64), wholly written: log2 of the sum of 2^score,
                      // scores in units of log2; +infinity for a query without a visible key
  void* rounding;  // as out: rounding error of a 16-bit out (exact minus stored), in out's dtype; nullptr if there is
                   // no backward or out is wider
};

struct RelAttentionBackward {
  RelAttention inputs;
  Operand grad_out, out;    // (B, T, H, D)
  Operand rounding;         // likewise; its data is nullptr if out is wider than 16 bits
  const void* log_sum_exp;  // as the forward left it
  bool memory_needs_grad;
  // All contiguous, wholly written (zeros where nothing is visible), and overlapping neither inputs nor one another.
  void *query, *key, *value;           // (B, T, H, D)
  void* position;                      // (R, H, D)
  void *content_bias, *position_bias;  // (H, D)
  void *memory_key, *memory_value;     // (B, M, H, D); not touched unless memory_needs_grad
};

}  // namespace pytbptt
