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
//     0    warp 0 copies B, C, x, z with TMA (z plainly where TMA cannot) into rings of stages; warps 1, 2 make a, b
//          and the weights from dt; warp 3 stores y
//     1..  walkers: S of 64 features and 128 columns each: a head, or a part of one whose headdim or dstate is larger
//     ..   one or two readers: Y
#pragma once

#include "common/ssd_inputs.cuh"
#include "common/ssd_outputs.cuh"
#include "common/ssd_segments.cuh"
#include "common/ssd_states.cuh"

namespace hybrid_ops {

// The first of two CTAs that take turns waits until the other has the state that enters the `turn`-th sequence.
template <typename Config>
__device__ __forceinline__ void enter_in_turn(const SharedMemory<Config>& shared, uint32 turn, int lane) {
  if (cluster_rank() == 0) {
    wait_for_count(shared.entered(), 4 * Config::kWalkers * (turn + 1));
  } else {
    __syncwarp();
    if (lane == 0) count_in_cluster(address_in_cta(shared.entered(), 0));
  }
}

// The state of a walker's features and columns, from chunk to chunk.
template <typename Config>
__device__ __forceinline__ void walk_states(const SsdParams& p, const SharedMemory<Config>& shared, int walker) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Walker<Config> w{shared, walker / Config::kHalves, walker % Config::kHalves, warp, lane, p.nseq < 0};
  uint32 iteration = 0, found = 0, entered = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    if constexpr (Config::kSplit) {
      const Pieces<Config> pieces{p, walker, unit.round};
      if (unit.finding) {
        if (pieces.rank() == 0 && p.initial.data != nullptr) {
          load_state(p, unit, w.tile, w.half, w.state);
          pieces.store(p.segments, w);
        }
        find_state(p, w, unit, iteration, 0);
        pieces.hand_on(w);
        iteration += unit.chunks;
        found += unit.chunks;
        return;
      }
      pieces.enter(w);
      if (unit.chunks > 0) w.prepare(iteration);  // not before: registers are few
    } else {
      if (unit.chunks > 0) w.prepare(iteration);
      load_state(p, unit, w.tile, w.half, w.state);
    }
    walk_and_keep<Config>(p, unit, w.tile, w.half, w.state, [&](int c) {
      w.template walk<false>(iteration, (iteration - found) / Config::kTurns, iteration + 1, c + 1 == unit.chunks);
      ++iteration;
      // what enters is in registers now; before, the first CTA must not store a state, perhaps in the same slot
      if (Config::kTurns > 1 && c == 0 && p.initial.data != nullptr) enter_in_turn(shared, entered++, lane);
    });
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
      init_barrier(shared.loaded(s), Config::kGated && p.plain_z != nullptr ? 33 : 1);  // see copy_chunks
      init_barrier(shared.full(s), 1);
      init_barrier(shared.empty(s), 4 * (Config::kWalkers + 1));
    }
    for (int g = 0; g < Config::kGroupStages; ++g) {
      init_barrier(shared.group_empty(g), 4 * (Config::kWalkers + 1) * (1 + shared.paired));
    }
    for (int buffer = 0; buffer < Config::kBuffers; ++buffer) {
      init_barrier(shared.passed_full(buffer), 4 * Config::kWalkers);
      init_barrier(shared.passed_empty(buffer), 4);
    }
    for (int output = 0; output < Config::kOutputs; ++output) {
      init_barrier(shared.y_full(output), 4);
      init_barrier(shared.y_empty(output), 1);
    }
    if (Config::kTurns > 1) store_shared(shared.entered(), 0.f), __threadfence();
    fence_barrier_init();
  }
  __syncthreads();
  if (shared.paired || Config::kTurns > 1) cluster_arrive(), cluster_wait();  // before anything comes from another CTA
  let_next_kernel_start();
  wait_for_kernel_before();

  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      copy_inputs<Config>(p, shared);
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
  if (shared.paired || Config::kTurns > 1) {
    __syncwarp();
    cluster_arrive(), cluster_wait();  // until then the other CTA tells this one what it is done with
  }
}

}  // namespace hybrid_ops
