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
  int rows, groups, group_size;
  float eps;
  bool weight_fp32;
};

// CTAs of a multiprocessor for which registers suffice, by the vectors of a lane: without the bound ptxas has loads
// wait for fewer others, in more registers. One fewer where z is kept to the end, or x + residual is rounded.
inline constexpr int kNormCtas[] = {0, 6, 5, 3, 3, 3, 2};
inline constexpr int kMostEarlyWeights = 3;  // vectors of a lane whose weights have registers beside x and z

template <typename T, typename Stream, Gate kGate, int kVectors>
__global__ void __launch_bounds__(32 * kMaxNormWarps, kNormCtas[kVectors] - (kGate == Gate::first ? 0 : 1))
    norm_kernel(const __grid_constant__ NormParams p) {
  using Part = NormPart<T, Stream, kVectors>;
  constexpr int kCount = Part::kCount;
  constexpr bool kWeightsEarly = kVectors <= kMostEarlyWeights;
  __shared__ NormSums<1> shared[kMaxNormWarps];

  const Part part(p.groups, p.group_size);
  const int row = part.row;
  if (row >= p.rows) return;
  const bool has_second = kGate != Gate::none || p.second != nullptr;
  const T* const x = static_cast<const T*>(p.x) + row * p.x_stride + part.column;
  const Stream* const second = static_cast<const Stream*>(p.second) + row * p.second_stride + part.column;

  Vector<T, kCount> x_raw[kVectors] = {};
  Vector<Stream, kCount> second_raw[kVectors] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!part.has(i)) continue;
    x_raw[i] = load_once(reinterpret_cast<const Vector<T, kCount>*>(x + part.place(i)));
    if (has_second) {
      second_raw[i] = load_once(reinterpret_cast<const Vector<Stream, kCount>*>(second + part.place(i)));
    }
  }
  NormWeight<T, kCount> weights[kVectors];
  const auto load_weight = [&](int i) {
    if (part.has(i)) weights[i].load(p.weight, p.weight_fp32, part.column + part.place(i));
  };
  if constexpr (kWeightsEarly) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load_weight(i);
  }

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
        const Vector<Stream, kCount> h = pack<Stream>(u[i]);
        unpack<Stream>(h, u[i]);
        Stream* const place = static_cast<Stream*>(p.h) + row * p.h_stride + part.column + part.place(i);
        if (part.has(i)) store_vector(place, h);
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) squares[0] = fmaf(u[i][c], u[i][c], squares[0]);
  }
  int turn = 0;
  team_sums(squares, shared[threadIdx.y], turn);
  const float rstd = 1.f / sqrtf(squares[0] / static_cast<float>(p.group_size) + p.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float weight[kCount];
    if (!kWeightsEarly) load_weight(i);
    weights[i].get(p.weight_fp32, weight);
#pragma unroll
    for (int c = 0; c < kCount; ++c) u[i][c] *= rstd * weight[c];
    if constexpr (kGate == Gate::last) {
      float z[kCount];
      unpack<Stream>(second_raw[i], z);
#pragma unroll
      for (int c = 0; c < kCount; ++c) u[i][c] *= z[c] * sigmoid<Stream>(z[c]);
    }
    T* const place = static_cast<T*>(p.y) + row * p.y_stride + part.column + part.place(i);
    if (part.has(i)) store_vector(place, pack<T>(u[i]));
  }
}

}  // namespace hybrid_ops
