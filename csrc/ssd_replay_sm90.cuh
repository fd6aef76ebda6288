// Mamba-2's recurrence while decoding, of states that stay as they are for many tokens.
//
// A slot holds a state S and, in rings, the x, B and dt of the n tokens behind it. With e_t the decay up to token t,
//
//   y_t = e_t (S C_t) + sum_j c_tj x_j,    c_tj = dt_j exp(A sum_{j < i <= t} dt_i) (B_j . C_t),
//
// so that S is only read, until the ring is full: then S takes the n tokens in (flush), and the T new ones are all that
// the ring holds. Without new tokens (T = 0) this kernel materialises: it takes the tokens in, there or elsewhere.
//
// A block has p.heads heads of one group of one sequence, and its warps tiles of their rows (of headdim). A warp loads
// its tile of the state all at once as soon as it knows the slot, and asks for the ring's length before, for the cached
// tokens behind it. Each lane of a row has a token, or a few, and adds c_tj x_j to its part of S C_t: the sum over the
// lanes is y. Only B_j . C_t, which all heads of a group have in common, goes through shared memory.
//
// Blocks of one sequence need no order. A warp that reads ring[slot], start + 256 length, announces itself in the same
// atomic addition; the last one knows that all have read, and writes the new number. New tokens go to places that hold
// none which this call reads, flush or not: the ring has more than p.capacity + T - 1 places.
#pragma once

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
  bool x_aligned, columns_aligned;  // of x; of B and C: neighbours, each four of them aligned
  bool dt_softplus;
};

inline constexpr int kMaxTokens = 32;    // of a sequence in one call, cached and new: one for each lane
inline constexpr int kMaxCapacity = 16;  // of them, cached

// Of a lane, rows that are neighbours: of a token's x it loads whole vectors.
template <typename State, int kN, int kRows>
struct ReplayLayout : Layout<State, kN, kRows> {
  static constexpr int kRowStep = 1;
  static constexpr int kTokens = kMaxTokens / Layout<State, kN, kRows>::kLanes;  // of a lane
};

// Of a block, in floats: B_j . C_t, [T][kMaxTokens]; for a flush B_j, [kMaxCapacity][dstate], and of each warp
// weight_j x_j, [kMaxCapacity][tile].
__host__ __device__ constexpr int replay_shared(int tokens, int dstate, int warps, int tile) {
  return tokens * kMaxTokens + kMaxCapacity * (dstate + warps * tile);
}

// run(i) for all i < count, by the threads of a block.
template <typename Run>
__device__ __forceinline__ void each(int count, const Run& run) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) run(i);
}

// What a warp finds in a slot.
struct Found {
  int start, length;  // of the ring, without the tokens dropped
  bool flush;
};

// Reads a slot's number, and is counted in it. Who is counted last moves it on, for all of the sequence's warps have
// read it.
__device__ __forceinline__ Found find(const SsdReplayParams& p, int slot, int dropped) {
  int* const ring = p.ring + slot * p.ring_stride;
  const bool counts = threadIdx.x % 32 == 0 && p.write_slots == nullptr;
  int number = 0;
  if (counts) {
    number = atomicAdd(ring, 1 << 16);
  } else if (p.write_slots != nullptr) {
    number = *ring;
  }
  const int shared = p.write_slots == nullptr ? __shfl_sync(~0u, number, 0) : number;
  const int start = (shared & 255) % p.places;
  const int length = max(min(shared >> 8 & 255, p.capacity) - dropped, 0);
  const bool flush = p.tokens == 0 || length + p.tokens > p.capacity;
  if (counts && number >> 16 == static_cast<int>(gridDim.x * (blockDim.x / 32)) - 1) {
    const int next = flush ? (start + length) % p.places + 256 * p.tokens : start + 256 * (length + p.tokens);
    *ring = p.tokens == 0 ? 0 : next;
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
// memory: weight_j x_j, [n][kTile]; B: [n][kDstate].
template <typename State, typename L, bool kStochastic, int kRows>
__device__ __forceinline__ void take_in(const SsdReplayParams& p, const uint4 (&raw)[kRows][L::kLoads], float decay,
                                        const float* inputs, const float* B, int n, int place, int head, int above,
                                        int column) {
  constexpr int kTogether = kRows * L::kColumns > 16 ? 16 / L::kColumns : kRows;  // rows, for which registers suffice
  const int64 seed = kStochastic ? *p.seed : 0;
#pragma unroll
  for (int first = 0; first < kRows; first += kTogether) {
    float S[kTogether][L::kColumns];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      unpack_row<State, L>(raw[first + r], 1.f, S[r]);
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) S[r][c] *= decay;
    }
    const float* const input = inputs + threadIdx.x % 32 / L::kLanes * kRows + first;
#pragma unroll 1
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
__global__ void __launch_bounds__(256, 2)
    ssd_replay_kernel(const __grid_constant__ SsdReplayParams p) {
  using L = ReplayLayout<State, kN, kRows>;
  constexpr int kTogether = 4;  // tokens of a lane whose B is under way at once
  extern __shared__ float4 dynamic[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, part = lane % L::kLanes, side = lane / L::kLanes, column = part * L::kPerLoad;
  const int T = p.tokens, b = blockIdx.y, first_head = blockIdx.x * p.heads, group = first_head / p.heads_per_group;
  float* const scores = reinterpret_cast<float*>(dynamic);
  float* const old_B = scores + T * kMaxTokens;
  float* const inputs = old_B + kMaxCapacity * (kN + warp * L::kTile);

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
  const auto columns_to_float = [&](const Columns& columns, float(&values)[L::kColumns]) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) packed_to_float(columns[i], p.dtype, values + i * L::kPerLoad);
  };
  const auto load_C = [&](int t, float(&C)[L::kColumns]) {
    Columns columns;
    load_columns(p.C, offset(p.C_strides, b, t, group, 0), p.C_strides.element, p.columns_aligned, columns);
    columns_to_float(columns, C);
  };

  // in order: the state, then the number of the ring, then what depends on that
  const int tiles_of_head = (p.headdim + L::kTile - 1) / L::kTile, tiles = p.heads * tiles_of_head;
  uint4 raw[kRows][L::kLoads];
  Found found;
  float C[L::kColumns];
  int place = slot;
  bool stored = false;
#pragma unroll 1
  for (int tile = warp;; tile += warps) {
    const bool exists = tile < tiles, first = tile == warp;
    const int head = first_head + tile / tiles_of_head, first_row = tile % tiles_of_head * L::kTile;
    const int above = first_row + side * kRows, mine = above + part / L::kLanesPerSum;  // of the lane; its y's
    if (exists) load_tile<State, L>(p, head_of<State>(p, slot, head), above, column, raw);
    if (first) found = find(p, slot, dropped);
    const int n = found.length;
    const auto place_of = [&](int j) {
      const int place = found.start + j;
      return place < p.places ? place : place - p.places;
    };
    const auto cache_x = [&](int j) {  // row 0 of token j
      return slot * p.cache_x_slot_stride + static_cast<int64>(head) * p.cache_x_head_stride +
             place_of(j) * p.cache_x_place_stride;
    };
    const auto cache_B = [&](int j) {
      return slot * p.cache_B_slot_stride + static_cast<int64>(group) * p.cache_B_group_stride +
             place_of(j) * p.cache_B_place_stride;
    };
    float* const cache_dt = p.cache_dt + slot * p.cache_dt_slot_stride +
                            static_cast<int64>(head) * p.cache_dt_head_stride +
                            place_of(lane) * p.cache_dt_place_stride;

    // of the lane's tokens part, part + kLanes, ..: x of the tile's rows; and dt of token `lane`
    Packed<kItem, kPerVector> x[L::kTokens][kRows / kPerVector];
    float dt = 0.f, A = 0.f;
    unsigned dt_bits = 0;
    if (exists) {
#pragma unroll
      for (int k = 0; k < L::kTokens; ++k) {
        const int j = part + k * L::kLanes;
        const void* const data = j < n ? p.cache_x : p.x;
        const int64 base = j < n ? cache_x(j) : offset(p.x_strides, b, j - n, head, 0);
        const int stride = j < n ? 1 : p.x_strides.element;
#pragma unroll
        for (int i = 0; i < kRows / kPerVector; ++i) {
          x[k][i] = {};
          const int row = above + i * kPerVector;
          if (j < n + T && row < p.headdim) {
            load_packed(data, base + static_cast<int64>(row) * stride, stride, j < n || p.x_aligned, x[k][i]);
          }
        }
      }
      if (lane < n) {
        dt = *cache_dt;
      } else if (lane < n + T) {
        dt_bits = load_bits(p.dt, p.dt_dtype, offset(p.dt_strides, b, lane - n, head, 0));
      }
      A = p.A[static_cast<int64>(head) * p.A_stride];
    }

    if (first) {
      stored = found.flush;
      if (p.write_slots != nullptr) {
        place = p.write_slots[static_cast<int64>(b) * p.write_stride];
        stored = usable(p, place);
      }
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
            load_columns(p.B, offset(p.B_strides, b, j - n, group, 0), p.B_strides.element, p.columns_aligned,
                         columns[r]);
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
    }
    if (!exists) break;

    // the new tokens to their places
    if (lane >= n && lane < n + T) {
      dt = step_of(p, dt_bits, load_bias(p, head));
      if (first_row == 0) *cache_dt = dt;
    }
#pragma unroll
    for (int k = 0; k < L::kTokens; ++k) {
      const int j = part + k * L::kLanes;
      if (j >= n && j < n + T) {
#pragma unroll
        for (int i = 0; i < kRows / kPerVector; ++i) {
          const int row = above + i * kPerVector;
          if (row < p.headdim) store_packed(p.cache_x, cache_x(j) + row, x[k][i]);
        }
      }
    }
    // of a number of each token, those of the lane's
    const auto of_tokens = [&](float own, float(&mine)[L::kTokens]) {
#pragma unroll
      for (int k = 0; k < L::kTokens; ++k) {
        mine[k] = L::kTokens == 1 ? own : __shfl_sync(~0u, own, part + k * L::kLanes);
      }
    };
    const auto add_x = [&](int k, float weight, float(&sums)[kRows]) {
#pragma unroll
      for (int i = 0; i < kRows / kPerVector; ++i) {
        float values[kPerVector];
        packed_to_float(x[k][i], p.dtype, values);
#pragma unroll
        for (int r = 0; r < kPerVector; ++r) {
          sums[i * kPerVector + r] = fmaf(weight, values[r], sums[i * kPerVector + r]);
        }
      }
    };

    const float D = load_D(p, head, mine);
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      const RowBits bits = load_row(p, b, t, head, mine);
      load_C(t, C);
      float decay, weights[L::kTokens], sums[kRows];
      const float weight = weigh(dt, A, n + t, decay);
      of_tokens(weight * scores[t * kMaxTokens + lane], weights);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float S[L::kColumns];
        unpack_row<State, L>(raw[r], 1.f, S);
        sums[r] = 0.f;
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) sums[r] = fmaf(S[c], C[c], sums[r]);
        sums[r] *= decay;
      }
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
      take_in<State, L, kStochastic>(p, raw, decay, inputs, old_B, n, place, head, above, column);
      __syncwarp();
    }
  }
}

}  // namespace hybrid_ops
