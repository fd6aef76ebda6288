// Gradients of RMSNorm, plain, with a residual, or gated, in one pass over memory, then the weight's.
//
// With n = u rstd, what the weight is multiplied with:  du = rstd (dn - n mean(dn n)),  dweight = sum over rows of dy
// n. So a row is looked at twice, once for its two sums. It lies in shared memory, where the next rows come meanwhile;
// the gate is computed twice, for which there is time, unlike room in registers. Those hold the thread's part of
// dweight; a CTA's teams are added at its end, and a second kernel adds the CTAs in their order: the same bits every
// time.
#pragma once

#include "common/norm.cuh"

namespace hybrid_ops {

inline constexpr int kMaxNormStages = 4;

struct NormBwdParams {
  const void* dy;      // (rows, hidden), unit stride in a row, as all of them; T
  const void* x;       // what the norm saw: x, or with a residual h; Stream
  const void* third;   // z, or the gradient of h, or null; Stream
  const void* weight;  // (hidden,), contiguous, T or float32
  void* dx;            // contiguous, as the next; T
  void* dthird;        // dz, or the residual's gradient where Stream is not T, or null; Stream
  void* dweight;       // as weight
  float* partials;     // (CTAs of a group, hidden)
  int64 dy_stride, x_stride, third_stride;
  int rows, groups, group_size;
  int step;  // teams in a group: from a team's row to its next
  int stages;
  float eps;
  bool weight_fp32;
};

// A warp's rows on their way into its part of shared memory, `stages` of them at a time: one lane asks for them, all
// wait for the one that is next, and nobody for another warp.
class RowRing {
 public:
  // fill(slot, barrier, row) has the next row's bytes come to a slot.
  template <typename Fill>
  __device__ __forceinline__ RowRing(uint32 barriers, int stages, int row, int step, int rows, const Fill& fill)
      : barriers_(barriers), stages_(stages), ahead_(stages * step), rows_(rows) {
    if (threadIdx.x % 32 == 0) {
      for (int slot = 0; slot < stages; ++slot) init_barrier(barriers + 8 * slot, 1);
      fence_barrier_init();
      for (int slot = 0; slot < stages && row + slot * step < rows; ++slot) {
        fill(slot, barriers + 8 * slot, row + slot * step);
      }
    }
    __syncwarp();
  }

  // The slot in which the next row is, once it is there.
  __device__ __forceinline__ int wait() const {
    hybrid_ops::wait(barriers_ + 8 * slot_, parity_);
    return slot_;
  }

  // Every lane has read `row`: its place is for another one.
  template <typename Fill>
  __device__ __forceinline__ void refill(int row, const Fill& fill) {
    __syncwarp();
    if (threadIdx.x % 32 == 0 && row + ahead_ < rows_) fill(slot_, barriers_ + 8 * slot_, row + ahead_);
    if (++slot_ == stages_) slot_ = 0, parity_ ^= 1;
  }

 private:
  uint32 barriers_;
  int stages_, ahead_, rows_;
  int slot_ = 0;
  uint32 parity_ = 0;
};

// d/dz of z sigmoid(z), given that sigmoid; of 1 - sigmoid float32 has few digits where z is large.
template <typename T>
__device__ __forceinline__ float silu_grad(float z, float gate) {
  return sizeof(T) == 2 ? fmaf(z * gate, 1.f - gate, gate) : gate * fmaf(z, sigmoid<T>(-z), 1.f);
}

// A slot of the ring: a warp's elements of dy, x, and the third tensor.
template <typename T, typename Stream, int kVectors>
struct NormBwdSlot {
  static constexpr int kElements = NormPart<T, Stream, kVectors>::kOfWarp;
  static constexpr int kX = kElements * sizeof(T), kThird = kX + kElements * sizeof(Stream);
  static constexpr int kBytes = kThird + kElements * sizeof(Stream);
};

template <typename T, typename Stream, Gate kGate, int kVectors>
__global__ void __launch_bounds__(32 * kMaxNormWarps, 1) norm_bwd_kernel(const __grid_constant__ NormBwdParams p) {
  using Part = NormPart<T, Stream, kVectors>;
  constexpr int kCount = Part::kCount;
  extern __shared__ float4 dynamic[];
  __shared__ uint64 barriers[kMaxNormWarps][kMaxNormStages];
  __shared__ NormSums<2> shared[kMaxNormWarps];

  const Part part(p.groups, p.group_size);
  const bool has_third = kGate != Gate::none || p.third != nullptr;
  const int warps = blockDim.x / 32, warp_of_cta = threadIdx.y * warps + part.warp;

  using Slot = NormBwdSlot<T, Stream, kVectors>;
  constexpr int kX = Slot::kX, kThird = Slot::kThird, kSlot = Slot::kBytes;
  char* const slots = reinterpret_cast<char*>(dynamic) + warp_of_cta * p.stages * kSlot;
  const auto fill = [&](int slot, uint32 barrier, int row) {
    const uint32 place = shared_address(slots) + slot * kSlot;
    const uint32 bytes = part.elements * sizeof(T), stream_bytes = part.elements * sizeof(Stream);
    const auto at = [&](int64 stride) { return row * stride + part.column; };
    arrive_expecting(barrier, bytes + (has_third ? 2 : 1) * stream_bytes);
    load_bytes(place, static_cast<const T*>(p.dy) + at(p.dy_stride), bytes, barrier);
    load_bytes(place + kX, static_cast<const Stream*>(p.x) + at(p.x_stride), stream_bytes, barrier);
    if (has_third) {
      load_bytes(place + kThird, static_cast<const Stream*>(p.third) + at(p.third_stride), stream_bytes, barrier);
    }
  };
  RowRing ring(shared_address(barriers[warp_of_cta]), p.stages, part.row, p.step, p.rows, fill);

  float weight[kVectors][kCount], dweight[kVectors][kCount] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    NormWeight<T, kCount> bits;
    if (part.has(i)) bits.load(p.weight, p.weight_fp32, part.column + part.place(i));
    bits.get(p.weight_fp32, weight[i]);
  }
  const int64 hidden = static_cast<int64>(p.groups) * p.group_size;
  int turn = 0;
  for (int row = part.row; row < p.rows; row += p.step) {
    const char* const slot = slots + ring.wait() * kSlot;
    const auto load = [&](int i, float (&dy)[kCount], float (&x)[kCount], float (&third)[kCount]) {
      const int place = part.place(i);
      unpack<T>(*reinterpret_cast<const Vector<T, kCount>*>(slot + place * sizeof(T)), dy);
      unpack<Stream>(*reinterpret_cast<const Vector<Stream, kCount>*>(slot + kX + place * sizeof(Stream)), x);
      if (has_third) {
        unpack<Stream>(*reinterpret_cast<const Vector<Stream, kCount>*>(slot + kThird + place * sizeof(Stream)), third);
      }
    };

    float sums[2] = {0.f, 0.f};  // of u^2 and dn u
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!part.has(i)) continue;
      float dy[kCount], x[kCount], third[kCount];
      load(i, dy, x, third);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float gate = kGate == Gate::none ? 1.f : third[c] * sigmoid<Stream>(third[c]);
        const float u = kGate == Gate::first ? x[c] * gate : x[c];
        const float dn = (kGate == Gate::last ? dy[c] * gate : dy[c]) * weight[i][c];
        sums[0] = fmaf(u, u, sums[0]);
        sums[1] = fmaf(dn, u, sums[1]);
      }
    }
    team_sums(sums, shared[threadIdx.y], turn);
    const float size = static_cast<float>(p.group_size);
    const float rstd = 1.f / sqrtf(sums[0] / size + p.eps);
    const float mean = sums[1] * rstd / size;  // of dn n

#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!part.has(i)) continue;
      float dy[kCount], x[kCount], third[kCount];
      load(i, dy, x, third);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float s = kGate == Gate::none ? 0.f : sigmoid<Stream>(third[c]), gate = third[c] * s;
        const float n = (kGate == Gate::first ? x[c] * gate : x[c]) * rstd;
        const float dyg = kGate == Gate::last ? dy[c] * gate : dy[c];
        const float du = rstd * fmaf(-n, mean, dyg * weight[i][c]);
        dweight[i][c] = fmaf(dyg, n, dweight[i][c]);
        if constexpr (kGate == Gate::none) {
          x[c] = has_third ? du + third[c] : du;
        } else if constexpr (kGate == Gate::first) {
          third[c] = du * x[c] * silu_grad<Stream>(third[c], s);
          x[c] = du * gate;
        } else {
          third[c] = dy[c] * n * weight[i][c] * silu_grad<Stream>(third[c], s);
          x[c] = du;
        }
      }
      const int64 place = row * hidden + part.column + part.place(i);
      *reinterpret_cast<Vector<T, kCount>*>(static_cast<T*>(p.dx) + place) = pack<T>(x);
      if (kGate != Gate::none || p.dthird != nullptr) {
        *reinterpret_cast<Vector<Stream, kCount>*>(static_cast<Stream*>(p.dthird) + place) =
            pack<Stream>(kGate == Gate::none ? x : third);
      }
    }
    ring.refill(row, fill);
  }

  // the teams' parts of dweight, through the ring, in which nothing is under way any more
  float* const mine = reinterpret_cast<float*>(slots);
  const auto piece = [&](float* of_warp, int i, int c) {
    return reinterpret_cast<float4*>(of_warp + part.place(i) + c);
  };
  if (threadIdx.y > 0) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; c += 4) {
        const float* const d = dweight[i] + c;
        *piece(mine, i, c) = make_float4(d[0], d[1], d[2], d[3]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.y > 0) return;
  float* const partials = p.partials + blockIdx.x / p.groups * hidden + part.column;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!part.has(i)) continue;
#pragma unroll
    for (int c = 0; c < kCount; c += 4) {
      float* const d = dweight[i] + c;
      for (int team = 1; team < blockDim.y; ++team) {
        const float4 other = *piece(mine + team * warps * p.stages * (kSlot / 4), i, c);
        d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
      }
      *piece(partials, i, c) = make_float4(d[0], d[1], d[2], d[3]);
    }
  }
}

inline constexpr int kSumFeatures = 32;
inline constexpr int kSumRows = 8;

// dweight: the sums of all CTAs. Warp w of a block adds those of CTAs w, w + kSumRows, .. and then the warps are added.
template <typename T>
__global__ void __launch_bounds__(kSumFeatures* kSumRows)
    norm_dweight_kernel(const __grid_constant__ NormBwdParams p, int num_partials) {
  const int hidden = p.groups * p.group_size, feature = blockIdx.x * kSumFeatures + threadIdx.x;
  float sum = 0.f;
  if (feature < hidden) {
#pragma unroll 4
    for (int i = threadIdx.y; i < num_partials; i += kSumRows)
      sum += p.partials[static_cast<int64>(i) * hidden + feature];
  }
  __shared__ float sums[kSumRows][kSumFeatures];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || feature >= hidden) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  if (p.weight_fp32) {
    static_cast<float*>(p.dweight)[feature] = sum;
  } else {
    static_cast<T*>(p.dweight)[feature] = T(sum);
  }
}

}  // namespace hybrid_ops
