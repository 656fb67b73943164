// In which arithmetic the CUDA ops compute: by the tensors' dtype, and by what torch allows.
#pragma once
#include <ATen/Context.h>

#include "checks.h"

namespace pytbptt::cuda {

// `allowTF32CuBLAS` would raise where TF32 was allowed by torch.backends.cuda.matmul.fp32_precision.
inline bool tf32_is_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

inline Scalar scalar_of(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.scalar_type() != at::kDouble, op, ": ", name, ": found ", tensor.scalar_type(),
                    ", expected float32, bfloat16 or float16 on CUDA");
  return pytbptt::scalar_of(op, name, tensor);
}

}  // namespace pytbptt::cuda
