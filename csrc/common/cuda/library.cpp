// The Python module pytbptt._cuda: importing it registers the CUDA kernels of the ops.
#include <cuda_runtime_api.h>

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, module) {
  module.attr("architectures") = PYTBPTT_ARCHITECTURES;  // as in TORCH_CUDA_ARCH_LIST
  module.attr("toolkit") = pybind11::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
}
