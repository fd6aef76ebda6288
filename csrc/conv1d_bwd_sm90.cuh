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
  unsigned ctas;  // that share the tiles of a batch row
  bool weight_fp32, bias_fp32, states_fp32;
};

// A column of a sequence's initial or final states.
template <typename T>
__device__ __forceinline__ float load_state(const Conv1dBwdParams& p, const void* states, const int64 (&strides)[3],
                                            int sequence, int channel, int column) {
  if (states == nullptr || sequence < 0) return 0.f;
  return load_parameter<T>(states, p.states_fp32, sequence * strides[0] + channel * strides[1] + column * strides[2]);
}

// dy * act'(sum): silu'(s) = sigmoid(s) (1 + s sigmoid(-s)); of 1 - sigmoid(s) float32 has few digits where s is large.
template <typename T, bool kSilu>
__device__ __forceinline__ float through_activation(float dy, float sum) {
  if constexpr (!kSilu) return dy;
  const float gate = sigmoid<T>(sum), scaled = dy * gate;
  return fmaf(scaled, sizeof(T) == 2 ? fmaf(-sum, gate, sum) : sum * sigmoid<T>(-sum), scaled);
}

// The dx of one token of a channel: it has `later`, the ds of the tokens behind, the next one first, and its own ds
// goes in front of them and, where the token is the thread's own, to the sums of channel c. Of the inputs it has those
// that are seen(k), and of the tokens `distance` behind those that have it in sight.
template <typename T, int kWidth, bool kSilu, int kChannels, typename Input, typename Seen, typename InSight>
__device__ __forceinline__ float bwd_step(const float (&w)[kWidth], float bias, float dy, Input input, Seen seen,
                                          InSight in_sight, bool is_own, int c, float (&later)[kWidth - 1],
                                          float (&sums)[kWidth + 1][kChannels]) {
  constexpr int kHistory = kWidth - 1;
  const float sum = window_sum<T, kWidth>(bias, [&](int k) { return w[k]; }, input, seen);
  const float dsum = through_activation<T, kSilu>(dy, sum);
  float dx = w[kHistory] * dsum;
#pragma unroll
  for (int distance = 1; distance <= kHistory; ++distance) {
    if (in_sight(distance)) dx = fmaf(w[kHistory - distance], later[distance - 1], dx);
  }
  if (is_own) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (seen(k)) sums[k][c] = fmaf(dsum, input(k), sums[k][c]);
    }
    sums[kWidth][c] += dsum;
  }
#pragma unroll
  for (int k = kHistory - 1; k > 0; --k) later[k] = later[k - 1];
  later[0] = dsum;
  return dx;
}

// The dx of a tile in the place of its dy; `inputs` is x from the history on. The first tokens are the thread's own.
// kMasked: where starts are among them.
template <typename T, int kWidth, bool kSilu, bool kMasked, int kChannels, int kTokens>
__device__ __forceinline__ void bwd_tile(const Conv1dBwdParams& p, const Parameters<T, kWidth, kChannels>& parameters,
                                         const Starts<kWidth - 1 + kTokens>& starts,
                                         unsigned (&inputs)[kWidth - 1 + kTokens][2], unsigned (&grads)[kTokens][2],
                                         float (&sums)[kWidth + 1][kChannels]) {
  constexpr int kHistory = kWidth - 1, kOwn = kTokens - kHistory;
#pragma unroll
  for (int t = 0; kMasked && t < kTokens; ++t) {  // what belongs to no sequence may be NaN
    clear_words_if(starts.is_none(t + kHistory), inputs[t + kHistory], 2);
    clear_words_if(starts.is_none(t + kHistory), grads[t], 2);
  }
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) {
    float w[2][kWidth], b[2], later[2][kHistory] = {};
    parameters.pair(p, j, w, b);
#pragma unroll
    for (int t = kTokens - 1; t >= 0; --t) {
      float result[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto input = [&](int k) { return element<T>(inputs[t + k], 2 * j + c); };
        const auto seen = [&](int k) { return !kMasked || starts.is_joined(t + kHistory, kHistory - k); };
        const auto in_sight = [&](int distance) {
          return !kMasked || t + distance >= kTokens || starts.is_joined(t + distance + kHistory, distance);
        };
        result[c] = bwd_step<T, kWidth, kSilu>(w[c], b[c], element<T>(grads[t], 2 * j + c), input, seen, in_sight,
                                               t < kOwn, 2 * j + c, later[c], sums);
      }
      set_pair<T>(grads[t], j, result[0], result[1]);
    }
    __syncwarp();  // as in the forward: one pair's inputs unpacked at a time
  }
}

inline constexpr int kBwdTokens = 16;        // of a thread's tile
inline constexpr int kPackedBwdTokens = 13;  // where the masks need registers
inline constexpr int kBwdColumns = 64;       // threads of a CTA beside each other
inline constexpr int kBwdGroups = 2;         // of tokens

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kBwdColumns* kBwdGroups, sizeof(T) == 2 ? 3 : 4)
    conv1d_bwd_kernel(const __grid_constant__ Conv1dBwdParams p) {
  constexpr int kHistory = kWidth - 1;
  constexpr int kTokens = kPacked ? kPackedBwdTokens : kBwdTokens, kOwn = kTokens - kHistory;
  constexpr int kChannels = 8 / sizeof(T);

  // lanes behind the last vector do its work once more: a warp stays whole
  const int channel = min((blockIdx.x * kBwdColumns + threadIdx.x) * kChannels, p.dim - kChannels);
  const unsigned cta = blockIdx.z * gridDim.y + blockIdx.y;  // of all batch rows
  const int row = !kPacked && p.batch > 1 ? static_cast<int>(cta / p.ctas) : 0;
  if (cta >= p.ctas * p.batch) return;
  const int64 x_stride = p.x_token_stride, dy_stride = p.dy_token_stride, dx_stride = p.dx_token_stride;

  Parameters<T, kWidth, kChannels> parameters;
  float sums[kWidth + 1][kChannels] = {};  // of the weights, then of the bias
  unsigned start = ((cta - row * p.ctas) * kBwdGroups + threadIdx.y) * kOwn;
#pragma unroll 1
  for (bool is_first = true; start < static_cast<unsigned>(p.seqlen); is_first = false) {
    const int first = static_cast<int>(start), count = min(kTokens, p.seqlen - first);
    start += p.ctas * kBwdGroups * kOwn;
    const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + first * dy_stride + channel;

    unsigned inputs[kHistory + kTokens][2] = {}, grads[kTokens][2] = {};  // x from the history on; dy, then dx
#pragma unroll
    for (int i = 0; i < kHistory; ++i) load_words_if(first > 0, x + (i - kHistory) * x_stride, inputs[i]);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      load_words_if(i < count, x + i * x_stride, inputs[kHistory + i]);
      load_words_if(i < count, dy + i * dy_stride, grads[i]);
    }
    if (is_first) parameters.load(p, channel);

    __syncwarp();  // what is loaded is under way while the sequence is looked for
    const Sequence at_first =
        kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, first) : Sequence{row, 0, p.seqlen};
    T* dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + first * dx_stride + channel;
    const auto store_tile = [&] {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) store_words_if(i < count, dx + i * dx_stride, grads[i]);
    };
    Starts<kHistory + kTokens> starts;
    if (kPacked ? __all_sync(~0u, holds(at_first, first - kHistory, first + kTokens))  // a vote takes fewer registers
                : (first > 0 || p.initial_states == nullptr) && (count == kTokens || p.dfinal_states == nullptr)) {
      bwd_tile<T, kWidth, kSilu, false>(p, parameters, starts, inputs, grads, sums);
      store_tile();
      continue;
    }
    if constexpr (kPacked) {
      starts.find(p.cu_seqlens, p.nseq, at_first, first - kHistory);
      if ((p.initial_states == nullptr && p.dfinal_states == nullptr) || !starts.any()) {
        bwd_tile<T, kWidth, kSilu, true>(p, parameters, starts, inputs, grads, sums);
        store_tile();
        continue;
      }
    }
    // where a state is seen or has a gradient: token by token, the inputs once more out of L1
    Sequence sequence{-1, p.seqlen, p.seqlen};
    float later[kChannels][kHistory];
#pragma unroll 1
    for (int i = count - 1; i >= 0; --i) {
      const int token = first + i;
      if (token < sequence.begin) {  // the last token of the tile, or of a sequence
        sequence = kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token) : at_first;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int k = 0; k < kHistory; ++k) later[c][k] = 0.f;
        }
      }
      unsigned grad[2] = {};
      if (!kPacked || sequence.index >= 0) {  // what belongs to no sequence may be NaN
        const auto before = [&](int c, int distance) {
          return load_state<T>(p, p.initial_states, p.initial_strides, sequence.index, channel + c,
                               kHistory - distance);
        };
        float window[kWidth][kChannels];
        load_words_if(true, dy + i * dy_stride, grad);
        load_window<T, kWidth, kChannels>(x + i * x_stride, x_stride, token, sequence, before, window);
        // the last kHistory inputs of a sequence are its final state
        const int column = kHistory - (sequence.end - token);
#pragma unroll
        for (int j = 0; j < kChannels / 2; ++j) {
          float w[2][kWidth], b[2], result[2];
          parameters.pair(p, j, w, b);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const auto input = [&](int k) { return window[k][2 * j + c]; };
            result[c] = bwd_step<T, kWidth, kSilu>(w[c], b[c], element<T>(grad, 2 * j + c), input, AllSeen{}, AllSeen{},
                                                   i < kOwn, 2 * j + c, later[2 * j + c], sums);
            if (column >= 0) {
              result[c] +=
                  load_state<T>(p, p.dfinal_states, p.dfinal_strides, sequence.index, channel + 2 * j + c, column);
            }
          }
          set_pair<T>(grad, j, result[0], result[1]);
        }
      }
      store_words_if(i < kOwn, dx + i * dx_stride, grad);
    }
  }

  // the first group adds the sums of the others in their order
  __shared__ float2 shared[kBwdGroups][kWidth + 1][kChannels / 2][kBwdColumns];
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
    for (int j = 0; j < kChannels / 2; ++j) {
      shared[threadIdx.y][k][j][threadIdx.x] = make_float2(sums[k][2 * j], sums[k][2 * j + 1]);
    }
  }
  __syncthreads();
  if (threadIdx.y > 0) return;
  float* partials = static_cast<float*>(p.partials) + static_cast<int64>(cta) * p.dim + channel;
#pragma unroll
  for (int k = 0; k <= kWidth; ++k, partials += static_cast<int64>(p.batch) * p.ctas * p.dim) {
#pragma unroll
    for (int j = 0; j < kChannels / 2; ++j) {
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int group = 0; group < kBwdGroups; ++group) {
        const float2 part = shared[group][k][j][threadIdx.x];
        sum.x += part.x, sum.y += part.y;
      }
      reinterpret_cast<float2*>(partials)[j] = sum;
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
