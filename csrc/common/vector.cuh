// A few neighbouring elements of a tensor at a time, as float32 in registers. Free of host headers: NVRTC compiles it
// too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hybrid_ops {

using int64 = long long;  // <cstdint> is a host header

inline constexpr int kPerVector = 4;

template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<4> {
  using type = unsigned;
};
template <>
struct WordsOf<8> {
  using type = uint2;
};
template <>
struct WordsOf<16> {
  using type = uint4;
};
// The bits of four elements, or of two, or of eight of 16 bits: 4 bytes to 16.
template <typename T, int kCount = kPerVector>
using Vector = typename WordsOf<kCount * sizeof(T)>::type;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& raw, float (&values)[kPerVector]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kPerVector; ++i) values[i] = to_float(elements[i]);
}

// A bfloat16 is the upper half of a float32: one instruction a value.
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(const uint2& raw, float (&values)[kPerVector]) {
  values[0] = __uint_as_float(raw.x << 16);
  values[1] = __uint_as_float(raw.x & 0xffff0000u);
  values[2] = __uint_as_float(raw.y << 16);
  values[3] = __uint_as_float(raw.y & 0xffff0000u);
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T, 8>& raw, float (&values)[8]) {
  unpack<T>(make_uint2(raw.x, raw.y), reinterpret_cast<float (&)[4]>(values[0]));
  unpack<T>(make_uint2(raw.z, raw.w), reinterpret_cast<float (&)[4]>(values[4]));
}

// A vector to global memory by one instruction: one that was made of words and is assigned through a pointer, LLVM
// stores word by word.
__device__ __forceinline__ void store_vector(void* place, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(place), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_vector(void* place, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// The same; with `streaming` as what leaves L2 first.
__device__ __forceinline__ void store_vector(void* place, const uint2& v, bool streaming) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.cs.v2.u32 [%0], {%1, %2}; @!p st.global.v2.u32 [%0], {%1, "
      "%2};}" ::"l"(place),
      "r"(v.x), "r"(v.y), "r"(unsigned(streaming))
      : "memory");
}
__device__ __forceinline__ void store_vector(void* place, const uint4& v, bool streaming) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4}; @!p st.global.v4.u32 [%0], "
      "{%1, %2, %3, %4};}" ::"l"(place),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(unsigned(streaming))
      : "memory");
}

// One rounding to nearest per value, two values per instruction.
template <typename T>
__device__ __forceinline__ Vector<T> pack(const float (&values)[kPerVector]);

template <>
__device__ __forceinline__ uint4 pack<float>(const float (&v)[kPerVector]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

template <>
__device__ __forceinline__ uint2 pack<__nv_bfloat16>(const float (&v)[kPerVector]) {
  uint2 raw;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&raw);
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
  return raw;
}

template <>
__device__ __forceinline__ uint2 pack<__half>(const float (&v)[kPerVector]) {
  uint2 raw;
  __half2* pairs = reinterpret_cast<__half2*>(&raw);
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  return raw;
}

template <typename T>
__device__ __forceinline__ Vector<T, 8> pack(const float (&v)[8]) {
  const uint2 low = pack<T>(reinterpret_cast<const float (&)[4]>(v[0]));
  const uint2 high = pack<T>(reinterpret_cast<const float (&)[4]>(v[4]));
  return make_uint4(low.x, low.y, high.x, high.y);
}

// Read once, by this kernel alone: past L1, through the read-only path. Predicated, as load_words_if below; what is not
// loaded stays as it is.
__device__ __forceinline__ void load_once_if(bool condition, const void* pointer, uint2& v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];}"
               : "+r"(v.x), "+r"(v.y)
               : "l"(pointer), "r"(unsigned(condition)));
}
__device__ __forceinline__ void load_once_if(bool condition, const void* pointer, uint4& v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(pointer), "r"(unsigned(condition)));
}

// Elements one behind the other in registers, a whole number of 32-bit words. Element i, which is known at compile
// time:
template <typename T>
__device__ __forceinline__ float element(const unsigned* words, int i);
template <>
__device__ __forceinline__ float element<float>(const unsigned* words, int i) {
  return __uint_as_float(words[i]);
}
template <>
__device__ __forceinline__ float element<__nv_bfloat16>(const unsigned* words, int i) {
  return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
template <>
__device__ __forceinline__ float element<__half>(const unsigned* words, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))));
}

// Elements 2 j and 2 j + 1.
template <typename T>
__device__ __forceinline__ void set_pair(unsigned* words, int j, float first, float second);
template <>
__device__ __forceinline__ void set_pair<float>(unsigned* words, int j, float first, float second) {
  words[2 * j] = __float_as_uint(first), words[2 * j + 1] = __float_as_uint(second);
}
template <>
__device__ __forceinline__ void set_pair<__nv_bfloat16>(unsigned* words, int j, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  words[j] = reinterpret_cast<const unsigned&>(pair);
}
template <>
__device__ __forceinline__ void set_pair<__half>(unsigned* words, int j, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  words[j] = reinterpret_cast<const unsigned&>(pair);
}

// 8 bytes or 16, by way of L1, for a neighbour that reads them too; words that are not loaded stay as they are.
// Predicated instructions: a branch would keep what lies before it from overlapping with what lies behind. Not by the
// read-only path: the compiler would move such a load behind a search that it is to overlap with.
__device__ __forceinline__ void load_words_if(bool condition, const void* pointer, unsigned (&words)[2]) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.v2.u32 {%0, %1}, [%2];}"
               : "+r"(words[0]), "+r"(words[1])
               : "l"(pointer), "r"(unsigned(condition)));
}
__device__ __forceinline__ void load_words_if(bool condition, const void* pointer, unsigned (&words)[4]) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
               : "l"(pointer), "r"(unsigned(condition)));
}
// kStreaming: the first to leave L2.
template <bool kStreaming = false>
__device__ __forceinline__ void store_words_if(bool condition, void* pointer, const unsigned (&words)[1]) {
  static_assert(kStreaming);
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.cs.u32 [%0], %1;}" ::"l"(pointer), "r"(words[0]),
               "r"(unsigned(condition))
               : "memory");
}
template <bool kStreaming = false>
__device__ __forceinline__ void store_words_if(bool condition, void* pointer, const unsigned (&words)[2]) {
  if constexpr (kStreaming) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.cs.v2.u32 [%0], {%1, %2};}" ::"l"(pointer),
                 "r"(words[0]), "r"(words[1]), "r"(unsigned(condition))
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(pointer),
                 "r"(words[0]), "r"(words[1]), "r"(unsigned(condition))
                 : "memory");
  }
}
__device__ __forceinline__ void store_words_if(bool condition, void* pointer, const unsigned (&words)[4]) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(pointer),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(unsigned(condition))
               : "memory");
}

}  // namespace hybrid_ops
