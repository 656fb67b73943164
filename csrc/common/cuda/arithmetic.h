// How a kernel multiplies, for code that is compiled without nvcc too.
#pragma once

namespace pytbptt::cuda {

// float32 multiplies and adds as written; tf32 reads the same tensors and rounds the factors to 10 bits.
enum class Arithmetic { float16, bfloat16, float32, tf32 };

}  // namespace pytbptt::cuda
