// Gradients of the causal depthwise conv1d, channel-last. With u the inputs behind their history, s the window sums:
//
//   s[t] = bias + sum_k weight[k] u[t - (kWidth - 1) + k],  ds[t] = dy[t] act'(s[t])
//   dx[t] = sum_k weight[k] ds[t + (kWidth - 1) - k],  dweight[k] = sum_t ds[t] u[t - (kWidth - 1) + k],  dbias = sum
//   ds
//
// The stream of the forward, with a second window: a thread owns four channels and walks a run of tokens with the last
// kWidth - 1 inputs and the last kWidth - 1 ds in registers. So it writes dx kWidth - 1 tokens late, and computes ds of
// as many tokens of the next run once more. x and dy are read once, s is computed anew, and the sums of a run stay in
// registers; they are written once, and a second kernel adds the runs in their order: the same bits every time.
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
  void* partials;              // (width + 1, batch * runs, dim) float32: sums of each run, the bias behind the weights
  const int* cu_seqlens;       // (nseq + 1,) or null: then every batch row is a sequence
  int64 dy_batch_stride, x_batch_stride, dx_batch_stride;
  unsigned dy_token_stride, x_token_stride, dx_token_stride;
  int64 initial_strides[3];
  int64 dfinal_strides[3];
  int64 dinitial_strides[3];
  int batch, seqlen, dim, nseq;
  unsigned runs;  // of tokens_per_thread each, in a batch row
  int tokens_per_thread;
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

template <typename T, int kWidth, bool kSilu, bool kPacked, int kLoads, int kMinBlocks>
__global__ void __launch_bounds__(kConvThreads, kMinBlocks)
    conv1d_bwd_kernel(const __grid_constant__ Conv1dBwdParams p) {
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
  const int64 x_stride = p.x_token_stride, dy_stride = p.dy_token_stride, dx_stride = p.dx_token_stride;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + first * dy_stride + channel;
  T* dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + (first - kHistory) * dx_stride + channel;  // late

  float weight[kWidth][kChannels], bias[kChannels];
  load_parameters<T, kWidth>(p.weight, p.weight_fp32, p.bias, p.bias_fp32, channel, weight, bias);
  float dweight[kWidth][kChannels] = {}, dbias[kChannels] = {};

  // inputs[k] and dsums[k] belong to the token kHistory - k before the one at x. Of tokens before the run dsums is
  // anything, for they lead to no dx that is written here.
  float inputs[kHistory][kChannels], dsums[kHistory][kChannels];
  auto start_windows = [&](const Sequence& sequence, int token) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      const int back = kHistory - k;
      if (token - back >= sequence.begin && (!kPacked || sequence.index >= 0)) {
        unpack<T>(load_vector(x - back * x_stride), inputs[k]);
      } else {
        const int column = kHistory - (sequence.begin - (token - back));
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          inputs[k][c] = load_state<T>(p, p.initial_states, p.initial_strides, sequence.index, channel + c, column);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) dsums[k][c] = 0.f;
    }
  };
  // one token: its sums belong to this run where it does, its dx to the place of an earlier one
  auto step = [&](const float (&input)[kChannels], const float (&dout)[kChannels], bool is_own, T* place, bool writes) {
    float result[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float sum = window_sum<T, kWidth>(
          bias[c], [&](int k) { return weight[k][c]; }, [&](int k) { return k < kHistory ? inputs[k][c] : input[c]; });
      const float dsum = through_activation<T, kSilu>(dout[c], sum);
      if (is_own) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) dweight[k][c] = fmaf(dsum, inputs[k][c], dweight[k][c]);
        dweight[kHistory][c] = fmaf(dsum, input[c], dweight[kHistory][c]);
        dbias[c] += dsum;
      }
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) inputs[k][c] = inputs[k + 1][c];
      inputs[kHistory - 1][c] = input[c];
      result[c] = weight[0][c] * dsum;
#pragma unroll
      for (int k = 1; k < kWidth; ++k) result[c] = fmaf(weight[k][c], dsums[kHistory - k][c], result[c]);
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) dsums[k][c] = dsums[k + 1][c];
      dsums[kHistory - 1][c] = dsum;
    }
    store_vector_if(writes, place, pack<T>(result));
  };
  // behind a sequence's last token ds is zero, and its last kHistory inputs are its final state
  auto finish_sequence = [&](const Sequence& sequence, int token) {
#pragma unroll
    for (int i = 0; i < kHistory; ++i) {
      float result[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        result[c] = load_state<T>(p, p.dfinal_states, p.dfinal_strides, sequence.index, channel + c, i);
#pragma unroll
        for (int k = i + 1; k < kWidth; ++k) result[c] = fmaf(weight[k][c], dsums[kHistory + i - k][c], result[c]);
      }
      const int written = token - kHistory + i;
      store_vector_if(written >= max(first, sequence.begin) && written < last, dx + i * dx_stride, pack<T>(result));
    }
  };

  int token = first;
  Sequence sequence = kPacked ? find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token) : Sequence{row, 0, p.seqlen};
  start_windows(sequence, token);
  while (true) {
    if (token == sequence.end) {
      finish_sequence(sequence, token);
      if (token >= last) break;
      sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
      start_windows(sequence, token);
    }
    if (token >= last + kHistory) break;
    const int end = min(last, sequence.end), written_from = max(first, sequence.begin) + kHistory;
    if (token + kLoads <= end && (!kPacked || sequence.index >= 0)) {
      // the next kLoads tokens are under way all the time: each one's registers take the one kLoads behind it
      Vector<T> x_ahead[kLoads], dy_ahead[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        x_ahead[i] = load_vector(x + i * x_stride);
        dy_ahead[i] = load_vector(dy + i * dy_stride);
      }
      do {
        const bool goes_on = token + 2 * kLoads <= end;
        x += kLoads * x_stride;
        dy += kLoads * dy_stride;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          float input[kChannels], dout[kChannels];
          unpack<T>(x_ahead[i], input);
          unpack<T>(dy_ahead[i], dout);
          if (goes_on) {
            x_ahead[i] = load_vector(x + i * x_stride);
            dy_ahead[i] = load_vector(dy + i * dy_stride);
          }
          step(input, dout, true, dx + i * dx_stride, token + i >= written_from);
        }
        token += kLoads;
        dx += kLoads * dx_stride;
      } while (token + kLoads <= end);
    } else {
      float input[kChannels] = {}, dout[kChannels] = {};
      if (!kPacked || sequence.index >= 0) {  // what belongs to no sequence may be NaN
        unpack<T>(load_vector(x), input);
        unpack<T>(load_vector(dy), dout);
      }
      step(input, dout, token < last, dx, token >= written_from);
      ++token;
      x += x_stride;
      dy += dy_stride;
      dx += dx_stride;
    }
  }

  float4* partials = static_cast<float4*>(p.partials) + thread;
  const int64 stride = static_cast<int64>(p.batch) * p.runs * vectors;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    partials[k * stride] = make_float4(dweight[k][0], dweight[k][1], dweight[k][2], dweight[k][3]);
  }
  partials[kWidth * stride] = make_float4(dbias[0], dbias[1], dbias[2], dbias[3]);
}

inline constexpr int kSumChannels = 32;
inline constexpr int kSumRows = 8;

// dweight and dbias: the sums of all runs. Warp w of a block adds runs w, w + kSumRows, .. and then the warps are
// added.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumChannels* kSumRows)
    conv1d_bwd_sum_kernel(const __grid_constant__ Conv1dBwdParams p) {
  const int channel = blockIdx.x * kSumChannels + threadIdx.x, k = blockIdx.y;
  const int num_runs = p.batch * p.runs;
  float sum = 0.f;
  if (channel < p.dim) {
    const float* partials = static_cast<const float*>(p.partials) + static_cast<int64>(k) * num_runs * p.dim + channel;
#pragma unroll 4
    for (int run = threadIdx.y; run < num_runs; run += kSumRows) {
      sum += partials[static_cast<int64>(run) * p.dim];
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
