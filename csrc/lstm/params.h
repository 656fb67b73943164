// Kernel parameters of lstm on all devices. Sizes as in the documentation: B streams, T chunk length, H hidden units.
// Gates stand in the order i f g o, H of each. All strides are counted in elements, over a contiguous last dimension;
// inputs are read-only and may alias one another.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace pytbptt {

// Row (t, b) of a (T, B, width) tensor, at data + t * step + b * stream; 0 strides (expanded dimensions) included.
struct ChunkRows {
  const void* data;
  std::int64_t step, stream;
};

// Row b of a (B, H) tensor, at data + b * stream.
struct StateRows {
  const void* data;
  std::int64_t stream;
};

struct Lstm {
  std::int64_t T, B, H;   // T and H at least 1
  Scalar dtype;           // of everything but cells, which are float (double for float64)
  const void* weight_hh;  // (4H, H), rows weight_stride apart
  std::int64_t weight_stride;
  StateRows h0;       // (B, H)
  StateRows c0;       // (B, H), a cell's type
  const bool* reset;  // (T, B) contiguous: h and c are zero before that step; nullptr means nowhere
};

struct LstmForward {
  Lstm inputs;
  ChunkRows gates;  // (T, B, 4H), input projection and both biases
  // Outputs: contiguous, fully written, without overlap with inputs or one another.
  void* output;     // (T, B, H)
  void* h_n;        // (B, H)
  void* c_n;        // (B, H), a cell's type
  void* activated;  // (T, B, 4H), the gates after sigmoid or tanh; nullptr where no backward follows
  void* cells;      // (T, B, H), c after every step, a cell's type; nullptr together with activated
};

struct LstmBackward {
  Lstm inputs;
  ChunkRows grad_output;  // (T, B, H); data is nullptr for zeros
  StateRows grad_h_n;     // (B, H); likewise
  StateRows grad_c_n;     // (B, H), a cell's type; likewise
  const void* output;     // the forward's outputs, unchanged
  const void* activated;
  const void* cells;
  // Outputs: contiguous, fully written, without overlap with inputs or one another.
  void* grad_gates;   // (T, B, 4H)
  void* grad_weight;  // (4H, H)
  void* grad_h0;      // (B, H)
  void* grad_c0;      // (B, H), a cell's type
};

}  // namespace pytbptt
