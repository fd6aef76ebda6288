// Gradients of the causal depthwise conv1d, channel-last. With u the inputs behind their history, s the window sums:
//
//   s[t] = bias + sum_k weight[k] u[t - (kWidth - 1) + k],  ds[t] = dy[t] act'(s[t])
//   dx[t] = sum_k weight[k] ds[t + (kWidth - 1) - k],  dweight[k] = sum_t ds[t] u[t - (kWidth - 1) + k],  dbias = sum
//   ds
//
// The stream of the forward, both ways: a thread has 16 tokens of x and dy (13 of a packed row) of 8 bytes of channels,
// all loads before anything else, and goes from the last token to the first with the ds of the kWidth - 1 behind. So it
// owns all but the last kWidth - 1 tokens, whose dx takes the registers of dy, and computes the ds of those for them.
// Then it goes on a whole grid of tiles further, and keeps the sums of weight and bias. Those are written once by a
// CTA, and a second kernel adds the CTAs in their order: the same bits every time.
#pragma once

#include "common/async_copies.cuh"
#include "common/conv1d.cuh"

namespace hybrid_ops {

struct Conv1dBwdParams {
  const void* dy;              // (batch, seqlen, dim), unit stride in dim
  const void* x;               // as dy
  const void* weight;          // (dim, width), contiguous, T or float32
  const void* bias;            // (dim,), T or float32, or null
  const void* initial_states;  // (nseq, dim, width - 1), T or float32, newest column last, or null for zeros
  const void* dfinal_states;   // as initial_states, or null for zeros
  void* dx;                    // as dy
  void* dweight;               // as weight
  void* dbias;                 // as bias
  void* dinitial_states;       // as initial_states, or null
  void* partials;              // (width + 1, batch * ctas, dim) float32: sums of each CTA, the bias behind the weights
  const int* cu_seqlens;       // (nseq + 1,) or null: then every batch row is a sequence
  int64 dy_batch_stride, x_batch_stride, dx_batch_stride;
  unsigned dy_token_stride, x_token_stride, dx_token_stride;
  int64 initial_strides[3];
  int64 dfinal_strides[3];
  int64 dinitial_strides[3];
  int batch, seqlen, dim, nseq;
  unsigned ctas;  // that share the runs of a batch row
  int tokens;     // of a run
  bool weight_fp32, bias_fp32, states_fp32;
};

// A column of a sequence's initial or final states.
template <typename T>
__device__ __forceinline__ float load_state(const Conv1dBwdParams& p, const void* states, const int64 (&strides)[3],
                                            int sequence, int channel, int column) {
  if (states == nullptr || sequence < 0) return 0.f;
  asm volatile("" : "+r"(channel));  // or its addresses would be kept for later
  return load_parameter<T>(states, p.states_fp32, sequence * strides[0] + channel * strides[1] + column * strides[2]);
}

// dy * act'(sum): silu'(s) = sigmoid(s) (1 + s sigmoid(-s)); of 1 - sigmoid(s) float32 has few digits where s is large.
template <typename T, bool kSilu>
__device__ __forceinline__ float through_activation(float dy, float sum) {
  if constexpr (!kSilu) return dy;
  const float gate = sigmoid<T>(sum), scaled = dy * gate;
  return fmaf(scaled, sizeof(T) == 2 ? fmaf(-sum, gate, sum) : sum * sigmoid<T>(-sum), scaled);
}

inline constexpr int kBwdThreads = 64;     // of a CTA, beside each other
inline constexpr int kBwdStep = 4;         // tokens that a thread reads at once
inline constexpr int kBwdStages = 4;       // of so many tokens in shared memory
#ifdef ISLANDS
inline constexpr bool kIslands = true;
#else
inline constexpr bool kIslands = false;
#endif
inline constexpr int kBwdCtas = 10;  // of a multiprocessor

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kBwdThreads, kBwdCtas) conv1d_bwd_kernel(const __grid_constant__ Conv1dBwdParams p) {
  constexpr int kHistory = kWidth - 1;
  constexpr int kChannels = 8 / sizeof(T);

  // lanes behind the last vector do its work once more: a warp stays whole
  const int channel = min((blockIdx.x * kBwdThreads + threadIdx.x) * kChannels, p.dim - kChannels);
  const unsigned cta = blockIdx.z * gridDim.y + blockIdx.y;  // of all batch rows
  const int row = !kPacked && p.batch > 1 ? static_cast<int>(cta / p.ctas) : 0;
  if (cta >= p.ctas * p.batch) return;
  const int64 x_stride = p.x_token_stride, dy_stride = p.dy_token_stride, dx_stride = p.dx_token_stride;

  __shared__ uint2 ring[kBwdStages][kBwdStep][2][kBwdThreads];  // each thread's own: nobody waits for another
  const unsigned slots = static_cast<unsigned>(__cvta_generic_to_shared(&ring[0][0][0][threadIdx.x]));
  constexpr unsigned kSlotBytes = kBwdThreads * 8, kStageBytes = kBwdStep * 2 * kSlotBytes;

  float weight[kChannels][kWidth], bias[kChannels];
  float sums[kWidth + 1][kChannels] = {};  // of the weights, then of the bias
  // Of the last tokens: token t - distance of the next group's first one t has [kBwdStep - distance], and t itself [0].
  float inputs[kBwdStep][kChannels], dsums[kBwdStep][kChannels];

  unsigned start = (cta - row * p.ctas) * p.tokens;
#pragma unroll 1
  for (bool is_first = true; start < static_cast<unsigned>(p.seqlen); is_first = false) {
    const int first = static_cast<int>(start), last = min(first + p.tokens, p.seqlen);
    const int limit = min(last + kHistory, p.seqlen);  // of what is read
    start += p.ctas * p.tokens;
    const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + first * dy_stride + channel;
    T* dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + (first - kHistory) * dx_stride + channel;  // late

    unsigned before[kHistory][2] = {};
#pragma unroll
    for (int i = 0; i < kHistory; ++i) load_words_if(first > 0, x + (i - kHistory) * x_stride, before[i]);

    const auto read_ahead = [&](int ahead, unsigned stage) {
      const auto read = [&](int i) {
        copy_async<8>(stage + 2 * i * kSlotBytes, x + i * x_stride);
        copy_async<8>(stage + (2 * i + 1) * kSlotBytes, dy + i * dy_stride);
      };
      if (ahead + kBwdStep <= limit) {
#pragma unroll
        for (int i = 0; i < kBwdStep; ++i) read(i);
      } else {
#pragma unroll 1
        for (int i = 0; i < limit - ahead; ++i) read(i);
      }
      commit_copies();
      x += kBwdStep * x_stride, dy += kBwdStep * dy_stride;
    };
#pragma unroll
    for (int i = 0; i < kBwdStages - 1; ++i) read_ahead(first + i * kBwdStep, slots + i * kStageBytes);
    if (is_first) {
      Parameters<T, kWidth, kChannels> parameters;
      parameters.load(p, channel);
#pragma unroll
      for (int j = 0; j < kChannels / 2; ++j) {
        float w[2][kWidth], b[2];
        parameters.pair(p, j, w, b);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          bias[2 * j + c] = b[c];
#pragma unroll
          for (int k = 0; k < kWidth; ++k) weight[2 * j + c][k] = w[c][k];
        }
      }
    }

    Sequence sequence = kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, first) : Sequence{row, 0, p.seqlen};
    // Of the tokens from `own` on the dx belong to this sequence and run; where groups start that have no ends in them.
    int own, fast_to;
    const auto start_sequence = [&](int token, bool is_at_first) {
      own = max(first, sequence.begin);
      fast_to = sequence.index >= 0 ? min(last, sequence.end) - kBwdStep : -1;
#pragma unroll
      for (int distance = 1; distance <= kHistory; ++distance) {
        const int back = sequence.begin - (token - distance);  // how far before the first token
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          float value = 0.f;
          if (is_at_first && back <= 0) {
            value = sequence.index >= 0 ? element<T>(before[kHistory - distance], c) : 0.f;
          } else {
            value = load_state<T>(p, p.initial_states, p.initial_strides, sequence.index, channel + c, kHistory - back);
          }
          inputs[kBwdStep - distance][c] = value, dsums[kBwdStep - distance][c] = 0.f;
        }
      }
    };
    start_sequence(first, true);

    // Token i of a group, `place` of it.
    const auto step = [&](int i, unsigned slot, bool is_own, T* place, bool writes, bool clears) {
      unsigned x_words[2], dy_words[2];
      load_shared(slot, x_words), load_shared(slot + kSlotBytes, dy_words);
      clear_words_if(clears, x_words, 2), clear_words_if(clears, dy_words, 2);
      float result[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        inputs[i][c] = element<T>(x_words, c);
        const auto input = [&](int k) { return inputs[(i + kBwdStep - kHistory + k) % kBwdStep][c]; };
        const float sum = window_sum<T, kWidth>(bias[c], [&](int k) { return weight[c][k]; }, input);
        const float dsum = through_activation<T, kSilu>(element<T>(dy_words, c), sum);
        dsums[i][c] = dsum;
        if (is_own) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sums[k][c] = fmaf(dsum, input(k), sums[k][c]);
          sums[kWidth][c] += dsum;
        }
        float total = weight[c][kHistory] * dsums[(i + kBwdStep - kHistory) % kBwdStep][c];
#pragma unroll
        for (int k = kHistory - 1; k >= 0; --k) {
          total = fmaf(weight[c][k], dsums[(i + kBwdStep - k) % kBwdStep][c], total);
        }
        result[c] = total;
      }
      unsigned words[2];
#pragma unroll
      for (int j = 0; j < kChannels / 2; ++j) set_pair<T>(words, j, result[2 * j], result[2 * j + 1]);
      store_words_if(writes, place, words);
    };
    // behind a sequence's last token ds is zero, and its last kHistory inputs are its final state
    const auto finish_sequence = [&](int token) {
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        const int written = token - kHistory + i;
        if (written < own || written >= last) continue;
        float result[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          result[c] = load_state<T>(p, p.dfinal_states, p.dfinal_strides, sequence.index, channel + c, i);
#pragma unroll
          for (int k = i + 1; k < kWidth; ++k) {
            result[c] = fmaf(weight[c][k], dsums[kBwdStep + i - k][c], result[c]);
          }
        }
        unsigned words[2];
#pragma unroll
        for (int j = 0; j < kChannels / 2; ++j) set_pair<T>(words, j, result[2 * j], result[2 * j + 1]);
        store_words_if(true, dx + i * dx_stride, words);
      }
    };

    bool goes_on = true;
    unsigned stage = slots;
#pragma unroll 1
    for (int token = first; goes_on;) {
      read_ahead(token + (kBwdStages - 1) * kBwdStep,
                 stage == slots ? slots + (kBwdStages - 1) * kStageBytes : stage - kStageBytes);
      wait_for_copies<kBwdStages - 1>();
      if (token >= own + kHistory && token <= fast_to) {
#pragma unroll
        for (int i = 0; i < kBwdStep; ++i) {
          step(i, stage + 2 * i * kSlotBytes, true, dx, true, false);
          dx += dx_stride;
        }
        token += kBwdStep;
      } else {
#pragma unroll 1
        for (int i = 0; i < kBwdStep; ++i) {
          if (token == sequence.end) {
            finish_sequence(token);
            if (token < last) {
              sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
              start_sequence(token, false);
            } else {
              goes_on = false;
            }
          }
          goes_on = goes_on && token < last + kHistory;
          if (!goes_on) break;
          step(0, stage + 2 * i * kSlotBytes, token < last, dx, token >= own + kHistory, kPacked && sequence.index < 0);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
#pragma unroll
            for (int k = 1; k < kBwdStep; ++k) {
              inputs[k][c] = inputs[(k + 1) % kBwdStep][c], dsums[k][c] = dsums[(k + 1) % kBwdStep][c];
            }
          }
          ++token, dx += dx_stride;
        }
      }
      stage = stage == slots + (kBwdStages - 1) * kStageBytes ? slots : stage + kStageBytes;
    }
    if (!kIslands) break;
    wait_for_copies();  // what was read and not needed
  }

  float* partials = static_cast<float*>(p.partials) + static_cast<int64>(cta) * p.dim + channel;
#pragma unroll
  for (int k = 0; k <= kWidth; ++k, partials += static_cast<int64>(p.batch) * p.ctas * p.dim) {
#pragma unroll
    for (int j = 0; j < kChannels / 2; ++j) {
      reinterpret_cast<float2*>(partials)[j] = make_float2(sums[k][2 * j], sums[k][2 * j + 1]);
    }
  }
}

inline constexpr int kSumChannels = 32;
inline constexpr int kSumRows = 8;

// dweight and dbias: the sums of all CTAs. Warp w of a block adds rows w, w + kSumRows, .. and then the warps are
// added.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumChannels* kSumRows)
    conv1d_bwd_sum_kernel(const __grid_constant__ Conv1dBwdParams p) {
  const int channel = blockIdx.x * kSumChannels + threadIdx.x, k = blockIdx.y;
  const int num_rows = p.batch * p.ctas;
  float sum = 0.f;
  if (channel < p.dim) {
    const float* partials = static_cast<const float*>(p.partials) + static_cast<int64>(k) * num_rows * p.dim + channel;
#pragma unroll 4
    for (int row = threadIdx.y; row < num_rows; row += kSumRows) {
      sum += partials[static_cast<int64>(row) * p.dim];
    }
  }
  __shared__ float sums[kSumRows][kSumChannels];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= p.dim) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  if (k < kWidth) {
    store_parameter<T>(p.dweight, p.weight_fp32, static_cast<int64>(channel) * kWidth + k, sum);
  } else {
    store_parameter<T>(p.dbias, p.bias_fp32, channel, sum);
  }
}

// The gradient of each sequence's history, to which its first kWidth - 1 tokens lead, and its final state where it is
// short. A thread per (sequence, channel).
template <typename T, int kWidth, bool kSilu>
__global__ void conv1d_bwd_states_kernel(const __grid_constant__ Conv1dBwdParams p) {
  constexpr int kHistory = kWidth - 1;
  const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int index = static_cast<int>(thread / p.dim), channel = static_cast<int>(thread % p.dim);
  if (index >= p.nseq) return;
  const bool packed = p.cu_seqlens != nullptr;
  const int begin = packed ? max(p.cu_seqlens[index], 0) : 0;
  const int end = packed ? min(p.cu_seqlens[index + 1], p.seqlen) : p.seqlen;
  const int length = max(end - begin, 0), row = packed ? 0 : index;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + channel;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + channel;

  float weight[kWidth], window[kWidth], dsums[kHistory];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    weight[k] = load_parameter<T>(p.weight, p.weight_fp32, static_cast<int64>(channel) * kWidth + k);
  }
  const float bias = p.bias == nullptr ? 0.f : load_parameter<T>(p.bias, p.bias_fp32, channel);
#pragma unroll
  for (int k = 0; k < kHistory; ++k) {
    window[k + 1] = load_state<T>(p, p.initial_states, p.initial_strides, index, channel, k);
  }
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    dsums[i] = 0.f;
    if (i >= length) continue;
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kHistory; ++k) sum = fmaf(weight[k], window[k] = window[k + 1], sum);
    window[kHistory] = to_float(x[(begin + i) * static_cast<int64>(p.x_token_stride)]);
    sum = fmaf(weight[kHistory], window[kHistory], sum);
    dsums[i] = through_activation<T, kSilu>(to_float(dy[(begin + i) * static_cast<int64>(p.dy_token_stride)]), sum);
  }
#pragma unroll
  for (int column = 0; column < kHistory; ++column) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k <= column; ++k) sum = fmaf(weight[k], dsums[column - k], sum);
    if (column >= length) {
      sum += load_state<T>(p, p.dfinal_states, p.dfinal_strides, index, channel, column - length);
    }
    const int64* strides = p.dinitial_strides;
    store_parameter<T>(p.dinitial_states, p.states_fp32,
                       index * strides[0] + channel * strides[1] + column * strides[2], sum);
  }
}

}  // namespace hybrid_ops
