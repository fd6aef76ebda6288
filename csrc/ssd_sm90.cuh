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

namespace hybrid_ops {

// ------------------------------------------------------------------------------------------------ states in memory

// The slot of a sequence in a pool; false where it has none.
__device__ __forceinline__ bool find_slot(const SsdParams& p, const int* slots, int64 place, int64& slot) {
  slot = slots == nullptr ? place : slots[place];
  return slots == nullptr || (slot >= 0 && slot < p.num_slots && slot != p.null_slot);
}

__device__ __forceinline__ States segment_states(const SsdParams& p) {
  return {p.segment_states, DType::float32, static_cast<int64>(p.nheads) * p.headdim * p.dstate, nullptr};
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
__device__ __forceinline__ void load_state(const SsdParams& p, const Unit& unit, int head, int feature, int left,
                                           float (&state)[kStates / 2]) {
#pragma unroll
  for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
  States states = p.initial;
  int64 slot = static_cast<int64>(unit.slot) * p.parts;
  if (p.segment_chunks > 0 && unit.chunks > 0) {
    // also what enters the first segment: the pool may have the sequence's last state already, from another CTA
    states = segment_states(p);
  } else if (states.data == nullptr || !find_slot(p, states.slots, unit.sequence, slot)) {
    return;
  }
  const int64 base = slot * states.stride;
  if (states.dtype == DType::float32) {
    const float* source = static_cast<const float*>(states.data) + base;
    for_each_pair(p, head, feature, left, [&](int i, int64 place) {
      const float2 pair = *reinterpret_cast<const float2*>(source + place);
      state[i] = pair.x;
      state[i + 1] = pair.y;
    });
  } else {
    const unsigned short* source = static_cast<const unsigned short*>(states.data) + base;
    for_each_pair(p, head, feature, left, [&](int i, int64 place) {
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

// X^T of a warp's 16 features, of tokens 16 k .. in x[k]: an operand of wgmma.
__device__ __forceinline__ void load_x(uint32 (&x)[4][4], uint32 tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    load_matrices_transposed(x[k], swizzled(tile, 16 * k + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2));
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
           find_slot(p, target.slots, unit.sequence, slot);
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

// What enters a chunk, in bfloat16, to where the next products find it, if anything reads these rows.
template <typename Config>
__device__ __forceinline__ void pass_on(uint32 columns, const float (&state)[kStates / 2], int row, int lane) {
#pragma unroll
  for (int j = 0; j < kStates / 8; j += 2) {  // columns 8 j to 8 j + 15
    store_matrices(swizzled(columns + j / 8 * Config::kColumnBytes, row + lane % 16, j % 8 + lane / 16),
                   pack_bf16(state[4 * j], state[4 * j + 1]), pack_bf16(state[4 * j + 2], state[4 * j + 3]),
                   pack_bf16(state[4 * j + 4], state[4 * j + 5]), pack_bf16(state[4 * j + 6], state[4 * j + 7]));
  }
}

// x of a warp's 16 features times the tokens' weights. The two parts of a weight make it one rounding.
__device__ __forceinline__ void load_scaled_x(uint32 (&x)[4][4], uint32 tile, uint32 weights, int warp, int lane) {
  load_x(x, tile, warp, lane);
  float parts[16];
  load_tokens(parts, weights, lane);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int pair = i / 4 * 4 + i % 4 / 2 * 2;  // of tokens
    x[i / 4][i % 4] = scale_bf16(x[i / 4][i % 4], __float_as_uint(parts[pair]), __float_as_uint(parts[pair + 1]));
  }
}

// The state of the 64 features of a tile, or of one half of their columns, from chunk to chunk.
template <typename Config>
__device__ __forceinline__ void walk_states(const SsdParams& p, const SharedMemory<Config>& shared, int walker) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int tile = walker / Config::kHalves, half = walker % Config::kHalves;
  const int row = 64 * tile + 16 * warp;  // the warp's first feature
  const int feature = row + lane / 4;     // the thread's, and feature + 8
  const int left = half * kStates;
  const bool never = p.nseq < 0;
  float state[kStates / 2];
  float log_decay = 0.f;
  uint32 x[4][4];  // the next chunk's x, scaled
  float a_last;    // log2 of what it leaves of the state

  const auto prepare = [&](uint32 iteration) {
    const int s = iteration % Config::kStages;
    shared.wait_for_inputs(iteration);
    load_scaled_x(x, shared.x(s, tile), shared.per_token(s, kWeight), warp, lane);
    a_last = load_shared(shared.per_token(s, kA) + place_of(kChunk - 1) * 4);
    __syncwarp();
    if (lane == 0) arrive(shared.empty(s));
  };

  const auto walk_chunk = [&](uint32 iteration, bool last) {
    const uint32 group = shared.group(iteration);
    uint32 now[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      now[i / 4][i % 4] = Config::kAhead ? copy_operand(x[i / 4][i % 4], never) : x[i / 4][i % 4];
    }
    if constexpr (Config::kStatesOnly) {
      log_decay += a_last;
    } else {
      const int buffer = iteration % Config::kBuffers;
      wait(shared.state_empty(buffer), (iteration / Config::kBuffers + 1) & 1);
      if (row < Config::kFeatures) {
        const uint32 columns = shared.state(buffer) + half * (kStates / 64) * Config::kColumnBytes;
        pass_on<Config>(columns, state, row, lane);
      }
    }
    const float keep = exp2_fast(a_last);
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) state[i] *= keep;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // S += (scaled X)^T B
      const uint32 B = group + half * (kStates / 64) * Config::kTileBytes;
      wgmma<true>(state, now[k], swizzled_operand(B, k * 2048, Config::kTileBytes), true);
    }
    wgmma_commit();
    if constexpr (!Config::kStatesOnly) {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive(shared.state_full(iteration % Config::kBuffers));
    }
    if (Config::kAhead && !last) prepare(iteration + 1);
    wgmma_wait<0>();
    keep_operands(now, never, group);
    __syncwarp();
    if (lane == 0) arrive(shared.group_empty(iteration));
    if (!Config::kAhead && !last) prepare(iteration + 1);
  };

  if (!Config::kStatesOnly && p.segment_chunks > 0) wait_for_kernel_before();  // for the states of segments
  uint32 iteration = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    if (unit.chunks > 0) prepare(iteration);
    if constexpr (Config::kStatesOnly) {
#pragma unroll
      for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
      log_decay = 0.f;
      for (int c = 0; c < unit.chunks; ++c, ++iteration) walk_chunk(iteration, c + 1 == unit.chunks);
      store_state(p, segment_states(p), unit.slot, unit.head, feature, left, state);
      if (thread == 0 && walker == 0) {
        p.segment_decay[static_cast<int64>(unit.slot) * p.nheads + unit.head] = log_decay;
      }
    } else {
      load_state(p, unit, unit.head, feature, left, state);
      int c = 0;
      do {  // from state to state that is kept: what stores them would be in the way of the loop over chunks
        for (const int stop = next_stop(p, unit, c); c < stop; ++c, ++iteration) {
          walk_chunk(iteration, c + 1 == unit.chunks);
        }
#pragma unroll 1
        for (int copy = 0; copy < 2; ++copy) {
          States target;
          int64 slot;
          if (find_target(p, unit, c, copy, target, slot)) {
            store_state(p, target, slot, unit.head, feature, left, state);
          }
        }
      } while (c < unit.chunks);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- the kernel

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas) ssd_kernel(const __grid_constant__ SsdParams p) {
  extern __shared__ unsigned char raw_shared[];
  if constexpr (Config::kStatesOnly) let_next_begin();
  const SharedMemory<Config> shared{(shared_address(raw_shared) + 1023) & ~1023u};
  // the same in all lanes, which the compiler must see to let products run side by side
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      init_barrier(shared.loaded(s), 1);
      init_barrier(shared.full(s), 1);
      init_barrier(shared.empty(s), 4 * Config::kWalkers + (Config::kStatesOnly ? 0 : 4));
    }
    for (int g = 0; g < Config::kGroupStages; ++g) {
      init_barrier(shared.group_empty(g), 4 * Config::kWalkers + (Config::kStatesOnly ? 0 : 4));
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

  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) copy_chunks<Config>(p, shared);
    } else if (warp <= 2) {
      make_decays<Config>(p, shared, warp - 1);
    } else if constexpr (!Config::kStatesOnly) {
      store_chunks<Config>(p, shared);
    }
  } else if (warpgroup <= Config::kWalkers) {
    take_registers<Config::kWalkerRegisters>();
    walk_states<Config>(p, shared, warpgroup - 1);
  } else if constexpr (!Config::kStatesOnly) {
    take_registers<Config::kReaderRegisters>();
    make_outputs<Config>(p, shared, warpgroup - 1 - Config::kWalkers);
  }
}

// Between the states of the segments and the scan: from what each part adds to the state that enters each segment. A
// thread has four elements of a sequence's state. What several parts add is loaded at once, before anything is stored.
__global__ void __launch_bounds__(256) ssd_join_kernel(const __grid_constant__ SsdParams p) {
  constexpr int kAtOnce = 8;
  let_next_begin();
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int elements = p.headdim * p.dstate, element = (blockIdx.x * 256 + threadIdx.x) * 4;
  if (element >= elements) return;
  Unit unit;
  find_sequence(p, sequence, unit);
  const int64 place = static_cast<int64>(head) * elements + element;
  float4 state = {};
  int64 slot;
  if (p.initial.data != nullptr && find_slot(p, p.initial.slots, sequence, slot)) {
    const Floats source{p.initial.data, p.initial.dtype};
    slot = slot * p.initial.stride + place;
    state = make_float4(source[slot], source[slot + 1], source[slot + 2], source[slot + 3]);
  }
  const int64 first = static_cast<int64>(first_slot(p, sequence)) * p.parts;
  const auto states_of = [&](int part) {
    return reinterpret_cast<float4*>(p.segment_states + (first + part) * p.nheads * elements + place);
  };
  wait_for_kernel_before();
  // the last segment's parts lead nowhere
  const int parts = max((unit.chunks + p.segment_chunks - 1) / p.segment_chunks - 1, 0) * p.parts;
  for (int part = 0; part < parts; part += kAtOnce) {
    float keep[kAtOnce];
    float4 added[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (part + i >= parts) continue;
      keep[i] = exp2f(p.segment_decay[(first + part + i) * p.nheads + head]);
      added[i] = *states_of(part + i);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (part + i >= parts) continue;
      if ((part + i) % p.parts == 0) *states_of(part + i) = state;
      state.x = fmaf(state.x, keep[i], added[i].x);
      state.y = fmaf(state.y, keep[i], added[i].y);
      state.z = fmaf(state.z, keep[i], added[i].z);
      state.w = fmaf(state.w, keep[i], added[i].w);
    }
  }
  if (unit.chunks > 0) *states_of(parts) = state;
}

}  // namespace hybrid_ops
