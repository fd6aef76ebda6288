// Elements of tensors whose dtype is known at run time only. They are loaded as bits and become numbers later: a
// conversion beside the load would wait for it before the next load is under way.
#pragma once

#include "common/dtype.h"
#include "common/vector.cuh"

namespace hybrid_ops {

// The bits of an element that has been, or is being, loaded: one of the two, the other is 0. Two registers, for of two
// loads into one, whichever of them is predicated off, the second waits until the first has arrived.
struct Element {
  unsigned wide, narrow;

  __device__ __forceinline__ unsigned bits() const { return wide | narrow; }
  __device__ __forceinline__ Element merged() const { return {bits(), 0}; }  // of one register; waits
};

// Element i; 0 where it is not present.
__device__ __forceinline__ Element load_bits(const void* data, DType dtype, int64 i, bool present = true) {
  const bool is_wide = dtype == DType::float32;
  Element e;
  asm volatile(
      "{\n.reg .pred wide, narrow;\nsetp.ne.b32 wide, %4, 0;\nsetp.ne.b32 narrow, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@wide ld.global.b32 %0, [%2];\n@narrow ld.global.u16 %1, [%3];\n}"
      : "=&r"(e.wide), "=&r"(e.narrow)
      : "l"(static_cast<const unsigned*>(data) + i), "l"(static_cast<const unsigned short*>(data) + i),
        "r"(static_cast<int>(present && is_wide)), "r"(static_cast<int>(present && !is_wide))
      : "memory");
  return e;
}

// Into the L2 cache.
__device__ __forceinline__ void prefetch_bits(const void* data, DType dtype, int64 i) {
  const int64 place = i * (dtype == DType::float32 ? 4 : 2);
  asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const unsigned char*>(data) + place));
}

__device__ __forceinline__ float from_bits(unsigned bits, DType dtype) {
  const float narrow = dtype == DType::bfloat16 ? __uint_as_float(bits << 16)
                                                : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return dtype == DType::float32 ? __uint_as_float(bits) : narrow;
}

__device__ __forceinline__ float from_bits(Element e, DType dtype) { return from_bits(e.bits(), dtype); }

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64 i) {
  return from_bits(load_bits(data, dtype, i), dtype);
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64 i, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<unsigned short*>(data)[i] = dtype == DType::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                                                     : __half_as_ushort(__float2half_rn(value));
  }
}

// kCount elements; where load_runs found them aligned and of 16 bits, the first two of each four words are four of
// them.
template <int kCount>
struct Bits {
  unsigned words[kCount];
};

// Runs of kRun elements, a multiple of four, that begin kStep apart, the first one at element `first` of a row. The row
// begins at `base`, its elements are `stride` apart. `aligned`: neighbours in memory, each four of them aligned.
template <int kCount, int kRun, int kStep>
__device__ __forceinline__ void load_runs(const void* data, DType dtype, int64 base, int first, int64 stride,
                                          bool aligned, Bits<kCount>& bits) {
  base += first * stride;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits.words[i] = load_bits(data, dtype, base + (i / kRun * kStep + i % kRun) * stride).bits();
    }
    return;
  }
  const bool wide = dtype == DType::float32;
#pragma unroll
  for (int i = 0; i < kCount; i += kPerVector) {
    const int64 source = (base + i / kRun * kStep + i % kRun) * (wide ? 4 : 2);  // bytes
    const uint2* const pairs = reinterpret_cast<const uint2*>(static_cast<const unsigned char*>(data) + source);
    const uint2 pair = __ldg(pairs);
    bits.words[i] = pair.x, bits.words[i + 1] = pair.y;
    if (wide) {
      const uint2 second = __ldg(pairs + 1);
      bits.words[i + 2] = second.x, bits.words[i + 3] = second.y;
    }
  }
}

// What load_runs has loaded.
template <int kCount>
__device__ __forceinline__ void runs_to_float(const Bits<kCount>& bits, DType dtype, bool aligned,
                                              float (&values)[kCount]) {
  if (!aligned || dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from_bits(bits.words[i], dtype);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned word = bits.words[i / kPerVector * kPerVector + i % kPerVector / 2];
    values[i] = from_bits(i % 2 == 0 ? word & 0xffff : word >> 16, dtype);
  }
}

// kCount neighbours, a multiple of four, as bits: of elements of kItem bytes, packed as in memory.
template <int kItem, int kCount>
struct alignas(4 * kItem) Packed {
  unsigned words[kItem * kCount / 4];
};

// From element `first` on, `stride` apart. `aligned`: neighbours in memory, each four of them aligned.
template <int kItem, int kCount>
__device__ __forceinline__ void load_packed(const void* data, int64 first, int64 stride, bool aligned,
                                            Packed<kItem, kCount>& packed) {
  if (aligned) {
    const unsigned char* const source = static_cast<const unsigned char*>(data) + kItem * first;
#pragma unroll
    for (int i = 0; i < kItem * kCount / 4; i += kItem) {  // an instruction for four elements
      if constexpr (kItem == 4) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(source + 4 * i));
        packed.words[i] = four.x, packed.words[i + 1] = four.y;
        packed.words[i + 2] = four.z, packed.words[i + 3] = four.w;
      } else {
        const uint2 four = __ldg(reinterpret_cast<const uint2*>(source + 4 * i));
        packed.words[i] = four.x, packed.words[i + 1] = four.y;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kItem == 4) {
      packed.words[i] = static_cast<const unsigned*>(data)[first + i * stride];
    } else {
      const unsigned element = static_cast<const unsigned short*>(data)[first + i * stride];
      packed.words[i / 2] = i % 2 == 0 ? element : packed.words[i / 2] | element << 16;
    }
  }
}

// To an aligned place.
template <int kItem, int kCount>
__device__ __forceinline__ void store_packed(void* data, int64 first, const Packed<kItem, kCount>& packed) {
  unsigned char* const target = static_cast<unsigned char*>(data) + kItem * first;
#pragma unroll
  for (int i = 0; i < kItem * kCount / 4; i += kItem) {
    const unsigned* const w = packed.words + i;
    if constexpr (kItem == 4) {
      *reinterpret_cast<uint4*>(target + 4 * i) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
      *reinterpret_cast<uint2*>(target + 4 * i) = make_uint2(w[0], w[1]);
    }
  }
}

template <int kItem, int kCount>
__device__ __forceinline__ void packed_to_float(const Packed<kItem, kCount>& packed, DType dtype, float* values) {
  if constexpr (kItem == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(packed.words[i]);
  } else if (dtype == DType::bfloat16) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      values[i] = __uint_as_float(packed.words[i / 2] << 16);
      values[i + 1] = __uint_as_float(packed.words[i / 2] & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = from_bits(packed.words[i / 2] >> i % 2 * 16 & 0xffff, DType::float16);
    }
  }
}

}  // namespace hybrid_ops
