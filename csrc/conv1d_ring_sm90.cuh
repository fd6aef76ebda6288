// The causal depthwise conv1d of conv1d_sm90.cuh for many tokens, by way of shared memory.
//
// A warp owns 512 bytes of channels for good, 16 of each lane, and walks over tiles of tokens. Its input is on its way
// into a ring of its own, kConvGroup tokens in a slot, without a pause between tiles: first the kConvGroup tokens
// before a tile, which hold its history, then the tile. A result takes its input's place and leaves from there. So what
// is under way takes no registers, and tiles may be short: the whole GPU reads and writes one part of memory at a time.
#pragma once

#include "common/conv1d_ring.cuh"
#include "conv1d_sm90.cuh"

namespace hybrid_ops {

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv1d_ring_kernel(const __grid_constant__ Conv1dParams p, int stages) {
  constexpr int kParts = ConvWalker<T>::kParts;
  constexpr int kHistory = kWidth - 1;
  constexpr int kSlot = kConvGroup * kConvRowBytes;
  extern __shared__ float4 dynamic[];
  __shared__ uint64 barriers[kConvThreads / 32][kConvMaxStages];

  const ConvWalker<T> own(p.dim);
  if (!own.exists) return;
  const int warp = own.warp, lane = own.lane, walkers = own.walkers, channel = own.channel;
  const uint32 row_bytes = own.row_bytes;
  const int tiles = p.batch * p.runs, groups = 1 + p.tokens_per_thread / kConvGroup;

  char* const slots = reinterpret_cast<char*>(dynamic) + warp * stages * kSlot;
  const uint32 slots_address = shared_address(slots), barrier = shared_address(barriers[warp]);
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) init_barrier(barrier + 8 * i, 1);
    fence_barrier_init();
  }
  __syncwarp();

  // what is asked for next
  int next_tile = own.walker, next_group = 0, next_slot = 0;
  const auto ask = [&] {
    if (next_tile >= tiles) return;
    const int row = next_tile / static_cast<int>(p.runs);
    const int begin = next_tile % static_cast<int>(p.runs) * p.tokens_per_thread;
    const int token = begin + (next_group - 1) * kConvGroup, end = min(begin + p.tokens_per_thread, p.seqlen);
    const int from = next_group > 0 ? token : max(token + kConvGroup - kHistory, 0);
    const int rows = max(0, min(token + kConvGroup, end) - from);
    if (lane == 0) arrive_expecting(barrier + 8 * next_slot, rows * row_bytes);
    __syncwarp();
    if (lane < rows) {
      const T* const x = static_cast<const T*>(p.x) + row * p.x_batch_stride + own.first_channel;
      load_bytes(slots_address + next_slot * kSlot + (from - token + lane) * kConvRowBytes,
                 x + (from + lane) * static_cast<int64>(p.x_token_stride), row_bytes, barrier + 8 * next_slot);
    }
    if (++next_slot == stages) next_slot = 0;
    if (++next_group == groups) next_group = 0, next_tile += walkers;
  };
  for (int i = 0; i < stages; ++i) ask();

  float weight[kParts][kWidth][kPerVector] = {}, bias[kParts][kPerVector] = {};
  if (own.has) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_parameters<T, kWidth>(p.weight, p.weight_fp32, p.bias, p.bias_fp32, channel + part * kPerVector,
                                 weight[part], bias[part]);
    }
  }
  int slot = 0;
  bool is_first = true;
  uint32 parity = 0;
  Sequence sequence{-1, 0, 0};
  const auto place_of = [&](int i) { return slots + slot * kSlot + i * kConvRowBytes + lane * 16; };
  const auto element = [&](int i, int part) { return reinterpret_cast<const Vector<T>*>(place_of(i))[part]; };
  const auto put = [&](int i, const uint4& result) { *reinterpret_cast<uint4*>(place_of(i)) = result; };

  for (int tile = own.walker; tile < tiles; tile += walkers) {
    const int row = tile / static_cast<int>(p.runs);
    int token = tile % static_cast<int>(p.runs) * p.tokens_per_thread;
    const int last = min(token + p.tokens_per_thread, p.seqlen);
    const int64 y_stride = p.y_token_stride;
    T* y = static_cast<T*>(p.y) + row * p.y_batch_stride + token * y_stride +
           own.first_channel;  // of a slot's first token
    float window[kParts][kHistory][kPerVector];
    if constexpr (!kPacked) {
      sequence = {row, 0, p.seqlen};
    } else if (token < sequence.begin || token >= sequence.end) {
      sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
    }

    const auto step = [&](int i) {
      Vector<T> results[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float input[kPerVector], result[kPerVector];
        unpack<T>(element(i, part), input);
#pragma unroll
        for (int c = 0; c < kPerVector; ++c) {
          const float sum = window_sum<T, kWidth>(
              bias[part][c], [&](int k) { return weight[part][k][c]; },
              [&](int k) { return k < kHistory ? window[part][k][c] : input[c]; });
          result[c] = kSilu ? sum * sigmoid<T>(sum) : sum;
#pragma unroll
          for (int k = 0; k + 1 < kHistory; ++k) window[part][k][c] = window[part][k + 1][c];
          window[part][kHistory - 1][c] = input[c];
        }
        results[part] = pack<T>(result);
      }
      put(i, *reinterpret_cast<const uint4*>(results));
    };
    // the window of the first token of a tile, or of a sequence: its part of the sequence is in the slot
    const auto start_window = [&](bool in_slot) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
          const int back = kHistory - k;
          if (in_slot && token - back >= sequence.begin) {
            unpack<T>(element(kConvGroup - back, part), window[part][k]);
          } else {
#pragma unroll
            for (int c = 0; c < kPerVector; ++c) {
              window[part][k][c] = own.has ? before_sequence<T>(p, sequence.index, channel + part * kPerVector + c,
                                                                sequence.begin - (token - back))
                                           : 0.f;
            }
          }
        }
      }
    };

    for (int group = 0; group < groups; ++group) {
      wait(barrier + 8 * slot, parity);
      const int rows = group == 0 ? 0 : min(kConvGroup, last - token);
      if (group == 0) {
        start_window(true);
      } else if (token + kConvGroup <= min(last, sequence.end) && (!kPacked || sequence.index >= 0)) {
#pragma unroll
        for (int i = 0; i < kConvGroup; ++i) step(i);
        token += kConvGroup;
      } else {
        for (int i = 0; i < kConvGroup && token < last; ++i) {
          if (kPacked && token == sequence.end) {
            sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
            start_window(false);
          }
          if (kPacked && sequence.index < 0) {
            put(i, uint4{});
          } else {
            step(i);
          }
          ++token;
        }
      }
      // the slot is y's now, and free once it is read: one turn later
      fence_async_proxy();
      __syncwarp();
      if (lane < rows) {
        store_bytes(y + lane * y_stride, slots_address + slot * kSlot + lane * kConvRowBytes, row_bytes);
      }
      commit_stores();
      y += rows * y_stride;
      wait_for_stores<false, 1>();
      __syncwarp();
      if (!is_first) ask();
      is_first = false;
      if (++slot == stages) slot = 0, parity ^= 1;
    }
  }
  wait_for_stores<false>();
}

}  // namespace hybrid_ops
