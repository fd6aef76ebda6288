// What the kernels that decode with the SSD recurrence have in common: numbers of a token, rows of y, rows of states.
// Params: the parameters of a kernel, whose members have the same names in all of them.
#pragma once

#include "common/exponential.cuh"
#include "common/state_rows.cuh"

namespace hybrid_ops {

struct TokenStrides {
  int sequence, token, head, element;  // `head` is the group of B and C; dt has no element
};

template <typename Params>
__device__ __forceinline__ bool usable(const Params& p, int slot) {
  return slot >= 0 && slot < p.nslots && slot != p.null_slot;
}

// The element at (b, token, head or group, element) of a tensor of tokens.
__device__ __forceinline__ int64 offset(const TokenStrides& s, int b, int64 token, int head, int element) {
  return static_cast<int64>(b) * s.sequence + token * s.token + static_cast<int64>(head) * s.head +
         static_cast<int64>(element) * s.element;
}

// dt of the recurrence.
template <typename Params>
__device__ __forceinline__ float step_of(const Params& p, Element bits, Element bias) {
  return step_size(from_bits(bits, p.dt_dtype) + from_bits(bias, p.dt_bias_dtype), p.dt_softplus, p.dt_min, p.dt_max);
}

// What a lane needs for the row whose y it computes.
struct RowBits {
  Element x, z;
};

template <typename Params>
__device__ __forceinline__ RowBits load_row(const Params& p, int b, int64 token, int head, int row) {
  const bool present = row < p.headdim;
  return {load_bits(p.x, p.dtype, offset(p.x_strides, b, token, head, row), present),
          load_bits(p.z, p.z_dtype, offset(p.z_strides, b, token, head, row), present && p.z != nullptr)};
}

template <typename Params>
__device__ __forceinline__ Element load_D(const Params& p, int head, int row) {
  return load_bits(p.D, p.D_dtype, static_cast<int64>(head) * p.D_head_stride + static_cast<int64>(row) * p.D_p_stride,
                   p.D != nullptr && row < p.headdim);
}

template <typename Params>
__device__ __forceinline__ Element load_bias(const Params& p, int head) {
  return load_bits(p.dt_bias, p.dt_bias_dtype, static_cast<int64>(head) * p.dt_bias_stride, p.dt_bias != nullptr);
}

// (sum + D x) silu(z), to y; `writes`: of the lanes that have the row, one.
template <typename Params>
__device__ __forceinline__ void finish_row(const Params& p, int64 y_offset, float sum, Element D, RowBits bits,
                                           bool writes) {
  float y = fmaf(from_bits(D, p.D_dtype), from_bits(bits.x, p.dtype), sum);
  if (p.z != nullptr) y *= silu(from_bits(bits.z, p.z_dtype));
  if (writes) store_float(p.y, p.dtype, y_offset, y);
}

template <typename State, typename Params>
__device__ __forceinline__ State* head_of(const Params& p, int slot, int head) {
  return static_cast<State*>(p.state) + slot * p.state_slot_stride + static_cast<int64>(head) * p.state_head_stride;
}

template <typename Params>
__device__ __forceinline__ float* scale_of(const Params& p, int slot, int head, int row) {
  return p.state_scale + static_cast<int64>(slot) * p.scale_slot_stride +
         static_cast<int64>(head) * p.scale_head_stride + static_cast<int64>(row) * p.scale_p_stride;
}

// Stores a lane's part of a row of head `head` in slot `place`, rounded as after token t.
template <typename State, typename L, bool kStochastic, typename Params>
__device__ __forceinline__ void store_row(const Params& p, int place, int head, int row, int column,
                                          const float (&S)[L::kColumns], int64 seed, int t) {
  float values[L::kColumns], scale, multiplier;
  if constexpr (sizeof(State) == 1) multiplier = multiplier_of<State, L>(S, scale);
#pragma unroll
  for (int i = 0; i < L::kColumns; ++i) values[i] = sizeof(State) == 1 ? __fmul_rn(S[i], multiplier) : S[i];
  if (row >= p.headdim) return;
  store_columns<State, L, kStochastic>(head_of<State>(p, place, head) + static_cast<int64>(row) * p.state_p_stride,
                                       column, values, (static_cast<int64>(place) * p.nheads + head) * p.headdim + row,
                                       seed, t);
  if constexpr (sizeof(State) == 1) {
    if (column == 0) *scale_of(p, place, head, row) = scale;
  }
}

}  // namespace hybrid_ops
