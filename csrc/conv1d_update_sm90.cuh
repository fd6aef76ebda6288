// The next token of each sequence through the causal depthwise convolution, the windows in a pool of slots.
//
// A thread owns the channels of 16 bytes of x, for kSequences sequences: their loads are all under way before the first
// is used, and the weights are read once for all. A slot holds kWidth - 1 columns. Where the columns of a channel are
// neighbours, a lane's part of the slot is kWidth - 1 pieces of 16 bytes, which the warp loads and stores in the order
// of memory and exchanges through shared memory; where channels are, each column is a piece by itself.
#pragma once

#include "common/bits.cuh"
#include "common/conv1d.cuh"

namespace hybrid_ops {

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
  int batch, dim, nslots, null_slot;
  DType weight_dtype, bias_dtype;
  bool silu;
};

template <typename T, int kWidth, bool kColumnsTogether, int kSequences, int kThreads>
__global__ void __launch_bounds__(kThreads) conv1d_update_kernel(const __grid_constant__ Conv1dUpdateParams p) {
  constexpr int kChannels = 16 / sizeof(T);
  constexpr int kPieces = kWidth - 1;
  constexpr int kOfWarp = 32 * kPieces;  // pieces
  __shared__ uint4 exchanged[kThreads / 32][kSequences][kColumnsTogether ? kOfWarp : 1];
  auto& exchange = exchanged[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int channel = (blockIdx.x * kThreads + threadIdx.x) * kChannels;
  const bool has_channels = channel < p.dim;

  // the j-th piece of this lane: its first element in the slot, and whether the slot has it
  const auto piece = [&](int j) {
    if (!kColumnsTogether) return static_cast<int64>(j) * p.state_column_stride + channel;
    return static_cast<int64>((channel - lane * kChannels) * kPieces + (j * 32 + lane) * kChannels);
  };
  const auto has_piece = [&](int j) {
    return kColumnsTogether ? piece(j) < static_cast<int64>(p.dim) * kPieces : has_channels;
  };

  int slots[kSequences];
#pragma unroll
  for (int s = 0; s < kSequences; ++s) {
    const int b = min(static_cast<int>(blockIdx.y) * kSequences + s, p.batch - 1);
    slots[s] = p.slots == nullptr ? b : p.slots[static_cast<int64>(b) * p.slots_stride];
  }
  T* states[kSequences];  // null: padding
  uint4 x[kSequences], window[kSequences][kPieces];
#pragma unroll
  for (int s = 0; s < kSequences; ++s) {
    const int b = blockIdx.y * kSequences + s;
    states[s] = nullptr;
    if (b >= p.batch) continue;
    if (has_channels) {
      x[s] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + static_cast<int64>(b) * p.x_stride + channel);
    }
    const int slot = slots[s];
    if (slot >= 0 && slot < p.nslots && (p.slots == nullptr || slot != p.null_slot)) {
      states[s] = static_cast<T*>(p.conv_state) + slot * p.state_slot_stride;
    }
  }
#pragma unroll
  for (int s = 0; s < kSequences; ++s) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (states[s] != nullptr && has_piece(j)) {
        window[s][j] = __ldcs(reinterpret_cast<const uint4*>(states[s] + piece(j)));
      }
    }
  }

  float weight[kChannels * kWidth], bias[kChannels];
  if (has_channels) {
    Bits<kChannels * kWidth> weight_bits;
    load_runs<kChannels * kWidth, kChannels * kWidth, 0>(p.weight, p.weight_dtype, 0, channel * kWidth, 1, true,
                                                         weight_bits);
    runs_to_float(weight_bits, p.weight_dtype, true, weight);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    bias[c] = from_bits(load_bits(p.bias, p.bias_dtype, channel + c, p.bias != nullptr && has_channels), p.bias_dtype);
  }

  if constexpr (kColumnsTogether) {  // from the order of memory to each lane's channels
#pragma unroll
    for (int s = 0; s < kSequences; ++s) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) exchange[s][j * 32 + lane] = window[s][j];
    }
    __syncwarp();
  }
#pragma unroll
  for (int s = 0; s < kSequences; ++s) {
    const int b = blockIdx.y * kSequences + s;
    if (b >= p.batch || !has_channels) break;
    T* y = static_cast<T*>(p.y) + static_cast<int64>(b) * p.y_stride + channel;
    if (states[s] == nullptr) {
      *reinterpret_cast<uint4*>(y) = make_uint4(0, 0, 0, 0);
      continue;
    }
    if constexpr (kColumnsTogether) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) window[s][j] = exchange[s][lane * kPieces + j];
    }
    T* old = reinterpret_cast<T*>(window[s]);
    const auto at = [&](int c, int k) -> T& { return old[kColumnsTogether ? c * kPieces + k : k * kChannels + c]; };
    const T* tokens = reinterpret_cast<const T*>(&x[s]);
    uint4 result;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float sum = window_sum<T, kWidth>(
          bias[c], [&](int k) { return weight[c * kWidth + k]; },
          [&](int k) { return to_float(k < kPieces ? at(c, k) : tokens[c]); });
      reinterpret_cast<T*>(&result)[c] = T(p.silu ? sum * sigmoid<T>(sum) : sum);
#pragma unroll
      for (int k = 0; k + 1 < kPieces; ++k) at(c, k) = at(c, k + 1);
      at(c, kPieces - 1) = tokens[c];
    }
    *reinterpret_cast<uint4*>(y) = result;
    if constexpr (kColumnsTogether) {  // each lane to where it read
#pragma unroll
      for (int j = 0; j < kPieces; ++j) exchange[s][lane * kPieces + j] = window[s][j];
    }
  }
  if constexpr (kColumnsTogether) __syncwarp();
#pragma unroll
  for (int s = 0; s < kSequences; ++s) {
    if (states[s] == nullptr) continue;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (!has_piece(j)) continue;
      const uint4 moved = kColumnsTogether ? exchange[s][j * 32 + lane] : window[s][j];
      __stcs(reinterpret_cast<uint4*>(states[s] + piece(j)), moved);
    }
  }
}

}  // namespace hybrid_ops
