// Causal depthwise conv1d, channel-last: y[t] = act(bias + sum_k weight[k] * x[t - (kWidth - 1) + k]) per channel.
//
// A pure stream: a thread has a tile of 64 bytes, some tokens of the channels of a vector. All of its loads are under
// way before anything is done with them, all of its stores come last, and nothing in between waits for memory: so that
// sees what it sees of a copy. Where sequences start in a tile, a bit of each token says so to the taps. The kWidth - 1
// tokens before the tile are read once more, out of L1, for they belong to the thread beside it in the CTA, which is
// some groups of tokens high.
//
// Results take the registers of inputs: pair of channels by pair, from the last token to the first.
#pragma once

#include "common/conv1d.cuh"
#include "common/division.cuh"
#include "common/hopper.cuh"

namespace hybrid_ops {

struct Conv1dParams {
  const void* x;               // (batch, seqlen, dim), unit stride in dim
  const void* weight;          // (dim, width), contiguous, T or float32
  const void* bias;            // (dim,), T or float32, or null
  const void* initial_states;  // (nslots, dim, state_len), T or float32, newest column last, or null for zeros
  void* y;                     // as x
  void* final_states;          // as initial_states; may be the same pool
  const int* cu_seqlens;       // (nseq + 1,) or null: then every batch row is a sequence
  const int* read_slots;       // (nseq,) slot of a sequence in initial_states, or null: its number
  const int* write_slots;      // (nseq,) likewise in final_states
  int64 x_batch_stride, y_batch_stride;
  unsigned x_token_stride, y_token_stride;
  int64 initial_strides[3];
  int64 final_strides[3];
  int batch, seqlen, dim, nseq;
  int nslots, null_slot, state_len;
  unsigned tiles;  // of a CTA's tokens, in a batch row
  WideDivisor by_tiles;
  bool weight_fp32, bias_fp32, states_fp32;
};

// The pool's row for a sequence; false where it has none.
__device__ __forceinline__ bool find_slot(const Conv1dParams& p, const int* slots, int sequence, int& slot) {
  slot = slots == nullptr ? sequence : slots[sequence];
  return slot >= 0 && slot < p.nslots && (slots == nullptr || slot != p.null_slot);
}

// The input `distance` >= 1 tokens before a sequence's first one: a column of its initial state.
template <typename T>
__device__ __forceinline__ float before_sequence(const Conv1dParams& p, int sequence, int channel, int distance) {
  int slot;
  if (p.initial_states == nullptr || sequence < 0 || distance > p.state_len) return 0.f;
  if (!find_slot(p, p.read_slots, sequence, slot)) return 0.f;
  const int64 offset =
      slot * p.initial_strides[0] + channel * p.initial_strides[1] + (p.state_len - distance) * p.initial_strides[2];
  return load_parameter<T>(p.initial_states, p.states_fp32, offset);
}

// One token of channels 2 j and 2 j + 1, from input(k, c) of the c-th of them to their place in `words`.
template <typename T, int kWidth, bool kSilu, typename Input>
__device__ __forceinline__ void conv1d_step(const float (&w)[2][kWidth], const float (&b)[2], Input input, int j,
                                            unsigned* words) {
  float result[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float sum = window_sum<T, kWidth>(b[c], [&](int k) { return w[c][k]; }, [&](int k) { return input(k, c); });
    result[c] = kSilu ? sum * sigmoid<T>(sum) : sum;
  }
  set_pair<T>(words, j, result[0], result[1]);
}

// The results of a tile, from its history on, in the place of its inputs. kMasked: where starts are among them.
template <typename T, int kWidth, bool kSilu, bool kMasked, int kChannels, int kCount, int kWords>
__device__ __forceinline__ void conv1d_tile(const Conv1dParams& p, const Parameters<T, kWidth, kChannels>& parameters,
                                            const Starts<kCount>& starts, unsigned (&raw)[kCount][kWords]) {
  constexpr int kHistory = kWidth - 1;
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) {
    float w[2][kWidth], b[2];
    parameters.pair(p, j, w, b);
#pragma unroll
    for (int t = kCount - 1; t >= kHistory; --t) {
      const auto input = [&](int k, int c) {
        const bool is_seen = !kMasked || starts.is_joined(t, kHistory - k);
        return is_seen ? element<T>(raw[t - kHistory + k], 2 * j + c) : 0.f;
      };
      conv1d_step<T, kWidth, kSilu>(w, b, input, j, raw[t]);
    }
    __syncwarp();  // keeps the compiler from unpacking the next pair's inputs already, for which it has no registers
  }
#pragma unroll
  for (int t = kHistory; kMasked && t < kCount; ++t) clear_words_if(starts.is_none(t), raw[t], kWords);
}

inline constexpr int kTileBytes = 64;     // of a thread
inline constexpr int kTileThreads = 128;  // of a CTA: (vectors, groups of tokens), whole warps to a group
// CTAs that a multiprocessor has registers for, as many as do without spills.
template <typename T, bool kPacked>
inline constexpr int kTileCtas = sizeof(T) == 4 || kPacked ? 6 : 8;

template <typename T, int kWidth, bool kSilu, bool kPacked, int kChannels>
__global__ void __launch_bounds__(kTileThreads, kTileCtas<T, kPacked>)
    conv1d_kernel(const __grid_constant__ Conv1dParams p) {
  constexpr int kHistory = kWidth - 1;
  constexpr int kTokens = kTileBytes / (kChannels * sizeof(T));
  constexpr int kWords = kChannels * sizeof(T) / 4;
  static_assert(kTokens >= kHistory);

  let_next_kernel_start();
  // lanes behind the last vector do its work once more: a warp stays whole
  const int channel = min((blockIdx.x * blockDim.x + threadIdx.x) * kChannels, p.dim - kChannels);
  const unsigned tile = blockIdx.z * gridDim.y + blockIdx.y;
  const int row = !kPacked && p.batch > 1 ? p.by_tiles.of(tile) : 0;
  const unsigned start = ((tile - row * p.tiles) * blockDim.y + threadIdx.y) * kTokens;
  if (row >= p.batch || start >= static_cast<unsigned>(p.seqlen)) return;
  const int first = static_cast<int>(start), count = min(kTokens, p.seqlen - first);
  const int64 x_stride = p.x_token_stride, y_stride = p.y_token_stride;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;

  wait_for_kernel_before();
  unsigned raw[kHistory + kTokens][kWords] = {};  // the history, then the tile
#pragma unroll
  for (int i = 0; i < kHistory; ++i) load_words_if(first > 0, x + (i - kHistory) * x_stride, raw[i]);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) load_words_if(i < count, x + i * x_stride, raw[kHistory + i]);
  Parameters<T, kWidth, kChannels> parameters;
  parameters.load(p, channel);

  __syncwarp();  // what is loaded is under way while the sequence is looked for
  Sequence sequence = kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, first) : Sequence{row, 0, p.seqlen};
  T* y = static_cast<T*>(p.y) + row * p.y_batch_stride + first * y_stride + channel;
  const auto store_tile = [&] {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) store_words_if(i < p.seqlen - first, y + i * y_stride, raw[kHistory + i]);
  };
  Starts<kHistory + kTokens> starts;
  if (kPacked ? holds(sequence, first - kHistory, first + count) : first > 0 || p.initial_states == nullptr) {
    conv1d_tile<T, kWidth, kSilu, false>(p, parameters, starts, raw);
    return store_tile();
  }
  if constexpr (kPacked) {
    starts.find(p.cu_seqlens, p.nseq, sequence, first - kHistory);
    if (p.initial_states == nullptr || !starts.any()) {
      conv1d_tile<T, kWidth, kSilu, true>(p, parameters, starts, raw);
      return store_tile();
    }
  }
  // where an initial state is seen: token by token and 8 bytes by 8, inputs and parameters once more out of L1, so that
  // it takes fewer registers than what is above
  constexpr int kPart = 8 / sizeof(T);
#pragma unroll 1
  for (int token = first; token < first + count; ++token, x += x_stride, y += y_stride) {
    if (kPacked && token >= sequence.end) sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
#pragma unroll 1
    for (int part = 0; part < kChannels; part += kPart) {
      unsigned result[2] = {};
      if (!kPacked || sequence.index >= 0) {
        Parameters<T, kWidth, kPart> parameters;
        parameters.load(p, channel + part);
        const auto before = [&](int c, int distance) {
          return before_sequence<T>(p, sequence.index, channel + part + c, distance);
        };
        float window[kWidth][kPart];
        load_window<T, kWidth, kPart>(x + part, x_stride, token, sequence, before, window);
#pragma unroll
        for (int j = 0; j < kPart / 2; ++j) {
          float w[2][kWidth], b[2];
          parameters.pair(p, j, w, b);
          const auto input = [&](int k, int c) { return window[k][2 * j + c]; };
          conv1d_step<T, kWidth, kSilu>(w, b, input, j, result);
        }
      }
      store_words_if(true, y + part, result);
    }
  }
}

// The last state_len inputs of each sequence, which for a short one begin in its initial state. A thread per (sequence,
// channel) goes from old to new, so a pool may be updated in place.
template <typename T>
__global__ void conv1d_final_states_kernel(const __grid_constant__ Conv1dParams p) {
  const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int index = static_cast<int>(thread / p.dim), channel = static_cast<int>(thread % p.dim);
  int slot;
  if (index >= p.nseq || !find_slot(p, p.write_slots, index, slot)) return;
  const bool packed = p.cu_seqlens != nullptr;
  const int begin = packed ? max(p.cu_seqlens[index], 0) : 0;
  const int end = packed ? min(p.cu_seqlens[index + 1], p.seqlen) : p.seqlen;
  const T* x = static_cast<const T*>(p.x) + (packed ? 0 : index) * p.x_batch_stride + channel;
  for (int column = 0; column < p.state_len; ++column) {
    const int token = end - p.state_len + column;
    const float value =
        token >= begin ? to_float(x[token * p.x_token_stride]) : before_sequence<T>(p, index, channel, begin - token);
    const int64 offset = slot * p.final_strides[0] + channel * p.final_strides[1] + column * p.final_strides[2];
    store_parameter<T>(p.final_states, p.states_fp32, offset, value);
  }
}

}  // namespace hybrid_ops
