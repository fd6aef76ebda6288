// Rows of an SSM state, kLanes lanes of a warp to each: how they are shared, between memory and float32 registers, and
// through one token.
#pragma once

#include "common/bits.cuh"
#include "common/eight_bits.cuh"
#include "common/random.cuh"

namespace hybrid_ops {

// How the lanes of a warp share a tile of kRows rows of each lane. A row has no more than kMaxLanes.
template <typename State, int kN, int kRows, int kMaxLanes = 32>
struct Layout {
  static constexpr int kDstate = kN;
  static constexpr int kPerLoad = 16 / sizeof(State);                                             // elements
  static constexpr int kLanes = kDstate / kPerLoad < kMaxLanes ? kDstate / kPerLoad : kMaxLanes;  // of a row
  static constexpr int kLoads = kDstate / (kPerLoad * kLanes);                                    // of a lane for a row
  static constexpr int kColumns = kPerLoad * kLoads;                                              // of a lane
  static constexpr int kStep = kPerLoad * kLanes;  // from one load of a row to the next
  static constexpr int kGroups = 32 / kLanes;      // rows side by side
  static constexpr int kTile = kRows * kGroups;
  static constexpr int kRowStep = kGroups;             // from a lane's row to its next
  static constexpr int kLanesPerSum = kLanes / kRows;  // that end with the same row's sum
  static_assert(kRows <= kLanes);
};

// States pass through the L2 cache once, and are the first to leave it, read or written.
__device__ __forceinline__ unsigned long long passing() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint4 load_state(const void* pointer) {
  uint4 raw;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(pointer), "l"(passing()));
  return raw;
}

__device__ __forceinline__ void store_state(void* pointer, const uint4& raw) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(pointer), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w), "l"(passing())
               : "memory");
}

// Where there is something, by predicates; else the result is anything.
__device__ __forceinline__ uint4 load_state_if(bool present, const void* pointer) {
  uint4 raw;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %6, 0;"
      "@p ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;}"
      : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
      : "l"(pointer), "l"(passing()), "r"(static_cast<int>(present)));
  return raw;
}

// Streaming, which many small CTAs in the order of memory gain from, and takes no registers for a policy.
__device__ __forceinline__ void store_state_if(bool present, void* pointer, const uint4& raw) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(pointer),
               "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w), "r"(static_cast<int>(present))
               : "memory");
}

template <typename State>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<__half> = true;

// The elements of a word, the first in its low bits.
template <typename State>
__device__ __forceinline__ void unpack_word(unsigned word, float* values) {
  if constexpr (sizeof(State) == 1) {
    EightBits<State>::unpack(word, values);
  } else if constexpr (sizeof(State) == 4) {
    values[0] = __uint_as_float(word);
  } else {
    constexpr DType kDType = kIsHalf<State> ? DType::float16 : DType::bfloat16;
    values[0] = from_bits(word & 0xffff, kDType);
    values[1] = kIsHalf<State> ? from_bits(word >> 16, kDType) : __uint_as_float(word & 0xffff0000);
  }
}

template <typename State>
__device__ __forceinline__ unsigned pack_word(const float* v) {
  if constexpr (sizeof(State) == 1) {
    return EightBits<State>::pack(v);
  } else if constexpr (sizeof(State) == 4) {
    return __float_as_uint(v[0]);
  } else {
    unsigned word;
    if constexpr (kIsHalf<State>) {
      *reinterpret_cast<__half2*>(&word) = __floats2half2_rn(v[0], v[1]);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(&word) = __floats2bfloat162_rn(v[0], v[1]);
    }
    return word;
  }
}

// A lane's part of the rows `above` + r kRowStep of a head; zeros for rows it does not have.
template <typename State, typename L, int kRows, typename Params>
__device__ __forceinline__ void load_tile(const Params& p, const State* head, int above, int column,
                                          uint4 (&raw)[kRows][L::kLoads]) {
  const State* source = head + static_cast<int64>(above) * p.state_p_stride + column;
#pragma unroll
  for (int r = 0; r < kRows; ++r, source += static_cast<int64>(L::kRowStep) * p.state_p_stride) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      raw[r][i] = make_uint4(0, 0, 0, 0);
      if (above + r * L::kRowStep < p.headdim) raw[r][i] = load_state(source + i * L::kStep);
    }
  }
}

// `scale`: of the row, with 8-bit states.
template <typename State, typename L>
__device__ __forceinline__ void unpack_row(const uint4 (&raw)[L::kLoads], float scale, float (&S)[L::kColumns]) {
  constexpr int kPerWord = 4 / sizeof(State);
#pragma unroll
  for (int i = 0; i < L::kLoads; ++i) {
    const unsigned words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack_word<State>(words[j], S + i * L::kPerLoad + j * kPerWord);
  }
  if constexpr (sizeof(State) == 1) {
#pragma unroll
    for (int i = 0; i < L::kColumns; ++i) S[i] *= scale;
  }
}

// What a row of 8-bit codes is multiplied by before it is rounded; all lanes of the row take part.
template <typename State, typename L>
__device__ __forceinline__ float multiplier_of(const float (&S)[L::kColumns], float& scale) {
  float amax = fabsf(S[0]);
#pragma unroll
  for (int i = 1; i < L::kColumns; ++i) amax = EightBits<State>::max(amax, fabsf(S[i]));
#pragma unroll
  for (int offset = L::kLanes / 2; offset >= 1; offset /= 2) {
    amax = EightBits<State>::max(amax, __shfl_xor_sync(~0u, amax, offset));
  }
  return EightBits<State>::multiplier(amax, scale);
}

// A load's worth of a row, rounded to the nearest.
template <typename State>
__device__ __forceinline__ uint4 pack_nearest(const float* v) {
  constexpr int kPerWord = 4 / sizeof(State);
  return make_uint4(pack_word<State>(v), pack_word<State>(v + kPerWord), pack_word<State>(v + 2 * kPerWord),
                    pack_word<State>(v + 3 * kPerWord));
}

// A lane's part of a row to memory, rounded as after token t; `number`: of the row in the whole pool.
template <typename State, typename L, bool kStochastic>
__device__ __forceinline__ void store_columns(State* row, int column, const float (&values)[L::kColumns], int64 number,
                                              int64 seed, int t) {
#pragma unroll
  for (int i = 0; i < L::kLoads; ++i) {
    const float* v = values + i * L::kPerLoad;
    State* const place = row + column + i * L::kStep;
    if constexpr (kStochastic) {  // which has no registers for a policy
      const uint4 bits = philox(seed, (number * L::kDstate + column + i * L::kStep) / 8, t);
      __stcs(reinterpret_cast<uint4*>(place), round_stochastic<State>(v, bits));
    } else {
      store_state(place, pack_nearest<State>(v));
    }
  }
}

// log(1 + exp(v)), of an exponential that cannot overflow.
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.f) + log1pf(expf(-fabsf(v))); }

// dt of the recurrence; `dt` has its bias.
__device__ __forceinline__ float step_size(float dt, bool dt_softplus, float dt_min, float dt_max) {
  if (dt_softplus) dt = softplus(dt);
  dt = dt < dt_min ? dt_min : dt;  // comparisons leave NaN as it is
  return dt > dt_max ? dt_max : dt;
}

// A row's part of a lane through one token: S moves on; the part's sum with C is returned.
template <int kColumns>
__device__ __forceinline__ float advance(float (&S)[kColumns], float decay, float input, const float (&B)[kColumns],
                                         const float (&C)[kColumns]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    S[i] = fmaf(S[i], decay, input * B[i]);
    sum = fmaf(S[i], C[i], sum);
  }
  return sum;
}

// The sums over kLanes lanes of kRows numbers of each: lane `part` of them returns row part / (kLanes / kRows).
// Each step halves the rows that a lane still carries.
template <int kLanes, int kRows>
__device__ __forceinline__ float sum_rows(const float (&sums)[kRows], int part) {
  if constexpr (kRows == 1) {
    float sum = sums[0];
#pragma unroll
    for (int offset = kLanes / 2; offset >= 1; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
    return sum;
  } else {
    constexpr int kHalf = kRows / 2;
    const bool upper = part & kLanes / 2;
    float halves[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? sums[i] : sums[i + kHalf];
      halves[i] = (upper ? sums[i + kHalf] : sums[i]) + __shfl_xor_sync(0xffffffff, given, kLanes / 2);
    }
    return sum_rows<kLanes / 2>(halves, part);
  }
}

}  // namespace hybrid_ops
