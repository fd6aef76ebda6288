// What leaves a chunk of the SSD scan: y, made by the readers, and stored by a warp of warpgroup 0.
#pragma once

#include "common/ssd_norm.cuh"
#include "common/ssd_segments.cuh"

namespace hybrid_ops {

// A warp's 16 tokens of C as operands of wgmma: columns 16 k .. in c[k].
template <typename Config>
__device__ __forceinline__ void load_C(uint32 (&c)[Config::kGroupTiles * 4][4], uint32 tiles,
                                       const RowPlaces<Config>& places) {
#pragma unroll
  for (int k = 0; k < Config::kGroupTiles * 4; ++k) load_matrices(c[k], places.at(tiles, k));
}

// M = C B^T * 2^(a_l - b_s) below the diagonal, as operands of wgmma in m[k], and the diagonal of the thread's two rows
// in `own`. Warps, which have rows of different lengths, run the same instructions: code of their own would not stay in
// the instruction cache.
__device__ __forceinline__ void mix_rows(uint32 (&m)[4][4], float (&own)[2], const float (&cb)[32], const float (&a)[2],
                                         const float (&b)[16], int warp, int lane) {
  // of a lane's two columns of a group on the diagonal, those before its row
  const int distance = lane / 4 - 2 * (lane % 4);
  const uint32 triangle = distance > 1 ? ~0u : distance == 1 ? 0xFFFFu : 0u;
  float diagonal[2] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * k + i;  // columns 8 j ..
      const float b0 = b[2 * j], b1 = b[2 * j + 1];
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

// D x, where D has a number for every feature; x[j][..] are features 16 j .. as above.
template <typename Config>
__device__ __forceinline__ void add_skips(float (&y)[Config::kFeatures / 2],
                                          const uint32 (&x)[Config::kFeatures / 16][4], const SsdParams& p, int head,
                                          int lane) {
#pragma unroll
  for (int i = 0; i < Config::kFeatures / 4; ++i) {  // pairs of features, of a row and 8 rows later
    const int feature = i / 2 * 8 + 2 * (lane % 4);
    const uint32 pair = x[i / 4][i % 4];
    if (feature < p.headdim) {
      y[2 * i] += p.D[head * p.D_strides[0] + feature * p.D_strides[1]] * low_half(pair);
      y[2 * i + 1] += p.D[head * p.D_strides[0] + (feature + 1) * p.D_strides[1]] * high_half(pair);
    }
  }
}

// y + skip x, and the gate, as x is laid out. Where y will be normed, times the weights of the norm, and `squares` are
// those of a lane's part of its two rows, without weights.
template <typename Config>
__device__ __forceinline__ void finish_rows(uint32 weights, uint32 (&x)[Config::kFeatures / 16][4], float (&squares)[2],
                                            const float (&skip)[2], const float (&y)[Config::kFeatures / 2],
                                            uint32 z_tiles, const RowPlaces<Config>& places) {
  squares[0] = squares[1] = 0.f;
#pragma unroll
  for (int j = 0; j < Config::kFeatures / 16; ++j) {
    uint32 z[4];
    if constexpr (Config::kGated) load_matrices(z, places.at(z_tiles, j));
    uint32 of_norm[2] = {};
    if constexpr (Config::kNormed) {
#pragma unroll
      for (int i = 0; i < 2; ++i) load_word(of_norm[i], weights + (16 * j + 8 * i) * 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sum = &y[8 * j + 2 * i];
      float y0 = fmaf(skip[i % 2], low_half(x[j][i]), sum[0]), y1 = fmaf(skip[i % 2], high_half(x[j][i]), sum[1]);
      if constexpr (Config::kGated) {
        const float z0 = low_half(z[i]), z1 = high_half(z[i]);
        y0 *= z0 * sigmoid<bf16>(z0);
        y1 *= z1 * sigmoid<bf16>(z1);
      }
      if constexpr (Config::kNormed) {
        squares[i % 2] = fmaf(y0, y0, fmaf(y1, y1, squares[i % 2]));
        y0 *= low_half(of_norm[i / 2]);
        y1 *= high_half(of_norm[i / 2]);
      }
      x[j][i] = pack_bf16(y0, y1);
    }
  }
}

// Like for_each_chunk for who makes y: find(unit, iteration) where only a state is to be found, and else enter(unit),
// chunk(unit, c, iteration, turn) for every chunk, of which it is the `turn`-th, and leave(unit, the next turn).
template <typename Config, typename Find, typename Enter, typename Chunk, typename Leave>
__device__ __forceinline__ void for_each_scanned(const SsdParams& p, Find find, Enter enter, Chunk chunk, Leave leave) {
  uint32 iteration = 0, found = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    if constexpr (Config::kSplit) {
      if (unit.finding) {
        find(unit, iteration);
        iteration += unit.chunks;
        found += unit.chunks;
        return;
      }
    }
    enter(unit);
    for (int c = 0; c < unit.chunks; ++c, ++iteration) {
      if (makes_y<Config>(iteration)) chunk(unit, c, iteration, (iteration - found) / Config::kTurns);
    }
    leave(unit, (iteration - found) / Config::kTurns);
  });
}

// y of every kReaders-th chunk.
template <typename Config>
__device__ __forceinline__ void make_outputs(const SsdParams& p, const SharedMemory<Config>& shared, uint32 reader) {
  constexpr int kSteps = Config::kGroupTiles * 4;  // of 16 columns of B, C and states
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const RowPlaces<Config> places(warp, lane);
  int place = place_of(16 * warp + lane / 4) * 4;  // of its first row in products; of row + 8 the next but one
  const bool never = p.nseq < 0, D_per_feature = p.D.data != nullptr && p.D_strides[1] != 0;
  float D = 0.f;
  GroupSums<Config> sums{p, warp, lane};
  for_each_scanned<Config>(
      p,
      [&](const Unit& unit, uint32 iteration) {
        Walker<Config> finder{shared, 0, 0, warp, lane, never};
        find_state(p, finder, unit, iteration, 1 + reader);
      },
      [&](const Unit& unit) {
        if constexpr (Config::kNormed) sums.enter(shared.weights(reader), 1 + Config::kWalkers + reader, unit);
        if (p.D.data != nullptr && !D_per_feature) D = p.D[unit.head * p.D_strides[0]];
      },
      [&](const Unit& unit, int c, uint32 iteration, uint32 turn) {
        if (turn % Config::kReaders != reader) return;
        // addresses made of it would be in registers throughout, of which there is none left
        if constexpr (Config::kSplit && (Config::kHalves == 2 || Config::kGated)) {
          asm volatile("" : "+r"(place));
        }
        const int s = iteration % Config::kStages;
        const uint32 group = shared.group(iteration);
        const int buffer = turn % Config::kBuffers;
        uint32 C[kSteps][4], m[4][4], x[Config::kFeatures / 16][4];
        float cb[32], y[Config::kFeatures / 2];  // C B^T [64, 64]; Y [64, P]
        shared.wait_for_inputs(iteration);
        load_C<Config>(C, group + Config::kC, places);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const uint32 offset = k / 4 * Config::kTileBytes + k % 4 * 32;
          wgmma<false>(cb, C[k], swizzled_operand(shared.operand(group), offset), k > 0);
        }
        wgmma_commit();
        const float a[2] = {load_shared(shared.per_token(s, kA) + place),
                            load_shared(shared.per_token(s, kA) + place + 8)};
        float b[16];
        load_tokens(b, shared.per_token(s, kB), lane, warp + 1);
        wait(shared.passed_full(buffer), (turn / Config::kBuffers) & 1);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {  // C S^T
          const uint32 offset = k / 4 * Config::kColumnBytes + k % 4 * 32;
          wgmma<false>(y, C[k], swizzled_operand(shared.operand(shared.passed(buffer)), offset), k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        __syncwarp();
        shared.leave_group(iteration, lane);
        float skip[2];
        mix_rows(m, skip, cb, a, b, warp, lane);
        const float reach[2] = {exp2_fast(a[0]), exp2_fast(a[1])};
        wgmma_wait<0>();
        keep_operands(C, never, group);
        __syncwarp();
        if (lane == 0) arrive(shared.passed_empty(buffer));
#pragma unroll
        for (int i = 0; i < Config::kFeatures / 2; ++i) y[i] *= reach[i / 2 % 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // M X
          wgmma<true>(y, m[k], swizzled_operand(shared.operand(shared.x(s, 0)), k * 2048, Config::kTileBytes), true);
        }
        wgmma_commit();
        const uint32 before = turn - Config::kReaders;  // this reader's last one, whose y is normed behind this one's
        if constexpr (Config::kNormed) {
          if (c >= Config::kReaders) sums.ask(c - Config::kReaders);
        }
#pragma unroll
        for (int j = 0; j < Config::kFeatures / 16; ++j) {
          load_matrices(x[j], places.at(shared.x(s, 0), j));
        }
        wgmma_wait<0>();
        keep_operands(m, never, group);

        if (D_per_feature) add_skips<Config>(y, x, p, unit.head, lane);
        skip[0] += D;
        skip[1] += D;
        float squares[2];
        finish_rows<Config>(shared.weights(reader) + lane % 4 * 4, x, squares, skip, y, shared.z(s, 0), places);
        if constexpr (Config::kNormed) sums.tell(c, squares);
        const int output = turn % Config::kOutputs;
        wait(shared.y_empty(output), (turn / Config::kOutputs + 1) & 1);
#pragma unroll
        for (int j = 0; j < Config::kFeatures / 16; ++j) {
          store_matrices(places.at(shared.y(output, 0), j), x[j][0], x[j][1], x[j][2], x[j][3]);
        }
        __syncwarp();
        if (lane == 0) {
          arrive(shared.empty(s));  // not before y, made of all that was loaded, is stored: see Walker::walk
          if (!Config::kNormed) arrive(shared.y_full(output));
        }
        if constexpr (Config::kNormed) {
          if (c >= Config::kReaders) norm_rows(shared, c - Config::kReaders, before, sums, places);
        }
      },
      [&](const Unit& unit, uint32 next) {
        if constexpr (Config::kNormed) {
          const uint32 ago = 1 + (next + Config::kReaders - 1 - reader) % Config::kReaders;
          if (ago > unit.chunks) return;
          sums.ask(unit.chunks - ago);
          norm_rows(shared, unit.chunks - ago, next - ago, sums, places);
        }
      });
}

// A head's y of chunk c, in `output`, to where it belongs: a whole chunk by TMA, another token by token, for what lies
// beside a sequence is not ours to write.
template <typename Config>
__device__ __forceinline__ void store_output(const SsdParams& p, const SharedMemory<Config>& shared, const Unit& unit,
                                             int c, int head, int output) {
  constexpr int kTiles = Config::kTiles / Config::kHeads;  // of a head's y
  const int lane = threadIdx.x % 32, token = unit.first + c * kChunk;
  const int low = max(unit.begin - token, 0), high = min(unit.end - token, kChunk);
  if (high - low == kChunk) {
    if (lane == 0) {
      fence_async_proxy();
      for (int tile = 0; tile < kTiles; ++tile) {
        store_box(p.y_map, shared.y(output, tile), 64 * tile, head, token, unit.row);
      }
      wait_for_stores<false>();
    }
  } else {
    bf16* y = p.y + unit.row * p.y_strides[0] + head * p.y_strides[2];
#pragma unroll 1
    for (int place = lane; place < kChunk * kTiles * 8; place += 32) {
      const int row = place / (kTiles * 8), column = place % (kTiles * 8);
      uint4 v;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(swizzled(shared.y(output, column / 8), row, column % 8))
                   : "memory");
      if (row >= low && row < high && 8 * column < p.headdim) {
        *reinterpret_cast<uint4*>(y + static_cast<int64>(token + row) * p.y_strides[1] + 8 * column) = v;
      }
    }
  }
  __syncwarp();
  if (lane == 0) arrive(shared.y_empty(output));
}

template <typename Config>
__device__ __forceinline__ void store_chunks(const SsdParams& p, const SharedMemory<Config>& shared) {
  for_each_scanned<Config>(
      p, [](const Unit&, uint32) {}, [](const Unit&) {},
      [&](const Unit& unit, int c, uint32, uint32 turn) {
#pragma unroll 1
        for (int i = 0; i < Config::kHeads; ++i) {
          const uint32 number = turn * Config::kHeads + i;  // of outputs
          const int output = number % Config::kOutputs;
          wait(shared.y_full(output), (number / Config::kOutputs) & 1);
          store_output(p, shared, unit, c, unit.head + i, output);
        }
      },
      [](const Unit&, uint32) {});
  if (threadIdx.x % 32 == 0) wait_for_stores<true>();
}

}  // namespace hybrid_ops
