// Forward of the SSD scan (Mamba-2) in one kernel: the state stays in registers from the first chunk of a sequence to
// the last, and x, B, C are read once. In a chunk of L = 64 tokens, with a = cumsum(dt' A log2 e), b = a - log2 dt':
//
//     M[L, L] = C[L, N] B^T[N, L] * 2^(a_l - b_s), s < l
//     Y[L, P] = C[L, N] S^T[N, P] * 2^a_l  +  M[L, L] X[L, P]  +  (D + own) X
//     S[P, N] = S * 2^a_last  +  (X * 2^(a_last - b))^T[P, L] B[L, N]
//
// Letters: P headdim, N dstate; `own` is the weight C_l B_l dt'_l of a token in its own y, which no product may round:
// after steep steps there is nothing else. Only S waits for the chunk before. So one warpgroup does nothing but walk S
// from chunk to chunk, passing on in bfloat16 what enters each of them, and others make Y, each of a chunk of its own.
// C and M are register operands, so that shared memory, which is busiest, holds less of what products read.
//
// Warpgroups of a CTA, which hand chunks on through mbarriers:
//     0    warp 0 copies B, C, x, z with TMA into rings of stages; warps 1, 2 make a, b and the weights from dt;
//          warp 3 stores y
//     1..  walkers: S of 64 features and 128 columns each: a head, or a part of one whose headdim or dstate is larger
//     ..   one or two readers: Y
#pragma once

#include "common/ssd_inputs.cuh"
#include "common/ssd_outputs.cuh"
#include "common/ssd_segments.cuh"

namespace hybrid_ops {

// ------------------------------------------------------------------------------------------------ states in memory

// The slot of a sequence in a pool; false where it has none.
__device__ __forceinline__ bool find_slot(const SsdParams& p, const int* slots, int64 place, int64& slot) {
  slot = slots == nullptr ? place : slots[place];
  return slots == nullptr || (slot >= 0 && slot < p.num_slots && slot != p.null_slot);
}

// A thread's part of a state: rows `feature` and `feature` + 8, columns 8 j + 2 (lane % 4) + {0, 1} from `left` on.
// body(i, place): registers i and i + 1 are those at `place`.
template <typename Body>
__device__ __forceinline__ void for_each_pair(const SsdParams& p, int head, int feature, int left, Body body) {
  const int lane = threadIdx.x % 32;
  // what is found out here is not worth a register from one use to the next
  asm volatile("" : "+r"(feature), "+r"(left));
#pragma unroll
  for (int i = 0; i < kStates / 2; i += 2) {
    const int row = feature + (i & 2) * 4, column = left + i / 4 * 8 + 2 * (lane % 4);
    if (row < p.headdim && column < p.dstate) {
      body(i, (static_cast<int64>(head) * p.headdim + row) * p.dstate + column);
    }
  }
}

__device__ __forceinline__ void store_state(const SsdParams& p, const States& states, int64 slot, int head, int feature,
                                            int left, const float (&state)[kStates / 2]) {
  const int64 base = slot * states.stride;
  for_each_pair(p, head, feature, left, [&](int i, int64 place) {
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
__device__ __forceinline__ void load_state(const SsdParams& p, const Unit& unit, int feature, int left,
                                           float (&state)[kStates / 2]) {
#pragma unroll
  for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
  const States& states = p.initial;
  int64 slot;
  if (states.data == nullptr || !find_slot(p, states.slots, unit.sequence, slot)) return;
  const int64 base = slot * states.stride;
  if (states.dtype == DType::float32) {
    const float* source = static_cast<const float*>(states.data) + base;
    for_each_pair(p, unit.head, feature, left, [&](int i, int64 place) {
      const float2 pair = *reinterpret_cast<const float2*>(source + place);
      state[i] = pair.x;
      state[i + 1] = pair.y;
    });
  } else {
    const unsigned short* source = static_cast<const unsigned short*>(states.data) + base;
    for_each_pair(p, unit.head, feature, left, [&](int i, int64 place) {
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

// The state of a walker's features and columns, from chunk to chunk.
template <typename Config>
__device__ __forceinline__ void walk_states(const SsdParams& p, const SharedMemory<Config>& shared, int walker) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Walker<Config> w{shared, walker / Config::kHalves, walker % Config::kHalves, warp, lane, p.nseq < 0};
  const int feature = 64 * w.tile + 16 * warp + lane / 4;  // the thread's first, and feature + 8
  const int left = w.half * kStates;
  uint32 iteration = 0, found = 0, round = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    if constexpr (Config::kSplit) {
      const Pieces<Config> pieces{p, walker, round};
      if (unit.finding) {
        if (pieces.rank() == 0 && p.initial.data != nullptr) {
          load_state(p, unit, feature, left, w.state);
          pieces.store(p.segments, w);
        }
        find_state(p, w, unit, iteration, 0);
        pieces.hand_on(w);
        iteration += unit.chunks;
        found += unit.chunks;
        return;
      }
      pieces.enter(w);
      if (unit.chunks > 0) w.template prepare<false>(iteration);  // not before: registers are few
      ++round;
    } else {
      if (unit.chunks > 0) w.template prepare<false>(iteration);
      load_state(p, unit, feature, left, w.state);
    }
    int c = 0;
    do {  // from state to state that is kept: what stores them would be in the way of the loop over chunks
      for (const int stop = next_stop(p, unit, c); c < stop; ++c, ++iteration) {
        w.template walk<false>(iteration, iteration - found, iteration + 1, c + 1 == unit.chunks);
      }
#pragma unroll 1
      for (int copy = 0; copy < 2; ++copy) {
        States target;
        int64 slot;
        if (find_target(p, unit, c, copy, target, slot)) {
          store_state(p, target, slot, unit.head, feature, left, w.state);
        }
      }
    } while (c < unit.chunks);
  });
}

// ---------------------------------------------------------------------------------------------------- the kernel

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) ssd_kernel(const __grid_constant__ SsdParams p) {
  extern __shared__ unsigned char raw_shared[];
  const SharedMemory<Config> shared{(shared_address(raw_shared) + 1023) & ~1023u, Config::kPaired && p.paired};
  // the same in all lanes, which the compiler must see to let products run side by side
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      init_barrier(shared.loaded(s), 1);
      init_barrier(shared.full(s), 1);
      init_barrier(shared.empty(s), 4 * (Config::kWalkers + 1));
    }
    for (int g = 0; g < Config::kGroupStages; ++g) {
      init_barrier(shared.group_empty(g), 4 * (Config::kWalkers + 1) * (1 + shared.paired));
    }
    for (int buffer = 0; buffer < Config::kBuffers; ++buffer) {
      init_barrier(shared.state_full(buffer), 4 * Config::kWalkers);
      init_barrier(shared.state_empty(buffer), 4);
    }
    for (int reader = 0; reader < Config::kReaders; ++reader) {
      init_barrier(shared.y_full(reader), 4);
      init_barrier(shared.y_empty(reader), 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (shared.paired) cluster_arrive(), cluster_wait();  // before anything comes from the other CTA

  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) copy_chunks<Config>(p, shared);
    } else if (warp <= 2) {
      make_decays<Config>(p, shared, warp - 1);
    } else {
      store_chunks<Config>(p, shared);
    }
  } else if (warpgroup <= Config::kWalkers) {
    take_registers<Config::kWalkerRegisters>();
    walk_states<Config>(p, shared, warpgroup - 1);
  } else {
    take_registers<Config::kReaderRegisters>();
    make_outputs<Config>(p, shared, warpgroup - 1 - Config::kWalkers);
  }
  if (shared.paired) {
    __syncwarp();
    cluster_arrive(), cluster_wait();  // until then the other CTA tells this one what it is done with
  }
}

}  // namespace hybrid_ops
