// What both directions of the causal conv1d share: which tokens are a sequence, its parameters and its history.
#pragma once

#include "common/exponential.cuh"
#include "common/vector.cuh"

namespace hybrid_ops {

inline constexpr int kConvThreads = 128;

// Tokens [begin, end) of a batch row; index -1 where they belong to no sequence: all of them are zeros then. In a
// packed row the boundaries from `next` on lie behind `begin`.
struct Sequence {
  int index, begin, end, next;
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
  return {low > nseq ? -1 : low - 1, begin, end, low};
}

// Whether tokens [from, to) are its own.
__device__ __forceinline__ bool holds(const Sequence& sequence, int from, int to) {
  return sequence.index >= 0 && sequence.begin <= from && to <= sequence.end;
}

// Which of kCount <= 16 tokens are the first of a sequence, a bit each, and in the upper half which belong to none.
// Those are starts as well: so a tap reaches back over no start, and what flows back neither.
template <int kCount>
struct Starts {
  unsigned bits;

  // Of the tokens from `base` on, of which `at` holds one: later starts than its own are all that matters. A whole warp
  // asks, and its lanes read 32 boundaries at once.
  __device__ __forceinline__ void find(const int* cu_seqlens, int nseq, const Sequence& at, int base) {
    static_assert(kCount <= 16);
    constexpr unsigned kAll = (1u << kCount) - 1;
    const auto none = [](unsigned tokens) { return tokens | tokens << 16; };
    bits = at.begin > base ? 1u << (at.begin - base) : 0u;
    if (at.next > nseq) bits = none(kAll);
    if (at.next == 0) bits = none(at.end >= base + kCount ? kAll : (1u << max(at.end - base, 0)) - 1);
    bool inside = true;
#pragma unroll 1
    for (int i = at.next + threadIdx.x % 32; __all_sync(~0u, inside); i += 32) {
      const int place = i <= nseq ? __ldg(cu_seqlens + i) - base : kCount;
      inside = place >= 0 && place < kCount;
      bits |= __reduce_or_sync(~0u, inside ? i == nseq ? none(kAll & ~0u << place) : 1u << place : 0u);
    }
  }

  // Whether a sequence begins or ends among the tokens.
  __device__ __forceinline__ bool any() const { return (bits & ~(bits >> 16 & bits >> 15) & 0xfffeu) != 0; }
  __device__ __forceinline__ bool is_none(int i) const { return (bits >> (16 + i) & 1) != 0; }
  // Whether token i sees token i - distance.
  __device__ __forceinline__ bool is_joined(int i, int distance) const {
    return (bits >> (i - distance + 1) & ((1u << distance) - 1)) == 0;
  }
};

__device__ __forceinline__ void clear_words_if(bool condition, unsigned* words, int count) {
#pragma unroll
  for (int i = 0; i < count; ++i) words[i] = condition ? 0u : words[i];
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

// Weights and biases of a thread's channels, in registers as they lie in memory, which for 16 bits is half of what they
// are as float32. Beside 16-bit inputs they may be float32 where kChannels is 4, for which there are registers.
template <typename T, int kWidth, int kChannels>
struct Parameters {
  static constexpr bool kMixed = sizeof(T) == 2 && kChannels == 4;
  static constexpr int kBytes = kMixed ? 8 : kChannels * sizeof(T);  // of a vector
  static constexpr int kOf = kBytes / sizeof(T);                     // elements of it
  static constexpr int kVectors = kMixed ? 2 : 1;  // where they are float32; then they are twice as many

  unsigned weight[kVectors * kWidth][kBytes / 4] = {}, bias[kVectors][kBytes / 4] = {};  // (channel, tap); (channel)

  template <typename Params>
  __device__ __forceinline__ void load(const Params& p, int channel) {
    const int64 weight_size = kMixed && p.weight_fp32 ? 4 : sizeof(T),
                bias_size = kMixed && p.bias_fp32 ? 4 : sizeof(T);
    const char* weights = static_cast<const char*>(p.weight) + channel * weight_size * kWidth;
    const char* biases = static_cast<const char*>(p.bias) + channel * bias_size;
#pragma unroll
    for (int i = 0; i < kVectors * kWidth; ++i) {
      load_words_if(i < kWidth || p.weight_fp32, weights + i * kBytes, weight[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      load_words_if(p.bias != nullptr && (i == 0 || p.bias_fp32), biases + i * kBytes, bias[i]);
    }
  }

  // Of channels 2 j and 2 j + 1 of those that are loaded.
  template <typename Params>
  __device__ __forceinline__ void pair(const Params& p, int j, float (&w)[2][kWidth], float (&b)[2]) const {
    const auto get = [](const unsigned (*vectors)[kBytes / 4], bool is_fp32, int i) {
      if (kMixed && is_fp32) return element<float>(vectors[i / 2], i % 2);
      return element<T>(vectors[i / kOf], i % kOf);
    };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) w[c][k] = get(weight, p.weight_fp32, (2 * j + c) * kWidth + k);
      b[c] = get(bias, p.bias_fp32, 2 * j + c);
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

// Of taps, and of tokens behind one.
struct AllSeen {
  __device__ __forceinline__ bool operator()(int) const { return true; }
};

// bias + sum_k weight(k) input(k) over the taps that are seen. A bias may be larger than the result, and each partial
// sum that has it in it is rounded at its scale: in float32, where that shows, it comes last; else first, which saves
// an instruction.
template <typename T, int kWidth, typename Weight, typename Input, typename Seen = AllSeen>
__device__ __forceinline__ float window_sum(float bias, Weight weight, Input input, Seen seen = {}) {
  constexpr bool kBiasFirst = sizeof(T) == 2;
  float sum = kBiasFirst ? bias : 0.f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (seen(k)) sum = fmaf(weight(k), input(k), sum);
  }
  return kBiasFirst ? sum : sum + bias;
}

}  // namespace hybrid_ops
