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

// What holds `token` of a packed row. A whole warp asks for the same token: its lanes test 32 boundaries at once, so 31
// sequences take one look at memory and 1023 two. Boundaries may be anything: what comes out lies within the row and
// holds the token.
__device__ __forceinline__ Sequence find_sequence(const int* cu_seqlens, int nseq, int seqlen, int token) {
  int low = 0, high = nseq + 1;  // boundaries 0..low-1 are <= token, those from high on are not
  while (low < high) {
    const int count = high - low, step = (count + 31) / 32;
    const int probe = low + min((static_cast<int>(threadIdx.x % 32) + 1) * step, count) - 1;
    const unsigned behind = __ballot_sync(~0u, __ldg(cu_seqlens + probe) > token);
    const int passed = __clz(__brev(behind));  // the probes up to the first that is not <= token; 32 where all are
    high = low + min((passed + 1) * step, count) - 1;
    low += min(passed * step, count);
  }
  const int begin = low == 0 ? 0 : max(__ldg(cu_seqlens + low - 1), 0);
  const int end = low > nseq ? seqlen : min(__ldg(cu_seqlens + low), seqlen);
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

// The same for whole sequences: in registers as they lie in memory, half of what they are as float32. Parameters of
// float32 beside 16-bit inputs stay in L1, and are read where they are needed.
template <typename T, int kWidth, int kChannels>
struct Parameters {
  static constexpr int kWords = kChannels * sizeof(T) / 4;

  unsigned weight[kWidth][kWords] = {}, bias[kWords] = {};  // (channel, tap), as vectors; (channel)

  template <typename Params>
  __device__ __forceinline__ void load(const Params& p, int channel) {
    const T* source = static_cast<const T*>(p.weight) + static_cast<int64>(channel) * kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) load_words_if(sizeof(T) == 4 || !p.weight_fp32, source + i * kChannels, weight[i]);
    load_words_if(p.bias != nullptr && (sizeof(T) == 4 || !p.bias_fp32), static_cast<const T*>(p.bias) + channel, bias);
  }

  // Of channels 2 j and 2 j + 1 of those from `channel` on.
  template <typename Params>
  __device__ __forceinline__ void pair(const Params& p, int channel, int j, float (&w)[2][kWidth],
                                       float (&b)[2]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int at = (2 * j + c) * kWidth + k;
        w[c][k] = element<T>(weight[at / kChannels], at % kChannels);
      }
      b[c] = element<T>(bias, 2 * j + c);
    }
    if (sizeof(T) == 2 && p.weight_fp32) {
      const float2* source = reinterpret_cast<const float2*>(static_cast<const float*>(p.weight) +
                                                             static_cast<int64>(channel + 2 * j) * kWidth);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float2 taps = __ldg(source + i);
        w[2 * i / kWidth][2 * i % kWidth] = taps.x, w[(2 * i + 1) / kWidth][(2 * i + 1) % kWidth] = taps.y;
      }
    }
    if (sizeof(T) == 2 && p.bias_fp32 && p.bias != nullptr) {
      const float2 pair = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(p.bias) + channel) + j);
      b[0] = pair.x, b[1] = pair.y;
    }
  }
};

// The inputs that `token`, at x, sees: of its own sequence, and before(channel, distance) for what lies so many tokens
// before the sequence's first one.
template <typename T, int kWidth, int kChannels, typename Before>
__device__ __forceinline__ void load_window(const T* x, int64 stride, int token, const Sequence& sequence,
                                            Before before, float (&window)[kWidth][kChannels]) {
  constexpr int kWords = kChannels * sizeof(T) / 4;
  unsigned words[kWidth][kWords] = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int back = kWidth - 1 - k;
    load_words_if(token - back >= sequence.begin, x - back * stride, words[k]);
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int distance = sequence.begin - (token - (kWidth - 1 - k));
#pragma unroll
    for (int c = 0; c < kChannels; ++c) window[k][c] = distance > 0 ? before(c, distance) : element<T>(words[k], c);
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
