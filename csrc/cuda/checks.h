// What the CUDA ops ask of torch and of a tensor before they take its address.
#pragma once
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include "scalar.h"

namespace pytbptt::cuda {

// `allowTF32CuBLAS` would raise where TF32 was allowed by torch.backends.cuda.matmul.fp32_precision.
inline bool tf32_is_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

inline Scalar scalar_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::float32;
    case at::kBFloat16:
      return Scalar::bfloat16;
    case at::kHalf:
      return Scalar::float16;
    default:
      TORCH_CHECK_VALUE(false, op, ": ", name, ": found ", tensor.scalar_type(),
                        ", expected float32, bfloat16 or float16 on CUDA");
  }
}

inline void check(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                  at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, ": found shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, op, ": ", name, ": found ", tensor.scalar_type(), ", expected ",
                    dtype);
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, ": found on ", tensor.device(), ", expected ", device);
}

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace pytbptt::cuda
