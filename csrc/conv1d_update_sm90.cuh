// The next token of each sequence through the causal depthwise convolution, the windows in a pool of slots.
//
// A thread owns four channels of one sequence, and shares nothing with others. It asks for all that it reads before it
// uses any of it; for the kWidth - 1 columns as soon as the slot is there.
#pragma once

#include "common/bits.cuh"
#include "common/conv1d.cuh"
#include "common/hopper.cuh"

namespace hybrid_ops {

inline constexpr int kUpdateChannels = 4;  // of a thread
inline constexpr int kUpdateThreads = 128;

struct Conv1dUpdateParams {
  const void* x;       // (batch, dim), unit stride in dim
  void* conv_state;    // (nslots, dim, kWidth - 1), as x
  const void* weight;  // (dim, kWidth), contiguous
  const void* bias;    // (dim,), contiguous, or null
  const int* slots;    // (batch,) or null: slot b
  void* y;             // as x; may be x
  int64 state_slot_stride;
  int state_column_stride;  // 1: the columns of a channel are neighbours; else the channels of a column
  int x_stride, y_stride, slots_stride;
  int dim, nslots, null_slot;
  DType weight_dtype, bias_dtype;
  bool silu;
};

// The parameters of a thread's channels: asked for as they lie in memory, numbers when they are used.
template <typename T, int kWidth, bool kUsual>
struct UpdateParameters;

// Of the dtype of x, and the bias aligned: as models have them.
template <typename T, int kWidth>
struct UpdateParameters<T, kWidth, true> {
  static constexpr int kCount = kUpdateChannels * kWidth;
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static constexpr int kWordsOfLoad = kWords % 4 == 0 ? 4 : 2;
  unsigned weight[kWords / kWordsOfLoad][kWordsOfLoad], bias[kUpdateChannels * sizeof(T) / 4] = {};

  __device__ __forceinline__ void load(const Conv1dUpdateParams& p, int channel) {
    const T* const weights = static_cast<const T*>(p.weight) + static_cast<int64>(channel) * kWidth;
#pragma unroll
    for (int i = 0; i < kWords / kWordsOfLoad; ++i) {
      load_words_if(true, weights + i * kWordsOfLoad * 4 / sizeof(T), weight[i]);
    }
    load_words_if(p.bias != nullptr, static_cast<const T*>(p.bias) + channel, bias);
  }

  __device__ __forceinline__ void get(const Conv1dUpdateParams&, float (&weights)[kCount],
                                      float (&biases)[kUpdateChannels]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) weights[i] = element<T>(&weight[0][0], i);
#pragma unroll
    for (int c = 0; c < kUpdateChannels; ++c) biases[c] = element<T>(bias, c);
  }
};

// Of any dtype, and the bias anywhere.
template <typename T, int kWidth>
struct UpdateParameters<T, kWidth, false> {
  static constexpr int kCount = kUpdateChannels * kWidth;
  static constexpr int kWordsOf16Bits = kCount / 2;
  static constexpr int kWords = kWordsOf16Bits % 4 == 0 ? 4 : 2;  // of a load
  unsigned weight[kCount / kWords][kWords] = {};
  Element bias[kUpdateChannels];

  __device__ __forceinline__ void load(const Conv1dUpdateParams& p, int channel) {
    const bool wide = p.weight_dtype == DType::float32;
    const char* const source =
        static_cast<const char*>(p.weight) + static_cast<int64>(channel) * kWidth * (wide ? 4 : 2);
#pragma unroll
    for (int i = 0; i < kCount / kWords; ++i) {
      load_words_if(wide || i < kWordsOf16Bits / kWords, source + i * kWords * 4, weight[i]);
    }
#pragma unroll
    for (int c = 0; c < kUpdateChannels; ++c) bias[c] = load_bits(p.bias, p.bias_dtype, channel + c, p.bias != nullptr);
  }

  // A branch for each dtype: to choose for each element costs more than all else that is done with it.
  __device__ __forceinline__ void get(const Conv1dUpdateParams& p, float (&weights)[kCount],
                                      float (&biases)[kUpdateChannels]) const {
#pragma unroll
    for (int c = 0; c < kUpdateChannels; ++c) biases[c] = from_bits(bias[c], p.bias_dtype);
    if (p.weight_dtype == DType::float32) return get_as<float>(weights);
    if (p.weight_dtype == DType::bfloat16) return get_as<__nv_bfloat16>(weights);
    get_as<__half>(weights);
  }

 private:
  template <typename U>
  __device__ __forceinline__ void get_as(float (&weights)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) weights[i] = element<U>(&weight[0][0], i);
  }
};

template <typename T, int kWidth, bool kColumnsTogether, bool kUsual>
__global__ void __launch_bounds__(kUpdateThreads) conv1d_update_kernel(const __grid_constant__ Conv1dUpdateParams p) {
  constexpr int kChannels = kUpdateChannels;
  constexpr int kPieces = kWidth - 1;
  constexpr int kWords = kChannels * sizeof(T) / 4;
  const int b = blockIdx.y;
  const int channel = (blockIdx.x * kUpdateThreads + threadIdx.x) * kChannels;
  let_next_kernel_start();
  wait_for_kernel_before();
  if (channel >= p.dim) return;

  const int slot = p.slots == nullptr ? b : p.slots[static_cast<int64>(b) * p.slots_stride];
  unsigned x[kWords] = {}, result[kWords], window[kPieces][kWords] = {};
  load_words_if(true, static_cast<const T*>(p.x) + static_cast<int64>(b) * p.x_stride + channel, x);
  UpdateParameters<T, kWidth, kUsual> parameters;
  parameters.load(p, channel);
  // predicates for padding: behind a branch, ptxas would put what is asked for before it
  const bool present = slot >= 0 && slot < p.nslots && (p.slots == nullptr || slot != p.null_slot);
  T* const state = static_cast<T*>(p.conv_state) + slot * p.state_slot_stride;
  const auto piece = [&](int j) {
    return kColumnsTogether ? state + channel * kPieces + j * kChannels
                            : state + static_cast<int64>(j) * p.state_column_stride + channel;
  };
#pragma unroll
  for (int j = 0; j < kPieces; ++j) load_words_if(present, piece(j), window[j]);
  float weight[kChannels * kWidth], bias[kChannels];
  parameters.get(p, weight, bias);

  const T* const token = reinterpret_cast<const T*>(x);
  const auto at = [&](int c, int k) -> T& {
    return reinterpret_cast<T*>(window)[kColumnsTogether ? c * kPieces + k : k * kChannels + c];
  };
  float sums[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float sum = window_sum<T, kWidth>(
        bias[c], [&](int k) { return weight[c * kWidth + k]; },
        [&](int k) { return to_float(k < kPieces ? at(c, k) : token[c]); });
    sums[c] = !present ? 0.f : p.silu ? sum * sigmoid<T>(sum) : sum;
#pragma unroll
    for (int k = 0; k + 1 < kPieces; ++k) at(c, k) = at(c, k + 1);
    at(c, kPieces - 1) = token[c];
  }
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) set_pair<T>(result, j, sums[2 * j], sums[2 * j + 1]);
  store_words_if(true, static_cast<T*>(p.y) + static_cast<int64>(b) * p.y_stride + channel, result);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) store_words_if(present, piece(j), window[j]);
}

}  // namespace hybrid_ops
