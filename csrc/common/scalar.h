// The types of the tensors that kernels are given.
#pragma once

namespace pytbptt {

enum class Scalar { float32, float64, bfloat16, float16 };

}  // namespace pytbptt
