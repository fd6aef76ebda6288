// Mamba-2's recurrence while decoding, of states that stay as they are for many tokens.
//
// A slot holds a state S and, in rings, the x, B and dt of the n tokens behind it. With e_t the decay up to token t,
//
//   y_t = e_t (S C_t) + sum_j c_tj x_j,    c_tj = dt_j exp(A sum_{j < i <= t} dt_i) (B_j . C_t),
//
// so that S is only read, until the ring is full: then S takes the n tokens in (flush), and the T new ones are all that
// the ring holds. Without new tokens (T = 0) this kernel materialises: it takes the tokens in, there or elsewhere.
//
// A block has p.heads heads of one group of one sequence, one after the other, and of each the same rows (headdim). A
// warp loads its tile of a head's state all at once, while it still computes with the last head's. B_j . C_t is the
// same for all heads of a group and computed once. Tokens go through shared memory: a ring's by cp.async, one head
// ahead.
//
// Blocks of one sequence need no order. Who reads ring[slot], start + 256 length, announces itself in the same atomic
// addition; the last one knows that all have read, and writes the new number. New tokens go to places that hold none
// which this call reads, flush or not: the ring has more than p.capacity + T - 1 places.
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
  int heads;       // of a block
  int row_blocks;  // of a head
  float dt_min, dt_max;
  DType dtype, dt_dtype, D_dtype, z_dtype, dt_bias_dtype;  // dtype: of x, B, C, y and the cache
  bool dt_softplus;
};

inline constexpr int kMaxTokens = 32;  // of a sequence in one call, cached and new: one for each lane

// Where things are in a block's shared memory, as offsets in bytes; `item`: of an element of x and B.
struct ReplayShared {
  int C, scores, weights, decays;  // float: [T][dstate], [T + 1][kMaxTokens], [2][T + 1][kMaxTokens], [2][T + 1]
  int B;                           // [T + capacity][dstate], the new tokens first
  int new_x;                       // [heads][T][rows]
  int cached_x;                    // [2][capacity][rows]
  int bytes;
};

__host__ __device__ constexpr ReplayShared replay_shared(int tokens, int capacity, int dstate, int heads, int rows,
                                                         int item) {
  ReplayShared s{};
  const auto take = [&](int bytes) {
    const int first = s.bytes;
    s.bytes += (bytes + 15) / 16 * 16;
    return first;
  };
  s.C = take(4 * tokens * dstate);
  s.scores = take(4 * (tokens + 1) * kMaxTokens);
  s.weights = take(4 * 2 * (tokens + 1) * kMaxTokens);
  s.decays = take(4 * 2 * (tokens + 1));
  s.B = take(item * (tokens + capacity) * dstate);
  s.new_x = take(item * heads * tokens * rows);
  s.cached_x = take(item * 2 * capacity * rows);
  return s;
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// kCount neighbours in shared memory, from an even one on.
template <int kCount>
__device__ __forceinline__ void read_neighbours(const void* data, DType dtype, int first, float* values) {
  if (dtype == DType::float32) {
    const float* source = static_cast<const float*>(data) + first;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = source[i];
    return;
  }
  const unsigned* source = reinterpret_cast<const unsigned*>(static_cast<const unsigned short*>(data) + first);
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const unsigned word = source[i / 2];
    values[i] = from_bits(word & 0xffff, dtype), values[i + 1] = from_bits(word >> 16, dtype);
  }
}

__device__ __forceinline__ void copy_element(void* target, int i, const void* source, int64 j, DType dtype) {
  const unsigned bits = load_bits(source, dtype, j);
  if (dtype == DType::float32) {
    static_cast<unsigned*>(target)[i] = bits;
  } else {
    static_cast<unsigned short*>(target)[i] = static_cast<unsigned short>(bits);
  }
}

// run(i) for all i < count, by the threads of a block.
template <typename Run>
__device__ __forceinline__ void each(int count, const Run& run) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) run(i);
}

// What a block finds in a slot.
struct Found {
  int start, length;  // of the ring, without the tokens dropped
  bool flush;
};

// By one thread of a block, once: reads a slot's number, and is counted in it.
__device__ __forceinline__ int arrive(const SsdReplayParams& p, int slot) {
  int* const ring = p.ring + slot * p.ring_stride;
  return p.write_slots == nullptr ? atomicAdd(ring, 1 << 16) : *ring;
}

// What that number says. Who was counted last moves it on, for all of the sequence's blocks have read it.
__device__ __forceinline__ Found find(const SsdReplayParams& p, int b, int slot, int number) {
  const int dropped = p.rollback == nullptr ? 0 : max(p.rollback[static_cast<int64>(b) * p.rollback_stride], 0);
  const int start = (number & 255) % p.places;
  const int length = max(min(number >> 8 & 255, p.capacity) - dropped, 0);
  const bool flush = p.tokens == 0 || length + p.tokens > p.capacity;
  if (p.write_slots == nullptr && number >> 16 == static_cast<int>(gridDim.x) - 1) {
    const int next = flush ? (start + length) % p.places + 256 * p.tokens : start + 256 * (length + p.tokens);
    p.ring[slot * p.ring_stride] = p.tokens == 0 ? 0 : next;
  }
  return {start, length, flush};
}

// What tokens up to `newest` weigh in the state after it, times their scores, and how far that state has decayed. By a
// warp: lane j has token j, with its step `dt`.
__device__ __forceinline__ void weigh(float dt, float A, int newest, const float* scores, float* weights,
                                      float& decay) {
  const int lane = threadIdx.x % 32;
  const float own = lane <= newest ? dt : 0.f;
  float sum = own;  // of this token's step and all newer
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const float newer = __shfl_down_sync(~0u, sum, o);
    if (lane + o < 32) sum += newer;
  }
  const float behind = __shfl_down_sync(~0u, sum, 1);  // not sum - own: of a large sum little is left of small steps
  if (lane <= newest) weights[lane] = own * expf(A * (lane < 31 ? behind : 0.f)) * scores[lane];
  if (lane == 0) decay = expf(A * sum);
}

// The rows of a lane through the n cached tokens, weight_j x_j (outer) B_j each, and into slot `place`. They are
// read again, from the L2 cache: a flush is rare, and in registers it would leave no room for the next head's rows.
template <typename State, typename L, bool kStochastic>
__device__ __forceinline__ void take_in(const SsdReplayParams& p, const State* source, const float* weights,
                                        float decay, const void* x, int x_stride, const void* B, int n, int place,
                                        int head, int above, int local, int column) {
  constexpr int kRows = L::kTile / L::kGroups, kTogether = L::kColumns <= 4 ? 4 : 2;  // that share what is read of B
  const int64 seed = kStochastic ? *p.seed : 0;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kTogether) {
    const int row = above + first * L::kGroups, x_row = local + first * L::kGroups;
    uint4 raw[kTogether][L::kLoads];
    load_tile<State, L>(p, source, row, column, raw);
    float S[kTogether][L::kColumns];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      unpack_row<State, L>(raw[r], 1.f, S[r]);
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) S[r][c] *= decay;
    }
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
      float columns[L::kColumns];
#pragma unroll
      for (int k = 0; k < L::kLoads; ++k) {
        read_neighbours<L::kPerLoad>(B, p.dtype, j * L::kDstate + column + k * L::kStep, columns + k * L::kPerLoad);
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const float input = weights[j] * load_float(x, p.dtype, j * x_stride + x_row + r * L::kGroups);
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c) S[r][c] = fmaf(input, columns[c], S[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      store_row<State, L, kStochastic>(p, place, head, row + r * L::kGroups, column, S[r], seed, 0);
    }
  }
}

template <typename State, int kN, int kRows, bool kStochastic>
__global__ void __launch_bounds__(256, 2) ssd_replay_kernel(const __grid_constant__ SsdReplayParams p) {
  using L = Layout<State, kN, kRows>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Found found;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, part = lane % L::kLanes, column = part * L::kPerLoad;
  const int T = p.tokens, item = p.dtype == DType::float32 ? 4 : 2;
  const int b = blockIdx.y, first_head = blockIdx.x / p.row_blocks * p.heads;
  const int rows = warps * L::kTile;                       // of the block,
  const int first_row = blockIdx.x % p.row_blocks * rows;  // of those that there are
  const int real_rows = min(rows, p.headdim - first_row);
  const int above = first_row + warp * L::kTile + lane / L::kLanes;                           // first row of the lane
  const int mine = warp * L::kTile + part / L::kLanesPerSum * L::kGroups + lane / L::kLanes;  // of the block, whose y
  const bool has_mine = mine < real_rows;
  const int group = first_head / p.heads_per_group;

  int slot = b;
  if (p.slots != nullptr) slot = p.slots[static_cast<int64>(b) * p.slots_stride];
  if (p.slots == nullptr ? b >= p.nslots : !usable(p, slot)) {
    each(p.heads * T * real_rows, [&](int i) {
      const int head = first_head + i / (T * real_rows), t = i / real_rows % T, row = first_row + i % real_rows;
      store_float(p.y, p.dtype, offset(p.y_strides, b, t, head, row), 0.f);
    });
    return;
  }

  uint4 raw[kRows][L::kLoads];
  load_tile<State, L>(p, head_of<State>(p, slot, first_head), above, column, raw);
  int number = 0;
  if (threadIdx.x == 0) number = arrive(p, slot);

  // the new tokens, while the state is on its way
  const ReplayShared s = replay_shared(T, p.capacity, kN, p.heads, rows, item);
  float* const C = reinterpret_cast<float*>(shared + s.C);
  float* const scores = reinterpret_cast<float*>(shared + s.scores);
#pragma unroll 2
  for (int i = threadIdx.x; i < T * kN; i += blockDim.x) {
    C[i] = load_float(p.C, p.dtype, offset(p.C_strides, b, i / kN, group, i % kN));
    copy_element(shared + s.B, i, p.B, offset(p.B_strides, b, i / kN, group, i % kN), p.dtype);
  }
  const int count = p.heads * T * real_rows;
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int token = i / real_rows, row = i % real_rows;  // token of the head, head by head
    const int64 source = offset(p.x_strides, b, token % T, first_head + token / T, first_row + row);
    copy_element(shared + s.new_x, token * rows + row, p.x, source, p.dtype);
  }
  if (threadIdx.x == 0) found = find(p, b, slot, number);
  __syncthreads();
  const int start = found.start, n = found.length;
  const bool flush = found.flush;

  const auto place_of = [&](int j) { return start + j < p.places ? start + j : start + j - p.places; };
  const auto cache_x = [&](int head, int j) {  // row of token j
    return static_cast<unsigned char*>(p.cache_x) +
           item * (slot * p.cache_x_slot_stride + static_cast<int64>(head) * p.cache_x_head_stride +
                   place_of(j) * p.cache_x_place_stride + first_row);
  };
  const auto cache_B = [&](int j) {
    return static_cast<unsigned char*>(p.cache_B) +
           item * (slot * p.cache_B_slot_stride + static_cast<int64>(group) * p.cache_B_group_stride +
                   place_of(j) * p.cache_B_place_stride);
  };
  const auto cache_dt = [&](int head, int j) {
    return p.cache_dt + slot * p.cache_dt_slot_stride + static_cast<int64>(head) * p.cache_dt_head_stride +
           place_of(j) * p.cache_dt_place_stride;
  };
  const auto stage_x = [&](int stage) { return shared + s.cached_x + item * stage * p.capacity * rows; };
  const int pieces = item * real_rows / 16;  // of 16 bytes, of a token's rows
  const auto fetch_x = [&](int head, int stage) {
    each(n * pieces, [&](int i) {
      const int j = i / pieces, piece = i % pieces;
      copy_async(stage_x(stage) + item * j * rows + 16 * piece, cache_x(head, j) + 16 * piece);
    });
  };
  // dt of token `lane` of a head, and what makes a number of it
  unsigned dt_bits = 0;
  float A = 0.f, bias = 0.f;
  const auto fetch_dt = [&](int head) {
    if (lane < n) {
      dt_bits = __float_as_uint(*cache_dt(head, lane));
    } else if (lane < n + T) {
      dt_bits = load_bits(p.dt, p.dt_dtype, offset(p.dt_strides, b, lane - n, head, 0));
    }
    A = p.A[static_cast<int64>(head) * p.A_stride];
    bias = load_bias(p, head);
  };

  const int pieces_of_B = item * kN / 16;
  each(n * pieces_of_B, [&](int i) {
    const int j = i / pieces_of_B, piece = i % pieces_of_B;
    copy_async(shared + s.B + item * (T + j) * kN + 16 * piece, cache_B(j) + 16 * piece);
  });
  fetch_x(first_head, 0);
  fetch_dt(first_head);
  // the new tokens to their places
  const auto copy = [](void* target, const void* source) {
    *static_cast<uint4*>(target) = *static_cast<const uint4*>(source);
  };
  each(p.heads * T * pieces, [&](int i) {
    const int token = i / pieces, piece = i % pieces;
    copy(cache_x(first_head + token / T, n + token % T) + 16 * piece,
         shared + s.new_x + item * token * rows + 16 * piece);
  });
  if (first_row == 0 && first_head % p.heads_per_group == 0) {
    each(T * pieces_of_B,
         [&](int i) { copy(cache_B(n + i / pieces_of_B) + i % pieces_of_B * 16, shared + s.B + 16 * i); });
  }
  wait_for_copies();
  __syncthreads();

  // scores: B_j . C_t, of a warp those of every warps-th token j; ones for the flush
  if (warp == 0) scores[T * kMaxTokens + lane] = 1.f;
#pragma unroll 1
  for (int j = warp; j < n + T; j += warps) {
    constexpr int kMine = kN / 32;
    float B[kMine];
    read_neighbours<kMine>(shared + s.B, p.dtype, (j < n ? T + j : j - n) * kN + lane * kMine, B);
#pragma unroll 1
    for (int t = max(j - n, 0); t < T; ++t) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kMine; ++i) sum = fmaf(B[i], C[t * kN + lane * kMine + i], sum);
#pragma unroll
      for (int o = 16; o >= 1; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == 0) scores[t * kMaxTokens + j] = sum;
    }
  }
  __syncthreads();

  int place = slot;
  bool stored = flush;
  if (p.write_slots != nullptr) {
    place = p.write_slots[static_cast<int64>(b) * p.write_stride];
    stored = usable(p, place);
  }

#pragma unroll 1
  for (int i = 0; i < p.heads; ++i) {
    const int head = first_head + i, stage = i % 2;
    float* const weights = reinterpret_cast<float*>(shared + s.weights) + stage * (T + 1) * kMaxTokens;
    float* const decays = reinterpret_cast<float*>(shared + s.decays) + stage * (T + 1);
    const float D = has_mine ? load_D(p, head, first_row + mine) : 0.f;

    // of y_t in row t; of the flush in row T
    float dt = __uint_as_float(dt_bits);
    if (lane >= n && lane < n + T) {
      dt = step_of(p, dt_bits, bias);
      if (warp == 0 && first_row == 0) *cache_dt(head, lane) = dt;
    }
#pragma unroll 1
    for (int t = warp; t < T + flush; t += warps) {
      weigh(dt, A, t < T ? n + t : n - 1, scores + t * kMaxTokens, weights + t * kMaxTokens, decays[t]);
    }
    wait_for_copies();
    __syncthreads();
    const bool more = i + 1 < p.heads;
    if (more) {
      fetch_x(head + 1, 1 - stage);
      fetch_dt(head + 1);
    }
    const unsigned char* const old_x = stage_x(stage);
    const unsigned char* const new_x = shared + s.new_x + item * i * T * rows;

#pragma unroll 1
    for (int t = 0; t < T || t == 0; ++t) {
      RowBits bits{0, 0};
      float sum = 0.f;
      if (T > 0) {
        if (has_mine) {
          bits.x = load_bits(new_x, p.dtype, t * rows + mine);
          if (p.z != nullptr) {
            bits.z = load_bits(p.z, p.z_dtype, offset(p.z_strides, b, t, head, first_row + mine));
          }
        }
        float columns[L::kColumns], sums[kRows];
#pragma unroll
        for (int c = 0; c < L::kColumns; ++c)
          columns[c] = C[t * kN + column + c / L::kPerLoad * L::kStep + c % L::kPerLoad];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float S[L::kColumns];
          unpack_row<State, L>(raw[r], 1.f, S);
          sums[r] = 0.f;
#pragma unroll
          for (int c = 0; c < L::kColumns; ++c) sums[r] = fmaf(S[c], columns[c], sums[r]);
        }
        sum = sum_rows<L::kLanes>(sums, part);
      }
      if (t + 1 >= T) {  // no more is needed of this head's rows in registers
        if (stored) {
          take_in<State, L, kStochastic>(p, head_of<State>(p, slot, head), weights + T * kMaxTokens, decays[T], old_x,
                                         rows, shared + s.B + item * T * kN, n, place, head, above, above - first_row,
                                         column);
        }
        if (more) load_tile<State, L>(p, head_of<State>(p, slot, head + 1), above, column, raw);
      }
      if (T > 0) {
        // the lanes that have a row's sum share its tokens
        sum = part % L::kLanesPerSum == 0 ? decays[t] * sum : 0.f;
        if (has_mine) {
#pragma unroll 1
          for (int j = part % L::kLanesPerSum; j <= n + t; j += L::kLanesPerSum) {
            const unsigned char* const x = j < n ? old_x + item * j * rows : new_x + item * (j - n) * rows;
            sum = fmaf(weights[t * kMaxTokens + j], load_float(x, p.dtype, mine), sum);
          }
        }
#pragma unroll
        for (int o = L::kLanesPerSum / 2; o >= 1; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
        const bool writes = has_mine && part % L::kLanesPerSum == 0;
        finish_row(p, offset(p.y_strides, b, t, head, first_row + mine), sum, D, bits, writes);
      }
    }
  }
}

}  // namespace hybrid_ops
