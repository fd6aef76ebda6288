// Exponentials by the special function units: one instruction each, subnormals are zeros. Errors are 2^-22 or so, which
// 16-bit results do not show. Where float32 is the result, the exact functions are right.
#pragma once

namespace hybrid_ops {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + exp(-x)) for a result of type T: of 16 bits the two fast instructions, which are as many as a stream has
// room for.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.f + exp2_fast(x * -1.4426950408889634f)));
    return result;
  } else {
    return 1.f / (1.f + expf(-x));
  }
}

// To a few units in the last place of float32, and no branch; 0 below -87.
__device__ __forceinline__ float silu_close(float x) { return __fdividef(x, 1.f + expf(-x)); }

// To float32's precision.
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

}  // namespace hybrid_ops
