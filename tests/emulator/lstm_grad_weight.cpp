// The part of csrc/lstm/cuda/op.cpp that is torch's, as an op on tensors of any device.
#include "lstm/cuda/grad_weight.h"

STABLE_TORCH_LIBRARY(pytbptt_emulator, library) {
  library.def("lstm_grad_weight(Tensor grad_gates, Tensor h0, Tensor output, Tensor? reset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pytbptt_emulator, CPU, library) {
  library.impl("lstm_grad_weight", TORCH_BOX(&pytbptt::cuda::lstm_grad_weight));
}
