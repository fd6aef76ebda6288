// Forward of the SSD scan as in ssd_sm90.cuh, of two heads that share B and C side by side. Letters are those of there.
// A warpgroup walks the state S of each, and makes its y too, transposed, so that what it holds in registers, S and X,
// is what products take from registers; C B^T is made once for both, and M of it by a warpgroup of its own:
//
//     Y^T[P, L] = S[P, N] C^T[N, L] * 2^a_l  +  (D + own) X^T  +  X^T[P, L] M^T[L, L]
//
// Nothing of S goes through shared memory, which is busiest, and of B and C half as much. But a chunk of both takes as
// long as 1.6 chunks there, so that this is for problems with pairs of heads, and sequences, enough for all
// multiprocessors.
//
// Warpgroups of a CTA, which hand chunks on through mbarriers:
//     0    warp 0 copies B, C, x, z with TMA into rings of stages; warps 1, 2 make a, b and the weights from dt;
//          warp 3 stores y
//     1 2  walkers: S and Y^T of a head
//     3    the mixer: M of both heads
#pragma once

#include "common/ssd_inputs.cuh"
#include "common/ssd_outputs.cuh"
#include "common/ssd_states.cuh"

namespace hybrid_ops {

template <bool kGated>
struct PairConfig : InputSizes<2, 2, 1, kGated> {
  using Sizes = InputSizes<2, 2, 1, kGated>;
  using Sizes::kHeads, Sizes::kTileBytes, Sizes::kGroupBytes;
  static constexpr bool kSplit = false, kPaired = false;
  static constexpr int kTurns = 1;
  static constexpr bool kNormed = false;
  static constexpr int kThreads = 128 * (1 + kHeads + 1);

  // of 512 for a thread of each warpgroup together; all with which ptxas spills nothing
  static constexpr int kProducerRegisters = 56;
  static constexpr int kWalkerRegisters = 184;
  static constexpr int kMixerRegisters = 88;

  // behind the stages: what the mixer passes on to walkers, M of a head, and two numbers of each token; y on its way
  // out
  static constexpr int kNumbers = kTileBytes;  // from its beginning
  static constexpr int kPassedBytes = kTileBytes + 1024;
  static constexpr int kBuffers = 2 * kHeads;
  static constexpr int kOutputs = kHeads;
  static constexpr int kOutputBytes = kTileBytes;

  static constexpr int kGroupStages = 3;
  static constexpr int kFixedBytes =
      kGroupStages * kGroupBytes + kBuffers * kPassedBytes + kOutputs * kOutputBytes + kBarrierBytes;
  static constexpr int kStages = Sizes::stages_beside(kFixedBytes, 4);
  static_assert(kStages >= 2);
  static constexpr int kPrefetched = 0, kDtPrefetched = 0;
  static constexpr int kSharedBytes = Sizes::all_bytes(kFixedBytes, kStages);
};

// Where 2^a of a token is, and behind it its weight in its own y. What the four lanes of a quarter need, tokens
// 8 j + 2 (lane % 4) + {0, 1}, are 16 bytes each, and the quarters 144 bytes apart: see place_of.
__device__ __forceinline__ uint32 number_place(uint32 numbers, int token) {
  return numbers + token % 8 / 2 * 144 + token / 8 * 16 + token % 2 * 8;
}

// M of both heads, and the tokens' numbers.
template <typename Config>
__device__ __forceinline__ void mix_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4, place = place_of(row) * 4;  // the lane's first; row + 8, and the next but one
  for_each_chunk<Config>(
      p, [](const Unit&, uint32) {},
      [&](const Unit&, int, uint32 iteration) {
        const int s = iteration % Config::kStages;
        const uint32 group = shared.group(iteration);
        float cb[32];  // C B^T [64, 64]
        shared.wait_for_inputs(iteration);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Config::kGroupTiles * 4; ++k) {
          const uint32 offset = k / 4 * Config::kTileBytes + k % 4 * 32;
          wgmma(cb, swizzled_operand(group + Config::kC, offset), swizzled_operand(group, offset), k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        __syncwarp();
        shared.leave_group(iteration, lane);
#pragma unroll 1
        for (int head = 0; head < Config::kHeads; ++head) {
          const int buffer = iteration % 2 * Config::kHeads + head;
          const uint32 mixed = shared.passed(buffer);
          const float a[2] = {load_shared(shared.per_token(s, kA, head) + place),
                              load_shared(shared.per_token(s, kA, head) + place + 8)};
          float b[16], own[2];
          uint32 m[4][4];
          load_tokens(b, shared.per_token(s, kB, head), lane, warp + 1);
          mix_rows(m, own, cb, a, b, warp, lane);
          wait(shared.passed_empty(buffer), (iteration / 2 + 1) & 1);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            store_matrices(swizzled(mixed, 16 * warp + lane % 16, 2 * k + lane / 16), m[k][0], m[k][1], m[k][2],
                           m[k][3]);
          }
          if (lane % 4 == 0) {
            store_shared2(number_place(mixed + Config::kNumbers, row), exp2_fast(a[0]), own[0]);
            store_shared2(number_place(mixed + Config::kNumbers, row + 8), exp2_fast(a[1]), own[1]);
          }
          fence_async_proxy();
          __syncwarp();
          if (lane == 0) arrive(shared.passed_full(buffer));
        }
        if (lane == 0) arrive(shared.empty(s));
      });
}

// S and Y^T of the `head`-th head.
template <typename Config>
struct PairWalker {
  const SharedMemory<Config>& shared;
  int head, warp, lane;
  bool never;
  float D[2];  // of the thread's two features
  float state[kStates / 2];

  __device__ __forceinline__ void walk(uint32 iteration) {
    const int s = iteration % Config::kStages, buffer = iteration % 2 * Config::kHeads + head;
    const uint32 group = shared.group(iteration), mixed = shared.passed(buffer);
    uint32 entering[8][4], x[4][4], scaled[4][4];
    float y[32];  // Y^T [64, 64]
    shared.wait_for_inputs(iteration);
#pragma unroll
    for (int i = 0; i < 32; ++i) entering[i / 4][i % 4] = pack_bf16(state[2 * i], state[2 * i + 1]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // S C^T
      const uint32 offset = k / 4 * Config::kTileBytes + k % 4 * 32;
      wgmma<false>(y, entering[k], swizzled_operand(group + Config::kC, offset), k > 0);
    }
    wgmma_commit();
    load_x(x, shared.x(s, head), warp, lane);
    const float keep = exp2_fast(load_shared(shared.per_token(s, kA, head) + place_of(kChunk - 1) * 4));
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) state[i] *= keep;
    wgmma_wait<0>();
    keep_operands(entering, never, shared.base);
    wait(shared.passed_full(buffer), (iteration / 2) & 1);
    add_own(y, x, mixed + Config::kNumbers);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<false>(y, x[k], swizzled_operand(mixed, k * 32), true);  // X^T M^T
    wgmma_commit();
    scale_x(scaled, x, shared.per_token(s, kWeight, head), lane);  // not before: registers are few
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // S += (scaled X)^T B
      wgmma<true>(state, scaled[k], swizzled_operand(group, k * 2048, Config::kTileBytes), true);
    }
    wgmma_commit();
    if (!Config::kGated && lane == 0) arrive(shared.empty(s));  // no sooner than products took x: see Walker::walk
    wgmma_wait<1>();
    keep_operands(x, never, shared.base);
    __syncwarp();
    if (lane == 0) arrive(shared.passed_empty(buffer));
    if constexpr (Config::kGated) gate(y, shared.z(s, head));
    wait(shared.y_empty(head), (iteration + 1) & 1);
    store_y(y);
    __syncwarp();
    if (lane == 0) {
      if (Config::kGated) arrive(shared.empty(s));
      arrive(shared.y_full(head));
    }
    wgmma_wait<0>();
    keep_operands(scaled, never, shared.base);
    __syncwarp();
    shared.leave_group(iteration, lane);
  }

 private:
  // y * 2^a + (D + own) x, tokens 8 j + 2 (lane % 4) + {0, 1} of the thread's two features.
  __device__ __forceinline__ void add_own(float (&y)[32], const uint32 (&x)[4][4], uint32 numbers) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float of[4];
      load_shared4(of, number_place(numbers, 8 * j + 2 * (lane % 4)));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32 pair = x[j / 2][j % 2 * 2 + row];
        float* sum = y + 4 * j + 2 * row;
        sum[0] = fmaf(sum[0], of[0], (of[1] + D[row]) * low_half(pair));
        sum[1] = fmaf(sum[1], of[2], (of[3] + D[row]) * high_half(pair));
      }
    }
  }

  __device__ __forceinline__ void gate(float (&y)[32], uint32 tile) const {
    uint32 z[4][4];
    load_x(z, tile, warp, lane);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float z0 = low_half(z[i / 4][i % 4]), z1 = high_half(z[i / 4][i % 4]);
      y[2 * i] *= z0 * sigmoid<bf16>(z0);
      y[2 * i + 1] *= z1 * sigmoid<bf16>(z1);
    }
  }

  __device__ __forceinline__ void store_y(const float (&y)[32]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32 place = column_of_tile(shared.y(head, 0), k, warp, lane);
      store_matrices_transposed(place, pack_bf16(y[8 * k], y[8 * k + 1]), pack_bf16(y[8 * k + 2], y[8 * k + 3]),
                                pack_bf16(y[8 * k + 4], y[8 * k + 5]), pack_bf16(y[8 * k + 6], y[8 * k + 7]));
    }
  }
};

// The `index`-th head of every pair, from chunk to chunk.
template <typename Config>
__device__ __forceinline__ void walk_pairs(const SsdParams& p, const SharedMemory<Config>& shared, int index) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  PairWalker<Config> w{shared, index, warp, lane, p.nseq < 0};
  uint32 iteration = 0;
  for_each_unit<Config>(p, [&](Unit unit) {
    unit.head += index;
    load_state(p, unit, 0, 0, w.state);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int feature = 16 * warp + lane / 4 + 8 * row;
      w.D[row] = p.D.data == nullptr || feature >= p.headdim
                     ? 0.f
                     : p.D[unit.head * p.D_strides[0] + feature * p.D_strides[1]];
    }
    walk_and_keep<Config>(p, unit, 0, 0, w.state, [&](int) { w.walk(iteration++); });
  });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) ssd_pair_kernel(const __grid_constant__ SsdParams p) {
  extern __shared__ unsigned char raw_shared[];
  const SharedMemory<Config> shared{(shared_address(raw_shared) + 1023) & ~1023u, false};
  // the same in all lanes, which the compiler must see to let products run side by side
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    constexpr int kConsumers = 4 * (Config::kHeads + 1);  // warps
    for (int s = 0; s < Config::kStages; ++s) {
      init_barrier(shared.loaded(s), Config::kGated && p.plain_z != nullptr ? 33 : 1);  // see copy_chunks
      init_barrier(shared.full(s), 1);
      init_barrier(shared.empty(s), kConsumers);
    }
    for (int g = 0; g < Config::kGroupStages; ++g) init_barrier(shared.group_empty(g), kConsumers);
    for (int buffer = 0; buffer < Config::kBuffers; ++buffer) {
      init_barrier(shared.passed_full(buffer), 4);
      init_barrier(shared.passed_empty(buffer), 4);
    }
    for (int output = 0; output < Config::kOutputs; ++output) {
      init_barrier(shared.y_full(output), 4);
      init_barrier(shared.y_empty(output), 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
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
  } else if (warpgroup <= Config::kHeads) {
    take_registers<Config::kWalkerRegisters>();
    walk_pairs<Config>(p, shared, warpgroup - 1);
  } else {
    give_registers<Config::kMixerRegisters>();
    mix_chunks<Config>(p, shared);
  }
}

}  // namespace hybrid_ops
