// What leaves a chunk of the SSD scan: y, made by warpgroups of their own, and stored by a warp of warpgroup 0.
#pragma once

#include "common/ssd_problem.cuh"

namespace hybrid_ops {

// A warp's 16 tokens of C as operands of wgmma: columns 16 k .. in c[k].
template <typename Config>
__device__ __forceinline__ void load_C(uint32 (&c)[Config::kGroupTiles * 4][4], uint32 tiles, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < Config::kGroupTiles * 4; ++k) {
    load_matrices(c[k], swizzled(tiles + k / 4 * Config::kTileBytes, 16 * warp + lane % 16, k % 4 * 2 + lane / 16));
  }
}

// M = C B^T * 2^(a_l - b_s) below the diagonal, as operands of wgmma in m[k], and the diagonal of the thread's two rows
// in `own`. Warps, which have rows of different lengths, run the same instructions: code of their own would not stay in
// the instruction cache.
__device__ __forceinline__ void mix_rows(uint32 (&m)[4][4], float (&own)[2], const float (&cb)[32], const float (&a)[2],
                                         uint32 b, int warp, int lane) {
  // of a lane's two columns of a group on the diagonal, those before its row
  const int distance = lane / 4 - 2 * (lane % 4);
  const uint32 triangle = distance > 1 ? ~0u : distance == 1 ? 0xFFFFu : 0u;
  float diagonal[2] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float of_columns[4];
    load_shared4(of_columns, b + lane % 4 * 80 + k * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * k + i;  // columns 8 j ..
      const float b0 = of_columns[2 * i], b1 = of_columns[2 * i + 1];
      const float m0 = cb[4 * j] * exp2_fast(a[0] - b0), m1 = cb[4 * j + 1] * exp2_fast(a[0] - b1);
      const float m2 = cb[4 * j + 2] * exp2_fast(a[1] - b0), m3 = cb[4 * j + 3] * exp2_fast(a[1] - b1);
      if (i == 0 && k == warp) diagonal[0] = distance == 0 ? m0 : m1;
      if (i == 1 && k == warp) diagonal[1] = distance == 0 ? m2 : m3;
      const uint32 before = k < warp ? ~0u : 0u, here = k == warp ? triangle : before;
      m[k][2 * i] = pack_bf16(m0, m1) & (i == 0 ? here : before);
      m[k][2 * i + 1] = pack_bf16(m2, m3) & (i == 0 && k == warp ? ~0u : here);
    }
  }
  const int holder = lane / 4 * 4 + lane / 8;  // the lane of four that meets the diagonal of their rows
  own[0] = __shfl_sync(~0u, diagonal[0], holder);
  own[1] = __shfl_sync(~0u, diagonal[1], holder);
}

// (D + own) x added to y, the gate, and the way to the tiles where C was: no other warp reads these rows.
template <typename Config>
__device__ __forceinline__ void finish_rows(const SharedMemory<Config>& shared, int s, int head, const float (&own)[2],
                                            const float (&y)[Config::kFeatures / 2], int warp, int lane) {
  const int row = 16 * warp + lane % 16;
#pragma unroll
  for (int j = 0; j < Config::kFeatures / 8; j += 2) {  // features 8 j to 8 j + 15
    const int tile = head * Config::kTilesPerHead + j / 8, column = j % 8 + lane / 16;
    uint32 x[4], z[4], packed[4];  // {features, the next 8} x {rows, rows + 8}
    load_matrices(x, swizzled(shared.x(s, tile), row, column));
    if constexpr (Config::kGated) {
      load_matrices(z, swizzled(shared.stage(s) + Config::kZ + tile * Config::kTileBytes, row, column));
    }
    float D[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_shared2(D[i], shared.D(s, head) + (8 * (j + i) + 2 * (lane % 4)) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y0 = y[4 * j + 2 * i] + (D[i / 2][0] + own[i % 2]) * low_half(x[i]);
      float y1 = y[4 * j + 2 * i + 1] + (D[i / 2][1] + own[i % 2]) * high_half(x[i]);
      if constexpr (Config::kGated) {
        const float z0 = low_half(z[i]), z1 = high_half(z[i]);
        y0 *= z0 * sigmoid<bf16>(z0);
        y1 *= z1 * sigmoid<bf16>(z1);
      }
      packed[i] = pack_bf16(y0, y1);
    }
    store_matrices(swizzled(shared.y(s, tile), row, column), packed[0], packed[1], packed[2], packed[3]);
  }
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int tile = 0; tile < Config::kTilesPerHead; ++tile) {
      arrive(shared.output_full(s, head * Config::kTilesPerHead + tile));
    }
  }
}

// y of every kReaders-th chunk.
template <typename Config>
__device__ __forceinline__ void make_outputs(const SsdParams& p, const SharedMemory<Config>& shared, int reader) {
  constexpr int kHeads = Config::kHeads, kSteps = Config::kGroupTiles * 4;  // of 16 columns of B, C and states
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  for_each_chunk<Config>(
      p, [](const Unit&, int) {},
      [&](const Unit&, int, int iteration) {
        if (iteration % Config::kReaders != reader) return;
        const int s = iteration % Config::kStages, buffer = iteration % Config::kBuffers;
        const uint32 stage = shared.stage(s);
        uint32 c[kSteps][4], m[kHeads][4][4];
        float cb[32], y[kHeads][Config::kFeatures / 2];  // C B^T [64, 64]; of each head Y [64, P]
        float own[kHeads][2];
        shared.wait_for_inputs(iteration);
        load_C<Config>(c, stage + Config::kC, warp, lane);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          wgmma<false>(cb, c[k], swizzled_operand(stage, Config::kB + k / 4 * Config::kTileBytes + k % 4 * 32), k > 0);
        }
        wgmma_commit();
        wait(shared.state_full(buffer), (iteration / Config::kBuffers) & 1);
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {  // C S^T
            const uint32 offset = k / 4 * Config::kColumnBytes + k % 4 * 32;
            wgmma<false>(y[head], c[k], swizzled_operand(shared.state(buffer, head), offset), k > 0);
          }
          wgmma_commit();
        }
        wgmma_wait<kHeads>();
        const int place = place_of(16 * warp + lane / 4) * 4;  // and that of 8 rows later is the next but one
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          const float a[2] = {load_shared(shared.decay(s, head, kA) + place),
                              load_shared(shared.decay(s, head, kA) + place + 8)};
          mix_rows(m[head], own[head], cb, a, shared.decay(s, head, kB), warp, lane);
          wgmma_wait<kHeads - 1>();  // of both heads one product may be under way: the other state's, or M's before
          if (head == kHeads - 1) {
            __syncwarp();
            if (lane == 0) arrive(shared.state_empty(buffer));
          }
          const float reach[2] = {exp2_fast(a[0]), exp2_fast(a[1])};
#pragma unroll
          for (int i = 0; i < Config::kFeatures / 2; ++i) y[head][i] *= reach[i / 2 % 2];
          made(m[head]);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {  // M X
            const uint32 x = Config::kX + head * Config::kTilesPerHead * Config::kTileBytes;
            wgmma<true>(y[head], m[head][k], swizzled_operand(stage, x + k * 2048, Config::kTileBytes), true);
          }
          wgmma_commit();
        }
        if constexpr (kHeads == 2) {
          wgmma_wait<1>();
          finish_rows<Config>(shared, s, 0, own[0], y[0], warp, lane);
        }
        wgmma_wait<0>();
        finish_rows<Config>(shared, s, kHeads - 1, own[kHeads - 1], y[kHeads - 1], warp, lane);
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
          const int head = unit.head + tile / Config::kTilesPerHead, feature = tile % Config::kTilesPerHead * 64;
          wait(shared.output_full(s, tile), (iteration / Config::kStages) & 1);
          if (high - low == kChunk) {
            if (lane == 0) {
              fence_async_proxy();  // here and not where y was written, whose warps it would hold up
              store_box(p.y_map, shared.y(s, tile), feature, head, token, unit.row);
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
                           : "r"(swizzled(shared.y(s, tile), row, column))
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

}  // namespace hybrid_ops
