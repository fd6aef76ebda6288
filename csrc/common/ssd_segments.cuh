// What the CTAs of a cluster, each with a segment of one sequence of a head, tell each other. The sequence is cut into
// pieces (see pieces_before), and each CTA finds what a piece adds to the state, and how far what enters it decays.
// With all pieces before its segment, in their order, it knows what enters there.
#pragma once

#include "common/ssd_inputs.cuh"
#include "common/ssd_walker.cuh"

namespace hybrid_ops {

// The state that a unit's chunks lead to from nothing, and their decay, in a walker; of two finders the second one, a
// reader, hands over what its half leads to, each warp in the place where its rows are passed on later. Readers who
// find nothing help with the decays, and wait: on barriers of the stages they would miss phases.
template <typename Config>
__device__ __forceinline__ void find_state(const SsdParams& p, Walker<Config>& w, const Unit& unit, uint32 iteration,
                                           int finder) {
  if (unit.chunks == 0) {
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) w.state[i] = 0.f;
    w.decay = 1.f;
    return;
  }
  constexpr int kThreads = Config::kThreads - 128;
  sync_threads(1, kThreads);  // nobody is at the unit before
  if (finder < Config::kFinders) {
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) w.state[i] = 0.f;
    w.decay = 1.f;
    if (finder < unit.chunks) w.prepare(iteration + finder);
#pragma unroll 1
    for (int i = finder; i < unit.chunks; i += Config::kFinders) {
      const uint32 next = iteration + i + Config::kFinders;
      w.template walk<true>(iteration + i, 0, next, i + Config::kFinders >= unit.chunks);
    }
  } else {
    help_make_decays(p, w.shared, unit, iteration);
  }
  sync_threads(1, kThreads);
  if constexpr (Config::kFinders == 2) {
    const uint32 place = w.shared.passed(0) + w.warp * 2048 + w.lane * 16;
    if (finder == 1) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float* s = w.state + 4 * i;
        store_shared4(place + i / 4 * 8192 + i % 4 * 512, s[0], s[1], s[2], s[3]);
      }
      if (w.warp == 0 && w.lane == 0) store_shared(w.shared.found_decay(), w.decay);
    }
    sync_threads(1, kThreads);
    if (finder == 0) {
      const float decay = load_shared(w.shared.found_decay());
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float added[4];
        load_shared4(added, place + i / 4 * 8192 + i % 4 * 512);
#pragma unroll
        for (int j = 0; j < 4; ++j) w.state[4 * i + j] = fmaf(w.state[4 * i + j], decay, added[j]);
      }
      w.decay *= decay;
    }
  }
}

// A piece in memory: the state as its warpgroup's registers are, 16 times 4 of each thread, and the decay. The CTAs of
// a sequence have one each and one for the state that enters the sequence; of this sequence, and of the one before, for
// all wait for all, and none is two ahead.
//
// That a warp's part of a piece is there it tells the warps that have the same rows in each CTA, by a flag for each:
// p.ticket, which nothing else writes. Who has waited for a flag clears it, so that memory need not be cleared before.
constexpr int kPieceFloats = 64 * kStates + 32;

__device__ __forceinline__ void store_flag(uint64* flag, uint64 value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ uint64 load_flag(const uint64* flag) {
  uint64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

template <typename Config>
struct Pieces {
  const SsdParams& p;
  int walker;
  int round;  // sequences of these CTAs before

  __device__ __forceinline__ int rank() const { return blockIdx.x % p.segments; }
  __device__ __forceinline__ int64 group() const { return blockIdx.x / p.segments * 2 + round % 2; }

  __device__ __forceinline__ float* at(int piece) const {
    return p.pieces + ((group() * (p.segments + 1) + piece) * Config::kWalkers + walker) * kPieceFloats;
  }

  // of a warp in CTA `to`, for the piece of CTA `from`
  __device__ __forceinline__ uint64* flag(int from, int to, int warp) const {
    return p.flags + ((group() * p.segments + to) * Config::kWalkers * 4 + walker * 4 + warp) * p.segments + from;
  }

  __device__ __forceinline__ void store(int piece, const Walker<Config>& w) const {
    float* const place = at(piece);
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* s = w.state + 4 * i;
      reinterpret_cast<float4*>(place)[i * 128 + thread] = make_float4(s[0], s[1], s[2], s[3]);
    }
    if (w.lane == 0) place[64 * kStates + w.warp] = w.decay;
  }

  __device__ __forceinline__ void hand_on(const Walker<Config>& w) const {
    if (pieces_before(p.segments - 1, p.segments) > rank()) store(rank(), w);
    __syncwarp();
    if (w.lane < p.segments) store_flag(flag(rank(), w.lane, w.warp), p.ticket);
  }

  // What enters this CTA's segment.
  __device__ __forceinline__ void enter(Walker<Config>& w) const {
    const int thread = threadIdx.x % 128, pieces = pieces_before(rank(), p.segments);
#pragma unroll
    for (int i = 0; i < kStates / 2; ++i) w.state[i] = 0.f;
    if (w.lane < p.segments) {
      uint64* const mine = flag(w.lane, rank(), w.warp);
      while (load_flag(mine) != p.ticket) {
      }
      *mine = 0;
    }
    __syncwarp();
#pragma unroll 1
    for (int piece = p.initial.data == nullptr ? 0 : -1; piece < pieces; ++piece) {
      const float* const place = at(piece < 0 ? p.segments : piece);
      const float keep = piece < 0 ? 0.f : __ldcg(place + 64 * kStates + w.warp);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 added[8];  // past the L1 cache: it may have what was here before
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          added[i] = __ldcg(reinterpret_cast<const float4*>(place) + (8 * half + i) * 128 + thread);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float* const s = w.state + 32 * half + 4 * i;
          s[0] = fmaf(s[0], keep, added[i].x);
          s[1] = fmaf(s[1], keep, added[i].y);
          s[2] = fmaf(s[2], keep, added[i].z);
          s[3] = fmaf(s[3], keep, added[i].w);
        }
      }
    }
  }
};

}  // namespace hybrid_ops
