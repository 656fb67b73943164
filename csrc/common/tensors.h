// Checks and allocates tensors through torch's stable ABI only, so that one build works with torch 2.10 and later.
// Errors are RuntimeErrors in Python: other types of exceptions do not pass that interface from torch 2.15 on. (The
// ops' public functions have checked before, with ValueErrors.)
#pragma once
// Targets torch 2.10. Defined here, not with -D, because pybind11 as bundled with some torch releases does not compile
// with this macro set.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/scalar.h"

#if defined(__ELF__)
// Message of the last failed call on this thread. Exists from torch 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
#endif

namespace pytbptt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed from a tensor or a list

// Device type and index in the stable ABI's numbering.
struct TensorDevice {
  std::int32_t type, index;

  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator!=(const TensorDevice& other) const { return type != other.type || index != other.index; }
};

inline TensorDevice device_of(const Tensor& tensor) {
  TensorDevice device{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

// The dtype's number in the stable ABI. Cheaper than Tensor::scalar_type(), which compares against every dtype in turn.
inline std::int32_t dtype_number(const Tensor& tensor) {
  std::int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

inline std::int32_t dtype_number(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      throw std::logic_error(std::string("unsupported dtype ") + torch::headeronly::toString(dtype));
  }
}

inline std::string text(Shape shape) {
  std::ostringstream written;
  for (std::size_t i = 0; i < shape.size(); ++i) written << (i == 0 ? "[" : ", ") << shape[i];
  written << (shape.empty() ? "[]" : "]");
  return written.str();
}

inline std::string text(const TensorDevice& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  const std::string type = device.is_cuda() ? "cuda" : "another type of device";
  return device.index < 0 ? type : type + ":" + std::to_string(device.index);
}

template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check(const char* op, const char* name, const Tensor& tensor, Shape shape, ScalarType dtype,
                  const TensorDevice& device) {
  if (!tensor.sizes().equals(shape)) {
    reject(op, ": ", name, ": found shape ", text(tensor.sizes()), ", expected ", text(shape));
  }
  if (dtype_number(tensor) != dtype_number(dtype)) {
    reject(op, ": ", name, ": found ", tensor.scalar_type(), ", expected ", dtype);
  }
  if (device_of(tensor) != device) {
    reject(op, ": ", name, ": found on ", text(device_of(tensor)), ", expected ", text(device));
  }
}

// The operand's dtype; throws unless it is one of the four that the kernels support.
inline ScalarType operand_type(const char* op, const char* name, const Tensor& tensor) {
  const std::int32_t number = dtype_number(tensor);
  for (const ScalarType type : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}) {
    if (number == dtype_number(type)) return type;
  }
  reject(op, ": ", name, ": found ", tensor.scalar_type(), ", expected float32, float64, bfloat16 or float16");
}

inline Scalar scalar_of(ScalarType operands) {
  switch (operands) {
    case ScalarType::Double:
      return Scalar::float64;
    case ScalarType::BFloat16:
      return Scalar::bfloat16;
    case ScalarType::Half:
      return Scalar::float16;
    default:
      return Scalar::float32;
  }
}

// Uninitialised contiguous tensor (torch.empty).
inline Tensor allocate(Shape shape, ScalarType dtype, const TensorDevice& device) {
  std::array<std::int64_t, 4> strides{};  // at most 4 dimensions
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides.at(i) = stride;
    stride *= std::max<std::int64_t>(shape[i], 1);
  }
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
                               dtype_number(dtype), device.type, device.index, &made) == TORCH_SUCCESS) {
    return Tensor(made);
  }
#if defined(__ELF__)
  if (torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
#endif
  // Before torch 2.13 the message is only printed to stderr. Running out of memory is the usual cause, so report that.
  const char* problem =
      device.is_cuda() ? "CUDA out of memory. Found no room on " : "can't allocate memory: found no room on ";
  throw std::runtime_error(problem + text(device) + " for a tensor of shape " + text(shape));
}

inline Tensor zeros(Shape shape, ScalarType dtype, const TensorDevice& device) {
  Tensor made = allocate(shape, dtype, device);
  return torch::stable::zero_(made);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : as_contiguous(tensor);
}

inline Tensor contiguous_copy(const Tensor& tensor) {
  return as_contiguous(torch::stable::clone(tensor));
}

}  // namespace pytbptt
