// States of the SSD scan in memory: those that enter sequences, and those that are kept.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// The slot of a sequence in a pool; false where it has none.
__device__ __forceinline__ bool find_slot(const SsdParams& p, const int* slots, int64 place, int64& slot) {
  slot = slots == nullptr ? place : slots[place];
  return slots == nullptr || (slot >= 0 && slot < p.num_slots && slot != p.null_slot);
}

// A thread's part of 64 features by 128 columns of a state, the `tile`-th and the `half`-th: rows `feature` and
// `feature` + 8, columns 8 j + 2 (lane % 4) + {0, 1} from `left` on. body(i, place): registers i and i + 1 are those at
// `place`.
template <typename Body>
__device__ __forceinline__ void for_each_pair(const SsdParams& p, int head, int tile, int half, Body body) {
  int thread = threadIdx.x % 128;
  // what is found out here is not worth a register from one use to the next
  asm volatile("" : "+r"(thread));
  const int lane = thread % 32, feature = 64 * tile + thread / 32 * 16 + lane / 4, left = half * kStates;
#pragma unroll
  for (int i = 0; i < kStates / 2; i += 2) {
    const int row = feature + (i & 2) * 4, column = left + i / 4 * 8 + 2 * (lane % 4);
    if (row < p.headdim && column < p.dstate) {
      body(i, (static_cast<int64>(head) * p.headdim + row) * p.dstate + column);
    }
  }
}

__device__ __forceinline__ void store_state(const SsdParams& p, const States& states, int64 slot, int head, int tile,
                                            int half, const float (&state)[kStates / 2]) {
  const int64 base = slot * states.stride;
  for_each_pair(p, head, tile, half, [&](int i, int64 place) {
    if (states.dtype == DType::float32) {
      *reinterpret_cast<float2*>(static_cast<float*>(states.data) + base + place) = make_float2(state[i], state[i + 1]);
    } else if (states.dtype == DType::bfloat16) {
      *reinterpret_cast<uint32*>(static_cast<bf16*>(states.data) + base + place) = pack_bf16(state[i], state[i + 1]);
    } else {
      *reinterpret_cast<__half2*>(static_cast<__half*>(states.data) + base + place) =
          __floats2half2_rn(state[i], state[i + 1]);
    }
  });
}

// The dtype is looked at once: with a branch for every pair the loads would wait for each other.
__device__ __forceinline__ void load_state(const SsdParams& p, const Unit& unit, int tile, int half,
                                           float (&state)[kStates / 2]) {
#pragma unroll
  for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
  const States& states = p.initial;
  int64 slot;
  if (states.data == nullptr || !find_slot(p, states.slots, unit.sequence, slot)) return;
  const int64 base = slot * states.stride;
  if (states.dtype == DType::float32) {
    const float* source = static_cast<const float*>(states.data) + base;
    for_each_pair(p, unit.head, tile, half, [&](int i, int64 place) {
      const float2 pair = *reinterpret_cast<const float2*>(source + place);
      state[i] = pair.x;
      state[i + 1] = pair.y;
    });
  } else {
    const unsigned short* source = static_cast<const unsigned short*>(states.data) + base;
    for_each_pair(p, unit.head, tile, half, [&](int i, int64 place) {
      state[i] = __uint_as_float(*reinterpret_cast<const uint32*>(source + place));
    });
#pragma unroll
    for (int i = 0; i < kStates / 2; i += 2) {
      const uint32 pair = __float_as_uint(state[i]);
      const __half2 half = *reinterpret_cast<const __half2*>(&pair);
      const bool brain = states.dtype == DType::bfloat16;
      state[i] = brain ? low_half(pair) : __low2float(half);
      state[i + 1] = brain ? high_half(pair) : __high2float(half);
    }
  }
}

// Chunks of a unit, of which `c` are done, until the next state is kept.
__device__ __forceinline__ int next_stop(const SsdParams& p, const Unit& unit, int c) {
  if (p.interval.data == nullptr) return unit.chunks;
  const int place = unit.position + c * kChunk;
  return min(unit.chunks, c + (p.state_interval - place % p.state_interval) / kChunk);
}

// Where the state after `c` chunks goes, as the `copy`-th of two: kept at this position, final.
__device__ __forceinline__ bool find_target(const SsdParams& p, const Unit& unit, int c, int copy, States& target,
                                            int64& slot) {
  if (copy == 1) {
    target = p.final;
    return target.data != nullptr && c == unit.chunks && unit.first + c * kChunk >= unit.end &&
           (unit.chunks > 0 || unit.begin == unit.end) && find_slot(p, target.slots, unit.sequence, slot);
  }
  target = p.interval;
  if (target.data == nullptr || c == 0) return false;
  const int offset = p.seq_offsets == nullptr ? 0 : p.seq_offsets[unit.sequence];
  const int position = offset + min(unit.first + c * kChunk, unit.end) - unit.begin;
  const int j = position / p.state_interval - offset / p.state_interval - 1;
  const bool packed = target.slots == nullptr && p.interval_base != nullptr;
  const int64 place =
      packed ? p.interval_base[unit.sequence] + j : static_cast<int64>(unit.sequence) * p.num_intervals + j;
  return position % p.state_interval == 0 && (packed ? place : j) < p.num_intervals &&
         find_slot(p, target.slots, place, slot);
}

// body(c) for chunks of a unit in turn, and after each the state of the unit's (first) head wherever it is kept, by the
// first of the CTAs that all have it.
template <typename Config, typename Body>
__device__ __forceinline__ void walk_and_keep(const SsdParams& p, const Unit& unit, int tile, int half,
                                              const float (&state)[kStates / 2], Body body) {
  int c = 0;
  do {  // from state to state that is kept: what stores them would be in the way of the loop over chunks
    for (const int stop = next_stop(p, unit, c); c < stop; ++c) body(c);
#pragma unroll 1
    for (int copy = 0; copy < 2; ++copy) {
      States target;
      int64 slot;
      if (blockIdx.x % Config::kTurns == 0 && find_target(p, unit, c, copy, target, slot)) {
        store_state(p, target, slot, unit.head, tile, half, state);
      }
    }
  } while (c < unit.chunks);
}

}  // namespace hybrid_ops
