// Gradients of the causal depthwise conv1d, channel-last. With u the inputs behind their history, s the window sums:
//
//   s[t] = bias + sum_k weight[k] u[t - (kWidth - 1) + k],  ds[t] = dy[t] act'(s[t])
//   dx[t] = sum_k weight[k] ds[t + (kWidth - 1) - k],  dweight[k] = sum_t ds[t] u[t - (kWidth - 1) + k],  dbias = sum
//   ds
//
// A thread has 8 bytes of channels and walks a run of tokens with the last kWidth - 1 inputs and ds in registers. So it
// reads x and dy once, writes dx kWidth - 1 tokens late, and computes the ds of as many tokens of the next run once
// more. The next tokens are on their way into shared memory, which has room for what registers had not. The sums of
// weight and bias are added up in a CTA, which has kBwdGroups runs, and a second kernel adds the CTAs in their order:
// the same bits every time. No sum has more than kBwdTerms terms: the sums of so many tokens are added to those of all
// before them.
#pragma once

#include "common/async_copies.cuh"
#include "common/conv1d.cuh"
#include "common/hopper.cuh"

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
  void* partials;              // (width + 1, ctas, dim) float32: sums of each CTA, the bias behind the weights
  const int* cu_seqlens;       // (nseq + 1,) or null: then every batch row is a sequence
  int64 dy_batch_stride, x_batch_stride, dx_batch_stride;
  unsigned dy_token_stride, x_token_stride, dx_token_stride;
  int64 initial_strides[3];
  int64 dfinal_strides[3];
  int64 dinitial_strides[3];
  int batch, seqlen, dim, nseq;
  int rows, row_tokens;  // as the batch's, or one row where all of those lie behind each other
  unsigned runs;         // of a row
  int run_tokens;        // the last one may have fewer
  unsigned ctas;         // that share the runs of all rows
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

inline constexpr int kBwdThreads = 64;    // of a CTA, beside each other
inline constexpr int kBwdGroups = 2;      // of so many threads in a CTA, a run each
inline constexpr int kBwdCtas = 4;        // that registers of a multiprocessor are enough for
inline constexpr int kBwdStep = 4;        // tokens that are read and waited for together
inline constexpr int kBwdStages = 4;      // of so many tokens in shared memory
inline constexpr int kBwdTerms = 32;      // of a sum, a multiple of kBwdStep
inline constexpr int kBwdCarveout = 100;  // percent of L1 that is to be shared memory

// Of the sums of all tokens of a run. As float32 they lose digits where a run is long, which 16-bit results do not
// show.
template <typename T>
struct Total {
  using type = float;
};
template <>
struct Total<float> {
  using type = double;
};

template <typename T, int kWidth, int kChannels>
__device__ __forceinline__ void load_parameters(const Conv1dBwdParams& p, int channel,
                                                float (&weight)[kChannels][kWidth], float (&bias)[kChannels]) {
  Parameters<T, kWidth, kChannels> parameters;
  parameters.load(p, channel);
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) {
    parameters.pair(p, j, reinterpret_cast<float (&)[2][kWidth]>(weight[2 * j]),
                    reinterpret_cast<float (&)[2]>(bias[2 * j]));
  }
}

template <typename T, int kChannels>
__device__ __forceinline__ void store_elements_if(bool condition, T* pointer, const float (&values)[kChannels]) {
  unsigned words[2];
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) set_pair<T>(words, j, values[2 * j], values[2 * j + 1]);
  store_words_if<true>(condition, pointer, words);  // dx is not read again soon
}

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kBwdThreads* kBwdGroups, kBwdCtas)
    conv1d_bwd_kernel(const __grid_constant__ Conv1dBwdParams p) {
  constexpr int kHistory = kWidth - 1;
  constexpr int kChannels = 8 / sizeof(T);

  let_next_kernel_start();
  // lanes behind the last vector do its work once more, and so does a group behind the last run: a warp stays whole
  const int channel = min((blockIdx.x * kBwdThreads + threadIdx.x) * kChannels, p.dim - kChannels);
  const unsigned cta = blockIdx.z * gridDim.y + blockIdx.y;
  if (cta >= p.ctas) return;
  const unsigned nth_run = cta * kBwdGroups + threadIdx.y, run = min(nth_run, p.runs * p.rows - 1);  // of all rows
  const int row = p.rows > 1 ? static_cast<int>(run / p.runs) : 0;
  const int first = static_cast<int>((run - row * p.runs) * p.run_tokens);
  const int last =
      static_cast<int>(min(static_cast<unsigned>(first) + p.run_tokens, static_cast<unsigned>(p.row_tokens)));
  const int64 x_stride = p.x_token_stride, dy_stride = p.dy_token_stride, dx_stride = p.dx_token_stride;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + first * x_stride + channel;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + first * dy_stride + channel;
  T* dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + (first - kHistory) * dx_stride + channel;  // late

  // x and dy; each thread's own: none waits for another
  __shared__ uint2 ring[kBwdGroups][kBwdStages * kBwdStep * 2][kBwdThreads];
  const unsigned stages = shared_address(&ring[threadIdx.y][0][threadIdx.x]);
  constexpr unsigned kSlot = kBwdThreads * 8, kToken = 2 * kSlot, kStage = kBwdStep * kToken;  // in bytes
  constexpr unsigned kLast = (kBwdStages - 1) * kStage;
  const auto read_ahead = [&](int token, unsigned stage) {
    const auto read = [&](int i) {
      copy_async<8>(stage + i * kToken, x + i * x_stride);
      copy_async<8>(stage + i * kToken + kSlot, dy + i * dy_stride);
    };
    const int count = min(last + kHistory, p.row_tokens) - token;
    if (count >= kBwdStep) {
#pragma unroll
      for (int i = 0; i < kBwdStep; ++i) read(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) read(i);
    }
    commit_copies();
    x += kBwdStep * x_stride, dy += kBwdStep * dy_stride;
  };

  wait_for_kernel_before();
  unsigned before[kHistory][2] = {};
#pragma unroll
  for (int i = 0; i < kHistory; ++i) load_words_if(first > 0, x + (i - kHistory) * x_stride, before[i]);
#pragma unroll
  for (int i = 0; i < kBwdStages - 1; ++i) read_ahead(first + i * kBwdStep, stages + i * kStage);
  float weight[kChannels][kWidth], bias[kChannels];
  load_parameters<T, kWidth>(p, channel, weight, bias);

  // Of the weights, then of the bias: of the latest tokens, and of all before them.
  float sums[kWidth + 1][kChannels] = {};
  typename Total<T>::type totals[kWidth + 1][kChannels] = {};
  const auto add_sums = [&] {
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) totals[k][c] += sums[k][c], sums[k][c] = 0.f;
    }
  };
  // Of the latest tokens, a place each: token i of a step takes place i from the one kBwdStep before it.
  float inputs[kBwdStep][kChannels], dsums[kBwdStep][kChannels];
  const auto place = [](int i, int distance) { return (i + kBwdStep - distance) % kBwdStep; };

  const auto sequence_at = [&](int token) {
    if (kPacked) return find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
    const int index = p.rows == p.batch ? 0 : token / p.seqlen;  // in its row
    return Sequence{row + index, index * p.seqlen, (index + 1) * p.seqlen};
  };
  Sequence sequence = sequence_at(first);
  int from, whole_to;  // its tokens in this run; the last one at which a step can start that has no end in it
  const auto start_sequence = [&](int token, bool is_run) {
    from = max(first, sequence.begin);
    whole_to = sequence.index >= 0 ? min(last, sequence.end) - kBwdStep : -1;
#pragma unroll
    for (int distance = 1; distance <= kHistory; ++distance) {
      const int beyond = sequence.begin - (token - distance);  // the first token
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float input = 0.f;
        if (!is_run || beyond > 0) {
          input = load_state<T>(p, p.initial_states, p.initial_strides, sequence.index, channel + c, kHistory - beyond);
        } else if (!kPacked || sequence.index >= 0) {
          input = element<T>(before[kHistory - distance], c);
        }
        inputs[place(0, distance)][c] = input, dsums[place(0, distance)][c] = 0.f;
      }
    }
  };
  start_sequence(first, true);

  // Token i of a step: its ds, and the dx of the token kHistory before it.
  const auto compute = [&](int i, unsigned slot, bool is_own, bool writes, bool is_none) {
    unsigned words[2][2];
    load_shared(slot, words[0]), load_shared(slot + kSlot, words[1]);
    clear_words_if(is_none, words[0], 2), clear_words_if(is_none, words[1], 2);  // may be NaN
    float result[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      inputs[i][c] = element<T>(words[0], c);
      const auto input = [&](int k) { return inputs[place(i, kHistory - k)][c]; };
      const float sum = window_sum<T, kWidth>(bias[c], [&](int k) { return weight[c][k]; }, input);
      dsums[i][c] = through_activation<T, kSilu>(element<T>(words[1], c), sum);
      if (is_own) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sums[k][c] = fmaf(dsums[i][c], input(k), sums[k][c]);
        sums[kWidth][c] += dsums[i][c];
      }
      result[c] = weight[c][kHistory] * dsums[place(i, kHistory)][c];
#pragma unroll
      for (int k = kHistory - 1; k >= 0; --k) result[c] = fmaf(weight[c][k], dsums[place(i, k)][c], result[c]);
    }
    store_elements_if<T>(writes, dx, result);
    dx += dx_stride;
  };
  // Behind the last token of a sequence, at `token`, ds is zero, and its last kHistory inputs are its final state.
  const auto finish_sequence = [&](int token) {
#pragma unroll
    for (int i = 0; i < kHistory; ++i) {
      const int written = token - kHistory + i;
      if (written < from || written >= last) continue;
      float result[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        result[c] = load_state<T>(p, p.dfinal_states, p.dfinal_strides, sequence.index, channel + c, i);
#pragma unroll
        for (int k = i + 1; k < kWidth; ++k) result[c] = fmaf(weight[c][k], dsums[place(i, k)][c], result[c]);
      }
      store_elements_if<T>(true, dx + i * dx_stride, result);
    }
  };

  unsigned stage = stages;
#pragma unroll 1
  for (int token = first; token < last + kHistory;) {
    read_ahead(token + (kBwdStages - 1) * kBwdStep, stage == stages ? stages + kLast : stage - kStage);
    wait_for_copies<kBwdStages - 1>();
    if (token <= whole_to) {
#pragma unroll
      for (int i = 0; i < kBwdStep; ++i) {
        compute(i, stage + i * kToken, true, i >= kHistory || token + i >= from + kHistory, false);
      }
      token += kBwdStep;
    } else if (token == last && sequence.index >= 0 && last + kHistory <= sequence.end) {
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        compute(i, stage + i * kToken, false, token + i >= from + kHistory, false);
      }
      token += kHistory;
    } else {
      // counted in tokens, the same of all threads: the addresses of slots are not, and then `token` takes registers
#pragma unroll 1
      for (int i = 0; i < kBwdStep && token < last + kHistory; ++i, ++token) {
        if (token == sequence.end) {
          finish_sequence(token);
          if (token >= last) {
            token = last + kHistory;  // nothing more of this run
            break;
          }
          sequence = sequence_at(token);
          start_sequence(token, false);
        }
        compute(0, stage + i * kToken, token < last, token >= from + kHistory, kPacked && sequence.index < 0);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int k = 1; k < kBwdStep; ++k) {
            inputs[k][c] = inputs[(k + 1) % kBwdStep][c], dsums[k][c] = dsums[(k + 1) % kBwdStep][c];
          }
        }
      }
    }
    if (token % kBwdTerms == 0) add_sums();
    stage = stage == stages + kLast ? stages : stage + kStage;
  }
  add_sums();
  wait_for_copies();  // of tokens that were not needed

  // the first group adds the others' sums, in their order, which lie where their tokens were
  auto& sums_of_groups = reinterpret_cast<float2(&)[kBwdGroups][kBwdStages * kBwdStep * 2][kBwdThreads]>(ring);
  static_assert((kWidth + 1) * kChannels / 2 <= kBwdStages * kBwdStep * 2);
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
    for (int j = 0; j < kChannels / 2; ++j) {
      float2 sum = make_float2(float(totals[k][2 * j]), float(totals[k][2 * j + 1]));
      if (nth_run != run) sum = make_float2(0.f, 0.f);
      sums_of_groups[threadIdx.y][k * kChannels / 2 + j][threadIdx.x] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.y > 0) return;
  float* partials = static_cast<float*>(p.partials) + static_cast<int64>(cta) * p.dim + channel;
#pragma unroll
  for (int k = 0; k <= kWidth; ++k, partials += static_cast<int64>(p.ctas) * p.dim) {
#pragma unroll
    for (int j = 0; j < kChannels / 2; ++j) {
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int group = 0; group < kBwdGroups; ++group) {
        const float2 part = sums_of_groups[group][k * kChannels / 2 + j][threadIdx.x];
        sum.x += part.x, sum.y += part.y;
      }
      reinterpret_cast<float2*>(partials)[j] = sum;
    }
  }
}

inline constexpr int kSumThreads = 32;  // beside each other, 16 bytes of channels each
inline constexpr int kSumRows = 8;

// dweight and dbias: the sums of all CTAs of the kernel before. Warp w of a block adds rows w, w + kSumRows, .. and
// then the warps are added, by a thread a channel.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads* kSumRows)
    conv1d_bwd_sum_kernel(const __grid_constant__ Conv1dBwdParams p) {
  let_next_kernel_start();
  const int channel = (blockIdx.x * kSumThreads + threadIdx.x) * 4, k = blockIdx.y;
  const float* partials = static_cast<const float*>(p.partials) + static_cast<int64>(k) * p.ctas * p.dim + channel;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  wait_for_kernel_before();
#pragma unroll 4
  for (unsigned row = threadIdx.y; channel < p.dim && row < p.ctas; row += kSumRows) {
    const float4 part = *reinterpret_cast<const float4*>(partials + static_cast<int64>(row) * p.dim);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  __shared__ float4 sums[kSumRows][kSumThreads];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  const int own = threadIdx.y * kSumThreads + threadIdx.x, own_channel = blockIdx.x * kSumThreads * 4 + own;
  if (own >= kSumThreads * 4 || own_channel >= p.dim) return;
  float total = 0.f;
#pragma unroll
  for (int row = 0; row < kSumRows; ++row) total += reinterpret_cast<const float*>(sums[row])[own];
  if (k < kWidth) {
    store_parameter<T>(p.dweight, p.weight_fp32, static_cast<int64>(own_channel) * kWidth + k, total);
  } else {
    store_parameter<T>(p.dbias, p.bias_fp32, own_channel, total);
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
