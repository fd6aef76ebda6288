// ssd_replay_sm90.cuh for the usual call while decoding: one token of each sequence, tokens in bfloat16, states of 16
// bits, each head's in one piece. The same formulas, slots, rings and bits of stochastic rounding.
//
// A warp has kOneRows rows of a head. Their state comes by one copy of TMA, asked for as soon as the slot is known: as
// many are under way as shared memory holds, whatever the registers. Meanwhile the warp goes through the chain of ring,
// cached tokens and weights. The sums are matrix products with float32 sums:
//
//   B_j . C        [tokens, dstate] [dstate, 1]      S C                      [rows, dstate] [dstate, 1]
//   sum_j w_j x_j  [rows, tokens] [tokens, 1]        sum_j w_j x_j (outer) B_j  [rows, tokens] [tokens, dstate]
//
// Weights are float32, and go into a product as sums of bfloat16: for y, of 8 bits itself, of two; for the state, where
// terms may cancel and random bits meet the rest, w_j B_j as the sum of three, all bits of a float32.
//
// No CTA needs another. Every warp reads ring[slot] first and is counted there afterwards, by an addition far above the
// number, which the last warp of a CTA makes for all of them: additions by every warp cost 5% of the time. The last one
// counted knows that all have read, and writes the new number, which nobody reads before the next launch. A warp writes
// x and dt of its own rows, and the first one of a group B, to a place of the ring that holds no token which this call
// reads. The state is written by ordinary stores, into rows that this warp alone has read, when their copy has long
// arrived; a warp's part of shared memory is written by that copy alone, and every lane waits for it before it ends.
#pragma once

#include "common/hopper.cuh"
#include "ssd_replay_sm90.cuh"

namespace hybrid_ops {

inline constexpr int kOneRows = 64;  // of a warp

template <typename State, int kDstate>
inline constexpr int kOneShared = kOneRows * kDstate * static_cast<int>(sizeof(State));  // bytes of a warp

inline constexpr int kOneWarps = 2;  // of a CTA at most, each of another head; measured: faster than one, or four

// D[16, 8] += A[16, 16] B[16, 8]; of lane 4 g + t, with c = 2 t:
//   a: (g, c ..), (g + 8, c ..), (g, c + 8 ..), (g + 8, c + 8 ..), two neighbours along K each;
//   b: (c .., g), (c + 8 .., g), two along K;  d: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1).
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  if constexpr (kIsHalf<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A pair of bfloat16, the first in the low bits.
__device__ __forceinline__ float low_float(uint32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32 pair) { return __uint_as_float(pair & 0xffff0000); }

__device__ __forceinline__ uint32 pack_pair(float low, float high) {
  const float pair[2] = {low, high};
  return pack_word<__nv_bfloat16>(pair);
}

__device__ __forceinline__ uint32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Takes from two float32 what a pair of bfloat16 holds of them.
__device__ __forceinline__ uint32 take_pair(float& first, float& second) {
  const uint32 pair = pack_pair(first, second);
  first -= low_float(pair), second -= high_float(pair);
  return pair;
}

// C for products with states in float16, which has fewer exponents: times a power of two, by which its largest element
// comes below 2^15, as the sum of `part` 0 and, times 2^-38, part 1, what the first does not hold. Exact but for
// elements 2^-66 times the largest. Returns what the sums with part `summed` are to be multiplied by.
template <int kSteps>
__device__ __forceinline__ float to_half(uint4 (&C)[kSteps], int part, int summed) {
  constexpr float kRest = 0x1p38f;
  uint32 largest = 0;
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) {
    const uint32 pair = word_of(C[i / 4], i % 4);
    largest = max(largest, max(pair & 0x7fff0000, pair << 16 & 0x7fff0000));
  }
  const uint32 exponent = min(127 + 14 + 127 - (__reduce_max_sync(~0u, largest) >> 23), 253u);
  const float scale = __uint_as_float(exponent << 23);
  const auto convert = [&](uint32 pair) {
    const float values[2] = {low_float(pair) * scale, high_float(pair) * scale};
    const uint32 word = pack_word<__half>(values);
    float held[2];
    unpack_word<__half>(word, held);
#pragma unroll
    for (int k = 0; k < 2; ++k) held[k] = values[k] == held[k] ? 0.f : (values[k] - held[k]) * kRest;  // also infinity
    return part == 0 ? word : pack_word<__half>(held);
  };
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    C[s] = make_uint4(convert(C[s].x), convert(C[s].y), convert(C[s].z), convert(C[s].w));
  return __uint_as_float((254 - exponent) << 23) * (summed == 0 ? 1.f : 1.f / kRest);
}

// A slot's number is left as it is, but a CTA's warps counted in it, by the last of them to come here; how many were
// before, in lane 0 of that one, in others -1. A warp comes when loads that depend on the number are under way, so has
// it. Not atomicAdd, which the compiler would have all lanes sum up for first.
__device__ __forceinline__ int count_in(int* ring, uint32 counted, int warps) {
  int before = -1;
  if (threadIdx.x % 32 == 0) {
    int before_here;
    asm volatile("atom.shared.add.u32 %0, [%1], 1;" : "=r"(before_here) : "r"(counted) : "memory");
    if (before_here == warps - 1) {
      asm volatile("atom.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(ring), "r"(warps << 16) : "memory");
    }
  }
  return before >> 16;
}

template <typename State, int kN, bool kStochastic>
__global__ void __maxnreg__(kN == 256 ? 255 : 160) ssd_replay_one_kernel(const __grid_constant__ SsdReplayParams p) {
  using Token = __nv_bfloat16;
  constexpr int kSteps = kN / 32;  // of products along dstate: of 32 neighbours, a lane has 8, for two of 16
  extern __shared__ float4 dynamic[];
  __shared__ uint64 copies[kOneWarps];
  __shared__ int counted;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int odd = g % 2, b = blockIdx.z, head = blockIdx.y * warps + warp, group = head / p.heads_per_group;
  const uint32 copied = shared_address(copies + warp);
  uint4* const held = reinterpret_cast<uint4*>(dynamic) + warp * kOneShared<State, kN> / 16;
  const int first =
      blockIdx.x * kOneRows + 8 * g;       // the lane's rows, in pairs: products i has the rows 2 i and 2 i + 1
  const int row = first + 2 * t;           // whose y is the lane's, and the one behind it
  const bool present = first < p.headdim;  // headdim is a multiple of 8
  // Columns of step s: a group's row of the state lies at the same banks as its neighbour's, which takes them in
  // another order. So of two columns of S C, all of the same C, one has the orders of even groups, the other of odd.
  const auto column_of = [&](int s) { return (s ^ odd) * 32 + t * 8; };

  if (lane == 0) {
    init_barrier(copied, 1);
    fence_barrier_init();
  }
  if (threadIdx.x == 0) counted = 0;
  __syncthreads();
  let_next_kernel_start();
  wait_for_kernel_before();
  int slot = b;
  if (p.slots != nullptr) slot = p.slots[static_cast<int64>(b) * p.slots_stride];
  const int dropped = p.rollback == nullptr ? 0 : max(p.rollback[static_cast<int64>(b) * p.rollback_stride], 0);

  // what does not depend on the slot
  uint4 C[kSteps], new_B[kSteps];
  const auto load_columns = [&](const void* data, const TokenStrides& strides, uint4(&columns)[kSteps]) {
    const Token* const source = static_cast<const Token*>(data) + offset(strides, b, 0, group, 0);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) columns[s] = __ldg(reinterpret_cast<const uint4*>(source + column_of(s)));
  };
  load_columns(p.C, p.C_strides, C);
  load_columns(p.B, p.B_strides, new_B);
  const Element dt_bits = load_bits(p.dt, p.dt_dtype, offset(p.dt_strides, b, 0, head, 0));
  const Element bias = load_bias(p, head);
  const float A = p.A[static_cast<int64>(head) * p.A_stride];

  Token* const y = static_cast<Token*>(p.y) + offset(p.y_strides, b, 0, head, row);
  if (p.slots == nullptr ? b >= p.nslots : !usable(p, slot)) {
    if (present) *reinterpret_cast<uint32*>(y) = 0;
    return;
  }
  State* const state = head_of<State>(p, slot, head) + static_cast<int64>(first) * kN;
  int* const ring = p.ring + slot * p.ring_stride;
  const int number = *static_cast<volatile int*>(ring);
  if (lane == 0) {
    const uint32 bytes = min(kOneRows, p.headdim - first) * kN * static_cast<int>(sizeof(State));
    arrive_expecting(copied, bytes);
    load_bytes(shared_address(held), state, bytes, copied);
  }
  __syncwarp();  // every lane has read the number, and sees the barrier

  const int start = (number & 255) % p.places;
  const int n = max(min(number >> 8 & 255, p.capacity) - dropped, 0);
  const bool flush = n + 1 > p.capacity;
  const auto place_of = [&](int j) {
    const int place = start + j;
    return place < p.places ? place : place - p.places;
  };
  const auto token_of = [&](int k) { return 2 * t + k % 2 + k / 2 * 8; };  // the lane's four along K
  Token* const cache_B = static_cast<Token*>(p.cache_B) + slot * p.cache_B_slot_stride +
                         static_cast<int64>(group) * p.cache_B_group_stride;
  Token* const cache_x =
      static_cast<Token*>(p.cache_x) + slot * p.cache_x_slot_stride + static_cast<int64>(head) * p.cache_x_head_stride;
  float* const cache_dt =
      p.cache_dt + slot * p.cache_dt_slot_stride + static_cast<int64>(head) * p.cache_dt_head_stride;
  const auto load_B = [&](int j, int column) {
    if (j >= n) return make_uint4(0, 0, 0, 0);
    return __ldcg(reinterpret_cast<const uint4*>(cache_B + place_of(j) * p.cache_B_place_stride + column));
  };
  const auto load_pair = [&](const void* data, const TokenStrides& strides) {
    if (data == nullptr || !present) return 0u;
    return *reinterpret_cast<const uint32*>(static_cast<const Token*>(data) + offset(strides, b, 0, head, row));
  };

  uint4 x[4];  // of the lane's tokens and rows
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[k] = make_uint4(0, 0, 0, 0);
    if (token_of(k) < n && present) {
      x[k] = __ldcg(reinterpret_cast<const uint4*>(cache_x + place_of(token_of(k)) * p.cache_x_place_stride + first));
    }
  }
  float dt = lane < n ? cache_dt[place_of(lane) * p.cache_dt_place_stride] : 0.f;  // of token `lane`
  const uint32 new_x = load_pair(p.x, p.x_strides), z = load_pair(p.z, p.z_strides);
  const Element D[2] = {load_D(p, head, row), load_D(p, head, row + 1)};

  float score;  // B_j . C of token `lane`
  {
    uint4 B[2][kSteps];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) B[r][s] = load_B(g + 8 * r, column_of(s));
    }
    const int before = count_in(ring, shared_address(&counted), warps);
    float of_new[4] = {}, cached[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      mma<Token>(of_new, new_B[s].x, 0, new_B[s].y, 0, C[s].x, C[s].y);
      mma<Token>(of_new, new_B[s].z, 0, new_B[s].w, 0, C[s].z, C[s].w);
    }
    if (head % p.heads_per_group == 0 && blockIdx.x == 0 && g == 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        *reinterpret_cast<uint4*>(cache_B + place_of(n) * p.cache_B_place_stride + column_of(s)) = new_B[s];
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      mma<Token>(cached, B[0][s].x, B[1][s].x, B[0][s].y, B[1][s].y, C[s].x, C[s].y);
      mma<Token>(cached, B[0][s].z, B[1][s].z, B[0][s].w, B[1][s].w, C[s].z, C[s].w);
    }
    const float low = __shfl_sync(~0u, odd ? cached[1] : cached[0], lane % 8 * 4);
    const float high = __shfl_sync(~0u, odd ? cached[3] : cached[2], lane % 8 * 4);
    score = lane == n ? (odd ? of_new[1] : of_new[0]) : lane < 8 ? low : high;
    if (lane == 0 && before == static_cast<int>(gridDim.x * gridDim.y - 1) * warps) {
      *ring = flush ? (start + n) % p.places + 256 : start + 256 * (n + 1);
    }
  }

  // the new token to its place
  const float new_dt = step_of(p, dt_bits, bias);
  if (lane == n) {
    dt = new_dt;
    if (blockIdx.x == 0) cache_dt[place_of(n) * p.cache_dt_place_stride] = dt;
  }
  if (present) *reinterpret_cast<uint32*>(cache_x + place_of(n) * p.cache_x_place_stride + row) = new_x;

  float decay;
  const float weight = weigh(dt, A, n, decay) * score, new_weight = __shfl_sync(~0u, weight, n);
  const auto of_tokens = [&](float own, float (&w)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = __shfl_sync(~0u, own, token_of(k));
  };
  float w[4];
  of_tokens(lane < n ? weight : 0.f, w);
  const auto input = [&](int i, int k) {  // of x in products i, register k of the lane
    return __byte_perm(word_of(x[k / 2 * 2], i), word_of(x[k / 2 * 2 + 1], i), k % 2 ? 0x7632 : 0x5410);
  };
  float X[4][4] = {};  // sum_j w_j x_j of the cached tokens
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const uint32 b0 = take_pair(w[0], w[1]), b1 = take_pair(w[2], w[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) mma<Token>(X[i], input(i, 0), input(i, 1), input(i, 2), input(i, 3), b0, b1);
  }
  float factor = 1.f;
  if constexpr (kIsHalf<State>) factor = to_half(C, g / 2 % 2, t % 2);

  wait(copied, 0);
  const auto state_at = [&](int i, int r, int column) { return held[((8 * g + 2 * i + r) * kN + column) / 8]; };
  float S[4][4] = {};  // S C
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 even_row = state_at(i, 0, column_of(s)), odd_row = state_at(i, 1, column_of(s));
      mma<State>(S[i], even_row.x, odd_row.x, even_row.y, odd_row.y, C[s].x, C[s].y);
      mma<State>(S[i], even_row.z, odd_row.z, even_row.w, odd_row.w, C[s].z, C[s].w);
    }
  }
  const auto choose = [&](const float (&v)[4][4], int i, int c) {
    const float low = i & 1 ? v[1][c] : v[0][c], high = i & 1 ? v[3][c] : v[2][c];
    return i & 2 ? high : low;
  };
  const auto sum_of = [&](int i, int r) { return odd ? choose(S, i, 2 * r + 1) : choose(S, i, 2 * r); };
  float results[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sum_of(t, r);
    // the other part of C is in the neighbour's columns
    if constexpr (kIsHalf<State>) sum = sum * factor + __shfl_xor_sync(~0u, sum_of(t ^ 1, r) * factor, 1);
    const float own_x = r == 0 ? low_float(new_x) : high_float(new_x);
    sum = fmaf(sum, decay, choose(X, t, 2 * r));
    sum = fmaf(new_weight, own_x, sum);
    results[r] = fmaf(from_bits(D[r], p.D_dtype), own_x, sum);
    if (p.z != nullptr) results[r] *= silu(r == 0 ? low_float(z) : high_float(z));
  }
  if (present) *reinterpret_cast<uint32*>(y) = pack_pair(results[0], results[1]);
  if (!flush) return;

  // the state through the cached tokens
  const int64 seed = kStochastic ? *p.seed : 0;
  of_tokens(weigh(dt, A, n - 1, decay), w);
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
    uint4 B[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) B[k] = load_B(token_of(k), 32 * s + g / 2 * 8);
    uint32 weighed[4][3][2];  // w_j B_j, of each two columns
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32 pair = word_of(B[k], q);
        v[k] = w[k] * (odd ? high_float(pair) : low_float(pair));
      }
#pragma unroll
      for (auto& part : weighed[q]) part[0] = take_pair(v[0], v[1]), part[1] = take_pair(v[2], v[3]);
    }
    const int column = 32 * s + 8 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float rows[2][8];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float d[4];
        unpack_word<State>(word_of(state_at(i, 0, column), q), d);
        unpack_word<State>(word_of(state_at(i, 1, column), q), d + 2);
#pragma unroll
        for (float& value : d) value *= decay;
#pragma unroll
        for (const auto& part : weighed[q]) {
          mma<Token>(d, input(i, 0), input(i, 1), input(i, 2), input(i, 3), part[0], part[1]);
        }
        rows[0][2 * q] = d[0], rows[0][2 * q + 1] = d[1];
        rows[1][2 * q] = d[2], rows[1][2 * q + 1] = d[3];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        using L = Layout<State, kN, 1>;
        const int64 number = (static_cast<int64>(slot) * p.nheads + head) * p.headdim + first + 2 * i + r;
        if (present) {
          store_columns<State, L, kStochastic>(state + (2 * i + r) * kN, column, rows[r], number, seed, 0);
        }
      }
    }
  }
}

}  // namespace hybrid_ops
