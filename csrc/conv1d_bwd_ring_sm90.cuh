// The gradients of conv1d_bwd_sm90.cuh for many tokens, by way of shared memory as in conv1d_ring_sm90.cuh.
//
// A slot has kConvGroup tokens of x and of dy; a tile is preceded by the x of its history, and followed by the kWidth -
// 1 tokens that its last dx need. dx takes the place of the dy of the token that completes it, kWidth - 1 later.
#pragma once

#include "common/conv1d_ring.cuh"
#include "conv1d_bwd_sm90.cuh"

namespace hybrid_ops {

template <typename T, int kWidth, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv1d_bwd_ring_kernel(const __grid_constant__ Conv1dBwdParams p, int stages) {
  constexpr int kParts = ConvWalker<T>::kParts;
  constexpr int kHistory = kWidth - 1;
  constexpr int kOfTensor = kConvGroup * kConvRowBytes, kSlot = 2 * kOfTensor;
  static_assert(kHistory < kConvGroup);
  extern __shared__ float4 dynamic[];
  __shared__ uint64 barriers[kConvThreads / 32][kConvMaxStages];

  const ConvWalker<T> own(p.dim);
  if (!own.exists) return;
  const int lane = own.lane, channel = own.channel;
  const uint32 row_bytes = own.row_bytes;
  const int tiles = p.batch * p.runs, groups = 2 + p.tokens_per_thread / kConvGroup;

  char* const slots = reinterpret_cast<char*>(dynamic) + own.warp * stages * kSlot;
  const uint32 slots_address = shared_address(slots), barrier = shared_address(barriers[own.warp]);
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) init_barrier(barrier + 8 * i, 1);
    fence_barrier_init();
  }
  __syncwarp();

  // what is asked for next: lanes 0 to 3 ask for x, the four behind them for dy
  int next_tile = own.walker, next_group = 0, next_slot = 0;
  const auto ask = [&] {
    if (next_tile >= tiles) return;
    const int row = next_tile / static_cast<int>(p.runs);
    const int begin = next_tile % static_cast<int>(p.runs) * p.tokens_per_thread;
    const int token = begin + (next_group - 1) * kConvGroup;
    const int end = min(begin + p.tokens_per_thread + kHistory, p.seqlen);
    const int from = next_group > 0 ? token : max(begin - kHistory, 0);
    const int rows = max(0, min(token + kConvGroup, end) - from);
    const uint32 slot_barrier = barrier + 8 * next_slot;
    if (lane == 0) arrive_expecting(slot_barrier, rows * row_bytes * (next_group > 0 ? 2 : 1));
    __syncwarp();
    const int i = lane % kConvGroup;
    if (i < rows && (lane < kConvGroup || (lane < 2 * kConvGroup && next_group > 0))) {
      const bool is_x = lane < kConvGroup;
      const T* const source = is_x ? static_cast<const T*>(p.x) + row * p.x_batch_stride
                                   : static_cast<const T*>(p.dy) + row * p.dy_batch_stride;
      const int64 offset = (from + i) * static_cast<int64>(is_x ? p.x_token_stride : p.dy_token_stride);
      load_bytes(slots_address + next_slot * kSlot + (is_x ? 0 : kOfTensor) + (from - token + i) * kConvRowBytes,
                 source + offset + own.first_channel, row_bytes, slot_barrier);
    }
    if (++next_slot == stages) next_slot = 0;
    if (++next_group == groups) next_group = 0, next_tile += own.walkers;
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
  float dweight[kParts][kWidth][kPerVector] = {}, dbias[kParts][kPerVector] = {};
  int slot = 0;
  bool is_first = true;
  uint32 parity = 0;
  Sequence sequence{-1, 0, 0};
  const auto x_place = [&](int i) { return slots + slot * kSlot + i * kConvRowBytes + lane * 16; };
  const auto load = [](const char* place, int part, float (&values)[kPerVector]) {
    unpack<T>(reinterpret_cast<const Vector<T>*>(place)[part], values);
  };

  for (int tile = own.walker; tile < tiles; tile += own.walkers) {
    const int row = tile / static_cast<int>(p.runs);
    const int first = tile % static_cast<int>(p.runs) * p.tokens_per_thread;
    const int last = min(first + p.tokens_per_thread, p.seqlen);
    const int64 dx_stride = p.dx_token_stride;
    T* const dx = static_cast<T*>(p.dx) + row * p.dx_batch_stride + own.first_channel;
    if constexpr (!kPacked) {
      sequence = {row, 0, p.seqlen};
    } else if (first < sequence.begin || first >= sequence.end) {
      sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, first);
    }

    // inputs[k] and dsums[k] belong to the token kHistory - k before `token`, as in conv1d_bwd_kernel
    float inputs[kParts][kHistory][kPerVector], dsums[kParts][kHistory][kPerVector];
    int token = first;
    const auto start_windows = [&](bool in_slot) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
          const int back = kHistory - k;
          if (in_slot && token - back >= sequence.begin && (!kPacked || sequence.index >= 0)) {
            load(x_place(kConvGroup - back), part, inputs[part][k]);
          } else {
            const int column = kHistory - (sequence.begin - (token - back));
#pragma unroll
            for (int c = 0; c < kPerVector; ++c) {
              inputs[part][k][c] = own.has ? load_state<T>(p, p.initial_states, p.initial_strides, sequence.index,
                                                           channel + part * kPerVector + c, column)
                                           : 0.f;
            }
          }
#pragma unroll
          for (int c = 0; c < kPerVector; ++c) dsums[part][k][c] = 0.f;
        }
      }
    };
    const auto step = [&](int i, bool is_own, bool is_zero) {
      Vector<T> results[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float input[kPerVector], dout[kPerVector], result[kPerVector];
        load(x_place(i), part, input);
        load(x_place(i) + kOfTensor, part, dout);
#pragma unroll
        for (int c = 0; c < kPerVector; ++c) {
          if (is_zero) input[c] = dout[c] = 0.f;
          const float sum = window_sum<T, kWidth>(
              bias[part][c], [&](int k) { return weight[part][k][c]; },
              [&](int k) { return k < kHistory ? inputs[part][k][c] : input[c]; });
          const float dsum = through_activation<T, kSilu>(dout[c], sum);
          if (is_own) {
#pragma unroll
            for (int k = 0; k < kHistory; ++k)
              dweight[part][k][c] = fmaf(dsum, inputs[part][k][c], dweight[part][k][c]);
            dweight[part][kHistory][c] = fmaf(dsum, input[c], dweight[part][kHistory][c]);
            dbias[part][c] += dsum;
          }
          result[c] = weight[part][0][c] * dsum;
#pragma unroll
          for (int k = 1; k < kWidth; ++k)
            result[c] = fmaf(weight[part][k][c], dsums[part][kHistory - k][c], result[c]);
#pragma unroll
          for (int k = 0; k + 1 < kHistory; ++k) {
            inputs[part][k][c] = inputs[part][k + 1][c];
            dsums[part][k][c] = dsums[part][k + 1][c];
          }
          inputs[part][kHistory - 1][c] = input[c];
          dsums[part][kHistory - 1][c] = dsum;
        }
        results[part] = pack<T>(result);
      }
      *reinterpret_cast<uint4*>(x_place(i) + kOfTensor) = *reinterpret_cast<const uint4*>(results);
    };
    // behind a sequence's last token ds is zero, and its last kHistory inputs are its final state
    const auto finish_sequence = [&] {
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        const int written = token - kHistory + i;
        if (!own.has || written < max(first, sequence.begin) || written >= last) continue;
        Vector<T> results[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          float result[kPerVector];
#pragma unroll
          for (int c = 0; c < kPerVector; ++c) {
            result[c] =
                load_state<T>(p, p.dfinal_states, p.dfinal_strides, sequence.index, channel + part * kPerVector + c, i);
#pragma unroll
            for (int k = i + 1; k < kWidth; ++k)
              result[c] = fmaf(weight[part][k][c], dsums[part][kHistory + i - k][c], result[c]);
          }
          results[part] = pack<T>(result);
        }
        T* const place = dx + written * dx_stride + lane * kParts * kPerVector;
        *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(results);
      }
    };

    bool goes_on = true;
    for (int group = 0; group < groups; ++group) {
      wait(barrier + 8 * slot, parity);
      const int token_of_slot = token;
      unsigned written = 0;  // bit i: in the slot's row i is the dx of the token kHistory before
      if (group == 0) {
        start_windows(true);
      } else if (token + kConvGroup <= min(last, sequence.end) && (!kPacked || sequence.index >= 0)) {
        const int from = max(first, sequence.begin) + kHistory;
#pragma unroll
        for (int i = 0; i < kConvGroup; ++i) {
          step(i, true, false);
          written |= static_cast<unsigned>(token + i >= from) << i;
        }
        token += kConvGroup;
      } else {
        for (int i = 0; i < kConvGroup && goes_on; ++i) {
          if (token == sequence.end) {
            finish_sequence();
            goes_on = token < last;
            if (!goes_on) break;
            sequence = find_sequence(p.cu_seqlens, p.nseq, p.seqlen, token);
            start_windows(false);
          }
          goes_on = token < last + kHistory;
          if (!goes_on) break;
          step(i, token < last, kPacked && sequence.index < 0);
          written |= static_cast<unsigned>(token >= max(first, sequence.begin) + kHistory) << i;
          ++token;
        }
      }
      // the slot is dx's now, and free once it is read: one turn later
      fence_async_proxy();
      __syncwarp();
      if (lane < kConvGroup && (written >> lane & 1)) {
        store_bytes(dx + (token_of_slot + lane - kHistory) * dx_stride,
                    slots_address + slot * kSlot + kOfTensor + lane * kConvRowBytes, row_bytes);
      }
      commit_stores();
      wait_for_stores<false, 1>();
      __syncwarp();
      if (!is_first) ask();
      is_first = false;
      if (++slot == stages) slot = 0, parity ^= 1;
    }
  }
  wait_for_stores<false>();

  if (!own.has) return;
  const int64 of_tap = static_cast<int64>(p.num_partials) * p.dim;
  float* const partials = static_cast<float*>(p.partials) + static_cast<int64>(own.walker) * p.dim + channel;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
      const float* const sums = k < kWidth ? dweight[part][k] : dbias[part];
      *reinterpret_cast<float4*>(partials + k * of_tap + part * kPerVector) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }
}

}  // namespace hybrid_ops
