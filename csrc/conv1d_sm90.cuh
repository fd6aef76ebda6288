// Causal depthwise conv1d, channel-last: y[t] = act(bias + sum_k weight[k] * x[t - (kWidth - 1) + k]) per channel.
//
// A pure stream. A thread owns four channels and walks a run of tokens with the last kWidth - 1 inputs in registers, so
// each input is read once (and kWidth - 1 more per run), with no shared memory and no barriers. Neighbouring threads
// own neighbouring channels: every access of a warp is 256 contiguous bytes (512 in float32). Eight channels a thread
// would need twice the registers, and too few warps would be there to keep loads in flight.
#pragma once

#include "common/vector.cuh"

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
  int64 x_batch_stride, x_token_stride;
  int64 y_batch_stride, y_token_stride;
  int64 initial_strides[3];
  int64 final_strides[3];
  int batch, seqlen, dim, nseq;
  int nslots, null_slot, state_len;
  int tokens_per_thread;
  bool weight_fp32, bias_fp32, states_fp32, silu;
};

struct Sequence {
  int index, begin, end;  // tokens [begin, end) of the batch row
};

// Sequence `index` of a packed batch, clamped to the tokens that exist.
__device__ __forceinline__ Sequence packed_sequence(const Conv1dParams& p, int index) {
  return {index, max(p.cu_seqlens[index], 0), min(p.cu_seqlens[index + 1], p.seqlen)};
}

// The last sequence that begins at or before `token`.
__device__ __forceinline__ Sequence find_sequence(const Conv1dParams& p, int token) {
  if (p.nseq == 0) return {0, 0, 0};
  int low = 0, high = p.nseq - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (p.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return packed_sequence(p, low);
}

template <typename T>
__device__ __forceinline__ float load_parameter(const void* parameter, bool is_fp32, int64 index) {
  return is_fp32 ? static_cast<const float*>(parameter)[index] : to_float(static_cast<const T*>(parameter)[index]);
}

// The pool's row for a sequence; false where it has none.
__device__ __forceinline__ bool find_slot(const Conv1dParams& p, const int* slots, int sequence, int& slot) {
  slot = slots == nullptr ? sequence : slots[sequence];
  return slot >= 0 && slot < p.nslots && (slots == nullptr || slot != p.null_slot);
}

// The input `distance` >= 1 tokens before a sequence's first one: a column of its initial state.
template <typename T>
__device__ __forceinline__ float before_sequence(const Conv1dParams& p, int sequence, int channel, int distance) {
  int slot;
  if (p.initial_states == nullptr || distance > p.state_len || !find_slot(p, p.read_slots, sequence, slot)) return 0.f;
  const int64 offset =
      slot * p.initial_strides[0] + channel * p.initial_strides[1] + (p.state_len - distance) * p.initial_strides[2];
  return load_parameter<T>(p.initial_states, p.states_fp32, offset);
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

// x / (1 + exp(-x)). A 16-bit result needs no more than the two fast instructions; float32 gets the exact functions.
template <typename T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(x, 1.f + __expf(-x));
  } else {
    return x / (1.f + expf(-x));
  }
}

template <typename T, int kWidth, bool kPacked, int kLoads, int kThreads>
__global__ void __launch_bounds__(kThreads) conv1d_kernel(const __grid_constant__ Conv1dParams p) {
  constexpr int kChannels = kPerVector;
  constexpr int kHistory = kWidth - 1;

  // thread -> (batch row, run of tokens, vector of channels), channels fastest
  const int vectors = p.dim / kChannels;
  const int runs = (p.seqlen + p.tokens_per_thread - 1) / p.tokens_per_thread;
  const int64 thread = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x;
  const int64 row_and_run = thread / vectors;
  const int channel = static_cast<int>(thread - row_and_run * vectors) * kChannels;
  const int row = static_cast<int>(row_and_run / runs);
  if (row >= p.batch) return;
  const int first = static_cast<int>(row_and_run - static_cast<int64>(row) * runs) * p.tokens_per_thread;
  const int last = min(first + p.tokens_per_thread, p.seqlen);
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + channel;
  T* y = static_cast<T*>(p.y) + row * p.y_batch_stride + channel;

  float weight[kWidth][kChannels], bias[kChannels];
  if (p.weight_fp32) {
    load_weight<float, kWidth>(p.weight, channel, weight);
  } else {
    load_weight<T, kWidth>(p.weight, channel, weight);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    bias[c] = p.bias == nullptr ? 0.f : load_parameter<T>(p.bias, p.bias_fp32, channel + c);
  }

  // window[k] is the input kHistory - k tokens back, of this sequence or of its initial state
  Sequence sequence = kPacked ? find_sequence(p, first) : Sequence{row, 0, p.seqlen};
  float window[kHistory][kChannels];
#pragma unroll
  for (int k = 0; k < kHistory; ++k) {
    const int token = first - kHistory + k;
    if (token >= sequence.begin) {
      unpack<T>(load_vector(x + token * p.x_token_stride), window[k]);
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        window[k][c] = before_sequence<T>(p, sequence.index, channel + c, sequence.begin - token);
      }
    }
  }

  Vector<T> next[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (first + i < last) next[i] = load_vector(x + (first + i) * p.x_token_stride);
  }
  for (int group = first; group < last; group += kLoads) {
    // the loads of the next group are under way while this one is computed
    Vector<T> raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      raw[i] = next[i];
      const int token = group + kLoads + i;
      if (token < last) next[i] = load_vector(x + token * p.x_token_stride);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = group + i;
      if (token >= last) break;
      if (kPacked && token == sequence.end && sequence.index + 1 < p.nseq) {
        do {  // skip empty sequences
          sequence = packed_sequence(p, sequence.index + 1);
        } while (sequence.end <= token && sequence.index + 1 < p.nseq);
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            window[k][c] = before_sequence<T>(p, sequence.index, channel + c, kHistory - k);
          }
        }
      }
      float current[kChannels], result[kChannels];
      unpack<T>(raw[i], current);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = bias[c];
#pragma unroll
        for (int k = 0; k < kHistory; ++k) sum = fmaf(weight[k][c], window[k][c], sum);
        sum = fmaf(weight[kHistory][c], current[c], sum);
        result[c] = p.silu ? silu<T>(sum) : sum;
        if (kPacked && (token < sequence.begin || token >= sequence.end)) result[c] = 0.f;  // of no sequence
      }
      store_vector(y + token * p.y_token_stride, pack<T>(result));
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int k = 0; k + 1 < kHistory; ++k) window[k][c] = window[k + 1][c];
        window[kHistory - 1][c] = current[c];
      }
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
  const Sequence sequence = packed ? packed_sequence(p, index) : Sequence{index, 0, p.seqlen};
  const T* x = static_cast<const T*>(p.x) + (packed ? 0 : index) * p.x_batch_stride + channel;
  for (int column = 0; column < p.state_len; ++column) {
    const int token = sequence.end - p.state_len + column;
    const float value = token >= sequence.begin ? to_float(x[token * p.x_token_stride])
                                                : before_sequence<T>(p, index, channel, sequence.begin - token);
    const int64 offset = slot * p.final_strides[0] + channel * p.final_strides[1] + column * p.final_strides[2];
    if (p.states_fp32) {
      static_cast<float*>(p.final_states)[offset] = value;
    } else {
      static_cast<T*>(p.final_states)[offset] = T(value);
    }
  }
}

}  // namespace hybrid_ops
