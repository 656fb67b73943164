// What the host code of both CUDA ops needs of torch, through its stable interface, and of the GPU.
#pragma once
#include <type_traits>

#include "common/cuda/arithmetic.h"
#include "common/tensors.h"

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace pytbptt::cuda {

// The kernels' own errors, which they return as texts.
inline void throw_if(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
}

inline CUstream_st* current_stream(const Place& place) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
  return static_cast<CUstream_st*>(stream);
}

// visit(std::integral_constant<Arithmetic, …>) for that in which tensors of this type are computed with.
template <typename Visit>
auto with_arithmetic(Scalar dtype, bool tf32, const Visit& visit) {
  switch (dtype) {
    case Scalar::float16:
      return visit(std::integral_constant<Arithmetic, Arithmetic::float16>());
    case Scalar::bfloat16:
      return visit(std::integral_constant<Arithmetic, Arithmetic::bfloat16>());
    default:
      return tf32 ? visit(std::integral_constant<Arithmetic, Arithmetic::tf32>())
                  : visit(std::integral_constant<Arithmetic, Arithmetic::float32>());
  }
}

// Refuses what CUDA kernels do not serve; `tensor` is the one whose device and dtype the others must have.
inline void check_served(const char* op, const char* name, const Tensor& tensor) {
  if (!place_of(tensor).is_cuda())
    reject(op, ": ", name, ": found on ", text(place_of(tensor)), ", expected on a CUDA device");
  if (dtype_number(tensor) == dtype_number(ScalarType::Double)) {
    reject(op, ": ", name, ": found ", tensor.scalar_type(), ", expected float32, bfloat16 or float16 on CUDA");
  }
}

}  // namespace pytbptt::cuda
