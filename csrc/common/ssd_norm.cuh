// The norm of the SSD scan's y, over the features of a group of heads, before y is in memory:
//
//     y[t, i] = u[t, i] weight[i] / sqrt(sum over j in the group of u[t, j]^2 / size + eps)
//
// A group's heads are in as many CTAs, which run at the same time and tell each other the sums of their own squares
// through memory: a number for each token, all of them before this kernel such that no sum has these bits, so that who
// reads one sees whether it is there. Meanwhile y, times the weights, waits in shared memory: a reader norms it when it
// has made its next one.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

constexpr uint32 kNoSum = 0xFFFFFFFFu;  // a NaN with a sign, which no sum of squares has

// The sums of squares of the 16 tokens of a reader's warp in each chunk of a unit.
template <typename Config>
struct GroupSums {
  const SsdParams& p;
  int warp, lane;
  float *own, *group;  // where the lane's are in the first chunk: of this head, of its group's first heads
  float asked[2][4];   // of tokens 4 (lane % 4) .. of every eighth head, on their way while other things are done

  // By a reader, who also gets the head's weights in bfloat16.
  __device__ __forceinline__ void enter(uint32 weights, int barrier, const Unit& unit) {
    // chunks of all sequences, of which some are left out: a sequence that neither begins nor ends at a multiple of 64
    // tokens has up to two more than 64s
    const int64 token = static_cast<int64>(unit.row) * p.seqlen + unit.begin;
    const int64 place = token / kChunk + 2 * unit.sequence + (unit.first - unit.begin + kChunk - 1) / kChunk;
    float* const sums = p.squares + (place * p.nheads + unit.head) * kChunk + 16 * warp;
    own = sums + lane / 4 + lane % 4 * 8;
    group = sums + (lane / 4 - unit.head % p.heads_per_group) * kChunk + lane % 4 * 4;
    sync_threads(barrier, 128);  // nobody reads those of the unit before
    const int i = 32 * warp + lane;
    if (i < 32 * Config::kTiles) {
      const bf16* const of_head = p.norm_weight + unit.head * p.headdim;
      store_word(weights + 4 * i, 2 * i < p.headdim ? reinterpret_cast<const uint32*>(of_head)[i] : 0);
    }
    sync_threads(barrier, 128);
  }

  // Of squares of two rows a lane has a quarter: for all CTAs.
  __device__ __forceinline__ void tell(int c, float (&squares)[2]) const {
#pragma unroll
    for (float& sum : squares) {
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    }
    const float sum = fabsf(lane % 4 == 0 ? squares[0] : squares[1]);
    if (lane % 4 < 2) {
      asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(own + offset(c)), "f"(sum) : "memory");
    }
  }

  __device__ __forceinline__ void ask(int c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) load(group + offset(c), 8 * i, asked[i]);
  }

  // All heads' sums of one token: 4 (lane % 4) + 2 (lane / 16) + lane / 8 % 2. Of chunk c, which was asked for.
  __device__ __forceinline__ float add(int c) const {
    float all[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) all[i] = asked[0][i] + asked[1][i];
    // what is missing makes a NaN; so may x
    if (__any_sync(~0u, isnan((all[0] + all[1]) + (all[2] + all[3]))) || p.heads_per_group > 16) wait(c, all);
#pragma unroll
    for (int i = 0; i < 2; ++i) all[i] = exchange(all[i], all[i + 2], lane & 16, 16);
    const float sum = exchange(all[0], all[1], lane & 8, 8);
    return sum + __shfl_xor_sync(~0u, sum, 4);
  }

 private:
  __device__ __forceinline__ int64 offset(int c) const { return static_cast<int64>(c) * p.nheads * kChunk; }

  // Of the head so many behind the lane's first, or zeros.
  __device__ __forceinline__ void load(const float* place, int head, float (&sums)[4]) const {
    sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
    if (lane / 4 + head < p.heads_per_group) {
      asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
                   : "l"(place + head * kChunk)
                   : "memory");
    }
  }

  __device__ __forceinline__ void wait(int c, float (&all)[4]) const {
    all[0] = all[1] = all[2] = all[3] = 0.f;
#pragma unroll 1
    for (int head = 0; head < p.heads_per_group; head += 8) {
      float sums[4];
      bool missing = true;
      while (missing) {
        load(group + offset(c), head, sums);
        missing = false;
#pragma unroll
        for (float sum : sums) missing |= __float_as_uint(sum) == kNoSum;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) all[i] += sums[i];
    }
    __syncwarp();
  }

  // The sum of the second number in lanes where `second`, else of the first, of this lane and the one beyond.
  __device__ __forceinline__ static float exchange(float a, float b, bool second, int distance) {
    return (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, distance);
  }
};

// A warp's 16 rows of the y of chunk c, the `turn`-th, which were stored a while ago, times their scales.
template <typename Config>
__device__ __forceinline__ void norm_rows(const SharedMemory<Config>& shared, int c, uint32 turn,
                                          const GroupSums<Config>& sums, const RowPlaces<Config>& places) {
  const SsdParams& p = sums.p;
  const int output = turn % Config::kOutputs, lane = sums.lane;
  const float scale = rsqrtf(fmaf(sums.add(c), p.inverse_group, p.norm_eps));
  const uint32 parts = pack_bf16(scale, scale - low_half(pack_bf16(scale, 0.f)));  // of one rounding
  const int holder = lane / 16 + lane / 8 % 2 * 16 + lane / 4 % 2 * 8;             // of row lane / 4
  uint32 scales[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32 of_row = __shfl_sync(~0u, parts, holder + 2 * i);
    scales[i][0] = __byte_perm(of_row, 0, 0x1010);
    scales[i][1] = __byte_perm(of_row, 0, 0x3232);
  }
#pragma unroll
  for (int j = 0; j < Config::kFeatures / 16; ++j) {
    uint32 y[4];
    load_matrices(y, places.at(shared.y(output, 0), j));
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = scale_bf16(y[i], scales[i % 2][0], scales[i % 2][1]);
    store_matrices(places.at(shared.y(output, 0), j), y[0], y[1], y[2], y[3]);
  }
  __syncwarp();
  if (lane == 0) arrive(shared.y_full(output));
}

}  // namespace hybrid_ops
