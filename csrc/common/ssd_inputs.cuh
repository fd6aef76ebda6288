// Warpgroups 0 and 1 of the SSD scan: copies in and out, the decays, and the matrices of a chunk that need no state.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// -------------------------------------------------------------------------------------------- warpgroup 0: copies

template <typename Config>
__device__ __forceinline__ void copy_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  for_each_chunk<Config>(
      p, [](const Unit&, int) {},
      [&](const Unit& unit, int c, int iteration) {
        const int s = iteration % Config::kStages;
        const uint32 stage = shared.stage(s), full = shared.full(s);
        const int token = unit.first + c * kChunk, group = unit.head / p.heads_per_group;
        wait(shared.empty(s), (iteration / Config::kStages + 1) & 1);
        arrive_expecting(full, Config::kStageLoads);
#pragma unroll
        for (int i = 0; i < Config::kGroupLoads; ++i) {
          const TensorMap& map = i < Config::kGroupTiles ? p.B_map : p.C_map;
          load_box(stage + i * Config::kTileBytes, map, full, i % Config::kGroupTiles * 64, group, token, unit.row);
        }
#pragma unroll
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          const int head = unit.head + (Config::kHeads == 1 ? 0 : tile);
          const int feature = Config::kHeads == 1 ? tile * 64 : 0;
          load_box(stage + Config::kX + tile * Config::kTileBytes, p.x_map, full, feature, head, token, unit.row);
          if constexpr (Config::kGated) {
            load_box(stage + Config::kZ + tile * Config::kTileBytes, p.z_map, full, feature, head, token, unit.row);
          }
        }
      });
}

// log(1 + exp(x)) with 2e-5 of relative error or less, also where it is small: there it is a series in u = exp(x). With
// exact functions the warps that make the decays held all others up.
__device__ __forceinline__ float softplus(float x) {
  const float u = __expf(x);
  const float series = u * (1.f - u * (0.5f - u * (1.f / 3 - u * (0.25f - u * 0.2f))));
  return x > 20.f ? x : u < 1.f / 32 ? series : __logf(1.f + u);
}

// One of two warps that make a, b and their powers: each of one of two heads, or of every other chunk of the only head.
// A lane has two neighbouring tokens.
template <typename Config>
__device__ __forceinline__ void make_decays(const SsdParams& p, const SharedMemory<Config>& shared, int worker) {
  constexpr int kTurns = Config::kHeads == 1 ? 2 : 1;
  const int lane = threadIdx.x % 32, turn = Config::kHeads == 1 ? worker : 0;
  const int head_of_cta = Config::kHeads == 1 ? 0 : worker;
  float A = 0.f, bias = 0.f;
  uint32 coming[2];  // dt of the next chunk, as it is stored: a conversion would wait for it
  const auto load = [&](const Unit& unit, int c) {
    const int token = unit.first + c * kChunk + 2 * lane;
    const int64 offset =
        unit.row * p.dt_strides[0] + token * p.dt_strides[1] + (unit.head + head_of_cta) * p.dt_strides[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token + i >= unit.begin && token + i < unit.end)
        coming[i] = load_bits(p.dt.data, p.dt.dtype, offset + i * p.dt_strides[1]).bits();
    }
  };
  const auto step = [&](const Unit& unit, int token, uint32 bits) {
    float dt = from_bits(bits, p.dt.dtype) + bias;
    if (p.dt_softplus) dt = softplus(dt);
    dt = fminf(fmaxf(dt, p.dt_min), p.dt_max);
    return token >= unit.begin && token < unit.end ? dt : 0.f;
  };
  for_each_chunk<Config>(
      p,
      [&](const Unit& unit, int iteration) {
        const int head = unit.head + head_of_cta;
        load(unit, (iteration + turn) % kTurns);
        A = p.A[head] * 1.4426950408889634f;
        bias = p.dt_bias.data == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
      },
      [&](const Unit& unit, int c, int iteration) {
        if (iteration % kTurns != turn) return;
        const int s = iteration % Config::kStages;
        const int token = unit.first + c * kChunk + 2 * lane;
        const float dt0 = step(unit, token, coming[0]), dt1 = step(unit, token + 1, coming[1]);
        load(unit, c + kTurns);
        const float a0 = dt0 * A;
        float sum = a0 + dt1 * A;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const float before = __shfl_up_sync(~0u, sum, distance);
          if (lane >= distance) sum += before;
        }
        float before = __shfl_up_sync(~0u, sum, 1);
        if (lane == 0) before = 0.f;
        const float last = __shfl_sync(~0u, sum, 31);
        const float first_a = before + a0;
        const float b0 = dt0 > 0.f ? first_a - log2_fast(dt0) : __int_as_float(0x7F800000);
        const float b1 = dt1 > 0.f ? sum - log2_fast(dt1) : __int_as_float(0x7F800000);
        wait(shared.empty(s), (iteration / Config::kStages + 1) & 1);
        const auto store = [&](Decay which, float first, float second) {
          store_shared2(shared.decay(s, head_of_cta, which) + place_of(2 * lane) * 4, first, second);
        };
        store(kA, first_a, sum);
        store(kB, b0, b1);
        store(kReach, exp2_fast(first_a), exp2_fast(sum));
        store(kWeight, exp2_fast(last - b0), exp2_fast(last - b1));
        __syncwarp();
        if (lane == 0) arrive(shared.full(s));
      });
}

// y from shared memory to where it belongs: whole chunks by TMA, others token by token, for what lies beside a sequence
// is not ours to write.
template <typename Config>
__device__ __forceinline__ void store_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  const int lane = threadIdx.x % 32;
  for_each_chunk<Config>(
      p, [](const Unit&, int) {},
      [&](const Unit& unit, int c, int iteration) {
        const int token = unit.first + c * kChunk, s = iteration % Config::kStages;
        const int low = max(unit.begin - token, 0), high = min(unit.end - token, kChunk);
#pragma unroll 1
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          const int head = unit.head + (Config::kHeads == 1 ? 0 : tile), feature = Config::kHeads == 1 ? tile * 64 : 0;
          wait(shared.output_full(s, tile), (iteration / Config::kStages) & 1);
          if (high - low == kChunk) {
            if (lane == 0) {
              fence_async_proxy();  // here and not where y was written, whose warps it would hold up
              store_box(p.y_map, shared.x(s, tile), feature, head, token, unit.row);
              wait_for_stores<false>();
            }
          } else {
            bf16* y = p.y + unit.row * p.y_strides[0] + head * p.y_strides[2] + feature;
#pragma unroll 1
            for (int i = lane; i < kChunk * 8; i += 32) {
              const int row = i / 8, column = i % 8;
              uint4 v;
              asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                           : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                           : "r"(swizzled(shared.x(s, tile), row, column))
                           : "memory");
              if (row >= low && row < high && feature + 8 * column < p.headdim) {
                *reinterpret_cast<uint4*>(y + static_cast<int64>(token + row) * p.y_strides[1] + 8 * column) = v;
              }
            }
          }
          __syncwarp();
          if (lane == 0) arrive(shared.empty(s));
        }
      });
  if (lane == 0) wait_for_stores<true>();
}

// -------------------------------------------------------------------------------------------- warpgroup 1: M

// Rows [0, low) and [high, 64) of a tile belong to other sequences and may hold anything; a product with a weight of
// zero would still pass their NaN on.
__device__ __forceinline__ void clear_rows(uint32 tile, int low, int high, int thread) {
  const int row = thread / 2;
  if (row >= low && row < high) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + row * 128 + (thread % 2) * 64 + i * 16), "r"(0)
                 : "memory");
  }
}

// M = C B^T * 2^(a_l - b_s) below the diagonal into a tile, and the diagonal into `own`. The four warps, which have
// rows of different lengths, run the same instructions: code of their own would not stay in the instruction cache.
__device__ __forceinline__ void mix_rows(const float (&cb)[32], uint32 a, uint32 b, uint32 mixed, uint32 own) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int place = place_of(row) * 4;   // and that of row + 8 is the next but one
  const float a0 = load_shared(a + place), a1 = load_shared(a + place + 8);
  float of_columns[16];
  load_tokens(of_columns, b, lane);
  // of a lane's two columns of a group on the diagonal, those before its row
  const int distance = lane / 4 - 2 * (lane % 4);
  const uint32 triangle = distance > 1 ? ~0u : distance == 1 ? 0xFFFFu : 0u;
  uint32 packed[16];
  float diagonal0 = 0.f, diagonal1 = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float b0 = of_columns[2 * j], b1 = of_columns[2 * j + 1];
    const float m0 = cb[4 * j] * exp2_fast(a0 - b0), m1 = cb[4 * j + 1] * exp2_fast(a0 - b1);
    const float m2 = cb[4 * j + 2] * exp2_fast(a1 - b0), m3 = cb[4 * j + 3] * exp2_fast(a1 - b1);
    if (j == 2 * warp) diagonal0 = distance == 0 ? m0 : m1;
    if (j == 2 * warp + 1) diagonal1 = distance == 0 ? m2 : m3;
    packed[2 * j] = pack_bf16(m0, m1) & (j < 2 * warp ? ~0u : j == 2 * warp ? triangle : 0u);
    packed[2 * j + 1] = pack_bf16(m2, m3) & (j <= 2 * warp ? ~0u : j == 2 * warp + 1 ? triangle : 0u);
  }
  if (distance == 0 || distance == 1) {  // the lane of four that meets the diagonal of its rows
    store_shared(own + place, diagonal0);
    store_shared(own + place + 8, diagonal1);
  }
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    store_matrices(swizzled(mixed, 16 * warp + lane % 16, j + lane / 16), packed[2 * j], packed[2 * j + 1],
                   packed[2 * j + 2], packed[2 * j + 3]);
  }
}

template <typename Config>
__device__ __forceinline__ void mix_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  for_each_chunk<Config>(
      p, [](const Unit&, int) {},
      [&](const Unit& unit, int c, int iteration) {
        const int s = iteration % Config::kStages, m = iteration % Config::kBuffers;
        const uint32 stage = shared.stage(s);
        const int token = unit.first + c * kChunk;
        const int low = max(unit.begin - token, 0), high = min(unit.end - token, kChunk);
        wait(shared.full(s), (iteration / Config::kStages) & 1);
        if (low > 0 || high < kChunk) [[unlikely]] {
#pragma unroll
          for (int tile = 0; tile < Config::kGroupTiles; ++tile) {
            clear_rows(stage + Config::kB + tile * Config::kTileBytes, low, high, thread);
          }
#pragma unroll
          for (int tile = 0; tile < Config::kTiles; ++tile) clear_rows(shared.x(s, tile), low, high, thread);
          fence_async_proxy();
          sync_threads(1, 128);
        }
        float cb[32];  // C B^T [64, 64]
        if constexpr (!Config::kStatesOnly) {
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < Config::kGroupTiles * 4; ++k) {
            const uint32 offset = k / 4 * Config::kTileBytes + k % 4 * 32;
            wgmma(cb, swizzled_operand(stage, Config::kC + offset), swizzled_operand(stage, Config::kB + offset),
                  k > 0);
          }
          wgmma_commit();
        }
        wait(shared.mixed_empty(m), (iteration / Config::kBuffers + 1) & 1);
        if constexpr (!Config::kStatesOnly) {
          wgmma_wait<0>();
#pragma unroll 1
          for (int head = 0; head < Config::kHeads; ++head) {
            mix_rows(cb, shared.decay(s, head, kA), shared.decay(s, head, kB),
                     shared.mixed(m) + head * Config::kTileBytes, shared.own(m, head));
          }
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) arrive(shared.mixed_full(m));
        if (lane == 0) arrive(shared.empty(s));
      });
}

}  // namespace hybrid_ops
