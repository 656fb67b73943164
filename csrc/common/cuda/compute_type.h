// The types that kernels compute products in; also used by code that is compiled without nvcc.
#pragma once

namespace pytbptt::cuda {

// float32: float32 multiply-adds. tf32: float32 tensors, factors rounded to TF32 (10 bits of mantissa).
enum class ComputeType { float16, bfloat16, float32, tf32 };

}  // namespace pytbptt::cuda
