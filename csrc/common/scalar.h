// Element types that the kernels support.
#pragma once

namespace pytbptt {

enum class Scalar { float32, float64, bfloat16, float16 };

}  // namespace pytbptt
