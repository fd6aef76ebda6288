// The dtypes of tensors, as every side knows them: bindings, launchers and kernels. Free of other headers.
#pragma once

namespace hybrid_ops {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float8_e4m3 = 3, int8 = 4 };

}  // namespace hybrid_ops
