// RMSNorm, plain, with a residual, or gated, in one pass over memory: a team of warps for each group of each row. See
// common/norm.cuh for who has what.
#pragma once

#include "common/norm.cuh"

namespace hybrid_ops {

struct NormParams {
  const void* x;       // (rows, hidden), unit stride in a row, as all of them; T
  const void* second;  // z, or the residual, or null; Stream
  const void* weight;  // (hidden,), contiguous, T or float32
  void* y;             // as x
  void* h;             // x + residual, as the residual; null without one
  int64 x_stride, second_stride, y_stride, h_stride;
  int rows, group_size;
  float inverse_size, eps;  // 1 / group_size
  bool weight_fp32;
  bool streaming;  // y and h: L2 could not keep them
};

inline constexpr int kMostNormVectors = 3;  // of a lane

template <typename T, typename Stream, Gate kGate, int kVectors>
__global__ void __launch_bounds__(32 * kMaxNormWarps) norm_kernel(const __grid_constant__ NormParams p) {
  using Part = NormPart<T, Stream, kVectors>;
  constexpr int kCount = Part::kCount, kStep = Part::kStep;
  __shared__ NormSums<1> shared[kMaxNormWarps];
  let_next_kernel_start();

  const Part part(p.group_size);
  const int row = part.row;
  const bool has_second = kGate != Gate::none || p.second != nullptr;
  const auto has = [&](int i) { return row < p.rows && part.has(i); };
  const T* const x = static_cast<const T*>(p.x) + row * p.x_stride + part.column;
  const Stream* const second = static_cast<const Stream*>(p.second) + row * p.second_stride + part.column;
  T* const y = static_cast<T*>(p.y) + row * p.y_stride + part.column;
  Stream* const h = static_cast<Stream*>(p.h) + row * p.h_stride + part.column;

  wait_for_kernel_before();
  Vector<T, kCount> x_raw[kVectors] = {};
  Vector<Stream, kCount> second_raw[kVectors] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    load_once_if(has(i), x + i * kStep, x_raw[i]);
    load_once_if(has(i) && has_second, second + i * kStep, second_raw[i]);
  }
  NormWeight<T, kCount> weights[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) weights[i].load_if(has(i), p.weight, p.weight_fp32, part.column + i * kStep);

  float u[kVectors][kCount], squares[1] = {0.f};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float other[kCount];
    unpack<T>(x_raw[i], u[i]);
    unpack<Stream>(second_raw[i], other);
    if constexpr (kGate == Gate::first) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) u[i][c] *= other[c] * sigmoid<Stream>(other[c]);
    } else if constexpr (kGate == Gate::none) {
      if (has_second) {  // the next layer sees the rounded stream, so the norm does too
#pragma unroll
        for (int c = 0; c < kCount; ++c) u[i][c] += other[c];
        const Vector<Stream, kCount> sum = pack<Stream>(u[i]);
        unpack<Stream>(sum, u[i]);
        if (has(i)) store_vector(h + i * kStep, sum, p.streaming);
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) squares[0] = fmaf(u[i][c], u[i][c], squares[0]);
  }
  team_sums(squares, shared[threadIdx.y]);
  const float rstd = rsqrtf(fmaf(squares[0], p.inverse_size, p.eps));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float weight[kCount];
    weights[i].get(p.weight_fp32, weight);
#pragma unroll
    for (int c = 0; c < kCount; ++c) u[i][c] *= rstd * weight[c];
    if constexpr (kGate == Gate::last) {
      float z[kCount];
      unpack<Stream>(second_raw[i], z);
#pragma unroll
      for (int c = 0; c < kCount; ++c) u[i][c] *= z[c] * sigmoid<Stream>(z[c]);
    }
    if (has(i)) store_vector(y + i * kStep, pack<T>(u[i]), p.streaming);
  }
}

}  // namespace hybrid_ops
