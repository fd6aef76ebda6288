// What both directions of RMSNorm share: who has which elements, and sums over a group.
//
// A group of features of one row belongs to a team of warps, each lane of which has kVectors vectors of neighbouring
// elements. The teams of a CTA are all in the same group.
#pragma once

#include "common/exponential.cuh"
#include "common/hopper.cuh"
#include "common/vector.cuh"

namespace hybrid_ops {

// y = norm(x) weight, or with the gate first norm(x silu(z)) weight, or last norm(x) weight silu(z).
enum class Gate { none, first, last };

inline constexpr int kMaxNormWarps = 8;  // of a CTA

// Elements of a vector, 16 bytes of the wider type: T is the dtype of x and y, or Stream, which z or the residual has.
template <typename T, typename Stream>
inline constexpr int kNormVector = 16 / (sizeof(T) > sizeof(Stream) ? sizeof(T) : sizeof(Stream));

// The part that a thread has in a group. blockDim is (threads of a team, teams), groups are fastest in the grid.
template <typename T, typename Stream, int kVectors>
struct NormPart {
  static constexpr int kCount = kNormVector<T, Stream>;
  static constexpr int kOfWarp = kVectors * 32 * kCount;  // elements

  int warp, lane;       // in the team
  int group, row;       // the team's, of which the row is its first
  int of_warp, column;  // its first element, of the group and of a whole row
  int elements;         // of the group, in the warp: fewer than kOfWarp in the last one

  __device__ __forceinline__ NormPart(int groups, int group_size)
      : warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        group(blockIdx.x % groups),
        row(blockIdx.x / groups * blockDim.y + threadIdx.y),
        of_warp(warp * kOfWarp),
        column(group * group_size + of_warp),
        elements(min(kOfWarp, group_size - of_warp)) {}

  // Of vector i, in the warp.
  __device__ __forceinline__ int place(int i) const { return (i * 32 + lane) * kCount; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < elements; }
};

// The weights of a vector as bits, of T or float32, until they are used: as numbers they would have to be there at
// once.
template <typename T, int kCount>
struct NormWeight {
  unsigned bits[kCount] = {};

  __device__ __forceinline__ void load(const void* weight, bool is_fp32, int first) {
    if (is_fp32) {
#pragma unroll
      for (int c = 0; c < kCount; c += 4) {
        *reinterpret_cast<uint4*>(bits + c) =
            *reinterpret_cast<const uint4*>(static_cast<const float*>(weight) + first + c);
      }
    } else {
      *reinterpret_cast<Vector<T, kCount>*>(bits) =
          *reinterpret_cast<const Vector<T, kCount>*>(static_cast<const T*>(weight) + first);
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

// Sums over the threads of a team, in the same order in all of them. `shared` is the team's; its halves take turns, so
// that one barrier a call is enough.
template <int kSums>
using NormSums = float[2][kSums][kMaxNormWarps];

template <int kSums>
__device__ __forceinline__ void team_sums(float (&sums)[kSums], NormSums<kSums>& shared, int& turn) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(sums[k]);
  const int warps = blockDim.x / 32;
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) shared[turn][k][threadIdx.x / 32] = sums[k];
  }
  sync_threads(1 + threadIdx.y, blockDim.x);
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0.f;
    for (int warp = 0; warp < warps; ++warp) sums[k] += shared[turn][k][warp];
  }
  turn ^= 1;
}

}  // namespace hybrid_ops
