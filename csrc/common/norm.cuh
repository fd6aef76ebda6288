// What both directions of RMSNorm share: who has which elements, and sums over a group.
//
// A group of features of one row belongs to a team of warps, each lane of which has kVectors vectors of neighbouring
// elements. The teams of a CTA are all in the same group, of neighbouring rows.
#pragma once

#include "common/exponential.cuh"
#include "common/hopper.cuh"
#include "common/vector.cuh"

namespace hybrid_ops {

// y = norm(x) weight, or with the gate first norm(x silu(z)) weight, or last norm(x) weight silu(z).
enum class Gate { none, first, last };

inline constexpr int kMaxNormWarps = 16;  // of a CTA

// Elements of a vector, 16 bytes of the wider type: T is the dtype of x and y, or Stream, which z or the residual has.
template <typename T, typename Stream>
inline constexpr int kNormVector = 16 / (sizeof(T) > sizeof(Stream) ? sizeof(T) : sizeof(Stream));

// The part that a thread has in a group: vectors that are kStep elements apart. blockDim is (threads of a team, teams),
// and the grid (groups, CTAs of a group, as many again where those are more than one dimension holds).
template <typename T, typename Stream, int kVectors>
struct NormPart {
  static constexpr int kCount = kNormVector<T, Stream>;
  static constexpr int kStep = 32 * kCount;

  int cta, row;       // of the group; the team's, or its first
  int first, column;  // its first element, of the group and of a whole row
  int elements;       // of the group, from there

  __device__ __forceinline__ explicit NormPart(int group_size)
      : cta(blockIdx.z * gridDim.y + blockIdx.y),
        row(cta * blockDim.y + threadIdx.y),
        first((threadIdx.x / 32 * kVectors * 32 + threadIdx.x % 32) * kCount),
        column(blockIdx.x * group_size + first),
        elements(group_size - first) {}

  __device__ __forceinline__ bool has(int i) const { return i * kStep < elements; }
};

// The weights of a vector as bits, of T or float32, until they are used: as numbers they would have to be there at
// once.
template <typename T, int kCount>
struct NormWeight {
  unsigned bits[kCount] = {};

  __device__ __forceinline__ void load_if(bool condition, const void* weight, bool is_fp32, int first) {
    using Words = unsigned[kCount * sizeof(T) / 4];
    const char* const place = static_cast<const char*>(weight) + first * (is_fp32 ? 4 : static_cast<int>(sizeof(T)));
    load_words_if(condition, place, reinterpret_cast<Words&>(bits));
    if constexpr (sizeof(T) == 2) {  // not twice into one register: the second load would wait for the first
      load_words_if(condition && is_fp32, place + sizeof(Words), reinterpret_cast<Words&>(bits[kCount / 2]));
    }
  }

  __device__ __forceinline__ void get(bool is_fp32, float (&w)[kCount]) const {
    if (is_fp32) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) w[c] = __uint_as_float(bits[c]);
    } else {
      unpack<T>(*reinterpret_cast<const Vector<T, kCount>*>(bits), w);
    }
  }
};

template <int kSums>
struct alignas(16) NormSums {
  float of_warp[kMaxNormWarps][kSums];
};

// Sums over the threads of each team, in the same order in all of them; `shared` is the team's, and not the one of the
// call before. The barrier is the CTA's, or with kApart, where teams do not come equally often, the team's own: those
// with a variable number are taken for all 16, of a multiprocessor's 64. (Four such CTAs did not run at a time; three
// do.)
template <int kSums, bool kApart = false>
__device__ __forceinline__ void team_sums(float (&sums)[kSums], NormSums<kSums>& shared) {
  static_assert(kSums == 1 || kSums == 2);
  constexpr int kLanes = 32 / kSums;  // that have one of the sums
  float sum = sums[0];
  if constexpr (kSums == 2) {
    const bool second = threadIdx.x & 16;
    sum = (second ? sums[1] : sums[0]) + __shfl_xor_sync(~0u, second ? sums[0] : sums[1], 16);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset >= 1; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const int warps = blockDim.x / 32;
  if (warps == 1) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = kSums == 1 ? sum : __shfl_sync(~0u, sum, k * kLanes);
    return;
  }
  if (threadIdx.x % kLanes == 0) shared.of_warp[threadIdx.x / 32][threadIdx.x % 32 / kLanes] = sum;
  if constexpr (kApart) {
    sync_threads(1 + threadIdx.y, blockDim.x);
  } else {
    __syncthreads();
  }
#pragma unroll
  for (int warp = 0; warp < kMaxNormWarps; warp += 4 / kSums) {
    if (warp >= warps) break;
    const float4 four = *reinterpret_cast<const float4*>(shared.of_warp[warp]);
    const float found[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (warp + j / kSums < warps) sums[j % kSums] = (warp + j / kSums == 0 ? 0.f : sums[j % kSums]) + found[j];
    }
  }
}

}  // namespace hybrid_ops
