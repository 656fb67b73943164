// What every op checks of a tensor before it takes its address. Bad arguments are ValueErrors, as in Python.
#pragma once
#include <ATen/core/Tensor.h>

#include "scalar.h"

namespace pytbptt {

inline void check(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                  at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, ": found shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, op, ": ", name, ": found ", tensor.scalar_type(), ", expected ",
                    dtype);
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, ": found on ", tensor.device(), ", expected ", device);
}

inline Scalar scalar_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::float32;
    case at::kDouble:
      return Scalar::float64;
    case at::kBFloat16:
      return Scalar::bfloat16;
    case at::kHalf:
      return Scalar::float16;
    default:
      TORCH_CHECK_VALUE(false, op, ": ", name, ": found ", tensor.scalar_type(),
                        ", expected float32, float64, bfloat16 or float16");
  }
}

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace pytbptt
