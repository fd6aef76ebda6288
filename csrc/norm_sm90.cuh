// RMSNorm, plain, with a residual, or gated, in one pass over memory. See common/norm.cuh for who has what.
//
// Rows come through registers (kRing false), which a short problem and many CTAs are right for, or through shared
// memory, the next ones under way while one is computed.
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
  int step;  // teams in a group: from a team's row to its next
  int stages;
  float eps;
  bool weight_fp32;
};

template <typename T, typename Stream, Gate kGate, int kVectors, bool kRing>
__global__ void __launch_bounds__(32 * kMaxNormWarps) norm_kernel(const __grid_constant__ NormParams p) {
  using Part = NormPart<T, Stream, kVectors>;
  constexpr int kCount = Part::kCount;
  extern __shared__ float4 dynamic[];
  __shared__ uint64 barriers[kMaxNormWarps][kMaxNormStages];
  __shared__ NormSums<1> shared[kMaxNormWarps];

  const Part part(p.groups, p.group_size);
  const bool has_second = kGate != Gate::none || p.second != nullptr;
  const int warp_of_cta = threadIdx.y * (blockDim.x / 32) + part.warp;
  const auto x_row = [&](int row) { return static_cast<const T*>(p.x) + row * p.x_stride + part.column; };
  const auto second_row = [&](int row) {
    return static_cast<const Stream*>(p.second) + row * p.second_stride + part.column;
  };

  // a slot of the ring: the warp's elements of x, then those of the second tensor
  constexpr uint32 kSlot = Part::kOfWarp * (sizeof(T) + sizeof(Stream));
  const char* const slots = reinterpret_cast<const char*>(dynamic) + warp_of_cta * p.stages * kSlot;
  const auto fill = [&](int slot, uint32 barrier, int row) {
    const uint32 place = shared_address(slots) + slot * kSlot;
    const uint32 x_bytes = part.elements * sizeof(T), second_bytes = part.elements * sizeof(Stream);
    arrive_expecting(barrier, has_second ? x_bytes + second_bytes : x_bytes);
    load_bytes(place, x_row(row), x_bytes, barrier);
    if (has_second) load_bytes(place + Part::kOfWarp * sizeof(T), second_row(row), second_bytes, barrier);
  };
  RowRing ring(shared_address(barriers[warp_of_cta]), kRing ? p.stages : 0, part.row, p.step, p.rows, fill);

  float weight[kVectors][kCount];
  load_norm_weight(part, p.weight, p.weight_fp32, weight);
  int turn = 0;
  for (int row = part.row; row < p.rows; row += p.step) {
    Vector<T, kCount> x_raw[kVectors] = {};
    Vector<Stream, kCount> second_raw[kVectors] = {};
    if constexpr (kRing) {
      const char* const slot = slots + ring.wait() * kSlot;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!part.has(i)) continue;
        const int place = part.place(i);
        x_raw[i] = *reinterpret_cast<const Vector<T, kCount>*>(slot + place * sizeof(T));
        if (has_second) {
          second_raw[i] = *reinterpret_cast<const Vector<Stream, kCount>*>(slot + Part::kOfWarp * sizeof(T) +
                                                                           place * sizeof(Stream));
        }
      }
      ring.refill(row, fill);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!part.has(i)) continue;
        x_raw[i] = load_once(reinterpret_cast<const Vector<T, kCount>*>(x_row(row) + part.place(i)));
        if (has_second) {
          second_raw[i] = load_once(reinterpret_cast<const Vector<Stream, kCount>*>(second_row(row) + part.place(i)));
        }
      }
    }

    float u[kVectors][kCount], squares[1] = {0.f};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float second[kCount];
      unpack<T>(x_raw[i], u[i]);
      unpack<Stream>(second_raw[i], second);
      if constexpr (kGate == Gate::first) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) u[i][c] *= second[c] * sigmoid<Stream>(second[c]);
      } else if constexpr (kGate == Gate::none) {
        if (has_second) {  // the next layer sees the rounded stream, so the norm does too
#pragma unroll
          for (int c = 0; c < kCount; ++c) u[i][c] += second[c];
          const Vector<Stream, kCount> h = pack<Stream>(u[i]);
          unpack<Stream>(h, u[i]);
          Stream* const place = static_cast<Stream*>(p.h) + row * p.h_stride + part.column + part.place(i);
          if (part.has(i)) *reinterpret_cast<Vector<Stream, kCount>*>(place) = h;
        }
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) squares[0] = fmaf(u[i][c], u[i][c], squares[0]);
    }
    team_sums(squares, shared[threadIdx.y], turn);
    const float rstd = 1.f / sqrtf(squares[0] / static_cast<float>(p.group_size) + p.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) u[i][c] *= rstd * weight[i][c];
      if constexpr (kGate == Gate::last) {
        float z[kCount];
        unpack<Stream>(second_raw[i], z);
#pragma unroll
        for (int c = 0; c < kCount; ++c) u[i][c] *= z[c] * sigmoid<Stream>(z[c]);
      }
      T* const place = static_cast<T*>(p.y) + row * p.y_stride + part.column + part.place(i);
      if (part.has(i)) *reinterpret_cast<Vector<T, kCount>*>(place) = pack<T>(u[i]);
    }
  }
}

}  // namespace hybrid_ops
