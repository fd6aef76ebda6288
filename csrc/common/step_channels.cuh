// Four neighbouring channels of a decoding step, which a thread takes through the convolution, and four rows of the
// state with what they need beside it. All of it is loaded as bits and becomes numbers later.
#pragma once

#include "common/async_copies.cuh"
#include "common/conv1d.cuh"
#include "common/division.cuh"
#include "common/state_rows.cuh"

namespace hybrid_ops {

struct Mamba2StepParams {
  const void* zxbcdt;       // (batch, d_inner + conv_dim + nheads), unit stride in a row
  void* conv_state;         // (nslots, conv_dim, width - 1), conv_dim = d_inner + 2 ngroups dstate
  void* state;              // (nslots, nheads, headdim, dstate), rows of neighbours aligned to 16 bytes
  const void* conv_weight;  // (conv_dim, width), contiguous
  const void* conv_bias;    // (conv_dim,) or null
  const float* A;           // (nheads,)
  const void* D;            // (nheads, headdim) or null
  const void* dt_bias;      // (nheads,) or null
  const void* norm_weight;  // (d_inner,)
  const int* slots;         // (batch,) or null: slot b
  const int64* seed;        // of stochastic rounding
  void* y;                  // (batch, d_inner), unit stride in a row
  int64 zxbcdt_stride, y_stride, conv_slot_stride, state_slot_stride;
  int conv_channel_stride, conv_column_stride, state_head_stride, state_p_stride;
  int conv_bias_stride, A_stride, D_head_stride, D_p_stride, dt_bias_stride, norm_weight_stride, slots_stride;
  int nslots, nheads, headdim, conv_dim, width, null_slot;
  int group_size, rows, rows_per_group;  // of the norm; of a CTA; of B and C
  Divisor by_headdim, by_rows_per_group;
  float dt_min, dt_max, eps;
  DType dtype, conv_state_dtype, conv_weight_dtype, conv_bias_dtype, D_dtype, dt_bias_dtype, norm_weight_dtype;
  bool dt_softplus, norm_before_gate;
  // Not all CTAs begin at once: they ask for states when their windows have come, lest those of others hold them up,
  // and store windows as what leaves L2 first.
  bool crowded;
};

inline constexpr int kMaxWidth = 4, kColumns = kMaxWidth - 1, kChannels = 4;

// What the models have, and a cache as it is made: tensors of bfloat16, a convolution of width 4, no strides but of
// rows and slots, and four neighbours always in one aligned piece of memory.
__host__ __device__ __forceinline__ bool is_usual(const Mamba2StepParams& p, int dstate) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<unsigned long long>(pointer) % 8 == 0; };
  return p.dtype == DType::bfloat16 && p.conv_state_dtype == DType::bfloat16 &&
         p.conv_weight_dtype == DType::bfloat16 && p.conv_bias_dtype == DType::bfloat16 &&
         p.norm_weight_dtype == DType::bfloat16 && p.width == kMaxWidth && p.conv_bias != nullptr &&
         aligned(p.zxbcdt) && aligned(p.conv_state) && aligned(p.conv_bias) && aligned(p.norm_weight) && aligned(p.y) &&
         (p.zxbcdt_stride | p.conv_slot_stride | p.y_stride) % kChannels == 0 && p.conv_column_stride == 1 &&
         p.conv_channel_stride == kColumns && p.conv_bias_stride == 1 && p.norm_weight_stride == 1 &&
         p.D_p_stride == 0 && p.state_p_stride == dstate && p.state_head_stride == p.headdim * dstate;
}

__device__ __forceinline__ Mamba2StepParams as_usual(Mamba2StepParams p, int dstate) {
  p.dtype = p.conv_state_dtype = p.conv_weight_dtype = p.conv_bias_dtype = p.norm_weight_dtype = DType::bfloat16;
  p.width = kMaxWidth;
  p.conv_channel_stride = kColumns;
  p.conv_column_stride = p.conv_bias_stride = p.norm_weight_stride = 1;
  p.D_p_stride = 0;
  p.state_p_stride = dstate, p.state_head_stride = p.headdim * dstate;
  return p;
}

// kCount elements as bits, one to a word; usual ones two to a word, as in memory.
template <bool kUsual, int kCount>
struct Elements {
  unsigned words[kUsual ? kCount / 2 : kCount];

  __device__ __forceinline__ float at(int i, DType dtype) const {
    if constexpr (kUsual) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      return from_bits(words[i], dtype);
    }
  }

  __device__ __forceinline__ float4 all(DType dtype) const {
    static_assert(kCount == 4);
    return make_float4(at(0, dtype), at(1, dtype), at(2, dtype), at(3, dtype));
  }
};

// kCount neighbours, `stride` apart, from element i on.
template <bool kUsual, int kCount>
__device__ __forceinline__ void load_elements(const void* data, DType dtype, int64 i, int stride,
                                              Elements<kUsual, kCount>& e) {
  if constexpr (kUsual) {
#pragma unroll
    for (int w = 0; w < kCount / 2; w += 2) {
      asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
                   : "=r"(e.words[w]), "=r"(e.words[w + 1])
                   : "l"(static_cast<const unsigned short*>(data) + i + 2 * w)
                   : "memory");
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      e.words[k] = load_bits(data, dtype, i + static_cast<int64>(k) * stride, data != nullptr).bits();
    }
  }
}

// Of four channels: what does not depend on the slot. Taps lie at the end, so that the last is the new token's.
template <bool kUsual>
struct ChannelBits {
  Elements<kUsual, kChannels> x, bias;
  Elements<kUsual, kChannels * kMaxWidth> taps;

  __device__ __forceinline__ void load(const Mamba2StepParams& p, int64 xBC, int channel) {
    load_elements(p.zxbcdt, p.dtype, xBC + channel, 1, x);
    load_elements(p.conv_bias, p.conv_bias_dtype, static_cast<int64>(channel) * p.conv_bias_stride, p.conv_bias_stride,
                  bias);
    if constexpr (kUsual) {
      load_elements(p.conv_weight, p.conv_weight_dtype, static_cast<int64>(channel) * kMaxWidth, 1, taps);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels * kMaxWidth; ++i) {
        const int tap = i % kMaxWidth - (kMaxWidth - p.width);
        taps.words[i] = load_bits(p.conv_weight, p.conv_weight_dtype,
                                  static_cast<int64>(channel + i / kMaxWidth) * p.width + tap, tap >= 0)
                            .bits();
      }
    }
  }

  // A bit of each load.
  __device__ __forceinline__ unsigned any() const {
    unsigned bits = 0;
    constexpr int kStep = kUsual ? 2 : 1;
#pragma unroll
    for (int i = 0; i < (kUsual ? kChannels / 2 : kChannels); i += kStep) bits ^= x.words[i] ^ bias.words[i];
#pragma unroll
    for (int i = 0; i < kChannels * kMaxWidth / kStep; i += kStep) bits ^= taps.words[i];
    return bits;
  }
};

template <bool kUsual>
__device__ __forceinline__ float activate(float x) {
  return kUsual ? silu_close(x) : silu(x);
}

// Of four rows: z and the weights of the skip and of the norm.
template <bool kUsual>
struct FeatureBits {
  Elements<kUsual, kChannels> z, weight;
  Element D[kChannels];

  __device__ __forceinline__ void load(const Mamba2StepParams& p, int64 token, int feature) {
    const int head = p.by_headdim.of(feature);
    load_elements(p.zxbcdt, p.dtype, token + feature, 1, z);
    load_elements(p.norm_weight, p.norm_weight_dtype, static_cast<int64>(feature) * p.norm_weight_stride,
                  p.norm_weight_stride, weight);
    const int64 first =
        static_cast<int64>(head) * p.D_head_stride + static_cast<int64>(feature - head * p.headdim) * p.D_p_stride;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      D[i] = i > 0 && p.D_p_stride == 0
                 ? D[0]
                 : load_bits(p.D, p.D_dtype, first + static_cast<int64>(i) * p.D_p_stride, p.D != nullptr);
    }
  }

  __device__ __forceinline__ float4 skip(const Mamba2StepParams& p, float4 x) const {
    const auto weight = [&](int i) { return from_bits(D[i], p.D_dtype); };
    return make_float4(weight(0) * x.x, weight(1) * x.y, weight(2) * x.z, weight(3) * x.w);
  }

  __device__ __forceinline__ float4 gate(const Mamba2StepParams& p) const {
    const float4 v = z.all(p.dtype);
    return make_float4(activate<kUsual>(v.x), activate<kUsual>(v.y), activate<kUsual>(v.z), activate<kUsual>(v.w));
  }

  __device__ __forceinline__ unsigned any() const {
    unsigned bits = z.words[0] ^ weight.words[0] ^ D[0].bits();
    if constexpr (!kUsual) {
#pragma unroll
      for (int i = 1; i < kChannels; ++i) bits ^= z.words[i] ^ weight.words[i] ^ D[i].bits();
    }
    return bits;
  }
};

// The columns that the tokens of four channels see, channel by channel; usual ones as memory has them, others as
// float32 with zeros before the first. In shared memory their pieces lie `step` apart, so that neighbouring threads
// have neighbouring ones.
template <bool kUsual>
struct Windows {
  static constexpr int kElements = kChannels * kColumns, kWords = kUsual ? kElements / 2 : kElements;
  Elements<kUsual, kElements> columns;

  // From element `first` of the pool to shared memory, usual ones under way.
  static __device__ __forceinline__ void fetch(const Mamba2StepParams& p, int64 first, unsigned* place, int step) {
    if constexpr (kUsual) {
#pragma unroll
      for (int w = 0; w < kWords; w += 2) {
        copy_async<8>(place + w * step, static_cast<const unsigned short*>(p.conv_state) + first + 2 * w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const bool present = i % kColumns >= kMaxWidth - p.width;
        const Element e = load_bits(p.conv_state, p.conv_state_dtype, offset(p, first, i), present);
        place[i / 2 * 2 * step + i % 2] = __float_as_uint(from_bits(e, p.conv_state_dtype));
      }
    }
  }

  __device__ __forceinline__ void take(const unsigned* place, int step) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(place + w * step);
      columns.words[w] = two.x, columns.words[w + 1] = two.y;
    }
  }

  __device__ __forceinline__ void put(unsigned* place, int step) const {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      *reinterpret_cast<uint2*>(place + w * step) = make_uint2(columns.words[w], columns.words[w + 1]);
    }
  }

  // Without the oldest columns, and with the tokens.
  __device__ __forceinline__ Windows moved_on(const Mamba2StepParams& p, const Elements<kUsual, kChannels>& x) const {
    Windows moved;
    if constexpr (kUsual) {
      const auto half = [&](int i, unsigned& word) {  // of the element that element i becomes, and its word
        const bool is_new = i % kColumns == kColumns - 1;
        const int source = is_new ? i / kColumns : i + 1;
        word = is_new ? x.words[source / 2] : columns.words[source / 2];
        return source % 2;
      };
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        unsigned low, high;
        const unsigned of_low = half(2 * w, low) != 0 ? 0x0032 : 0x0010;
        const unsigned of_high = half(2 * w + 1, high) != 0 ? 0x7600 : 0x5400;
        moved.columns.words[w] = __byte_perm(low, high, of_high | of_low);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        moved.columns.words[i] =
            i % kColumns < kColumns - 1 ? columns.words[i + 1] : __float_as_uint(x.at(i / kColumns, p.dtype));
      }
    }
    return moved;
  }

  // To where they came from.
  __device__ __forceinline__ void store(const Mamba2StepParams& p, int64 first) const {
    if constexpr (kUsual) {
#pragma unroll
      for (int w = 0; w < kWords; w += 2) {
        store_vector(static_cast<unsigned short*>(p.conv_state) + first + 2 * w,
                     make_uint2(columns.words[w], columns.words[w + 1]), p.crowded);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (i % kColumns < kMaxWidth - p.width) continue;
        store_float(p.conv_state, p.conv_state_dtype, offset(p, first, i), __uint_as_float(columns.words[i]));
      }
    }
  }

 private:
  static __device__ __forceinline__ int64 offset(const Mamba2StepParams& p, int64 first, int i) {
    return first + static_cast<int64>(i / kColumns) * p.conv_channel_stride +
           static_cast<int64>(i % kColumns - (kMaxWidth - p.width)) * p.conv_column_stride;
  }
};

// The convolution of four channels and its activation.
template <bool kUsual>
__device__ __forceinline__ float4 convolve(const Mamba2StepParams& p, const ChannelBits<kUsual>& bits,
                                           const Windows<kUsual>& windows) {
  float values[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    values[c] = activate<kUsual>(window_sum<float, kMaxWidth>(
        bits.bias.at(c, p.conv_bias_dtype), [&](int k) { return bits.taps.at(c * kMaxWidth + k, p.conv_weight_dtype); },
        [&](int k) {
          return k == kColumns ? bits.x.at(c, p.dtype) : windows.columns.at(c * kColumns + k, DType::float32);
        }));
  }
  return make_float4(values[0], values[1], values[2], values[3]);
}

}  // namespace hybrid_ops
