// What enters a chunk of the SSD scan, by warps of warpgroup 0: x, B, C, z, and what is made of dt.
#pragma once

#include "common/async_copies.cuh"
#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// What a chunk needs, into the L2 cache: two stages are too few for the latency of memory. Of B and C, which the heads
// of a group share, by one of them.
template <typename Config>
__device__ __forceinline__ void prefetch_chunk(const SsdParams& p, const Unit& unit, int c) {
  const int token = unit.first + c * kChunk, group = unit.head / p.heads_per_group;
  if (unit.head == group * p.heads_per_group) {
#pragma unroll 1
    for (int i = 0; i < 2 * Config::kGroupTiles; ++i) {
      const TensorMap& map = i < Config::kGroupTiles ? p.B_map : p.C_map;
      prefetch_box(map, i % Config::kGroupTiles * 64, group, token, unit.row);
    }
  }
#pragma unroll 1
  for (int tile = 0; tile < Config::kTiles; ++tile) {
    const int head = head_of<Config>(unit, tile), feature = feature_of<Config>(tile);
    prefetch_box(p.x_map, feature, head, token, unit.row);
    if constexpr (Config::kGated) prefetch_box(p.z_map, feature, head, token, unit.row);
  }
}

// z of a chunk, by all lanes of a warp, 4 bytes by 4.
template <typename Config>
__device__ __forceinline__ void copy_plain_z(const SsdParams& p, const SharedMemory<Config>& shared, const Unit& unit,
                                             int token, int s) {
  const int lane = threadIdx.x % 32, low = unit.begin - token, high = unit.end - token;
#pragma unroll 1
  for (int tile = 0; tile < Config::kTiles; ++tile) {
    const int feature = feature_of<Config>(tile) + 2 * lane, head = head_of<Config>(unit, tile);
    const bf16* z = p.plain_z + unit.row * p.z_strides[0] + token * p.z_strides[1] + head * p.z_strides[2] + feature;
#pragma unroll 4
    for (int row = 0; row < kChunk; ++row, z += p.z_strides[1]) {
      copy_async_if(row >= low && row < high && feature < p.headdim,
                    swizzled(shared.z(s, tile), row, lane / 4) + lane % 4 * 4, z);
    }
  }
}

// By one lane, or by all where z is not copied by TMA.
template <typename Config, bool kPlain>
__device__ __forceinline__ void copy_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  const bool leads = !kPlain || threadIdx.x % 32 == 0;
  for_each_chunk<Config>(
      p, [](const Unit&, uint32) {},
      [&](const Unit& unit, int i, uint32 iteration) {
        const int s = iteration % Config::kStages, c = chunk_at<Config>(unit, i);
        // else x and B are all it takes
        const bool whole = (!Config::kSplit || !unit.finding) && makes_y<Config>(iteration);
        const uint32 loaded = shared.loaded(s);
        const int token = unit.first + c * kChunk, group = unit.head / p.heads_per_group;
        wait(shared.empty(s), (iteration / Config::kStages + 1) & 1);
        if (leads) {
          constexpr int kBoxes = kPlain ? Config::kZ : Config::kHeadBytes;
          arrive_expecting(loaded, whole ? kBoxes + Config::kGroupBytes : Config::kZ + Config::kC);
        }
#pragma unroll
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          const int head = head_of<Config>(unit, tile), feature = feature_of<Config>(tile);
          if (leads) load_box(shared.x(s, tile), p.x_map, loaded, feature, head, token, unit.row);
          if (Config::kGated && !kPlain && whole) {
            load_box(shared.z(s, tile), p.z_map, loaded, feature, head, token, unit.row);
          }
        }
        if constexpr (kPlain) {
          if (whole) copy_plain_z(p, shared, unit, token, s);
          arrive_behind_copies(loaded);
        }
        wait(shared.group_empty(iteration), (iteration / Config::kGroupStages + 1) & 1);
#pragma unroll 4
        for (int tile = 0; tile < 2 * Config::kGroupTiles; ++tile) {
          if (!leads || (tile >= Config::kGroupTiles && !whole)) break;
          const TensorMap& map = tile < Config::kGroupTiles ? p.B_map : p.C_map;
          const uint32 place = shared.group(iteration) + tile * Config::kTileBytes;
          const int column = tile % Config::kGroupTiles * 64;
          if constexpr (Config::kPaired) {  // the compiler is to see it before it unrolls
            if (shared.paired) {
              if (tile % 2 == blockIdx.x % 2) load_box(place, map, loaded, column, group, token, unit.row, 3);
              continue;
            }
          }
          load_box(place, map, loaded, column, group, token, unit.row);
        }
        if constexpr (Config::kPrefetched > 0) {
          if (!kPlain && whole && c + Config::kPrefetched < unit.chunks) {
            prefetch_chunk<Config>(p, unit, c + Config::kPrefetched);
          }
        }
      },
      kPlain ? ~0u : 1u);
}

// By a warp.
template <typename Config>
__device__ __forceinline__ void copy_inputs(const SsdParams& p, const SharedMemory<Config>& shared) {
  if constexpr (Config::kGated) {
    if (p.plain_z != nullptr) return copy_chunks<Config, true>(p, shared);
  }
  if (threadIdx.x % 32 == 0) copy_chunks<Config, false>(p, shared);
}

// log(1 + exp(x)) with 2e-5 of relative error or less, also where it is small: there it is a series in u = exp(x). With
// exact functions the warps that make the decays held all others up.
__device__ __forceinline__ float softplus(float x) {
  const float u = __expf(x);
  const float series = u * (1.f - u * (0.5f - u * (1.f / 3 - u * (0.25f - u * 0.2f))));
  return x > 20.f ? x : u < 1.f / 32 ? series : __logf(1.f + u);
}

// Rows [0, low) and [high, 64) of a tile belong to other sequences and may hold anything; a product with a weight of
// zero would still pass their NaN on.
__device__ __forceinline__ void clear_rows(uint32 tile, int low, int high, int lane) {
  for (int row = lane; row < kChunk; row += 32) {
    if (row >= low && row < high) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) store_shared4(tile + row * 128 + i * 16, 0.f, 0.f, 0.f, 0.f);
  }
}

// A warp that makes a, b and weights of chunks from dt. A lane has two neighbouring tokens.
template <typename Config>
struct DecayMaker {
  static constexpr int kHeads = Config::kHeads;
  const SsdParams& p;
  const SharedMemory<Config>& shared;
  int lane = threadIdx.x % 32;
  float A[kHeads] = {}, bias[kHeads] = {};  // of the heads
  Element coming[kHeads][2];  // dt of the warp's next chunk, as it is stored: a conversion would wait for it

  __device__ __forceinline__ DecayMaker(const SsdParams& p, const SharedMemory<Config>& shared)
      : p(p), shared(shared) {}

  // Before the unit's chunks of this warp, of which the first is the i-th.
  __device__ __forceinline__ void enter(const Unit& unit, int i) {
    load(unit, i);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      A[h] = p.A[unit.head + h] * 1.4426950408889634f;
      bias[h] = p.dt_bias.data == nullptr ? 0.f : p.dt_bias[(unit.head + h) * p.dt_bias_stride];
    }
  }

  // Chunk i of the unit, whose next one of this warp is `stride` further.
  __device__ __forceinline__ void make(const Unit& unit, int i, uint32 iteration, int stride) {
    const int s = iteration % Config::kStages;
    const int first = unit.first + chunk_at<Config>(unit, i) * kChunk, token = first + 2 * lane;
    float dt[kHeads][2], sum[kHeads], first_a[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      dt[h][0] = step(unit, token, 0, h);
      dt[h][1] = step(unit, token + 1, 1, h);
    }
    load(unit, i + stride);
    if constexpr (Config::kDtPrefetched > 0) prefetch(unit, i + stride + Config::kDtPrefetched);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      first_a[h] = dt[h][0] * A[h];
      sum[h] = first_a[h] + dt[h][1] * A[h];
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float before = __shfl_up_sync(~0u, sum[h], distance);
        if (lane >= distance) sum[h] += before;
      }
    }
    float b[kHeads][2];
    uint32 weights[kHeads], lost[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float before = __shfl_up_sync(~0u, sum[h], 1);
      if (lane == 0) before = 0.f;
      const float last = __shfl_sync(~0u, sum[h], 31);
      first_a[h] += before;
      b[h][0] = dt[h][0] > 0.f ? first_a[h] - log2_fast(dt[h][0]) : __int_as_float(0x7F800000);
      b[h][1] = dt[h][1] > 0.f ? sum[h] - log2_fast(dt[h][1]) : __int_as_float(0x7F800000);
      const float weight0 = exp2_fast(last - b[h][0]), weight1 = exp2_fast(last - b[h][1]);
      weights[h] = pack_bf16(weight0, weight1);
      lost[h] = pack_bf16(weight0 - low_half(weights[h]), weight1 - high_half(weights[h]));
    }
    wait(shared.empty(s), (iteration / Config::kStages + 1) & 1);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const auto store = [&](PerToken which, float first, float second) {
        store_shared2(shared.per_token(s, which, h) + place_of(2 * lane) * 4, first, second);
      };
      store(kA, first_a[h], sum[h]);
      store(kB, b[h][0], b[h][1]);
      store(kWeight, __uint_as_float(weights[h]), __uint_as_float(lost[h]));
    }
    const int low = max(unit.begin - first, 0), high = min(unit.end - first, kChunk);
    if (low > 0 || high < kChunk) {
      wait(shared.loaded(s), (iteration / Config::kStages) & 1);
#pragma unroll 1
      for (int tile = 0; tile < Config::kGroupTiles; ++tile) {
        clear_rows(shared.group(iteration) + tile * Config::kTileBytes, low, high, lane);
      }
#pragma unroll 1
      for (int tile = 0; tile < Config::kTiles; ++tile) clear_rows(shared.x(s, tile), low, high, lane);
      fence_async_proxy();
    }
    __syncwarp();
    if (lane == 0) arrive(shared.full(s));
  }

 private:
  __device__ __forceinline__ int64 place(const Unit& unit, int token, int h = 0) const {
    return unit.row * p.dt_strides[0] + token * p.dt_strides[1] + (unit.head + h) * p.dt_strides[2];
  }

  __device__ __forceinline__ void load(const Unit& unit, int i) {
    const int token = unit.first + chunk_at<Config>(unit, i) * kChunk + 2 * lane;
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const bool present = token + next >= unit.begin && token + next < unit.end;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        coming[h][next] = load_bits(p.dt.data, p.dt.dtype, place(unit, token, h) + next * p.dt_strides[1], present);
      }
    }
  }

  // Into the L2 cache, where it pays: see kDtPrefetched.
  __device__ __forceinline__ void prefetch(const Unit& unit, int c) const {
    const int token = unit.first + c * kChunk + 2 * lane;
    if (c >= unit.chunks || token < unit.begin || token >= unit.end) return;
    prefetch_bits(p.dt.data, p.dt.dtype, place(unit, token));
    if (token + 1 < unit.end) prefetch_bits(p.dt.data, p.dt.dtype, place(unit, token) + p.dt_strides[1]);
  }

  __device__ __forceinline__ float step(const Unit& unit, int token, int i, int h) const {
    float dt = from_bits(coming[h][i], p.dt.dtype) + bias[h];
    if (p.dt_softplus) dt = softplus(dt);
    dt = fminf(fmaxf(dt, p.dt_min), p.dt_max);
    return token >= unit.begin && token < unit.end ? dt : 0.f;
  }
};

// The decays of every other chunk, by one of two warps; where a state is to be found, which is faster than two warps
// are, of every kMakers-th one.
template <typename Config>
__device__ __forceinline__ void make_decays(const SsdParams& p, const SharedMemory<Config>& shared, uint32 worker) {
  DecayMaker<Config> maker(p, shared);
  const auto makers = [](const Unit& unit) -> uint32 {
    if constexpr (Config::kSplit) {
      if (unit.finding) return Config::kMakers;
    }
    return 2;
  };
  for_each_chunk<Config>(
      p, [&](const Unit& unit, uint32 iteration) { maker.enter(unit, (worker - iteration) % makers(unit)); },
      [&](const Unit& unit, int i, uint32 iteration) {
        if (iteration % makers(unit) == worker) maker.make(unit, i, iteration, makers(unit));
      });
}

// The others of a unit whose state is to be found, by warps of a warpgroup that is idle meanwhile.
template <typename Config>
__device__ __forceinline__ void help_make_decays(const SsdParams& p, const SharedMemory<Config>& shared,
                                                 const Unit& unit, uint32 iteration) {
  const uint32 worker = 2 + threadIdx.x % 128 / 32;
  if (worker >= Config::kMakers) return;
  DecayMaker<Config> maker(p, shared);
  int i = (worker - iteration) % Config::kMakers;
  maker.enter(unit, i);
#pragma unroll 1
  for (; i < unit.chunks; i += Config::kMakers) maker.make(unit, i, iteration + i, Config::kMakers);
}

}  // namespace hybrid_ops
