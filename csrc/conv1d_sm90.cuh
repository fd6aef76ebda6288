// Causal depthwise conv1d, channel-last: y[t] = act(bias + sum_k weight[k] * x[t - (kWidth - 1) + k]) per channel.
//
// A pure stream. A thread owns four channels and walks a run of tokens with the last kWidth - 1 inputs in registers, so
// each input is read once (and kWidth - 1 more per run), with no shared memory and no barriers. Neighbouring threads
// own neighbouring channels: every access of a warp is 256 contiguous bytes (512 in float32). Eight channels a thread
// would need twice the registers, and too few warps would be there to keep loads in flight.
//
// What binds it beside memory are issue slots: a value has about 28 of them at the speed of a copy. So whatever does
// not change from token to token is decided outside the loop, and kLoads tokens within a sequence go unchecked.
#pragma once

#include "common/conv1d.cuh"

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
  unsigned runs;  // of tokens_per_thread each, in a batch row
  int tokens_per_thread;
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

template <typename T, int kWidth, bool kSilu, bool kPacked, int kLoads, int kMinBlocks>
__global__ void __launch_bounds__(kConvThreads, kMinBlocks) conv1d_kernel(const __grid_constant__ Conv1dParams p) {
  constexpr int kChannels = kPerVector;
  constexpr int kHistory = kWidth - 1;

  // thread -> (batch row, run of tokens, vector of channels), channels fastest
  const unsigned thread = blockIdx.x * kConvThreads + threadIdx.x, vectors = p.dim / kChannels;
  const unsigned row_and_run = thread / vectors;
  const int channel = static_cast<int>(thread % vectors) * kChannels;
  const int row = static_cast<int>(row_and_run / p.runs);
  if (row >= p.batch) return;
  const int first = static_cast<int>(row_and_run % p.runs) * p.tokens_per_thread;
  const int last = min(first + p.tokens_per_thread, p.seqlen);
  const int64 x_stride = p.x_token_stride, y_stride = p.y_token_stride;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;
  T* y = static_cast<T*>(p.y) + row * p.y_batch_stride + first * y_stride + channel;

  float weight[kWidth][kChannels], bias[kChannels];
  load_parameters<T, kWidth>(p.weight, p.weight_fp32, p.bias, p.bias_fp32, channel, weight, bias);

  // window[k] is the input kHistory - k before the token at x, of its sequence or of an initial state
  float window[kHistory][kChannels];
  auto start_window = [&](const Sequence& sequence, int token) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      const int back = kHistory - k;
      if (token - back >= sequence.begin) {
        unpack<T>(load_vector(x - back * x_stride), window[k]);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          window[k][c] = before_sequence<T>(p, sequence.index, channel + c, sequence.begin - (token - back));
        }
      }
    }
  };
  auto step = [&](const float (&input)[kChannels], T* place) {
    float result[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float sum = window_sum<T, kWidth>(
          bias[c], [&](int k) { return weight[k][c]; }, [&](int k) { return k < kHistory ? window[k][c] : input[c]; });
      result[c] = kSilu ? sum * sigmoid<T>(sum) : sum;
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) window[k][c] = window[k + 1][c];
      window[kHistory - 1][c] = input[c];
    }
    store_vector(place, pack<T>(result));
  };

  int token = first;
  Sequence sequence = kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token) : Sequence{row, 0, p.seqlen};
  start_window(sequence, token);
  while (token < last) {
    if (kPacked && token == sequence.end) {
      sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
      start_window(sequence, token);
    }
    const int end = min(last, sequence.end);
    if (kPacked && sequence.index < 0) {
      store_vector(y, Vector<T>{});
    } else if (token + kLoads <= end) {
      // the next kLoads tokens are under way all the time: each one's registers take the one kLoads behind it
      Vector<T> ahead[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) ahead[i] = load_vector(x + i * x_stride);
      do {
        const bool goes_on = token + 2 * kLoads <= end;
        x += kLoads * x_stride;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          float input[kChannels];
          unpack<T>(ahead[i], input);
          if (goes_on) ahead[i] = load_vector(x + i * x_stride);
          step(input, y + i * y_stride);
        }
        token += kLoads;
        y += kLoads * y_stride;
      } while (token + kLoads <= end);
      continue;
    } else {
      float input[kChannels];
      unpack<T>(load_vector(x), input);
      step(input, y);
    }
    ++token;
    x += x_stride;
    y += y_stride;
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
