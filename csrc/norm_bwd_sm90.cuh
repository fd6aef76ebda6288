// Gradients of RMSNorm, plain, with a residual, or gated, in one pass over memory, then the weight's.
//
// With n = u rstd, what the weight is multiplied with:  du = rstd (dn - n mean(dn n)),  dweight = sum over rows of dy
// n. So a row is looked at twice, once for its two sums. It stays in registers between, where the next row comes
// meanwhile: a team has every `step`-th row of a group and a part of dweight. A CTA adds those of its teams, and a
// second kernel those of the CTAs, both in their order: the same bits every time.
#pragma once

#include "common/norm.cuh"

namespace hybrid_ops {

struct NormBwdParams {
  const void* dy;      // (rows, hidden), unit stride in a row, as all of them; T
  const void* x;       // what the norm saw: x, or with a residual h; Stream
  const void* third;   // z, or the gradient of h, or null; Stream
  const void* weight;  // (hidden,), contiguous, T or float32
  void* dx;            // contiguous, as the next; T
  void* dthird;        // dz, or the residual's gradient where Stream is not T, or null; Stream
  void* dweight;       // as weight
  float* partials;     // (ctas, hidden)
  int64 dy_stride, x_stride, third_stride, hidden;
  int rows, group_size;
  int ctas, step;           // of a group: CTAs, and teams
  float inverse_size, eps;  // 1 / group_size
  bool weight_fp32;
  bool streaming;  // dx and dthird: L2 could not keep them
};

// d/dz of z sigmoid(z), given that sigmoid; of 1 - sigmoid float32 has few digits where z is large.
template <typename T>
__device__ __forceinline__ float silu_grad(float z, float gate) {
  return sizeof(T) == 2 ? fmaf(z * gate, 1.f - gate, gate) : gate * fmaf(z, sigmoid<T>(-z), 1.f);
}

// Vectors of a lane for which a thread has registers.
template <typename T, typename Stream, Gate kGate>
inline constexpr int kMostNormBwdVectors =
    (kGate == Gate::none && kNormVector<T, Stream> == 8 ? 32 : 24) / kNormVector<T, Stream>;
// Warps of a CTA at most, and CTAs of so many for which a multiprocessor has registers, 96 to 255 of a thread.
template <Gate kGate, int kVectors>
inline constexpr int kNormBwdWarps = kVectors == 1                               ? 10
                                     : kVectors == (kGate == Gate::none ? 3 : 2) ? 12
                                                                                 : 8;
template <Gate kGate, int kVectors>
inline constexpr int kNormBwdCtas = kVectors <= (kGate == Gate::none ? 2 : 1) ? 2 : 1;

template <typename T, typename Stream, Gate kGate, int kVectors>
__global__ void __launch_bounds__(32 * kNormBwdWarps<kGate, kVectors>, kNormBwdCtas<kGate, kVectors>)
    norm_bwd_kernel(const __grid_constant__ NormBwdParams p) {
  using Part = NormPart<T, Stream, kVectors>;
  constexpr int kCount = Part::kCount, kStep = Part::kStep;
  extern __shared__ float4 dynamic[];
  __shared__ NormSums<2> shared[kMaxNormWarps][2];
  let_next_kernel_start();

  const Part part(p.group_size);
  const bool has_third = kGate != Gate::none || p.third != nullptr;
  const T* dy_at = static_cast<const T*>(p.dy) + part.row * p.dy_stride + part.column;
  const Stream* x_at = static_cast<const Stream*>(p.x) + part.row * p.x_stride + part.column;
  const Stream* third_at = static_cast<const Stream*>(p.third) + part.row * p.third_stride + part.column;
  T* dx_at = static_cast<T*>(p.dx) + part.row * p.hidden + part.column;
  Stream* dthird_at = static_cast<Stream*>(p.dthird) + part.row * p.hidden + part.column;

  Vector<T, kCount> dy_raw[kVectors] = {};
  Vector<Stream, kCount> x_raw[kVectors] = {}, third_raw[kVectors] = {};
  const auto load = [&](int row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool there = row < p.rows && part.has(i);
      load_once_if(there, dy_at + i * kStep, dy_raw[i]);
      load_once_if(there, x_at + i * kStep, x_raw[i]);
    }
    dy_at += p.step * p.dy_stride, x_at += p.step * p.x_stride;
  };
  const auto load_third = [&](int row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      load_once_if(has_third && row < p.rows && part.has(i), third_at + i * kStep, third_raw[i]);
    }
    third_at += p.step * p.third_stride;
  };
  wait_for_kernel_before();
  load(part.row);
  load_third(part.row);
  float weight[kVectors][kCount], dweight[kVectors][kCount] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    NormWeight<T, kCount> bits;
    bits.load_if(part.has(i), p.weight, p.weight_fp32, part.column + i * kStep);
    bits.get(p.weight_fp32, weight[i]);
  }
  int turn = 0;
  for (int row = part.row; row < p.rows; row += p.step) {
    const int next = row + p.step;
    float dy[kVectors][kCount], x[kVectors][kCount], third[kVectors][kCount], gate[kVectors][kCount];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack<T>(dy_raw[i], dy[i]);
      unpack<Stream>(x_raw[i], x[i]);
      if constexpr (kGate != Gate::none) unpack<Stream>(third_raw[i], third[i]);
    }
    load(next);
    if constexpr (kGate != Gate::none) load_third(next);
    float sums[2] = {};  // of u^2 and dn u
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if constexpr (kGate != Gate::none) {  // x becomes u or dy loses the gate, z becomes what dz is du or rstd times
          const float s = sigmoid<Stream>(third[i][c]), slope = x[i][c] * silu_grad<Stream>(third[i][c], s);
          gate[i][c] = third[i][c] * s;
          third[i][c] = kGate == Gate::first ? slope : slope * dy[i][c] * weight[i][c];
          (kGate == Gate::first ? x : dy)[i][c] *= gate[i][c];
        }
        sums[0] = fmaf(x[i][c], x[i][c], sums[0]);
        sums[1] = fmaf(dy[i][c] * weight[i][c], x[i][c], sums[1]);
      }
    }
    team_sums<2, true>(sums, shared[threadIdx.y][turn]);
    turn ^= 1;
    const float rstd = rsqrtf(fmaf(sums[0], p.inverse_size, p.eps));
    const float mean = sums[1] * rstd * p.inverse_size;  // of dn n

#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kGate == Gate::none) unpack<Stream>(third_raw[i], third[i]);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float dn = dy[i][c] * rstd;  // without the weight
        const float du = fmaf(x[i][c], -mean * rstd * rstd, dn * weight[i][c]);
        dweight[i][c] = fmaf(dn, x[i][c], dweight[i][c]);
        x[i][c] = kGate == Gate::first ? du * gate[i][c] : kGate == Gate::last ? du : du + third[i][c];
        third[i][c] *= kGate == Gate::first ? du : rstd;
      }
      if (!part.has(i)) continue;
      store_vector(dx_at + i * kStep, pack<T>(x[i]), p.streaming);
      if (kGate != Gate::none || p.dthird != nullptr) {
        store_vector(dthird_at + i * kStep, pack<Stream>(kGate == Gate::none ? x[i] : third[i]), p.streaming);
      }
    }
    dx_at += p.step * p.hidden, dthird_at += p.step * p.hidden;
    if constexpr (kGate == Gate::none) load_third(next);
  }

  float* const parts = reinterpret_cast<float*>(dynamic);  // [teams][group_size], of dweight
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!part.has(i)) continue;
#pragma unroll
    for (int c = 0; c < kCount; c += 4) {
      float* const place = parts + threadIdx.y * p.group_size + part.first + i * kStep + c;
      *reinterpret_cast<float4*>(place) = reinterpret_cast<const float4&>(dweight[i][c]);
    }
  }
  __syncthreads();
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  float* const partials = p.partials + part.cta * p.hidden + blockIdx.x * p.group_size;
  for (int feature = 4 * thread; feature < p.group_size; feature += 4 * threads) {
    float sum[4] = {};
    for (unsigned team = 0; team < blockDim.y; ++team) {
      const float4 of = *reinterpret_cast<const float4*>(parts + team * p.group_size + feature);
      sum[0] += of.x, sum[1] += of.y, sum[2] += of.z, sum[3] += of.w;
    }
    store_vector(partials + feature, pack<float>(sum));
  }
}

inline constexpr int kSumFeatures = 32;
inline constexpr int kSumRows = 16;
inline constexpr int kSumAtOnce = 16;  // parts that a thread has under way: nearly always all it has

// dweight: the sums of all CTAs. Warp w of a block adds those of CTAs w, w + kSumRows, .. and then the warps are added.
template <typename T>
__global__ void __launch_bounds__(kSumFeatures* kSumRows) norm_dweight_kernel(const __grid_constant__ NormBwdParams p) {
  let_next_kernel_start();
  const int feature = blockIdx.x * kSumFeatures + threadIdx.x;
  wait_for_kernel_before();
  float sum = 0.f;
  if (feature < p.hidden) {
    const float* part_at = p.partials + threadIdx.y * p.hidden + feature;
#pragma unroll 1
    for (int first = threadIdx.y; first < p.ctas; first += kSumAtOnce * kSumRows) {
      float parts[kSumAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kSumAtOnce; ++i, part_at += kSumRows * p.hidden) {
        if (first + i * kSumRows < p.ctas) parts[i] = *part_at;
      }
#pragma unroll
      for (const float part : parts) sum += part;
    }
  }
  __shared__ float sums[kSumRows][kSumFeatures];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || feature >= p.hidden) return;
#pragma unroll
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  if (p.weight_fp32) {
    static_cast<float*>(p.dweight)[feature] = sum;
  } else {
    static_cast<T*>(p.dweight)[feature] = T(sum);
  }
}

}  // namespace hybrid_ops
