// Sixteen bytes of a tensor at a time, as float32 in registers. Free of host headers: NVRTC compiles it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hybrid_ops {

using int64 = long long;  // <cstdint> is a host header

// Elements of type T in one 16-byte access.
template <typename T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[kPerVector<T>]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) values[i] = to_float(elements[i]);
}

// One rounding to nearest per value, two values per instruction.
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kPerVector<T>]);

template <>
__device__ __forceinline__ uint4 pack<float>(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

template <>
__device__ __forceinline__ uint4 pack<__nv_bfloat16>(const float (&v)[8]) {
  uint4 raw;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
  return raw;
}

template <>
__device__ __forceinline__ uint4 pack<__half>(const float (&v)[8]) {
  uint4 raw;
  __half2* pairs = reinterpret_cast<__half2*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  return raw;
}

// Read once, by this kernel alone: past L1, through the read-only path.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* pointer) {
  uint4 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(pointer));
  return raw;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* pointer, const uint4& raw) {
  *reinterpret_cast<uint4*>(pointer) = raw;
}

}  // namespace hybrid_ops
