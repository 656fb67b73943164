// The gradient of weight_hh, which the CUDA op computes with torch's own matmul, as an op on CPU tensors.
#include "lstm/cuda/grad_weight.h"

STABLE_TORCH_LIBRARY(pytbptt_emulator, library) {
  library.def("lstm_grad_weight(Tensor grad_gates, Tensor h0, Tensor output, Tensor? reset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pytbptt_emulator, CPU, library) {
  library.impl("lstm_grad_weight", TORCH_BOX(&pytbptt::cuda::lstm_grad_weight));
}
