// The walkers of the SSD scan: a state of 64 features and 128 columns in a warpgroup's registers, from chunk to chunk.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// X^T of a warp's 16 features, of tokens 16 k .. in x[k]: an operand of wgmma.
__device__ __forceinline__ void load_x(uint32 (&x)[4][4], uint32 tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    load_matrices_transposed(x[k], swizzled(tile, 16 * k + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2));
  }
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

template <typename Config>
struct Walker {
  const SharedMemory<Config>& shared;
  int tile, half, warp, lane;  // of features, of columns; in the warpgroup
  bool never;
  float state[kStates / 2];
  uint32 x[4][4];  // the next chunk's x, scaled
  float a_last;    // log2 of what it leaves of the state
  float decay;     // of all chunks since it was set to 0

  // Who else reads a chunk, when it only is to find a state, does not, and this warpgroup arrives in its place.
  template <bool kFinding>
  __device__ __forceinline__ uint32 arrivals() const {
    return kFinding && tile + half == 0 ? 2 : 1;
  }

  template <bool kFinding>
  __device__ __forceinline__ void prepare(uint32 iteration) {
    const int s = iteration % Config::kStages;
    shared.wait_for_inputs(iteration);
    load_scaled_x(x, shared.x(s, tile), shared.per_token(s, kWeight), warp, lane);
    a_last = load_shared(shared.per_token(s, kA) + place_of(kChunk - 1) * 4);
    uint32 loaded = __float_as_uint(a_last);
#pragma unroll
    for (int i = 0; i < 16; ++i) loaded ^= x[i / 4][i % 4];
    __syncwarp();
    if (lane == 0) arrive_after(loaded, never, shared.empty(s), arrivals<kFinding>());
  }

  // Through a chunk that is prepared; then prepares chunk `next`, unless this is the last one. What enters the chunk is
  // passed on to the readers, as the `turn`-th, or else only its decay is taken down.
  template <bool kFinding>
  __device__ __forceinline__ void walk(uint32 iteration, uint32 turn, uint32 next, bool last) {
    // who finds leaves its stage before it waits for another: stages are all that loads can be ahead by
    constexpr bool kAhead = Config::kAhead && !kFinding;
    const uint32 group = shared.operand(shared.group(iteration));
    const int buffer = turn % Config::kBuffers;
    uint32 now[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      now[i / 4][i % 4] = kAhead ? copy_operand(x[i / 4][i % 4], never) : x[i / 4][i % 4];
    }
    if constexpr (kFinding) {
      decay += a_last;
    } else {
      wait(shared.state_empty(buffer), (turn / Config::kBuffers + 1) & 1);
      const int row = 64 * tile + 16 * warp;
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
    if constexpr (!kFinding) {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive(shared.state_full(buffer));
    }
    if (kAhead && !last) prepare<kFinding>(next);
    wgmma_wait<0>();
    keep_operands(now, never, shared.base);
    __syncwarp();
    shared.leave_group(iteration, lane, arrivals<kFinding>());
    if (!kAhead && !last) prepare<kFinding>(next);
  }
};

}  // namespace hybrid_ops
