// The walkers of the SSD scan: a state of 64 features and 128 columns in a warpgroup's registers, from chunk to chunk.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// Where a lane points at for tokens 16 k .. of a warp's 16 features: a matrix of 8 x 8 each for {features, the next 8}
// x {tokens, tokens + 8}, transposed on its way.
__device__ __forceinline__ uint32 column_of_tile(uint32 tile, int k, int warp, int lane) {
  return swizzled(tile, 16 * k + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
}

// X^T of a warp's 16 features, of tokens 16 k .. in x[k]: an operand of wgmma.
__device__ __forceinline__ void load_x(uint32 (&x)[4][4], uint32 tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    load_matrices_transposed(x[k], column_of_tile(tile, k, warp, lane));
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
__device__ __forceinline__ void scale_x(uint32 (&scaled)[4][4], const uint32 (&x)[4][4], uint32 weights, int lane) {
  float parts[16];
  load_tokens(parts, weights, lane);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int pair = i / 4 * 4 + i % 4 / 2 * 2;  // of tokens
    scaled[i / 4][i % 4] = scale_bf16(x[i / 4][i % 4], __float_as_uint(parts[pair]), __float_as_uint(parts[pair + 1]));
  }
}

template <typename Config>
struct Walker {
  const SharedMemory<Config>& shared;
  int tile, half, warp, lane;  // of features, of columns; in the warpgroup
  bool never;
  float state[kStates / 2];
  uint32 x[4][4];  // the next chunk's x, scaled
  float keep;      // what it leaves of the state
  float decay;     // what all chunks since it was set to 1 leave of it

  __device__ __forceinline__ void prepare(uint32 iteration) {
    const int s = iteration % Config::kStages;
    shared.wait_for_inputs(iteration);
    if (Config::kFeatures % 64 == 0 || 64 * tile + 16 * warp < Config::kFeatures) {
      load_x(x, shared.x(s, tile), warp, lane);
      scale_x(x, x, shared.per_token(s, kWeight), lane);
    } else {  // rows of which nobody reads what comes of them
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = 0u;
    }
    keep = exp2_fast(load_shared(shared.per_token(s, kA) + place_of(kChunk - 1) * 4));
  }

  // Through a chunk that is prepared; then prepares chunk `next`, unless this is the last one. What enters the chunk is
  // passed on to the readers, as the `turn`-th, or else only its decay is taken down.
  template <bool kFinding>
  __device__ __forceinline__ void walk(uint32 iteration, uint32 turn, uint32 next, bool last) {
    // who finds leaves its stage before it waits for another: stages are all that loads can be ahead by
    constexpr bool kAhead = Config::kAhead && !kFinding;
    const bool passes = !kFinding && makes_y<Config>(iteration);
    // who else reads a chunk, when only its state is asked for, does not, and this warpgroup arrives in its place
    const uint32 arrivals = !passes && tile + half == 0 ? 2 : 1;
    const uint32 group = shared.operand(shared.group(iteration));
    const int s = iteration % Config::kStages, buffer = turn % Config::kBuffers;
    uint32 now[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      now[i / 4][i % 4] = kAhead ? copy_operand(x[i / 4][i % 4], never) : x[i / 4][i % 4];
    }
    if constexpr (kFinding) decay *= keep;
    if (passes) {
      wait(shared.passed_empty(buffer), (turn / Config::kBuffers + 1) & 1);
      const int row = 64 * tile + 16 * warp;
      if (row < Config::kFeatures) {
        const uint32 columns = shared.passed(buffer) + half * (kStates / 64) * Config::kColumnBytes;
        pass_on<Config>(columns, state, row, lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) state[i] *= keep;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // S += (scaled X)^T B
      const uint32 B = group + half * (kStates / 64) * Config::kTileBytes;
      wgmma<true>(state, now[k], swizzled_operand(B, k * 2048, Config::kTileBytes), true);
    }
    wgmma_commit();
    if (passes) fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      // An arrival waits for no load, and one that is still under way would read what TMA writes in its place: no
      // sooner than products have taken x.
      arrive(shared.empty(s), arrivals);
      if (passes) arrive(shared.passed_full(buffer));
    }
    if (kAhead && !last) prepare(next);
    wgmma_wait<0>();
    keep_operands(now, never, shared.base);
    __syncwarp();
    shared.leave_group(iteration, lane, arrivals);
    if (!kAhead && !last) prepare(next);
  }
};

}  // namespace hybrid_ops
