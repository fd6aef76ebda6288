// Forward of the SSD scan (Mamba-2) in one kernel: the state stays in registers from the first chunk of a sequence to
// the last, and x, B, C are read once.
//
//     within a chunk of L = 64 tokens, a = cumsum(dt' A log2 e), b = a - log2 dt':
//     Y^T[P, L] = S[P, N] C^T[N, L] * 2^a_l  +  X^T[P, L] M^T[L, L]  +  (D + own) X^T        M = C B^T * 2^(a_l - b_s),
//     s < l S[P, N]   = S * 2^a_last  +  (X * 2^(a_last - b))^T[P, L] B[L, N]
//
// Everything is transposed so that the head's P features are the 64 rows of a wgmma: the state, which is the sum of one
// product, then is a register operand of the next, and never passes through shared memory. x is brought into registers
// once for all of its uses. Letters: P headdim, N dstate, `own` the weight C_l B_l dt'_l of a token on its own y, which
// no product may round: after steep steps there is nothing else.
//
// Warpgroups of a CTA, which hand chunks on through mbarriers:
//     0        warp 0 copies B, C, x, z with TMA into a ring of stages. Warps 1 and 2 turn dt into a, b and their
//     powers of
//              two; warp 3 stores y
//     1        M and own of each head, from one C B^T for all heads of the CTA
//     2..      a state of 64 rows each: a head, or a part of one whose headdim is above 64
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/hopper.cuh"

namespace hybrid_ops {

using int64 = long long;
using bf16 = __nv_bfloat16;

enum class Stored : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A float tensor of any of the three dtypes.
struct Floats {
  const void* data;  // or null
  Stored dtype;

  __device__ __forceinline__ float operator[](int64 i) const { return value(bits(i)); }

  // In two steps where the load is to be on its way while other things are done.
  __device__ __forceinline__ uint32 bits(int64 i) const {
    return dtype == Stored::float32 ? static_cast<const uint32*>(data)[i] : static_cast<const unsigned short*>(data)[i];
  }
  __device__ __forceinline__ float value(uint32 bits) const {
    if (dtype == Stored::float16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return __uint_as_float(dtype == Stored::float32 ? bits : bits << 16);
  }
};

// States (.., nheads, headdim, dstate), contiguous but for the first dimension, whose row `slots` names where given.
struct States {
  void* data;  // or null
  Stored dtype;
  int64 stride;
  const int* slots;
};

struct SsdParams {
  TensorMap x_map, B_map, C_map, z_map, y_map;  // (batch, seqlen, nheads | ngroups, headdim | dstate)
  Floats dt, dt_bias, D;
  const float* A;
  int64 dt_strides[3];  // batch, token, head
  int64 dt_bias_stride;
  int64 D_strides[2];  // head, feature
  bf16* y;
  int64 y_strides[3];      // batch, token, head
  const int* cu_seqlens;   // (nseq + 1,) or null: every batch row is a sequence
  const int* seq_offsets;  // (nseq,) or null: a sequence's first token has this position
  States initial, final, interval;
  const int* interval_base;  // (nseq,) or null: a packed sequence's first row of `interval`
  float* segment_states;  // (slots, parts, nheads, headdim, dstate): what a part of a segment adds to the state; then,
                          // in part 0, the state that enters the segment
  float* segment_decay;   // (slots, parts, nheads): log2 of what is left of a state after a part
  float dt_min, dt_max;
  int segment_chunks;  // chunks of a segment; 0: sequences are not split
  int parts;           // of a segment, whose states are made side by side
  int slots;           // places for segments, or sequences
  int seqlen, nseq, nheads, headdim, dstate, heads_per_group;
  int num_slots, null_slot, num_intervals, state_interval;
  bool dt_softplus;
};

constexpr int kChunk = 64;

template <int kTiles_, int kHeads_, int kStates_, bool kGated_, bool kStatesOnly_>
struct SsdConfig {
  static constexpr int kTiles = kTiles_;    // of 64 rows of states in a CTA
  static constexpr int kHeads = kHeads_;    // of a CTA: kTiles, or 1 with several tiles
  static constexpr int kStates = kStates_;  // dstate, padded: 128 or 256
  static constexpr bool kGated = kGated_;
  static constexpr bool kStatesOnly = kStatesOnly_;  // the segments' states, without y

  static constexpr bool kOverlap =
      kTiles == 1;  // a chunk is finished during the next: several tiles overlap each other

  static constexpr int kThreads = 128 * (2 + kTiles);
  static constexpr int kProducerRegisters = kTiles == 1 ? 64 : 56;
  static constexpr int kDecayRegisters = kTiles == 1 ? 120 : 88;
  static constexpr int kStateRegisters = kTiles == 1 ? 240 : 184;

  static constexpr int kTileBytes = kChunk * 64 * 2;  // 64 tokens of 128 bytes, swizzled
  static constexpr int kGroupTiles = kStates / 64;    // of B, and of C
  static constexpr int kGroupBytes = kGroupTiles * kTileBytes;
  static constexpr int kGroupLoads = kGroupTiles * (kStatesOnly ? 1 : 2);

  // a stage, in bytes from its beginning
  static constexpr int kB = 0;
  static constexpr int kC = kGroupBytes;
  static constexpr int kX = kC + (kStatesOnly ? 0 : kGroupBytes);
  static constexpr int kZ = kX + kTiles * kTileBytes;
  static constexpr int kStageLoads = kZ + (kGated ? kTiles * kTileBytes : 0);  // that TMA brings
  static constexpr int kDecay = kStageLoads;  // per head: a, b, 2^a, 2^(a_last - b), of 64 tokens each
  static constexpr int kDecayBytes = 4 * kChunk * 4;
  static constexpr int kStage = kStageLoads + kHeads * kDecayBytes;

  // behind the stages
  static constexpr int kBuffers = kTiles == 1 ? 3 : 2;                    // of M and what goes with it
  static constexpr int kMixed = (kStatesOnly ? 0 : kHeads * kTileBytes);  // M of all heads
  static constexpr int kScaled = kTiles * kTileBytes;  // x, as it enters the state; then y on its way out
  static constexpr int kTail = kBuffers * (kMixed + kScaled + kHeads * kChunk * 4) + 256;
  static constexpr int kLimit = 232448 - 1024;  // a CTA's shared memory, less what aligning it takes
  static constexpr int kStages = (kLimit - kTail) / kStage > 4 ? 4 : (kLimit - kTail) / kStage;
  static_assert(kStages >= 2);
  static constexpr int kSharedBytes = kStages * kStage + kTail + 1024;
};

// Where things lie in shared memory, and the barriers that pass them on.
template <typename Config>
struct SharedMemory {
  uint32 base;

  __device__ __forceinline__ uint32 stage(int s) const { return base + s * Config::kStage; }
  __device__ __forceinline__ uint32 mixed(int m) const {
    return base + Config::kStages * Config::kStage + m * Config::kMixed;
  }
  __device__ __forceinline__ uint32 scaled(int m, int tile = 0) const {
    return mixed(Config::kBuffers) + m * Config::kScaled + tile * Config::kTileBytes;
  }
  __device__ __forceinline__ uint32 own(int m) const {  // (heads, 64) float32
    return scaled(Config::kBuffers) + m * Config::kHeads * kChunk * 4;
  }
  __device__ __forceinline__ uint32 barrier(int i) const { return own(Config::kBuffers) + 8 * i; }
  __device__ __forceinline__ uint32 full(int s) const { return barrier(s); }
  __device__ __forceinline__ uint32 empty(int s) const { return barrier(Config::kStages + s); }
  __device__ __forceinline__ uint32 mixed_full(int m) const { return barrier(2 * Config::kStages + m); }
  __device__ __forceinline__ uint32 mixed_empty(int m) const {
    return barrier(2 * Config::kStages + Config::kBuffers + m);
  }
  __device__ __forceinline__ uint32 output_full(int m, int tile) const {
    return barrier(2 * (Config::kStages + Config::kBuffers) + m * Config::kTiles + tile);
  }
};

__device__ __forceinline__ float load_shared(uint32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float2 load_shared2(uint32 address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint32 address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void store_shared2(uint32 address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32 pack_bf16(float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float low_half(uint32 packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_half(uint32 packed) { return __uint_as_float(packed & 0xFFFF0000u); }

// The 16 bytes `column` of row `row` of a tile with 128-byte swizzle.
__device__ __forceinline__ uint32 swizzled(uint32 tile, int row, int column) {
  return tile + row * 128 + ((column ^ (row & 7)) << 4);
}

// ---------------------------------------------------------------------------------------------------- work units

// A sequence, or a segment of one, for the heads of a CTA.
struct Unit {
  int sequence, row, begin, end;  // its tokens [begin, end) of a batch row
  int first;                      // token at the first place of this segment's first chunk; may lie before `begin`
  int position;                   // of that place, from the beginning of the sequence, and seq_offsets
  int chunks, slot, segment;
  int head;   // the first of the CTA's
  bool last;  // no segment of the sequence follows
};

// The tokens of a sequence, and where its chunks begin: at multiples of kChunk, counted from seq_offsets.
__device__ __forceinline__ void find_sequence(const SsdParams& p, int sequence, Unit& unit) {
  const bool packed = p.cu_seqlens != nullptr;
  unit.sequence = sequence;
  unit.row = packed ? 0 : sequence;
  unit.begin = packed ? min(max(p.cu_seqlens[sequence], 0), p.seqlen) : 0;
  unit.end = packed ? min(max(p.cu_seqlens[sequence + 1], unit.begin), p.seqlen) : p.seqlen;
  const int offset = p.seq_offsets == nullptr ? 0 : p.seq_offsets[sequence], lead = offset % kChunk;
  unit.first = unit.begin - lead;
  unit.position = offset - lead;
  unit.chunks = (lead + unit.end - unit.begin + kChunk - 1) / kChunk;
}

// A sequence's first place for segments: those of different sequences never meet.
__device__ __forceinline__ int first_slot(const SsdParams& p, int sequence) {
  if (p.segment_chunks == 0) return sequence;
  if (p.cu_seqlens == nullptr) return sequence * (p.slots / p.nseq);
  return min(max(p.cu_seqlens[sequence], 0), p.seqlen) / (p.segment_chunks * kChunk) + 2 * sequence;
}

// False where there is nothing to do.
template <typename Config>
__device__ __forceinline__ bool find_unit(const SsdParams& p, int index, Unit& unit) {
  const int head_blocks = p.nheads / Config::kHeads, parts = Config::kStatesOnly ? p.parts : 1;
  const int part = index / head_blocks % parts;
  unit.slot = index / head_blocks / parts;
  unit.head = index % head_blocks * Config::kHeads;
  int low = 0, high = p.nseq;  // the last sequence whose first slot is not beyond this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_slot(p, middle) <= unit.slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  find_sequence(p, low, unit);
  unit.segment = unit.slot - first_slot(p, low);
  unit.last = true;
  if (p.segment_chunks == 0) return true;
  int first_chunk = unit.segment * p.segment_chunks, length = p.segment_chunks;
  unit.last = first_chunk + length >= unit.chunks;
  if (unit.segment > 0 && first_chunk >= unit.chunks) return false;
  int last_chunk = min(first_chunk + length, unit.chunks);
  if (Config::kStatesOnly) {  // of every segment but the last, in parts
    if (unit.last) return false;
    unit.slot = unit.slot * parts + part;
    length = (length + parts - 1) / parts;
    first_chunk += part * length;
    last_chunk = min(first_chunk + length, last_chunk);
  }
  unit.first += first_chunk * kChunk;
  unit.position += first_chunk * kChunk;
  unit.chunks = max(last_chunk - first_chunk, 0);
  return true;
}

template <typename Config, typename Body>
__device__ __forceinline__ void for_each_unit(const SsdParams& p, Body body) {
  const int count = p.slots * (Config::kStatesOnly ? p.parts : 1) * (p.nheads / Config::kHeads);
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    Unit unit;
    if (find_unit<Config>(p, index, unit)) body(unit);
  }
}

// chunk(unit, c, iteration) for every chunk of every unit of this CTA; all roles count alike.
template <typename Config, typename Enter, typename Chunk>
__device__ __forceinline__ void for_each_chunk(const SsdParams& p, Enter enter, Chunk chunk) {
  int iteration = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    enter(unit, iteration);
    for (int c = 0; c < unit.chunks; ++c, ++iteration) chunk(unit, c, iteration);
  });
}

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

// log(1 + exp(x)) with 2e-5 of relative error or less, also where it is small: there it is a series in u = exp(x).
__device__ __forceinline__ float softplus(float x) {
  const float u = __expf(x);
  const float series = u * (1.f - u * (0.5f - u * (1.f / 3 - u * (0.25f - u * 0.2f))));
  return x > 20.f ? x : u < 1.f / 32 ? series : __logf(1.f + u);
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
      if (token + i >= unit.begin && token + i < unit.end) coming[i] = p.dt.bits(offset + i * p.dt_strides[1]);
    }
  };
  const auto step = [&](const Unit& unit, int token, uint32 bits) {
    float dt = p.dt.value(bits) + bias;
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
        const float b0 = dt0 > 0.f ? first_a - log2_fast(dt0) : INFINITY;
        const float b1 = dt1 > 0.f ? sum - log2_fast(dt1) : INFINITY;
        wait(shared.empty(s), (iteration / Config::kStages + 1) & 1);
        const uint32 decay = shared.stage(s) + Config::kDecay + head_of_cta * Config::kDecayBytes + lane * 8;
        store_shared2(decay, first_a, sum);
        store_shared2(decay + kChunk * 4, b0, b1);
        store_shared2(decay + kChunk * 8, exp2_fast(first_a), exp2_fast(sum));
        store_shared2(decay + kChunk * 12, exp2_fast(last - b0), exp2_fast(last - b1));
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
        const int token = unit.first + c * kChunk, m = iteration % Config::kBuffers;
        const int low = max(unit.begin - token, 0), high = min(unit.end - token, kChunk);
#pragma unroll 1
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          const int head = unit.head + (Config::kHeads == 1 ? 0 : tile), feature = Config::kHeads == 1 ? tile * 64 : 0;
          wait(shared.output_full(m, tile), (iteration / Config::kBuffers) & 1);
          if (high - low == kChunk) {
            if (lane == 0) {
              store_box(p.y_map, shared.scaled(m, tile), feature, head, token, unit.row);
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
                           : "r"(swizzled(shared.scaled(m, tile), row, column))
                           : "memory");
              if (row >= low && row < high && feature + 8 * column < p.headdim) {
                *reinterpret_cast<uint4*>(y + static_cast<int64>(token + row) * p.y_strides[1] + 8 * column) = v;
              }
            }
          }
          __syncwarp();
          if (lane == 0) arrive(shared.mixed_empty(m));  // whose M was read before y was made
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
__device__ __forceinline__ void mix_rows(const float (&cb)[32], uint32 decay, uint32 mixed, uint32 own) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const uint32 columns = decay + kChunk * 4 + 2 * (lane % 4) * 4;
  const float a0 = load_shared(decay + row * 4), a1 = load_shared(decay + row * 4 + 32);
  float2 b[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) b[j] = load_shared2(columns + 32 * j);
  // of a lane's two columns of a group on the diagonal, those before its row
  const int distance = lane / 4 - 2 * (lane % 4);
  const uint32 triangle = distance > 1 ? ~0u : distance == 1 ? 0xFFFFu : 0u;
  uint32 packed[16];
  float diagonal0 = 0.f, diagonal1 = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float m0 = cb[4 * j] * exp2_fast(a0 - b[j].x), m1 = cb[4 * j + 1] * exp2_fast(a0 - b[j].y);
    const float m2 = cb[4 * j + 2] * exp2_fast(a1 - b[j].x), m3 = cb[4 * j + 3] * exp2_fast(a1 - b[j].y);
    if (j == 2 * warp) diagonal0 = distance == 0 ? m0 : m1;
    if (j == 2 * warp + 1) diagonal1 = distance == 0 ? m2 : m3;
    packed[2 * j] = pack_bf16(m0, m1) & (j < 2 * warp ? ~0u : j == 2 * warp ? triangle : 0u);
    packed[2 * j + 1] = pack_bf16(m2, m3) & (j <= 2 * warp ? ~0u : j == 2 * warp + 1 ? triangle : 0u);
  }
  if (distance == 0 || distance == 1) {  // the lane of four that meets the diagonal of its rows
    store_shared(own + row * 4, diagonal0);
    store_shared(own + row * 4 + 32, diagonal1);
  }
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    store_matrices(swizzled(mixed, 16 * warp + lane % 16, j + lane / 16), packed[2 * j], packed[2 * j + 1],
                   packed[2 * j + 2], packed[2 * j + 3]);
  }
}

// x dt' 2^(a_last - a), as it enters the state.
__device__ __forceinline__ void scale_rows(uint32 x_tile, uint32 decay, uint32 scaled, int thread) {
  const int row = thread / 8, column = thread % 8;  // and rows 16 further on, which are swizzled alike
  const uint32 offset = swizzled(0, row, column);
  float weight[4];
  uint32 v[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weight[i] = load_shared(decay + kChunk * 12 + (row + 16 * i) * 4);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[i][0]), "=r"(v[i][1]), "=r"(v[i][2]), "=r"(v[i][3])
                 : "r"(x_tile + offset + i * 2048)
                 : "memory");
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[i][k] = pack_bf16(low_half(v[i][k]) * weight[i], high_half(v[i][k]) * weight[i]);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(scaled + offset + i * 2048), "r"(v[i][0]),
                 "r"(v[i][1]), "r"(v[i][2]), "r"(v[i][3])
                 : "memory");
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
          for (int tile = 0; tile < Config::kTiles; ++tile) {
            clear_rows(stage + Config::kX + tile * Config::kTileBytes, low, high, thread);
          }
          fence_async_proxy();
          sync_threads(1, 128);
        }
        float cb[32];  // C B^T [64, 64]
        if constexpr (!Config::kStatesOnly) {
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < Config::kStates / 16; ++k) {
            const uint32 offset = k / 4 * Config::kTileBytes + k % 4 * 32;
            wgmma<false, false>(cb, swizzled_operand(stage, Config::kC + offset),
                                swizzled_operand(stage, Config::kB + offset), k > 0);
          }
          wgmma_commit();
        }
        wait(shared.mixed_empty(m), (iteration / Config::kBuffers + 1) & 1);
#pragma unroll
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          const uint32 decay = stage + Config::kDecay + (Config::kHeads == 1 ? 0 : tile) * Config::kDecayBytes;
          scale_rows(stage + Config::kX + tile * Config::kTileBytes, decay, shared.scaled(m, tile), thread);
        }
        if constexpr (!Config::kStatesOnly) {
          wgmma_wait<0>();
#pragma unroll 1
          for (int head = 0; head < Config::kHeads; ++head) {
            const uint32 decay = stage + Config::kDecay + head * Config::kDecayBytes;
            const uint32 mixed = shared.mixed(m) + head * Config::kTileBytes;
            const uint32 own = shared.own(m) + head * kChunk * 4;
            mix_rows(cb, decay, mixed, own);
          }
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) arrive(shared.mixed_full(m));
        if (lane == 0) arrive(shared.empty(s));
      });
}

// -------------------------------------------------------------------------------------------- the other warpgroups

// The slot of a sequence in a pool; false where it has none.
__device__ __forceinline__ bool find_slot(const SsdParams& p, const int* slots, int64 place, int64& slot) {
  slot = slots == nullptr ? place : slots[place];
  return slots == nullptr || (slot >= 0 && slot < p.num_slots && slot != p.null_slot);
}

__device__ __forceinline__ States segment_states(const SsdParams& p) {
  return {p.segment_states, Stored::float32, static_cast<int64>(p.nheads) * p.headdim * p.dstate, nullptr};
}

// A thread's part of a state: rows `feature` and `feature` + 8, columns 8 j + 2 (lane % 4) + {0, 1}. `value(i)` is
// where registers i and i + 1 are.
template <int kStates, typename Body>
__device__ __forceinline__ void for_each_pair(const SsdParams& p, int head, int feature, Body body) {
  const int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(feature));  // what is found out here is not worth a register from one use to the next
#pragma unroll
  for (int i = 0; i < kStates / 2; i += 2) {
    const int row = feature + (i & 2) * 4, column = i / 4 * 8 + 2 * (lane % 4);
    if (row < p.headdim && column < p.dstate) {
      body(i, (static_cast<int64>(head) * p.headdim + row) * p.dstate + column);
    }
  }
}

template <int kStates>
__device__ __forceinline__ void store_state(const SsdParams& p, const States& states, int64 slot, int head, int feature,
                                            const float (&state)[kStates / 2]) {
  const int64 base = slot * states.stride;
  for_each_pair<kStates>(p, head, feature, [&](int i, int64 place) {
    if (states.dtype == Stored::float32) {
      *reinterpret_cast<float2*>(static_cast<float*>(states.data) + base + place) = make_float2(state[i], state[i + 1]);
    } else if (states.dtype == Stored::bfloat16) {
      *reinterpret_cast<uint32*>(static_cast<bf16*>(states.data) + base + place) = pack_bf16(state[i], state[i + 1]);
    } else {
      *reinterpret_cast<__half2*>(static_cast<__half*>(states.data) + base + place) =
          __floats2half2_rn(state[i], state[i + 1]);
    }
  });
}

template <int kStates>
__device__ __forceinline__ void load_state(const SsdParams& p, const Unit& unit, int head, int feature,
                                           float (&state)[kStates / 2]) {
#pragma unroll
  for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
  States states = p.initial;
  int64 slot = static_cast<int64>(unit.slot) * p.parts;
  bool found = true;
  if (unit.segment > 0) {
    states = segment_states(p);
  } else {
    found = states.data != nullptr && find_slot(p, states.slots, unit.sequence, slot);
  }
  if (found) {
    const Floats source{states.data, states.dtype};
    const int64 base = slot * states.stride;
    for_each_pair<kStates>(p, head, feature, [&](int i, int64 place) {
      state[i] = source[base + place];
      state[i + 1] = source[base + place + 1];
    });
  }
}

// Y^T of a warp's 16 features into a tile of tokens, for the storing warp.
__device__ __forceinline__ void hand_over(uint32 tile, int warp, const uint32 (&packed)[16]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {  // tokens 8 j ..: {features 0-7, 8-15} of 8 tokens, and of the next 8
    store_matrices_transposed(swizzled(tile, 8 * j + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2), packed[2 * j],
                              packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
  }
  fence_async_proxy();
  __syncwarp();
}

// (D + own) x added to Y^T, the gate, and the way out, for the chunk in a stage and a buffer of M. In 8 steps of 8
// tokens, to be done while products are under way; registers of a step become two of `packed`.
template <typename Config>
struct Finish {
  const SharedMemory<Config>& shared;
  int tile, head_of_cta, warp, lane;
  float D0, D1;  // of the thread's two rows of features
  float2 own[8];
  uint32 x[4][4], z[4][4];
  uint32 packed[16];

  // Reads what the steps need: a load among the products would hold them up.
  __device__ __forceinline__ void begin(int s, int m) {
    const uint32 x_tile = shared.stage(s) + Config::kX + tile * Config::kTileBytes;
    const uint32 z_tile = shared.stage(s) + Config::kZ + tile * Config::kTileBytes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 features, 16 tokens
      const int row = 16 * k + lane % 8 + lane / 16 * 8, column = 2 * warp + lane / 8 % 2;
      load_matrices_transposed(x[k], swizzled(x_tile, row, column));
      if constexpr (Config::kGated) load_matrices_transposed(z[k], swizzled(z_tile, row, column));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      own[j] = load_shared2(shared.own(m) + head_of_cta * kChunk * 4 + 2 * (lane % 4) * 4 + 32 * j);
    }
  }

  __device__ __forceinline__ void step(int j, float (&y)[32]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32 pair = x[j / 2][j % 2 * 2 + i];
      const float D = i == 0 ? D0 : D1;
      float y0 = y[4 * j + 2 * i] + (D + own[j].x) * low_half(pair);
      float y1 = y[4 * j + 2 * i + 1] + (D + own[j].y) * high_half(pair);
      if constexpr (Config::kGated) {
        const float z0 = low_half(z[j / 2][j % 2 * 2 + i]), z1 = high_half(z[j / 2][j % 2 * 2 + i]);
        y0 *= __fdividef(z0, 1.f + exp2_fast(-1.4426950408889634f * z0));
        y1 *= __fdividef(z1, 1.f + exp2_fast(-1.4426950408889634f * z1));
      }
      packed[2 * j + i] = pack_bf16(y0, y1);
    }
  }

  // y takes the place of the scaled x, which has entered the state by now.
  __device__ __forceinline__ void end(int s, int m) {
    if (lane == 0) arrive(shared.empty(s));
    if constexpr (!Config::kOverlap) sync_threads(2 + tile, 128);  // all warps' products have read the scaled x
    hand_over(shared.scaled(m, tile), warp, packed);
    if (lane == 0) arrive(shared.output_full(m, tile));
  }
};

// Chunks of a unit, of which `c` are done, until the next state is kept.
__device__ __forceinline__ int next_stop(const SsdParams& p, const Unit& unit, int c) {
  if (p.interval.data == nullptr) return unit.chunks;
  const int place = unit.position + c * kChunk;
  return min(unit.chunks, c + (p.state_interval - place % p.state_interval) / kChunk);
}

// Where the state after `c` chunks goes, as the `copy`-th of two: kept at this position, final.
__device__ __forceinline__ bool find_target(const SsdParams& p, const Unit& unit, int c, int copy, States& target,
                                            int64& slot) {
  if (copy == 1) {
    target = p.final;
    return target.data != nullptr && unit.last && c == unit.chunks && find_slot(p, target.slots, unit.sequence, slot);
  }
  target = p.interval;
  if (target.data == nullptr || c == 0) return false;
  const int offset = p.seq_offsets == nullptr ? 0 : p.seq_offsets[unit.sequence];
  const int position = offset + min(unit.first + c * kChunk, unit.end) - unit.begin;
  const int j = position / p.state_interval - offset / p.state_interval - 1;
  const bool packed = target.slots == nullptr && p.interval_base != nullptr;
  const int64 place =
      packed ? p.interval_base[unit.sequence] + j : static_cast<int64>(unit.sequence) * p.num_intervals + j;
  return position % p.state_interval == 0 && (packed ? place : j) < p.num_intervals &&
         find_slot(p, target.slots, place, slot);
}

template <typename Config>
__device__ __forceinline__ void walk_states(const SsdParams& p, const SharedMemory<Config>& shared, int tile) {
  constexpr int kStates = Config::kStates;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int head_of_cta = Config::kHeads == 1 ? 0 : tile;
  const int feature = (Config::kHeads == 1 ? tile * 64 : 0) + 16 * warp + lane / 4;  // and feature + 8
  float state[kStates / 2];
  float y[32], y_before[32];  // Y^T [64 features, 64 tokens] of this chunk and of the one before, which is finished
  float log_decay = 0.f;
  Finish<Config> finish{shared, tile, head_of_cta, warp, lane};

  // one chunk; kOverlap: `pending` says whether there is one before to be finished
  const auto walk_chunk = [&](int iteration, bool pending) {
    const int s = iteration % Config::kStages, m = iteration % Config::kBuffers;
    const int s_before = (iteration + Config::kStages - 1) % Config::kStages;
    const int m_before = (iteration + Config::kBuffers - 1) % Config::kBuffers;
    const uint32 stage = shared.stage(s);
    const uint32 decay = stage + Config::kDecay + head_of_cta * Config::kDecayBytes;
    wait(shared.full(s), (iteration / Config::kStages) & 1);
    const float keep = load_shared(decay + kChunk * 8 + 63 * 4);
    if constexpr (Config::kStatesOnly) {
      log_decay += load_shared(decay + 63 * 4);
#pragma unroll
      for (int i = 0; i < kStates / 2; ++i) state[i] *= keep;
    } else {
      if constexpr (Config::kOverlap) finish.begin(s_before, m_before);
#pragma unroll
      for (int half = 0; half < kStates / 128; ++half) {  // Y^T = S C^T
        uint32 entering[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          float* pair = &state[64 * half + 2 * i];
          entering[i] = pack_bf16(pair[0], pair[1]);
          pair[0] *= keep;
          pair[1] *= keep;
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint32 offset = Config::kC + (2 * half + k / 4) * Config::kTileBytes + k % 4 * 32;
          wgmma(y, &entering[4 * k], swizzled_operand(stage, offset), half + k > 0);
          if (Config::kOverlap && half == 0) finish.step(k, y_before);  // of nothing, where nothing is pending
        }
        wgmma_commit();
        if (half + 1 < kStates / 128) wgmma_wait<0>();  // before the registers are filled again
      }
    }

    wait(shared.mixed_full(m), (iteration / Config::kBuffers) & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // S += (scaled X)^T B
      wgmma<true, true>(state, swizzled_operand(shared.scaled(m, tile), k * 2048),
                        swizzled_operand(stage, Config::kB + k * 2048, Config::kTileBytes), true);
    }
    wgmma_commit();
    if (Config::kOverlap && pending) finish.end(s_before, m_before);
    if constexpr (Config::kStatesOnly) {
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) arrive(shared.mixed_empty(m));
      if (lane == 0) arrive(shared.empty(s));
    } else {
      float2 reach[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) reach[j] = load_shared2(decay + kChunk * 8 + 32 * j + 2 * (lane % 4) * 4);
      wgmma_wait<1>();
#pragma unroll
      for (int i = 0; i < 32; ++i) y[i] *= i % 2 == 0 ? reach[i / 4].x : reach[i / 4].y;
      wgmma_fence();
      const uint32 mixed = shared.mixed(m) + head_of_cta * Config::kTileBytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // Y^T += X^T M^T
        wgmma<true, false>(y, swizzled_operand(stage + tile * Config::kTileBytes, Config::kX + k * 2048),
                           swizzled_operand(mixed, 32 * k), true);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if constexpr (Config::kOverlap) {
#pragma unroll
        for (int i = 0; i < 32; ++i) y_before[i] = y[i];
      } else {
        finish.begin(s, m);
#pragma unroll
        for (int j = 0; j < 8; ++j) finish.step(j, y);
        finish.end(s, m);
      }
    }
  };

  int iteration = 0;
  for_each_unit<Config>(p, [&](const Unit& unit) {
    const int head = unit.head + head_of_cta;
    if constexpr (Config::kStatesOnly) {
#pragma unroll
      for (int i = 0; i < kStates / 2; ++i) state[i] = 0.f;
      log_decay = 0.f;
      for (int c = 0; c < unit.chunks; ++c, ++iteration) walk_chunk(iteration, false);
      store_state<kStates>(p, segment_states(p), unit.slot, head, feature, state);
      if (thread == 0 && (Config::kHeads > 1 || tile == 0)) {
        p.segment_decay[static_cast<int64>(unit.slot) * p.nheads + head] = log_decay;
      }
    } else {
      load_state<kStates>(p, unit, head, feature, state);
      finish.D0 = finish.D1 = 0.f;
      if (p.D.data != nullptr) {
        const int64 D = head * p.D_strides[0];
        finish.D0 = p.D[D + min(feature, p.headdim - 1) * p.D_strides[1]];  // of no row beyond the last is y stored
        finish.D1 = p.D[D + min(feature + 8, p.headdim - 1) * p.D_strides[1]];
      }
      int c = 0;
      do {  // from state to state that is kept: what stores them would be in the way of the loop over chunks
        const int first = c, stop = next_stop(p, unit, c);
        for (; c < stop; ++c, ++iteration) walk_chunk(iteration, c > first);
        if (Config::kOverlap && c > first) {
          const int s = (iteration - 1) % Config::kStages, m = (iteration - 1) % Config::kBuffers;
          finish.begin(s, m);
#pragma unroll
          for (int j = 0; j < 8; ++j) finish.step(j, y_before);
          finish.end(s, m);
        }
#pragma unroll 1
        for (int copy = 0; copy < 2; ++copy) {
          States target;
          int64 slot;
          if (find_target(p, unit, c, copy, target, slot)) {
            store_state<kStates>(p, target, slot, head, feature, state);
          }
        }
      } while (c < unit.chunks);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- the kernel

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) ssd_kernel(const __grid_constant__ SsdParams p) {
  extern __shared__ unsigned char raw_shared[];
  const SharedMemory<Config> shared{(shared_address(raw_shared) + 1023) & ~1023u};
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      init_barrier(shared.full(s), 1 + Config::kHeads);
      init_barrier(shared.empty(s), 4 * (1 + Config::kTiles));
    }
    for (int m = 0; m < Config::kBuffers; ++m) {
      init_barrier(shared.mixed_full(m), 4);
      init_barrier(shared.mixed_empty(m), Config::kTiles * (Config::kStatesOnly ? 4 : 1));
      for (int tile = 0; tile < Config::kTiles; ++tile) init_barrier(shared.output_full(m, tile), 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) copy_chunks<Config>(p, shared);
    } else if (warp <= 2) {
      make_decays<Config>(p, shared, warp - 1);
    } else if (!Config::kStatesOnly) {
      store_chunks<Config>(p, shared);
    }
  } else if (warpgroup == 1) {
    give_registers<Config::kDecayRegisters>();
    mix_chunks<Config>(p, shared);
  } else {
    take_registers<Config::kStateRegisters>();
    walk_states<Config>(p, shared, warpgroup - 2);
  }
}

// Between the states of the segments and the scan: from what each part adds to the state that enters each segment. A
// thread has four elements of a sequence's state.
__global__ void __launch_bounds__(256) ssd_join_kernel(const __grid_constant__ SsdParams p) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int elements = p.headdim * p.dstate, element = (blockIdx.x * 256 + threadIdx.x) * 4;
  if (element >= elements) return;
  Unit unit;
  find_sequence(p, sequence, unit);
  const int64 place = static_cast<int64>(head) * elements + element;
  float state[4] = {};
  int64 slot;
  if (p.initial.data != nullptr && find_slot(p, p.initial.slots, sequence, slot)) {
    const Floats source{p.initial.data, p.initial.dtype};
    for (int i = 0; i < 4; ++i) state[i] = source[slot * p.initial.stride + place + i];
  }
  slot = static_cast<int64>(first_slot(p, sequence)) * p.parts;
  for (int chunk = 0; chunk < unit.chunks; chunk += p.segment_chunks, slot += p.parts) {
    const bool last = chunk + p.segment_chunks >= unit.chunks;
    float entering[4];
    for (int i = 0; i < 4; ++i) entering[i] = state[i];
    for (int part = 0; part < p.parts && !last; ++part) {
      const float keep = exp2f(p.segment_decay[(slot + part) * p.nheads + head]);
      const float4 added =
          *reinterpret_cast<const float4*>(p.segment_states + (slot + part) * p.nheads * elements + place);
      state[0] = fmaf(state[0], keep, added.x);
      state[1] = fmaf(state[1], keep, added.y);
      state[2] = fmaf(state[2], keep, added.z);
      state[3] = fmaf(state[3], keep, added.w);
    }
    *reinterpret_cast<float4*>(p.segment_states + slot * p.nheads * elements + place) =
        make_float4(entering[0], entering[1], entering[2], entering[3]);
  }
}

}  // namespace hybrid_ops
