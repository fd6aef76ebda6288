// What the warpgroups of the SSD scan share: the problem, where things lie in shared memory, and who does which part.
#pragma once

#include "common/bits.cuh"
#include "common/exponential.cuh"
#include "common/hopper.cuh"

namespace hybrid_ops {

using bf16 = __nv_bfloat16;

// A float tensor of any of the three dtypes.
struct Floats {
  const void* data;  // or null
  DType dtype;

  __device__ __forceinline__ float operator[](int64 i) const { return load_float(data, dtype, i); }
};

// States (.., nheads, headdim, dstate), contiguous but for the first dimension, whose row `slots` names where given.
struct States {
  void* data;  // or null
  DType dtype;
  int64 stride;
  const int* slots;
};

struct SsdParams {
  TensorMap x_map, B_map, C_map, z_map, y_map;  // (batch, seqlen, nheads | ngroups, headdim | dstate)
  const bf16* plain_z;  // z where its rows do not begin at multiples of 16 bytes, as TMA wants them, but of 4; or null
  int64 z_strides[3];   // batch, token, head
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
  const int* interval_base;       // (nseq,) or null: a packed sequence's first row of `interval`
  int segments;                   // of a sequence, each walked by a CTA of its own; 1: sequences are not split
  float* pieces;                  // what these CTAs tell each other, see ssd_segments.cuh: states and decays,
  uint64* flags;                  // and that they are there,
  uint64 ticket;                  // by this number
  const bf16* norm_weight;        // (nheads * headdim,), where y is normed
  float* squares;                 // what CTAs tell each other for that, see ssd_norm.cuh
  float norm_eps, inverse_group;  // 1 / features of a group
  float dt_min, dt_max;
  int seqlen, nseq, nheads, headdim, dstate, heads_per_group;
  int num_slots, null_slot, num_intervals, state_interval;
  bool dt_softplus;
  bool paired;  // see SsdConfig::kPaired
};

constexpr int kChunk = 64;
constexpr int kStates = 128;  // columns of a state that a warpgroup has: dstate, padded, or half of it

// A number for each token of a chunk, float32. What the four lanes of a quarter need, tokens 8 j + 2 (lane % 4) + {0,
// 1} for all j, are neighbours, and the quarters 80 bytes apart, so that four lanes meet no bank twice.
constexpr int kTokens = 4 * 20;
__device__ __forceinline__ int place_of(int token) { return token % 8 / 2 * 20 + token / 8 * 2 + token % 2; }

// Bytes of what comes from memory into shared memory, in two rings of stages: B and C, which are free again as soon as
// they are multiplied, and x, z and the three of `PerToken`, which stay until y is made.
template <int kHeads_, int kTiles_, int kHalves, bool kGated_>
struct InputSizes {
  static constexpr int kHeads = kHeads_;  // of a CTA
  static constexpr int kTiles = kTiles_;  // of x: 64 features each
  static constexpr bool kGated = kGated_;

  static constexpr int kTileBytes = kChunk * 64 * 2;          // 64 tokens of 128 bytes, swizzled
  static constexpr int kGroupTiles = kHalves * kStates / 64;  // of B, and of C
  static constexpr int kC = kGroupTiles * kTileBytes;         // from a stage's beginning
  static constexpr int kGroupBytes = 2 * kC;
  static constexpr int kZ = kTiles * kTileBytes;  // from a stage's beginning
  static constexpr int kHeadBytes = kZ * (kGated ? 2 : 1);
  static constexpr int kPerTokenBytes = kHeads * 3 * kTokens * 4;

  // Stages of x that fit beside so many bytes, into what the system and aligning leave of a CTA's; and the bytes of
  // all, with what aligning takes.
  __host__ __device__ static constexpr int stages_beside(int bytes, int most) {
    const int fitting = (231424 - bytes) / (kHeadBytes + kPerTokenBytes);
    return fitting > most ? most : fitting;
  }
  __host__ __device__ static constexpr int all_bytes(int bytes, int stages) {
    return bytes + stages * (kHeadBytes + kPerTokenBytes) + 1024;
  }
};
constexpr int kBarrierBytes = 512;

// How CTAs share a sequence of a head: not at all; each has a segment; both of two walk the state through all chunks,
// as one alone would, and make y of every second one.
enum class Sharing { none, segments, turns };

// kNormed: y is normed over the features of each group of heads, see ssd_norm.cuh.
template <int kFeatures_, int kHalves_, bool kGated_, Sharing kSharing, bool kNormed_ = false>
struct SsdConfig : InputSizes<1, (kFeatures_ + 63) / 64, kHalves_, kGated_> {
  using Sizes = InputSizes<1, (kFeatures_ + 63) / 64, kHalves_, kGated_>;
  using Sizes::kTiles, Sizes::kTileBytes, Sizes::kGroupTiles, Sizes::kGroupBytes, Sizes::kHeadBytes;
  static constexpr int kFeatures = kFeatures_;  // of a head, padded: 64, 80 or 128
  static constexpr int kHalves = kHalves_;      // 2: a state is too wide for one warpgroup
  static constexpr bool kSplit = kSharing == Sharing::segments;
  static constexpr int kTurns = kSharing == Sharing::turns ? 2 : 1;
  static constexpr bool kNormed = kNormed_;

  static constexpr int kWalkers = kTiles * kHalves;  // warpgroups with a part of the state
  // and those that make y, each of every so many chunks; the second would have no registers beside two walkers
  static constexpr int kReaders = kWalkers == 1 ? 2 : 1;
  static constexpr int kThreads = 128 * (1 + kWalkers + kReaders);
  // Where heads that share B and C come in pairs, CTAs 2 i and 2 i + 1, a cluster, have a pair, and each loads half of
  // B and C for both. With narrower states the instructions that this takes cost what it gains.
  static constexpr bool kPaired = kHalves == 2 && kSharing == Sharing::none;
  // warpgroups that find what enters a segment, each by chunks of its own: one or both walkers, or a walker and a
  // reader
  static constexpr int kFinders = kWalkers == 1 ? 2 : 1;
  // a walker prepares the next x while its product runs, at the price of copies, where readers are not what binds
  static constexpr bool kAhead = kReaders != 1;

  // of 512 for a thread of each warpgroup together; all with which ptxas spills nothing
  static constexpr int kProducerRegisters = kPaired ? 40 : 48;
  static constexpr int kWalkerRegisters = kReaders == 2 ? 160 : 144;
  static constexpr int kReaderRegisters = kReaders == 2 ? 152 : kPaired ? 184 : 176;

  // behind the stages: what walkers pass on to readers, states that enter a chunk, in bfloat16, as tiles of all
  // features by 64 columns; y on its way out
  static constexpr int kColumnBytes = kFeatures * 128;
  static constexpr int kPassedBytes = kGroupTiles * kColumnBytes;
  static constexpr int kBuffers = kReaders;            // of states that enter a chunk
  static constexpr int kOutputs = kReaders + kNormed;  // places of y, which waits for the norm a while
  static constexpr int kOutputBytes = kTiles * kTileBytes;

  static constexpr int kWeightBytes = kNormed ? kReaders * kTiles * 128 : 0;  // of a norm, for each reader

  // of B and C as many as leave room for those of x, z, of which more than kMost were no faster
  static constexpr int kGroupStages = kHalves == 2 ? 2 : kHeadBytes > kTileBytes ? 3 : 4;
  static constexpr int kMost = kReaders == 1 ? 8 : 4;
  static constexpr int kFixedBytes =
      kGroupStages * kGroupBytes + kBuffers * kPassedBytes + kOutputs * kOutputBytes + kBarrierBytes + kWeightBytes;
  // who takes every second chunk finds it in every second stage, and so misses no phase of a barrier
  static constexpr int kSkipping = kReaders * kTurns;
  static constexpr int kStages = Sizes::stages_beside(kFixedBytes, kMost) / kSkipping * kSkipping;
  static_assert(kStages >= 2 && kStages % kFinders == 0);
  // warps that make decays where a state is to be found; of so many stages none of them misses a phase, either
  static constexpr uint32 kMakers = kStages >= 4 ? 4 : 2;
  // chunks that come into the L2 cache before: all of them where stages are too few for the latency of memory, and dt
  static constexpr int kPrefetched = kGroupStages == 2 ? (kPaired ? 3 : 6) : 0;
  static constexpr int kDtPrefetched = kReaders == 2 && !kSplit ? 6 : 0;
  static constexpr int kSharedBytes = Sizes::all_bytes(kFixedBytes, kStages);
};

// a; b; of two neighbouring tokens 2^(a_last - b) in bfloat16, and what that has lost.
enum PerToken { kA, kB, kWeight };

// Where things lie in shared memory, and the barriers that pass them on.
template <typename Config>
struct SharedMemory {
  uint32 base;
  bool paired;  // this CTA is one of two: see SsdConfig::kPaired

  __device__ __forceinline__ uint32 group(uint32 iteration) const {
    return base + iteration % Config::kGroupStages * Config::kGroupBytes;
  }
  __device__ __forceinline__ uint32 x(int s, int tile) const {
    return base + Config::kGroupStages * Config::kGroupBytes + s * Config::kHeadBytes + tile * Config::kTileBytes;
  }
  __device__ __forceinline__ uint32 z(int s, int tile) const { return x(s, tile) + Config::kZ; }
  __device__ __forceinline__ uint32 passed(int buffer) const {
    return x(Config::kStages, 0) + buffer * Config::kPassedBytes;
  }
  __device__ __forceinline__ uint32 y(int output, int tile) const {
    return passed(Config::kBuffers) + output * Config::kOutputBytes + tile * Config::kTileBytes;
  }
  __device__ __forceinline__ uint32 per_token(int s, PerToken which, int head = 0) const {
    return y(Config::kOutputs, 0) + s * Config::kPerTokenBytes + (3 * head + which) * kTokens * 4;
  }
  __device__ __forceinline__ uint32 barrier(int i) const { return per_token(Config::kStages, kA) + 8 * i; }
  // of a stage of x: TMA's bytes are there, B's and C's too; what is made of dt is too, and rows of other sequences are
  // cleared; all are done
  __device__ __forceinline__ uint32 loaded(int s) const { return barrier(s); }
  __device__ __forceinline__ uint32 full(int s) const { return barrier(Config::kStages + s); }
  __device__ __forceinline__ uint32 empty(int s) const { return barrier(2 * Config::kStages + s); }
  __device__ __forceinline__ uint32 group_empty(uint32 iteration) const {
    return barrier(3 * Config::kStages + iteration % Config::kGroupStages);
  }
  __device__ __forceinline__ uint32 passed_full(int buffer) const {
    return barrier(3 * Config::kStages + Config::kGroupStages + buffer);
  }
  __device__ __forceinline__ uint32 passed_empty(int buffer) const {
    return passed_full(Config::kBuffers) + 8 * buffer;
  }
  __device__ __forceinline__ uint32 y_full(int output) const { return passed_empty(Config::kBuffers) + 8 * output; }
  __device__ __forceinline__ uint32 y_empty(int output) const { return y_full(Config::kOutputs) + 8 * output; }
  // of what a reader has found, beside its state
  __device__ __forceinline__ uint32 found_decay() const { return y_empty(Config::kOutputs); }
  // where CTAs take turns: how many warps of the second one have had the state that enters a sequence, a number
  __device__ __forceinline__ uint32 entered() const { return found_decay() + 8; }

  // where y is normed: a head's weights, as a reader takes them
  __device__ __forceinline__ uint32 weights(uint32 reader) const {
    return barrier(0) + kBarrierBytes + reader * Config::kTiles * 128;
  }

  // A warp is done with a stage of B and C, `count`-fold: a lane tells each CTA that loads parts of it.
  __device__ __forceinline__ void leave_group(uint32 iteration, int lane, uint32 count = 1) const {
    if constexpr (Config::kPaired) {
      if (lane <= paired) arrive_in_cluster(address_in_cta(group_empty(iteration), lane), count);
    } else if (lane == 0) {
      arrive(group_empty(iteration), count);
    }
  }

  // Of a place, for a descriptor of wgmma, which has no room for the CTA's number in a cluster.
  __device__ __forceinline__ static uint32 operand(uint32 place) {
    return Config::kPaired || Config::kTurns > 1 ? place & 0x3FFFF : place;
  }

  // Until chunk `iteration` lies in its stages.
  __device__ __forceinline__ void wait_for_inputs(uint32 iteration) const {
    const int s = iteration % Config::kStages, parity = (iteration / Config::kStages) & 1;
    wait(loaded(s), parity);
    wait(full(s), parity);
  }
};

__device__ __forceinline__ float load_shared(uint32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void load_shared4(float* v, uint32 address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_word(uint32& v, uint32 address) {
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
}

// The numbers of a lane's 16 tokens: see place_of. Of the first `sixteens` 16s, others are zeros: what a load returns
// to registers is what it costs.
__device__ __forceinline__ void load_tokens(float (&numbers)[16], uint32 tokens, int lane, int sixteens = 4) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float* const four = numbers + 4 * k;
    four[0] = four[1] = four[2] = four[3] = 0.f;
    if (k < sixteens) load_shared4(four, tokens + lane % 4 * 80 + k * 16);
  }
}

__device__ __forceinline__ void store_shared(uint32 address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void store_word(uint32 address, uint32 v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared2(uint32 address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void store_shared4(uint32 address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

__device__ __forceinline__ uint32 pack_bf16(float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Two numbers times two others, which are the sums of the two parts.
__device__ __forceinline__ uint32 scale_bf16(uint32 x, uint32 by, uint32 and_by) {
  uint32 product;
  asm("{\n.reg .b32 rest;\nmul.rn.bf16x2 rest, %1, %3;\nfma.rn.bf16x2 %0, %1, %2, rest;\n}"
      : "=r"(product)
      : "r"(x), "r"(by), "r"(and_by));
  return product;
}

__device__ __forceinline__ float low_half(uint32 packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_half(uint32 packed) { return __uint_as_float(packed & 0xFFFF0000u); }

// The 16 bytes `column` of row `row` of a tile with 128-byte swizzle.
__device__ __forceinline__ uint32 swizzled(uint32 tile, int row, int column) {
  return tile + row * 128 + ((column ^ (row & 7)) << 4);
}

// Where a lane points at for columns 16 j .. of a warp's 16 rows of tiles: a matrix of 8 x 8 each for {columns, the
// next 8} x {rows, rows + 8}. The four places in a tile are worth a register each, which the compiler would find anew
// for every chunk.
template <typename Config>
struct RowPlaces {
  uint32 in_tile[4];

  __device__ __forceinline__ RowPlaces(int warp, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      in_tile[j] = swizzled(0, 16 * warp + lane % 16, 2 * j + lane / 16);
      asm volatile("" : "+r"(in_tile[j]));
    }
  }

  __device__ __forceinline__ uint32 at(uint32 tiles, int j) const {
    return tiles + j / 4 * Config::kTileBytes + in_tile[j % 4];
  }
};

// ---------------------------------------------------------------------------------------------------- work units

// A sequence of a head, or of several, or a stretch of one.
struct Unit {
  int sequence, row, begin, end;  // its tokens [begin, end) of a batch row
  int first;                      // token at the first place of this stretch's first chunk; may lie before `begin`
  int position;                   // of that place, from the beginning of the sequence, and seq_offsets
  int chunks, head;               // the first one
  int round;                      // sequences of this CTA before
  bool finding;                   // only the state that its chunks lead to is asked for
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
  unit.finding = false;
}

// A sequence is cut into segments, and what lies before the last one into pieces: a segment each, or halves of the only
// one, so that nobody is idle. Each CTA first finds what a piece adds to the state.
__device__ __forceinline__ int pieces_before(int segment, int segments) {
  return segments == 2 ? 2 * segment : segment;
}

// A CTA's piece of a sequence, or its segment.
__device__ __forceinline__ Unit cut(const SsdParams& p, const Unit& sequence, bool finding) {
  const int size = p.segments, rank = blockIdx.x % size, segment = (sequence.chunks + size - 1) / size;
  const int piece = size == 2 ? (segment + 1) / 2 : segment, before = segment * (size - 1);
  const int length = finding ? piece : segment, end = min(finding ? before : segment * size, sequence.chunks);
  const int from = min(rank * length, end), to = min(from + length, end);
  Unit unit = sequence;
  unit.first += from * kChunk;
  unit.position += from * kChunk;
  unit.chunks = to - from;
  unit.finding = finding;
  return unit;
}

// The head, and the first of its features, that a tile of x has.
template <typename Config>
__device__ __forceinline__ int head_of(const Unit& unit, int tile) {
  return unit.head + (Config::kHeads == 1 ? 0 : tile);
}
template <typename Config>
__device__ __forceinline__ int feature_of(int tile) {
  return Config::kHeads == 1 ? 64 * tile : 0;
}

// Whether this CTA makes y of a chunk. Who takes turns counts iterations, so that readers miss no phase of a barrier.
template <typename Config>
__device__ __forceinline__ bool makes_y(uint32 iteration) {
  return Config::kTurns == 1 || iteration % Config::kTurns == blockIdx.x % Config::kTurns;
}

// body(unit) for every sequence of every head of this CTA, or for its piece and then its segment of each; called by
// these lanes of a warp.
template <typename Config, typename Body>
__device__ __forceinline__ void for_each_unit(const SsdParams& p, Body body, uint32 lanes = ~0u) {
  const int size = Config::kSplit ? p.segments : Config::kTurns, stretches = Config::kSplit ? 2 : 1;
  const int heads = p.nheads / Config::kHeads;
  for (int step = 0;; ++step) {
    // the same in all lanes, which the compiler must see to keep it in no register of theirs
    if constexpr (Config::kSplit) step = __shfl_sync(lanes, step, 0);
    const int index = (blockIdx.x + step / stretches * gridDim.x) / size;
    if (index >= p.nseq * heads) return;
    Unit unit;
    find_sequence(p, index / heads, unit);
    unit.round = step / stretches;
    unit.head = index % heads * Config::kHeads;
    body(Config::kSplit ? cut(p, unit, step % 2 == 0) : unit);
  }
}

// The i-th chunk of a unit in the order in which they are loaded: finders, who each have neighbours, take turns.
template <typename Config>
__device__ __forceinline__ int chunk_at(const Unit& unit, int i) {
  if constexpr (Config::kSplit) {
    if (unit.finding) {
      const int finder = i % Config::kFinders, all = unit.chunks / Config::kFinders;
      return finder * all + min(finder, unit.chunks % Config::kFinders) + i / Config::kFinders;
    }
  }
  return i;
}

// chunk(unit, i, iteration) for every chunk of every unit of this CTA, in the order in which they are loaded; all roles
// count alike.
template <typename Config, typename Enter, typename Chunk>
__device__ __forceinline__ void for_each_chunk(const SsdParams& p, Enter enter, Chunk chunk, uint32 lanes = ~0u) {
  uint32 iteration = 0;
  const auto walk = [&](const Unit& unit) {
    enter(unit, iteration);
    for (int i = 0; i < unit.chunks; ++i, ++iteration) chunk(unit, i, iteration);
  };
  for_each_unit<Config>(p, walk, lanes);
}

}  // namespace hybrid_ops
