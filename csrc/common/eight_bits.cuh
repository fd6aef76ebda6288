// Rows of 8-bit codes with a float32 scale: the order of operations of reference/quant_fp8.py, so its bytes.
#pragma once

#include <cuda_fp16.h>

namespace hybrid_ops {

// Tags of what a byte is.
struct E4m3 {
  unsigned char code;
};
struct Int8 {
  signed char code;
};

template <typename T>
struct EightBits;

inline constexpr float kFloatMax = 3.402823466e38f;

// largest / amax, which a row is multiplied by before it is rounded, and the scale to be stored.
__device__ __forceinline__ float row_multiplier(float amax, float largest, float& scale) {
  const float s = amax > 0.f && amax <= kFloatMax ? fminf(__fdiv_rn(largest, amax), kFloatMax) : 1.f;
  scale = __frcp_rn(s);
  return s;
}

template <>
struct EightBits<E4m3> {
  static __device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }  // without NaN

  static __device__ __forceinline__ float multiplier(float amax, float& scale) {
    return row_multiplier(amax, 448.f, scale);
  }

  static __device__ __forceinline__ void unpack(unsigned word, float* values) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned short pair = static_cast<unsigned short>(word >> 16 * i);
      __half2 halves;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(*reinterpret_cast<unsigned*>(&halves)) : "h"(pair));
      const float2 two = __half22float2(halves);
      values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
  }

  static __device__ __forceinline__ unsigned pack(const float* v) {
    unsigned short low, high;  // infinity saturates, NaN stays
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
    return low | static_cast<unsigned>(high) << 16;
  }
};

template <>
struct EightBits<Int8> {
  static __device__ __forceinline__ float max(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
  }

  // There is no code for NaN: the scale takes it.
  static __device__ __forceinline__ float multiplier(float amax, float& scale) {
    const float s = row_multiplier(amax, 127.f, scale);
    if (amax != amax) scale = amax;
    return s;
  }

  // 2^23 + code + 128, byte by byte, is a pattern.
  static __device__ __forceinline__ void unpack(unsigned word, float* values) {
    const unsigned offset = word ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = __uint_as_float(__byte_perm(offset, 0x4b000000u, 0x7440 + i)) - (8388608.f + 128.f);
    }
  }

  // 1.5 * 2^23 + v has v, rounded to nearest even, in its last bits.
  static __device__ __forceinline__ unsigned pack(const float* v) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(__fadd_rn(fminf(fmaxf(v[i], -127.f), 127.f), 12582912.f));
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040), __byte_perm(words[2], words[3], 0x0040), 0x5410);
  }
};

}  // namespace hybrid_ops
