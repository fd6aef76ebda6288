// Forward of the SSD scan (Mamba-2) in one kernel: the state stays in registers from the first chunk of a sequence to
// the last, and x, B, C are read once. In a chunk of L = 64 tokens, with a = cumsum(dt' A log2 e), b = a - log2 dt':
//
//     M[L, L]   = C[L, N] B^T[N, L] * 2^(a_l - b_s), s < l
//     Y^T[P, L] = S[P, N] C^T[N, L] * 2^a_l  +  X^T[P, L] M^T[L, L]  +  (D + own) X^T
//     S[P, N]   = S * 2^a_last  +  (X * 2^(a_last - b))^T[P, L] B[L, N]
//
// Everything is transposed so that a head's P features are the 64 rows of a wgmma: the state, which is the sum of one
// product, then is a register operand of the next, and never passes through shared memory. Letters: P headdim, N
// dstate; `own` is the weight C_l B_l dt'_l of a token in its own y, which no product may round: after steep steps
// there is nothing else.
//
// Warpgroups of a CTA, which hand chunks on through mbarriers:
//     0    warp 0 copies B, C, x, z with TMA into a ring of stages; warps 1, 2 turn dt into a, b and their powers;
//          warp 3 stores y
//     1    M and own of each head, from one C B^T for all heads of the CTA
//     2..  a state of 64 rows and 128 columns each: a head, or a part of one whose headdim or dstate is larger
#pragma once

#include "common/ssd_inputs.cuh"

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
  asm volatile("" : "+r"(feature));  // what is found out here is not worth a register from one use to the next
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

__device__ __forceinline__ void load_state(const SsdParams& p, const Unit& unit, int head, int feature, int left,
                                           float (&state)[kStates / 2]) {
#pragma unroll
  for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
  States states = p.initial;
  int64 slot = static_cast<int64>(unit.slot) * p.parts;
  bool found = true;
  if (unit.segment > 0) {
    states = segment_states(p);
  } else {
    found = states.data != nullptr && find_slot(p, states.slots, unit.sequence, slot);
  }
  if (found) {
    const Floats source{states.data, states.dtype};
    const int64 base = slot * states.stride;
    for_each_pair(p, head, feature, left, [&](int i, int64 place) {
      state[i] = source[base + place];
      state[i + 1] = source[base + place + 1];
    });
  }
}

// X^T of a warp's 16 features, of tokens 16 k .. in x[k]: an operand of wgmma.
__device__ __forceinline__ void load_x(uint32 (&x)[4][4], uint32 tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    load_matrices_transposed(x[k], swizzled(tile, 16 * k + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2));
  }
}

// (D + own) x added to Y^T, the gate, and the way into the tile of x, whose columns no other warp reads.
template <typename Config>
__device__ __forceinline__ void finish_chunk(const SharedMemory<Config>& shared, int s, int tile, const float (&D)[2],
                                             const float (&own)[16], const float (&y)[32]) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  uint32 x[4][4];
  load_x(x, shared.x(s, tile), warp, lane);
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // 16 tokens
    const uint32 row = 16 * k + lane / 16 * 8 + lane % 8, column = 2 * warp + lane / 8 % 2;
    uint32 z[4], packed[4];
    if constexpr (Config::kGated) {
      load_matrices_transposed(z, swizzled(shared.stage(s) + Config::kZ + tile * Config::kTileBytes, row, column));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // {8 tokens, the next 8} x {features 0-7, 8-15}
      const int r = 8 * k + 2 * i, token = 4 * k + i / 2 * 2;
      float y0 = y[r] + (D[i % 2] + own[token]) * low_half(x[k][i]);
      float y1 = y[r + 1] + (D[i % 2] + own[token + 1]) * high_half(x[k][i]);
      if constexpr (Config::kGated) {
        const float z0 = low_half(z[i]), z1 = high_half(z[i]);
        y0 *= z0 * sigmoid<bf16>(z0);
        y1 *= z1 * sigmoid<bf16>(z1);
      }
      packed[i] = pack_bf16(y0, y1);
    }
    store_matrices_transposed(swizzled(shared.x(s, tile), row, column), packed[0], packed[1], packed[2], packed[3]);
  }
  __syncwarp();
  if (lane == 0) arrive(shared.output_full(s, tile));
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
    return target.data != nullptr && unit.last && c == unit.chunks && find_slot(p, target.slots, unit.sequence, slot);
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

// kHalf: of the columns of its tile's state that the warpgroup has. Y^T is the sum of what both have found; the first
// adds them up.
template <typename Config, int kHalf>
__device__ __forceinline__ void walk_states(const SsdParams& p, const SharedMemory<Config>& shared, int tile) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int head_of_cta = Config::kHeads == 1 ? 0 : tile;
  const int feature = (Config::kHeads == 1 ? tile * 64 : 0) + 16 * warp + lane / 4;  // and feature + 8
  constexpr int kLeft = kHalf * kStates, kGroupOffset = kHalf * kStates / 64 * Config::kTileBytes;
  float state[kStates / 2];
  float log_decay = 0.f;
  float D[2] = {};  // of the thread's two rows of features

  const auto walk_chunk = [&](int iteration) {
    const int s = iteration % Config::kStages, m = iteration % Config::kBuffers;
    const uint32 stage = shared.stage(s);
    float y[32], y_mixed[32];  // Y^T [64 features, 64 tokens]: of the state, of M
    uint32 x[4][4];
    float weight[16], reach[16], own[16];
    const auto add_mixed = [&](float (&sum)[32], bool add) {  // X^T M^T
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<false>(sum, x[k], swizzled_operand(shared.mixed(m) + head_of_cta * Config::kTileBytes, 32 * k),
                     add || k > 0);
      }
      wgmma_commit();
    };
    wait(shared.full(s), (iteration / Config::kStages) & 1);
    wait(shared.mixed_full(m), (iteration / Config::kBuffers) & 1);
    if constexpr (Config::kHalves == 1 || Config::kStatesOnly) load_x(x, shared.x(s, tile), warp, lane);
    const float keep = load_shared(shared.decay(s, head_of_cta, kReach) + place_of(63) * 4);
    if constexpr (Config::kStatesOnly) {
      log_decay += load_shared(shared.decay(s, head_of_cta, kA) + place_of(63) * 4);
#pragma unroll
      for (int i = 0; i < kStates / 2; ++i) state[i] *= keep;
    } else {
      if constexpr (Config::kTwoSums) {
        add_mixed(y_mixed, false);
        wgmma_wait<1>();  // for the state, which has long been there: else the compiler waits for both
      }
      uint32 entering[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float* pair = &state[2 * i];
        entering[i] = pack_bf16(pair[0], pair[1]);
        pair[0] *= keep;
        pair[1] *= keep;
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 8; ++k) {  // S C^T
        const uint32 offset = Config::kC + kGroupOffset + k / 4 * Config::kTileBytes + k % 4 * 32;
        wgmma<false>(y, &entering[4 * k], swizzled_operand(stage, offset), k > 0);
      }
      wgmma_commit();
      if constexpr (!Config::kTwoSums) {
        wgmma_wait<0>();
        if constexpr (Config::kHalves == 2) load_x(x, shared.x(s, tile), warp, lane);  // there was no room before
        load_tokens(reach, shared.decay(s, head_of_cta, kReach), lane);
#pragma unroll
        for (int i = 0; i < 32; ++i) y[i] *= reach[i / 4 * 2 + i % 2];
        if constexpr (kHalf == 0) add_mixed(y, true);
      }
    }

    load_tokens(weight, shared.decay(s, head_of_cta, kWeight), lane);
    if constexpr (!Config::kStatesOnly) wgmma_wait<Config::kTwoSums>();  // X^T M^T has read x
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = i / 4 * 4 + i % 4 / 2 * 2;
      uint32& pair = x[i / 4][i % 4];
      pair = pack_bf16(low_half(pair) * weight[token], high_half(pair) * weight[token + 1]);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // S += (scaled X)^T B
      wgmma<true>(state, x[k], swizzled_operand(stage, Config::kB + kGroupOffset + k * 2048, Config::kTileBytes), true);
    }
    wgmma_commit();
    if constexpr (!Config::kStatesOnly && kHalf == 1) {
      wait(shared.partial_empty(), (iteration + 1) & 1);
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        store_shared4(shared.partial() + (i / 4 * 128 + thread) * 16, y[i], y[i + 1], y[i + 2], y[i + 3]);
      }
      __syncwarp();
      if (lane == 0) arrive(shared.partial_full());
    } else if constexpr (!Config::kStatesOnly) {
      if constexpr (Config::kTwoSums) {
        load_tokens(reach, shared.decay(s, head_of_cta, kReach), lane);
        wgmma_wait<1>();
      }
      load_tokens(own, shared.own(m, head_of_cta), lane);
      if constexpr (Config::kTwoSums) {
#pragma unroll
        for (int i = 0; i < 32; ++i) y[i] = fmaf(y[i], reach[i / 4 * 2 + i % 2], y_mixed[i]);
      }
      if constexpr (Config::kHalves == 2) {
        wait(shared.partial_full(), iteration & 1);
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
          float other[4];
          load_shared4(other, shared.partial() + (i / 4 * 128 + thread) * 16);
#pragma unroll
          for (int k = 0; k < 4; ++k) y[i + k] += other[k];
        }
        __syncwarp();
        if (lane == 0) arrive(shared.partial_empty());
      }
      finish_chunk(shared, s, tile, D, own, y);
    }
    wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) arrive(shared.mixed_empty(m));
    if (lane == 0) arrive(shared.empty(s));
  };

  int iteration = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    const int head = unit.head + head_of_cta;
    if constexpr (Config::kStatesOnly) {
#pragma unroll
      for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
      log_decay = 0.f;
      for (int c = 0; c < unit.chunks; ++c, ++iteration) walk_chunk(iteration);
      store_state(p, segment_states(p), unit.slot, head, feature, kLeft, state);
      if (thread == 0 && kHalf == 0 && (Config::kHeads > 1 || tile == 0)) {
        p.segment_decay[static_cast<int64>(unit.slot) * p.nheads + head] = log_decay;
      }
    } else {
      load_state(p, unit, head, feature, kLeft, state);
      if (p.D.data != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // of no row beyond the last is y stored
          D[i] = p.D[head * p.D_strides[0] + min(feature + 8 * i, p.headdim - 1) * p.D_strides[1]];
        }
      }
      int c = 0;
      do {  // from state to state that is kept: what stores them would be in the way of the loop over chunks
        for (const int stop = next_stop(p, unit, c); c < stop; ++c, ++iteration) walk_chunk(iteration);
#pragma unroll 1
        for (int copy = 0; copy < 2; ++copy) {
          States target;
          int64 slot;
          if (find_target(p, unit, c, copy, target, slot)) {
            store_state(p, target, slot, head, feature, kLeft, state);
          }
        }
      } while (c < unit.chunks);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- the kernel

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) ssd_kernel(const __grid_constant__ SsdParams p) {
  extern __shared__ unsigned char raw_shared[];
  const SharedMemory<Config> shared{(shared_address(raw_shared) + 1023) & ~1023u};
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      init_barrier(shared.full(s), 1 + Config::kHeads);
      init_barrier(shared.empty(s), 4 + 4 * Config::kWalkers + (Config::kStatesOnly ? 0 : Config::kTiles));
      for (int tile = 0; tile < Config::kTiles; ++tile) init_barrier(shared.output_full(s, tile), 4);
    }
    for (int m = 0; m < Config::kBuffers; ++m) {
      init_barrier(shared.mixed_full(m), 4);
      init_barrier(shared.mixed_empty(m), 4 * Config::kWalkers);
    }
    if constexpr (Config::kHalves == 2) {
      init_barrier(shared.partial_full(), 4);
      init_barrier(shared.partial_empty(), 4);
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
    } else if (!Config::kStatesOnly) {
      store_chunks<Config>(p, shared);
    }
  } else if (warpgroup == 1) {
    give_registers<Config::kMixRegisters>();
    mix_chunks<Config>(p, shared);
  } else {
    take_registers<Config::kStateRegisters>();
    if constexpr (Config::kHalves == 2) {
      if (warpgroup == 2) {
        walk_states<Config, 0>(p, shared, 0);
      } else {
        walk_states<Config, 1>(p, shared, 0);
      }
    } else {
      walk_states<Config, 0>(p, shared, warpgroup - 2);
    }
  }
}

// Between the states of the segments and the scan: from what each part adds to the state that enters each segment. A
// thread has four elements of a sequence's state.
__global__ void __launch_bounds__(256) ssd_join_kernel(const __grid_constant__ SsdParams p) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int elements = p.headdim * p.dstate, element = (blockIdx.x * 256 + threadIdx.x) * 4;
  if (element >= elements) return;
  Unit unit;
  find_sequence(p, sequence, unit);
  const int64 place = static_cast<int64>(head) * elements + element;
  float state[4] = {};
  int64 slot;
  if (p.initial.data != nullptr && find_slot(p, p.initial.slots, sequence, slot)) {
    const Floats source{p.initial.data, p.initial.dtype};
    for (int i = 0; i < 4; ++i) state[i] = source[slot * p.initial.stride + place + i];
  }
  slot = static_cast<int64>(first_slot(p, sequence)) * p.parts;
  for (int chunk = 0; chunk < unit.chunks; chunk += p.segment_chunks, slot += p.parts) {
    const bool last = chunk + p.segment_chunks >= unit.chunks;
    float entering[4];
    for (int i = 0; i < 4; ++i) entering[i] = state[i];
    for (int part = 0; part < p.parts && !last; ++part) {
      const float keep = exp2f(p.segment_decay[(slot + part) * p.nheads + head]);
      const float4 added =
          *reinterpret_cast<const float4*>(p.segment_states + (slot + part) * p.nheads * elements + place);
      state[0] = fmaf(state[0], keep, added.x);
      state[1] = fmaf(state[1], keep, added.y);
      state[2] = fmaf(state[2], keep, added.z);
      state[3] = fmaf(state[3], keep, added.w);
    }
    *reinterpret_cast<float4*>(p.segment_states + slot * p.nheads * elements + place) =
        make_float4(entering[0], entering[1], entering[2], entering[3]);
  }
}

}  // namespace hybrid_ops
