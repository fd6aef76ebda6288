// What both directions of the causal conv1d share where they go by way of shared memory: who has which channels.
#pragma once

#include "common/conv1d.cuh"
#include "common/hopper.cuh"

namespace hybrid_ops {

inline constexpr int kConvGroup = 4;       // tokens of a slot
inline constexpr int kConvRowBytes = 512;  // of a warp, in a token
inline constexpr int kConvMaxStages = 16;

// A warp owns a column of channels, 16 bytes of each lane, and walks over tiles of tokens: walker w has tiles w, w +
// walkers, .. Columns are fastest.
template <typename T>
struct ConvWalker {
  static constexpr int kParts = 16 / sizeof(Vector<T>);  // of four channels, in a lane
  static constexpr int kChannels = kConvRowBytes / sizeof(T);

  int warp, lane;
  int walkers, walker;
  int first_channel, channel;  // of the warp, of the lane
  bool exists, has;            // a warp that is left over has no tiles, a lane behind the last channel no channels
  uint32 row_bytes;

  __device__ __forceinline__ explicit ConvWalker(int dim) : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    constexpr int kWarps = kConvThreads / 32;
    const int columns = (dim + kChannels - 1) / kChannels, index = blockIdx.x * kWarps + warp;
    walkers = gridDim.x * kWarps / columns;
    walker = index / columns;
    first_channel = index % columns * kChannels;
    channel = first_channel + lane * kParts * kPerVector;
    exists = walker < walkers;
    has = channel < dim;
    row_bytes = min(kChannels, dim - first_channel) * sizeof(T);
  }
};

}  // namespace hybrid_ops
