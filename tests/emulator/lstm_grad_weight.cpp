// The part of csrc/cuda/lstm.cpp that is torch's, as an op on tensors of any device.
#include "cuda/lstm_grad_weight.h"

#include <torch/library.h>

TORCH_LIBRARY(pytbptt_emulator, library) {
  library.def("lstm_grad_weight(Tensor grad_gates, Tensor h0, Tensor output, Tensor? reset) -> Tensor",
              &pytbptt::cuda::lstm_grad_weight);
}
