// Host helpers of both CUDA ops (stable ABI).
#pragma once
#include <type_traits>

#include "common/cuda/compute_type.h"
#include "common/tensors.h"

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace pytbptt::cuda {

// Throws if a launch returned an error message.
inline void throw_if(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
}

inline CUstream_st* current_stream(const TensorDevice& device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return static_cast<CUstream_st*>(stream);
}

// Calls visit with the compute type for this dtype as a compile-time constant.
template <typename Visit>
auto dispatch_compute_type(Scalar dtype, bool tf32, const Visit& visit) {
  switch (dtype) {
    case Scalar::float16:
      return visit(std::integral_constant<ComputeType, ComputeType::float16>());
    case Scalar::bfloat16:
      return visit(std::integral_constant<ComputeType, ComputeType::bfloat16>());
    default:
      return tf32 ? visit(std::integral_constant<ComputeType, ComputeType::tf32>())
                  : visit(std::integral_constant<ComputeType, ComputeType::float32>());
  }
}

// Throws unless the tensor is on CUDA and not float64. The other arguments are checked against this tensor's device and
// dtype.
inline void check_supported(const char* op, const char* name, const Tensor& tensor) {
  if (!device_of(tensor).is_cuda())
    reject(op, ": ", name, ": found on ", text(device_of(tensor)), ", expected on a CUDA device");
  if (dtype_number(tensor) == dtype_number(ScalarType::Double)) {
    reject(op, ": ", name, ": found ", tensor.scalar_type(), ", expected float32, bfloat16 or float16 on CUDA");
  }
}

}  // namespace pytbptt::cuda
