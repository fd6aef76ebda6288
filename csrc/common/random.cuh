// Random bits, and float32 rounded with them to 16-bit numbers: the bits that triton_kernels/ssd_update.py and
// hybrid_ops/_torch/ssd_update.py make.
#pragma once

#include "common/vector.cuh"

namespace hybrid_ops {

// By the assembler: where the compiler knows how a factor came about, it multiplies 64 bits by 64.
__device__ __forceinline__ uint2 multiply_wide(unsigned a, unsigned b) {
  uint2 product;
  asm("{.reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p;}"
      : "=r"(product.x), "=r"(product.y)
      : "r"(a), "r"(b));
  return product;
}

// Philox4x32-10, Salmon et al. 2011, of kCount blocks, which have the keys of each round in common.
template <int kCount>
__device__ __forceinline__ void philox(int64 seed, const int64 (&blocks)[kCount], int t, uint4 (&bits)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bits[i] = make_uint4(static_cast<unsigned>(blocks[i]), static_cast<unsigned>(blocks[i] >> 32), t, 0);
  }
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint4& c = bits[i];
      const uint2 p0 = multiply_wide(c.x, 0xD2511F53u);
      // of the first token's 0 the compiler knows the product
      const uint2 p1 = round == 0 && t == 0 ? make_uint2(0, 0) : multiply_wide(c.z, 0xCD9E8D57u);
      c = make_uint4(p1.y ^ c.y ^ k0, p1.x, p0.y ^ c.w ^ k1, p0.x);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

__device__ __forceinline__ uint4 philox(int64 seed, int64 block, int t) {
  uint4 bits[1];
  philox<1>(seed, {block}, t, bits);
  return bits[0];
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// |v| goes to floor(|v| + bits * 2^-16 * step) on the grid of T, saturating; NaN stays NaN, and zero keeps its sign.
// A sum of integers and a truncation are all there is to most values: `usual` says whether they were to eight of them.
template <typename T>
struct Stochastic;

template <>
struct Stochastic<__nv_bfloat16> {
  static constexpr float kLargest = 3.38953138925153547590e38f;  // 0x7f7f0000

  static __device__ __forceinline__ bool usual(const float* v, const uint4&) {
    float largest = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) largest = max_or_nan(largest, fabsf(v[i]));
    return largest <= kLargest;
  }

  // Two values, and two times 16 bits; the result as two patterns.
  static __device__ __forceinline__ unsigned round_usual(float low, float high, unsigned bits) {
    // the pattern of a float32 is that of a bfloat16 with 16 more bits behind the point: carries do the rest
    return __byte_perm(__float_as_uint(low) + (bits & 0xffff), __float_as_uint(high) + (bits >> 16), 0x7632);
  }

  static __device__ __forceinline__ unsigned round(float low, float high, unsigned bits) {
    const unsigned rounded = round_usual(clamp(low), clamp(high), bits);
    return (low == low ? rounded & 0xffff : 0x7fc0) | (high == high ? rounded & 0xffff0000 : 0x7fc00000);
  }

  static __device__ __forceinline__ float clamp(float v) { return fminf(fmaxf(v, -kLargest), kLargest); }
};

template <>
struct Stochastic<__half> {
  static constexpr float kLargest = 65504.f, kNormal = 0x1p-14f;

  // Results tell, and are half as many registers. One that is larger than the smallest normal number and smaller than
  // the largest is of such a value: what is not, or NaN, comes to 0, to either of them, to infinity or to NaN.
  static __device__ __forceinline__ bool usual(const float*, const uint4& rounded) {
    const auto pair = [](unsigned word) { return __habs2(reinterpret_cast<const __half2&>(word)); };
    const __half2 a = pair(rounded.x), b = pair(rounded.y), c = pair(rounded.z), d = pair(rounded.w);
    const __half2 smallest = __hmin2(__hmin2(a, b), __hmin2(c, d));
    const __half2 largest = __hmax2_nan(__hmax2_nan(a, b), __hmax2_nan(c, d));
    int usual;  // of both halves, and no branch between
    asm("{\n.reg .pred p, q;\nsetp.gt.f16x2 p|q, %1, %2;\nand.pred p, p, q;\n"
        "setp.lt.and.f16x2 p|q, %3, %4, p;\nand.pred p, p, q;\nselp.s32 %0, 1, 0, p;\n}"
        : "=r"(usual)
        : "r"(bits_of(smallest)), "r"(bits_of(__float2half2_rn(kNormal))), "r"(bits_of(largest)),
          "r"(bits_of(__float2half2_rn(kLargest))));
    return usual;
  }

  static __device__ __forceinline__ unsigned bits_of(const __half2& pair) {
    return reinterpret_cast<const unsigned&>(pair);
  }

  // float32 has 13 more bits behind the point than a normal float16; the last three of the 16 would meet zeros.
  static __device__ __forceinline__ unsigned round_usual(float low, float high, unsigned bits) {
    unsigned first;  // by the assembler: with >> 19 and + it is two instructions, of which the compiler makes three
    asm("shl.b32 %0, %1, 16;" : "=r"(first) : "r"(bits));
    return truncate(__uint_as_float(__float_as_uint(low) + (first >> 19)),
                    __uint_as_float(__float_as_uint(high) + (bits >> 19)));
  }

  static __device__ __forceinline__ unsigned round(float low, float high, unsigned bits) {
    return truncate(add(low, bits & 0xffff), add(high, bits >> 16));
  }

  // v moved away from zero by `bits`, which a truncation completes.
  static __device__ __forceinline__ float add(float v, unsigned bits) {
    v = min_or_nan(max_or_nan(v, -kLargest), kLargest);
    if (fabsf(v) >= kNormal) return __uint_as_float(__float_as_uint(v) + (bits >> 3));
    // below, and for NaN: the grid is even, steps of 2^-24. 2^-17 + bits 2^-40 is a pattern; the sum is truncated too
    const float step = __uint_as_float(0x37000000u | bits) - 0x1p-17f;
    return copysignf(__fadd_rz(fabsf(v), step), v);
  }

  static __device__ __forceinline__ unsigned truncate(float low, float high) {
    unsigned packed;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
};

// Eight neighbours with the bits of their block.
template <typename T>
__device__ __forceinline__ uint4 round_stochastic(const float* v, uint4 bits) {
  using S = Stochastic<T>;
  const uint4 rounded = make_uint4(S::round_usual(v[0], v[1], bits.x), S::round_usual(v[2], v[3], bits.y),
                                   S::round_usual(v[4], v[5], bits.z), S::round_usual(v[6], v[7], bits.w));
  if (S::usual(v, rounded)) return rounded;
  return make_uint4(S::round(v[0], v[1], bits.x), S::round(v[2], v[3], bits.y), S::round(v[4], v[5], bits.z),
                    S::round(v[6], v[7], bits.w));
}

}  // namespace hybrid_ops
