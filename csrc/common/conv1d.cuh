// What both directions of the causal conv1d share: which tokens are a sequence, its parameters and its history.
#pragma once

#include "common/exponential.cuh"
#include "common/vector.cuh"

namespace hybrid_ops {

inline constexpr int kConvThreads = 128;

// Tokens [begin, end) of a batch row; index -1 where they belong to no sequence: all of them are zeros then.
struct Sequence {
  int index, begin, end;
};

// What holds `token` of a packed row. Boundaries may be anything: what comes out lies within the row.
__device__ __forceinline__ Sequence find_sequence(const int* cu_seqlens, int nseq, int seqlen, int token) {
  int low = 0, high = nseq + 1;  // boundaries 0..low-1 are <= token
  while (low < high) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int begin = low == 0 ? 0 : max(cu_seqlens[low - 1], 0);
  const int end = low > nseq ? seqlen : min(cu_seqlens[low], seqlen);
  return {low > nseq ? -1 : low - 1, begin, end};
}

template <typename T>
__device__ __forceinline__ float load_parameter(const void* parameter, bool is_fp32, int64 index) {
  return is_fp32 ? static_cast<const float*>(parameter)[index] : to_float(static_cast<const T*>(parameter)[index]);
}

template <typename T>
__device__ __forceinline__ void store_parameter(void* parameter, bool is_fp32, int64 index, float value) {
  if (is_fp32) {
    static_cast<float*>(parameter)[index] = value;
  } else {
    static_cast<T*>(parameter)[index] = T(value);
  }
}

// weight[channel..][:] as float32: kWidth vectors, for a thread's channels are neighbours in memory.
template <typename Stored, int kWidth>
__device__ __forceinline__ void load_weight(const void* weight, int channel, float (&w)[kWidth][kPerVector]) {
  const Stored* source = static_cast<const Stored*>(weight) + static_cast<int64>(channel) * kWidth;
#pragma unroll
  for (int i = 0; i < kPerVector * kWidth; i += kPerVector) {
    float values[kPerVector];
    unpack<Stored>(__ldg(reinterpret_cast<const Vector<Stored>*>(source + i)), values);
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) w[(i + j) % kWidth][(i + j) / kWidth] = values[j];
  }
}

// Weights and biases of the four channels from `channel` on.
template <typename T, int kWidth>
__device__ __forceinline__ void load_parameters(const void* weight, bool weight_fp32, const void* bias, bool bias_fp32,
                                                int channel, float (&w)[kWidth][kPerVector], float (&b)[kPerVector]) {
  if (weight_fp32) {
    load_weight<float, kWidth>(weight, channel, w);
  } else {
    load_weight<T, kWidth>(weight, channel, w);
  }
#pragma unroll
  for (int c = 0; c < kPerVector; ++c) {
    b[c] = bias == nullptr ? 0.f : load_parameter<T>(bias, bias_fp32, channel + c);
  }
}

// bias + sum_k weight(k) input(k). A bias may be larger than the result, and each partial sum that has it in it is
// rounded at its scale: in float32, where that shows, it comes last; else first, which saves an instruction.
template <typename T, int kWidth, typename Weight, typename Input>
__device__ __forceinline__ float window_sum(float bias, Weight weight, Input input) {
  constexpr bool kBiasFirst = sizeof(T) == 2;
  float sum = kBiasFirst ? bias : 0.f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum = fmaf(weight(k), input(k), sum);
  return kBiasFirst ? sum : sum + bias;
}

}  // namespace hybrid_ops
