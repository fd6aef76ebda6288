// Gradients of the causal depthwise conv1d, channel-last. With u the inputs behind their history, s the window sums:
//
//   s[t] = bias + sum_k weight[k] u[t - (kWidth - 1) + k],  ds[t] = dy[t] act'(s[t])
//   dx[t] = sum_k weight[k] ds[t + (kWidth - 1) - k],  dweight[k] = sum_t ds[t] u[t - (kWidth - 1) + k],  dbias = sum
//   ds
//
// A pure stream, as the forward: a CTA has a tile of kBwdTokens tokens, all of which is on its way into shared memory
// before anything is done with it, with the tokens beside it that it takes. Then each thread walks a run of the tile,
// two channels wide, with the last kWidth - 1 inputs and ds in registers, writes dx kWidth - 1 tokens late, and
// computes the ds of as many tokens of the next run once more. The sums of weight and bias are added up in a CTA, and a
// second kernel adds the CTAs in their order: the same bits every time.
#pragma once

#include "common/async_copies.cuh"
#include "common/conv1d.cuh"
#include "common/hopper.cuh"

namespace hybrid_ops {

struct Conv1dBwdParams {
  TensorMap x_map, dy_map;     // of a tile's rows, where TMA takes them: in_boxes
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
  unsigned tiles;        // of a row
  unsigned ctas;         // a tile each, of all rows
  bool in_boxes;
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

inline constexpr int kBwdTokens = 128;    // of a tile
inline constexpr int kBwdRowBytes = 256;  // of a tile's row
inline constexpr int kBwdThreads = 256;   // of a CTA
inline constexpr int kBwdCtas = 3;        // that a multiprocessor has shared memory for
inline constexpr int kBwdChannels = 2;    // of a thread
inline constexpr int kBwdStep = 4;        // tokens that are taken together

// How a CTA's threads have a tile: kLanes beside each other, kGroups of runs.
template <typename T>
struct BwdTile {
  static constexpr int kLanes = kBwdRowBytes / (kBwdChannels * sizeof(T));
  static constexpr int kGroups = kBwdThreads / kLanes;
  static constexpr int kRun = kBwdTokens / kGroups;
  static constexpr int kColumns = kLanes * kBwdChannels;
};

// Shared memory: tokens of x, from the first one's history to the last one that a ds beyond the tile sees; those of dy;
// and the barrier that says they are there.
template <int kWidth>
struct BwdMemory {
  static constexpr int kXRows = kBwdTokens + 2 * (kWidth - 1), kDyRows = kBwdTokens + kWidth - 1;
  static constexpr int kDy = kXRows * kBwdRowBytes, kTile = kDy + kDyRows * kBwdRowBytes;  // where they begin and end
  static constexpr int kBytes = kTile + 8;
};

// Of the sums of all CTAs. As float32 they lose digits where there are many, which 16-bit results do not show.
template <typename T>
struct Total {
  using type = float;
};
template <>
struct Total<float> {
  using type = double;
};

template <typename T>
__device__ __forceinline__ void store_pair_if(bool condition, T* pointer, const float (&values)[2]) {
  unsigned words[sizeof(T) / 2];
  set_pair<T>(words, 0, values[0], values[1]);
  store_words_if<true>(condition, pointer, words);  // dx is not read again soon
}

// Elements `index`, which is even, and the next one.
template <typename T>
__device__ __forceinline__ float2 load_pair(const void* parameter, int64 index) {
  const auto words = *reinterpret_cast<const Vector<T, 2>*>(static_cast<const T*>(parameter) + index);
  const unsigned* bits = reinterpret_cast<const unsigned*>(&words);
  return make_float2(element<T>(bits, 0), element<T>(bits, 1));
}

template <typename T>
__device__ __forceinline__ float2 load_pair(const void* parameter, bool is_fp32, int64 index) {
  return is_fp32 ? load_pair<float>(parameter, index) : load_pair<T>(parameter, index);
}

// Rows [from, to) of a tile, of which row 0 is at `source`, by all threads, 8 bytes by 8.
__device__ __forceinline__ void copy_rows(unsigned target, const char* source, int64 stride, int from, int to,
                                          int row_bytes) {
  constexpr int kBeside = kBwdRowBytes / 8, kRows = kBwdThreads / kBeside;
  const int left = threadIdx.x % kBeside * 8, first = from + static_cast<int>(threadIdx.x / kBeside);
  if (left >= row_bytes) return;
#pragma unroll 4
  for (int row = first; row < to; row += kRows) {
    copy_async<8>(target + row * kBwdRowBytes + left, source + row * stride + left);
  }
}

// A tile that begins with this token and channel of a row, on its way to `memory`.
template <typename T, int kWidth>
__device__ __forceinline__ void copy_tile(const Conv1dBwdParams& p, unsigned memory, int row, int token, int channel) {
  using Memory = BwdMemory<kWidth>;
  constexpr int kHistory = kWidth - 1;
  if (p.in_boxes) {
    if (threadIdx.x > 0) return;
    const unsigned loaded = memory + Memory::kTile;
    init_barrier(loaded, 1);
    fence_barrier_init();
    arrive_expecting(loaded, Memory::kTile);
    load_box(memory, p.x_map, loaded, channel, 0, token - kHistory, row);
    load_box(memory + Memory::kDy, p.dy_map, loaded, channel, 0, token, row);
  } else {
    const int64 x_stride = p.x_token_stride, dy_stride = p.dy_token_stride;
    const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + (token - kHistory) * x_stride + channel;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_batch_stride + token * dy_stride + channel;
    const int row_bytes = (p.dim - channel) * static_cast<int>(sizeof(T));
    const int to = min(kBwdTokens + kHistory, p.row_tokens - token);
    copy_rows(memory, reinterpret_cast<const char*>(x), x_stride * sizeof(T), token == 0 ? kHistory : 0, to + kHistory,
              row_bytes);
    copy_rows(memory + Memory::kDy, reinterpret_cast<const char*>(dy), dy_stride * sizeof(T), 0, to, row_bytes);
  }
}

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kBwdThreads, kBwdCtas) conv1d_bwd_kernel(const __grid_constant__ Conv1dBwdParams p) {
  using Tile = BwdTile<T>;
  using Memory = BwdMemory<kWidth>;
  constexpr int kHistory = kWidth - 1, kChannels = kBwdChannels, kWords = kChannels * sizeof(T) / 4;
  extern __shared__ __align__(128) uint4 tile_memory[];

  let_next_kernel_start();
  const unsigned cta = blockIdx.z * gridDim.y + blockIdx.y;
  if (cta >= p.ctas) return;
  const int row = p.rows > 1 ? static_cast<int>(cta / p.tiles) : 0;
  const int tile = static_cast<int>(cta - row * p.tiles) * kBwdTokens;  // its first token
  const int left = blockIdx.x * Tile::kColumns;                         // its first channel
  const int64 dx_stride = p.dx_token_stride;

  wait_for_kernel_before();
  const unsigned x_tile = shared_address(tile_memory), dy_tile = x_tile + Memory::kDy;
  copy_tile<T, kWidth>(p, x_tile, row, tile, left);

  const int lane = threadIdx.x % Tile::kLanes, group = threadIdx.x / Tile::kLanes;
  const bool is_channel = left + kChannels * lane < p.dim;
  const int channel = min(left + kChannels * lane, p.dim - kChannels);  // lanes behind the last: a warp stays whole
  const int first = tile + group * Tile::kRun, last = min(first + Tile::kRun, p.row_tokens);
  const auto sequence_at = [&](int token) {
    if (kPacked) return find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
    const int index = p.rows == p.batch ? 0 : token / p.seqlen;  // in its row
    return Sequence{row + index, index * p.seqlen, (index + 1) * p.seqlen};
  };
  Sequence sequence = sequence_at(min(first, p.row_tokens - 1));
  float weight[kChannels][kWidth], bias[kChannels] = {};
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float2 pair = load_pair<T>(p.weight, p.weight_fp32, static_cast<int64>(channel) * kWidth + 2 * i);
    weight[2 * i / kWidth][2 * i % kWidth] = pair.x, weight[(2 * i + 1) / kWidth][(2 * i + 1) % kWidth] = pair.y;
  }
  if (p.bias != nullptr) {
    const float2 pair = load_pair<T>(p.bias, p.bias_fp32, channel);
    bias[0] = pair.x, bias[1] = pair.y;
  }
  wait_for_copies();
  __syncthreads();
  if (p.in_boxes) wait(x_tile + Memory::kTile, 0);

  float sums[kWidth + 1][kChannels] = {};  // of the weights, then of the bias
  if (first < last) {
    T* dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + (first - kHistory) * dx_stride + channel;  // late
    // of a token, at `x_place` and `dy_place`
    unsigned x_place = x_tile + (group * Tile::kRun + kHistory) * kBwdRowBytes + lane * kWords * 4;
    unsigned dy_place = dy_tile + group * Tile::kRun * kBwdRowBytes + lane * kWords * 4;
    // Of the latest tokens, a place each: token i of a step takes place i from the one kBwdStep before it.
    float inputs[kBwdStep][kChannels], dsums[kBwdStep][kChannels];
    const auto place = [](int i, int distance) { return (i + kBwdStep - distance) % kBwdStep; };

    int from, whole_to;  // the sequence's tokens in this run; the last one at which a step without an end can start
    // The inputs before `token`, those of a sequence that starts behind them out of its initial state.
    const auto start_sequence = [&](int token, bool is_run) {
      from = max(first, sequence.begin);
      whole_to = sequence.index >= 0 ? min(last, sequence.end) - kBwdStep : -1;
#pragma unroll
      for (int distance = 1; distance <= kHistory; ++distance) {
        unsigned words[kWords] = {};
        if (is_run) load_shared(x_place - distance * kBwdRowBytes, words);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          inputs[place(0, distance)][c] = element<T>(words, c), dsums[place(0, distance)][c] = 0.f;
        }
      }
      if (is_run && sequence.index >= 0 && sequence.begin <= token - kHistory) return;
#pragma unroll
      for (int distance = 1; distance <= kHistory; ++distance) {
        const int beyond = sequence.begin - (token - distance);  // the first token
        if (is_run && sequence.index >= 0 && beyond <= 0) continue;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          inputs[place(0, distance)][c] =
              load_state<T>(p, p.initial_states, p.initial_strides, sequence.index, channel + c, kHistory - beyond);
        }
      }
    };
    start_sequence(first, true);

    // Token i of a step: its ds, and the dx of the token kHistory before it.
    const auto compute = [&](int i, int step, bool is_own, bool writes, bool is_none) {
      unsigned x_words[kWords], dy_words[kWords];
      load_shared(x_place + step * kBwdRowBytes, x_words), load_shared(dy_place + step * kBwdRowBytes, dy_words);
      clear_words_if(is_none, x_words, kWords), clear_words_if(is_none, dy_words, kWords);  // may be NaN
      float result[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        inputs[i][c] = element<T>(x_words, c);
        const auto input = [&](int k) { return inputs[place(i, kHistory - k)][c]; };
        const float sum = window_sum<T, kWidth>(bias[c], [&](int k) { return weight[c][k]; }, input);
        dsums[i][c] = through_activation<T, kSilu>(element<T>(dy_words, c), sum);
        if (is_own) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sums[k][c] = fmaf(dsums[i][c], input(k), sums[k][c]);
          sums[kWidth][c] += dsums[i][c];
        }
        result[c] = weight[c][kHistory] * dsums[place(i, kHistory)][c];
#pragma unroll
        for (int k = kHistory - 1; k >= 0; --k) result[c] = fmaf(weight[c][k], dsums[place(i, k)][c], result[c]);
      }
      store_pair_if<T>(writes && is_channel, dx, result);
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
        store_pair_if<T>(is_channel, dx + i * dx_stride, result);
      }
    };

    const auto next_step = [&] { x_place += kBwdStep * kBwdRowBytes, dy_place += kBwdStep * kBwdRowBytes; };
    for (int token = first;; next_step()) {
#pragma unroll 1
      for (; token <= whole_to; token += kBwdStep, next_step()) {
#pragma unroll
        for (int i = 0; i < kBwdStep; ++i) compute(i, i, true, i >= kHistory || token + i >= from + kHistory, false);
      }
      if (token >= last + kHistory) break;
      if (token == last && sequence.index >= 0 && last + kHistory <= sequence.end) {
#pragma unroll
        for (int i = 0; i < kHistory; ++i) compute(i, i, false, token + i >= from + kHistory, false);
        break;
      } else {
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
          compute(0, i, token < last, token >= from + kHistory, kPacked && sequence.index < 0);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
#pragma unroll
            for (int k = 1; k < kBwdStep; ++k) {
              inputs[k][c] = inputs[(k + 1) % kBwdStep][c], dsums[k][c] = dsums[(k + 1) % kBwdStep][c];
            }
          }
        }
      }
    }
  }

  // a thread for each pair of sums of the tile adds those of all groups, in their order, which lie where tokens were
  __syncthreads();
  auto& sums_of_groups = reinterpret_cast<float2(&)[Tile::kGroups][kWidth + 1][Tile::kLanes]>(tile_memory[0]);
  static_assert(sizeof(sums_of_groups) <= Memory::kTile);
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) sums_of_groups[group][k][lane] = make_float2(sums[k][0], sums[k][1]);
  __syncthreads();
  float* partials = static_cast<float*>(p.partials) + static_cast<int64>(cta) * p.dim + left;
  for (int k = group; k <= kWidth; k += Tile::kGroups) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) {
      const float2 part = sums_of_groups[i][k][lane];
      sum.x += part.x, sum.y += part.y;
    }
    if (is_channel) reinterpret_cast<float2*>(partials + static_cast<int64>(k) * p.ctas * p.dim)[lane] = sum;
  }
}

inline constexpr int kSumThreads = 32;  // beside each other, 16 bytes of channels each
inline constexpr int kSumRows = 16;
inline constexpr int kSumAtOnce = 8;  // rows that a thread has under way: nearly all it has

// dweight and dbias: the sums of all CTAs of the kernel before. Warp w of a block adds rows w, w + kSumRows, .. and
// then the warps are added, by a thread a channel.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads* kSumRows)
    conv1d_bwd_sum_kernel(const __grid_constant__ Conv1dBwdParams p) {
  let_next_kernel_start();
  const int channel = (blockIdx.x * kSumThreads + threadIdx.x) * 4, k = blockIdx.y;
  const float* partials = static_cast<const float*>(p.partials) + static_cast<int64>(k) * p.ctas * p.dim + channel;
  using Sum = typename Total<T>::type;
  Sum sum[4] = {};
  wait_for_kernel_before();
  if (channel < p.dim) {
#pragma unroll 1
    for (unsigned first = threadIdx.y; first < p.ctas; first += kSumAtOnce * kSumRows) {
      float4 parts[kSumAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kSumAtOnce; ++i) {
        const unsigned row = first + i * kSumRows;
        if (row < p.ctas) parts[i] = *reinterpret_cast<const float4*>(partials + static_cast<int64>(row) * p.dim);
      }
#pragma unroll
      for (const float4& part : parts) sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
  }
  __shared__ Sum sums[kSumRows][kSumThreads * 4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[threadIdx.y][4 * threadIdx.x + i] = sum[i];
  __syncthreads();
  const int own = threadIdx.y * kSumThreads + threadIdx.x, own_channel = blockIdx.x * kSumThreads * 4 + own;
  if (own >= kSumThreads * 4 || own_channel >= p.dim) return;
  Sum sum_of_rows = 0;
#pragma unroll
  for (int row = 0; row < kSumRows; ++row) sum_of_rows += sums[row][own];
  const float total = static_cast<float>(sum_of_rows);
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
