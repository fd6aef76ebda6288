// Mamba-2's recurrence while decoding, of states that stay as they are for many tokens.
//
// A slot holds a state S and, in rings, the x, B and dt of the n tokens behind it. With e_t the decay up to token t,
//
//   y_t = e_t (S C_t) + sum_j c_tj x_j,    c_tj = dt_j exp(A sum_{j < i <= t} dt_i) (B_j . C_t),
//
// so that S is only read, until the ring is full: then S takes the n tokens in (flush), and the T new ones are all that
// the ring holds. Without new tokens (T = 0) this kernel materialises: it takes the tokens in, there or elsewhere.
//
// A block has p.heads heads of one group of one sequence, and its warps tiles of their rows (of headdim), which they
// ask for by cp.async: the first ones before the ring's length is known, and what depends on that. Each lane of a row
// has a token, or a few, and adds c_tj x_j to its part of S C_t: the sum over the lanes is y. All that warps exchange
// is B_j . C_t, the same for all heads of a group.
//
// Blocks of one sequence need no order. A warp that reads ring[slot], start + 256 length, announces itself in the same
// atomic addition; the last one knows that all have read, and writes the new number. New tokens go to places that hold
// none which this call reads, flush or not: the ring has more than p.capacity + T - 1 places.
#pragma once

#include "common/async_copies.cuh"
#include "common/hopper.cuh"
#include "common/ssd_step.cuh"

namespace hybrid_ops {

struct SsdReplayParams {
  void* state;             // (nslots, nheads, headdim, dstate), rows of neighbours aligned to 16 bytes
  void* cache_x;           // (nslots, nheads, places, headdim), as the state's rows
  void* cache_B;           // (nslots, ngroups, places, dstate), as the state's rows
  float* cache_dt;         // (nslots, nheads, places)
  int* ring;               // (nslots,)
  const void* x;           // (batch, T, nheads, headdim)
  const void* dt;          // (batch, T, nheads)
  const float* A;          // (nheads,)
  const void* B;           // (batch, T, ngroups, dstate)
  const void* C;           // as B
  const void* D;           // (nheads, headdim) or null
  const void* z;           // as x, or null
  const void* dt_bias;     // (nheads,) or null
  const int* slots;        // (batch,) or null: slot b
  const int* rollback;     // (batch,) or null: 0
  const int64* seed;       // of stochastic rounding
  void* y;                 // as x; may be x
  const int* write_slots;  // (batch,), with T = 0, or null: in place
  int64 state_slot_stride, cache_x_slot_stride, cache_B_slot_stride, cache_dt_slot_stride, ring_stride;
  int state_head_stride, state_p_stride;
  int cache_x_head_stride, cache_x_place_stride, cache_B_group_stride, cache_B_place_stride;
  int cache_dt_head_stride, cache_dt_place_stride;
  TokenStrides x_strides, z_strides, y_strides, dt_strides, B_strides, C_strides;
  int A_stride, D_head_stride, D_p_stride, dt_bias_stride, slots_stride, rollback_stride, write_stride;
  int tokens;  // T
  int nslots, nheads, headdim, heads_per_group;
  int capacity, places, null_slot;
  int heads;  // of a block
  float dt_min, dt_max;
  DType dtype, dt_dtype, D_dtype, z_dtype, dt_bias_dtype;  // dtype: of x, B, C, y and the cache
  bool x_aligned, columns_aligned;                         // of x; of B and C: neighbours, each four of them aligned
  bool dt_softplus;
};

inline constexpr int kMaxTokens = 32;    // of a sequence in one call, cached and new: one for each lane
inline constexpr int kMaxCapacity = 16;  // of them, cached

// Of a lane, rows that are neighbours: of a token's x it loads whole vectors.
template <typename State, int kN, int kRows, int kItem>
struct ReplayLayout : Layout<State, kN, kRows> {
  using Base = Layout<State, kN, kRows>;
  static constexpr int kRowStep = 1;
  static constexpr int kTokens = kMaxTokens / Base::kLanes;  // of a lane
  // words of a lane for a tile: of the state, 16 bytes from each lane in turn; of x, vectors
  static constexpr int kStateWords = 4 * kRows * Base::kLoads, kPieces = kTokens * kRows / kPerVector;
  static constexpr int kTileWords = 32 * (kStateWords + kItem * kPieces);
};

// Words of a block's shared memory: a tile of each warp; B_j . C_t, [T][kMaxTokens]; for a flush B_j,
// [kMaxCapacity][dstate], and of each warp weight_j x_j, [kMaxCapacity][tile].
template <typename L>
__host__ __device__ constexpr int replay_shared(int tokens, int warps) {
  return warps * L::kTileWords + tokens * kMaxTokens + kMaxCapacity * (L::kDstate + warps * L::kTile);
}

// run(i) for all i < count, by the threads of a block.
template <typename Run>
__device__ __forceinline__ void each(int count, const Run& run) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) run(i);
}

// Keeps what is computed from `value` before from being kept in registers.
__device__ __forceinline__ void recompute(int& value) { asm volatile("" : "+r"(value)); }

// What a warp finds in a slot.
struct Found {
  int start, length;  // of the ring, without the tokens dropped
  bool flush;
};

// A slot's number, in lane 0, whose warp is counted in it where the ring moves on.
__device__ __forceinline__ int read_number(const SsdReplayParams& p, int slot) {
  int* const ring = p.ring + slot * p.ring_stride;
  if (threadIdx.x % 32 != 0) return 0;
  if (p.write_slots != nullptr) return *ring;
  unsigned lane;  // 0, which the compiler cannot know: additions to one place it would sum up first, and wait for here
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return atomicAdd(ring + lane, 1 << 16);
}

// Who was counted last moves the number on, for all of the sequence's warps have read it.
__device__ __forceinline__ Found find(const SsdReplayParams& p, int slot, int dropped, int number) {
  const int shared = __shfl_sync(~0u, number, 0);
  const int start = (shared & 255) % p.places;
  const int length = max(min(shared >> 8 & 255, p.capacity) - dropped, 0);
  const bool flush = p.tokens == 0 || length + p.tokens > p.capacity;
  const bool last = number >> 16 == static_cast<int>(gridDim.x * (blockDim.x / 32)) - 1;
  if (threadIdx.x % 32 == 0 && p.write_slots == nullptr && last) {
    const int next = flush ? (start + length) % p.places + 256 * p.tokens : start + 256 * (length + p.tokens);
    p.ring[slot * p.ring_stride] = p.tokens == 0 ? 0 : next;
  }
  return {start, length, flush};
}

// What a lane's token, with its step `dt`, weighs in the state after token `newest`, and how far the state before all
// of them has decayed until then.
__device__ __forceinline__ float weigh(float dt, float A, int newest, float& decay) {
  const int lane = threadIdx.x % 32;
  const float own = lane <= newest ? dt : 0.f;
  float sum = own;  // of this token's step and all newer
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const float newer = __shfl_down_sync(~0u, sum, o);
    if (lane + o < 32) sum += newer;
  }
  const float behind = __shfl_down_sync(~0u, sum, 1);  // not sum - own: of a large sum little is left of small steps
  decay = expf(A * __shfl_sync(~0u, sum, 0));
  return own * expf(A * (lane < 31 ? behind : 0.f));
}

// A lane's rows through the n cached tokens, weight_j x_j (outer) B_j each, and into slot `place`. `inputs`, in shared
// memory: weight_j x_j, [n][kTile]; B: [n][kDstate]. Row `r` of the state comes from read_row(r, S).
template <typename State, typename L, bool kStochastic, int kRows, typename ReadRow>
__device__ __forceinline__ void take_in(const SsdReplayParams& p, const ReadRow& read_row, float decay,
                                        const float* inputs, const float* B, int n, int place, int head, int above,
                                        int column) {
  constexpr int kTogether = kRows * L::kColumns > 16 ? 16 / L::kColumns : kRows;  // rows, for which registers suffice
  const int64 seed = kStochastic ? *p.seed : 0;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kTogether) {
    float S[kTogether][L::kColumns];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      read_row(first + r, S[r]);
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) S[r][c] *= decay;
    }
    const float* const input = inputs + threadIdx.x % 32 / L::kLanes * kRows + first;
#pragma unroll 2
    for (int j = 0; j < n; ++j) {
      float columns[L::kColumns];
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) {
        columns[c] = B[j * L::kDstate + column + c / L::kPerLoad * L::kStep + c % L::kPerLoad];
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) S[r][c] = fmaf(input[j * L::kTile + r], columns[c], S[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      store_row<State, L, kStochastic>(p, place, head, above + first + r, column, S[r], seed, 0);
    }
  }
}

// kItem: bytes of an element of x, B, C and y.
template <typename State, int kN, int kRows, int kItem, bool kStochastic>
__global__ void __maxnreg__(kRows == 16 ? 128 : 160) ssd_replay_kernel(const __grid_constant__ SsdReplayParams p) {
  using L = ReplayLayout<State, kN, kRows, kItem>;
  constexpr int kTogether = 4;  // tokens of a lane whose B is under way at once
  extern __shared__ float4 dynamic[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  int lane = threadIdx.x % 32, part = lane % L::kLanes, side = lane / L::kLanes, column = part * L::kPerLoad;
  int b = blockIdx.y;
  const int T = p.tokens, first_head = blockIdx.x * p.heads, group = first_head / p.heads_per_group;
  unsigned* const copied = reinterpret_cast<unsigned*>(dynamic) + warp * L::kTileWords;
  float* const scores = reinterpret_cast<float*>(dynamic) + warps * L::kTileWords;
  float* const old_B = scores + T * kMaxTokens;
  float* const inputs = old_B + kMaxCapacity * (kN + warp * L::kTile);

  let_next_kernel_start();
  wait_for_kernel_before();
  int slot = b;
  if (p.slots != nullptr) slot = p.slots[static_cast<int64>(b) * p.slots_stride];
  const int dropped = p.rollback == nullptr ? 0 : max(p.rollback[static_cast<int64>(b) * p.rollback_stride], 0);
  if (p.slots == nullptr ? b >= p.nslots : !usable(p, slot)) {
    each(p.heads * T * p.headdim, [&](int i) {
      const int head = first_head + i / (T * p.headdim), t = i / p.headdim % T, row = i % p.headdim;
      store_float(p.y, p.dtype, offset(p.y_strides, b, t, head, row), 0.f);
    });
    return;
  }

  using Columns = Packed<kItem, L::kPerLoad>[L::kLoads];
  const auto load_columns = [&](const void* data, int64 base, int stride, bool aligned, Columns& columns) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      load_packed(data, base + static_cast<int64>(column + i * L::kStep) * stride, stride, aligned, columns[i]);
    }
  };
  const auto columns_to_float = [&](const Columns& columns, float (&values)[L::kColumns]) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) packed_to_float(columns[i], p.dtype, values + i * L::kPerLoad);
  };
  const auto load_C = [&](int t, float (&C)[L::kColumns]) {
    Columns columns;
    load_columns(p.C, offset(p.C_strides, b, t, group, 0), p.C_strides.element, p.columns_aligned, columns);
    columns_to_float(columns, C);
  };

  // the warp's tiles: a head, and of that the first row of the warp and of the lane
  const int tiles_of_head = (p.headdim + L::kTile - 1) / L::kTile, tiles = p.heads * tiles_of_head;
  struct Tile {
    int head, first_row, above;
  };
  const auto tile_of = [&](int i) {
    const int heads = i / tiles_of_head, first_row = (i - heads * tiles_of_head) * L::kTile;
    return Tile{first_head + heads, first_row, first_row + side * kRows};
  };
  const auto state_at = [&](int r, int i) {
    return reinterpret_cast<uint4*>(copied) + (r * L::kLoads + i) * 32 + lane;
  };
  using Piece = Packed<kItem, kPerVector>;
  const auto x_at = [&](int k, int i) {
    return reinterpret_cast<Piece*>(copied + 32 * L::kStateWords) + (k * kRows / kPerVector + i) * 32 + lane;
  };
  const auto copy_state = [&](int index) {
    const Tile tile = tile_of(index);
    const State* source =
        head_of<State>(p, slot, tile.head) + static_cast<int64>(tile.above) * p.state_p_stride + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r, source += p.state_p_stride) {
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        if (tile.above + r < p.headdim) copy_async<16>(state_at(r, i), source + i * L::kStep);
      }
    }
  };
  const int number = read_number(p, slot);
  if (warp < tiles) copy_state(warp);

  const Found found = find(p, slot, dropped, number);
  const int n = found.length;
  int place = slot;
  bool stored = found.flush;
  if (p.write_slots != nullptr) {
    place = p.write_slots[static_cast<int64>(b) * p.write_stride];
    stored = usable(p, place);
  }
  const auto place_of = [&](int j) {
    const int place = found.start + j;
    return place < p.places ? place : place - p.places;
  };
  const auto cache_x = [&](int head, int j) {  // row 0 of token j
    return slot * p.cache_x_slot_stride + static_cast<int64>(head) * p.cache_x_head_stride +
           place_of(j) * p.cache_x_place_stride;
  };
  const auto cache_B = [&](int j) {
    return slot * p.cache_B_slot_stride + static_cast<int64>(group) * p.cache_B_group_stride +
           place_of(j) * p.cache_B_place_stride;
  };
  const auto cache_dt = [&](int head, int j) {
    return slot * p.cache_dt_slot_stride + static_cast<int64>(head) * p.cache_dt_head_stride +
           place_of(j) * p.cache_dt_place_stride;
  };

  // x of the tile's rows, of the lane's tokens part, part + kLanes, ..
  const auto copy_tokens = [&](int index) {
    const Tile tile = tile_of(index);
#pragma unroll
    for (int k = 0; k < L::kTokens; ++k) {
      const int j = part + k * L::kLanes;
      const bool cached = j < n;
      const void* const data = cached ? p.cache_x : p.x;
      const int64 base = cached ? cache_x(tile.head, j) : offset(p.x_strides, b, j - n, tile.head, 0);
      const int64 stride = cached ? 1 : p.x_strides.element;
#pragma unroll
      for (int i = 0; i < kRows / kPerVector; ++i) {
        const int row = tile.above + i * kPerVector;
        if (j >= n + T || row >= p.headdim) continue;
        if (cached || p.x_aligned) {
          copy_async<kItem * kPerVector>(x_at(k, i), static_cast<const unsigned char*>(data) + kItem * (base + row));
        } else {
          load_packed(data, base + row * stride, stride, false, *x_at(k, i));
        }
      }
    }
  };
  // what a tile begins with besides: of its head and of token `lane`
  struct Inputs {
    float A;
    Element bias, dt;
  };
  const auto load_inputs = [&](int index) {
    const int head = tile_of(index).head;
    const bool cached = lane < n;
    const int64 dt_offset = cached ? cache_dt(head, lane) : offset(p.dt_strides, b, lane - n, head, 0);
    return Inputs{
        .A = p.A[static_cast<int64>(head) * p.A_stride],
        .bias = load_bias(p, head),
        .dt = load_bits(cached ? p.cache_dt : p.dt, cached ? DType::float32 : p.dt_dtype, dt_offset, lane < n + T),
    };
  };
  Inputs coming;
  if (warp < tiles) {
    copy_tokens(warp);
    coming = load_inputs(warp);
  }

  float C[L::kColumns];
  // scores: B_j . C_t, of a warp those of every warps-th token
  const bool keeps_B = first_head % p.heads_per_group == 0;
#pragma unroll 1
  for (int begin = warp; begin < n + T; begin += warps * kTogether * L::kGroups) {
    const auto token_of = [&](int r) { return begin + (r * L::kGroups + side) * warps; };
    Columns columns[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int j = token_of(r);
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) columns[r][i] = {};
      if (j < n) {
        load_columns(p.cache_B, cache_B(j), 1, true, columns[r]);
      } else if (j < n + T) {
        load_columns(p.B, offset(p.B_strides, b, j - n, group, 0), p.B_strides.element, p.columns_aligned, columns[r]);
      }
    }
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      load_C(t, C);
      float sums[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        float B[L::kColumns];
        columns_to_float(columns[r], B);
        sums[r] = 0.f;
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) sums[r] = fmaf(B[c], C[c], sums[r]);
      }
      const float sum = sum_rows<L::kLanes>(sums, part);
      constexpr int kLanesPerToken = L::kLanes / kTogether;
      const int j = token_of(part / kLanesPerToken);
      if (part % kLanesPerToken == 0 && j < n + T) scores[t * kMaxTokens + j] = sum;
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int j = token_of(r);
      if (stored && j < n) {
        float B[L::kColumns];
        columns_to_float(columns[r], B);
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) {
          old_B[j * kN + column + c / L::kPerLoad * L::kStep + c % L::kPerLoad] = B[c];
        }
      }
      if (keeps_B && j >= n && j < n + T) {
#pragma unroll
        for (int i = 0; i < L::kLoads; ++i) {
          store_packed(p.cache_B, cache_B(j) + column + i * L::kStep, columns[r][i]);
        }
      }
    }
  }
  __syncthreads();

  // of a number of each token, those of the lane's
  const auto of_tokens = [&](float own, float (&mine)[L::kTokens]) {
#pragma unroll
    for (int k = 0; k < L::kTokens; ++k) {
      mine[k] = L::kTokens == 1 ? own : __shfl_sync(~0u, own, part + k * L::kLanes);
    }
  };
#pragma unroll 1
  for (int index = warp; index < tiles; index += warps) {
    recompute(slot), recompute(b), recompute(lane);
    const auto [head, first_row, above] = tile_of(index);
    const int mine = above + part / L::kLanesPerSum;  // the row whose y is the lane's
    const float A = coming.A;
    wait_for_copies();
    const auto read_row = [&](int r, float (&S)[L::kColumns]) {
      uint4 raw[L::kLoads];
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) raw[i] = *state_at(r, i);
      unpack_row<State, L>(raw, 1.f, S);
    };

    // the new tokens to their places
    float dt = __uint_as_float(coming.dt.wide);
    if (lane >= n && lane < n + T) {
      dt = step_of(p, coming.dt, coming.bias);
      if (first_row == 0) p.cache_dt[cache_dt(head, lane)] = dt;
    }
#pragma unroll
    for (int k = 0; k < L::kTokens; ++k) {
      const int j = part + k * L::kLanes;
      if (j >= n && j < n + T) {
#pragma unroll
        for (int i = 0; i < kRows / kPerVector; ++i) {
          const int row = above + i * kPerVector;
          if (row < p.headdim) store_packed(p.cache_x, cache_x(head, j) + row, *x_at(k, i));
        }
      }
    }
    const auto add_x = [&](int k, float weight, float (&sums)[kRows]) {
#pragma unroll
      for (int i = 0; i < kRows / kPerVector; ++i) {
        float values[kPerVector];
        packed_to_float(*x_at(k, i), p.dtype, values);
#pragma unroll
        for (int r = 0; r < kPerVector; ++r) {
          sums[i * kPerVector + r] = fmaf(weight, values[r], sums[i * kPerVector + r]);
        }
      }
    };

#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      load_C(t, C);
      float decay, weights[L::kTokens], sums[kRows];
      const float weight = weigh(dt, A, n + t, decay);
      of_tokens(weight * scores[t * kMaxTokens + lane], weights);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float S[L::kColumns];
        read_row(r, S);
        sums[r] = 0.f;
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) sums[r] = fmaf(S[c], C[c], sums[r]);
        sums[r] *= decay;
      }
      const Element D = load_D(p, head, mine);
      const RowBits bits = load_row(p, b, t, head, mine);
#pragma unroll
      for (int k = 0; k < L::kTokens; ++k) {
        if (part + k * L::kLanes <= n + t) add_x(k, weights[k], sums);
      }
      const float sum = sum_rows<L::kLanes>(sums, part);
      const bool writes = part % L::kLanesPerSum == 0 && mine < p.headdim;
      finish_row(p, offset(p.y_strides, b, t, head, mine), sum, D, bits, writes);
    }

    if (stored) {
      float decay, weights[L::kTokens];
      of_tokens(weigh(dt, A, n - 1, decay), weights);
#pragma unroll
      for (int k = 0; k < L::kTokens; ++k) {
        const int j = part + k * L::kLanes;
        if (j < n) {
          float input[kRows] = {};
          add_x(k, weights[k], input);
#pragma unroll
          for (int r = 0; r < kRows; ++r) inputs[j * L::kTile + side * kRows + r] = input[r];
        }
      }
      __syncwarp();
      take_in<State, L, kStochastic, kRows>(p, read_row, decay, inputs, old_B, n, place, head, above, column);
      __syncwarp();
    }
    if (index + warps < tiles) {
      copy_state(index + warps);
      copy_tokens(index + warps);
      coming = load_inputs(index + warps);
    }
  }
}

}  // namespace hybrid_ops
