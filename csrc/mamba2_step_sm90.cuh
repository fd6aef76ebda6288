// The next token of each sequence through a Mamba-2 mixer, from in_proj's output to out_proj's input, in one launch.
//
// A cluster takes one group of the norm of one sequence: whole groups of B and C, of which a CTA has consecutive rows
// (features of heads) of one. The state is the traffic: a CTA asks for its first tiles, p.stages for each warp, as soon
// as it knows the slot, and does everything else while they are on their way: the convolution, one channel a thread, of
// its rows and of its group's B and C (which its neighbours compute too: a few KB from L2, against a barrier), and the
// step sizes.
//
// All that crosses the cluster is a sum of squares from each warp, stored into every CTA with a count of bytes: no
// fence waits for the states that were written meanwhile. It also says that its sender has read the windows of B and C,
// which each CTA then moves on for a part of the channels.
//
// It is launched early: its CTAs come to a multiprocessor as soon as those of the kernel before have left, and do not
// wait for that kernel to be flushed and for a launch behind it. Why that is right:
//  * Until wait_for_kernel_before() a CTA touches nothing but its own registers and shared memory. All it reads or
//    writes in global memory may be the work of the kernel before, also the slots and, in a chain of steps, the states.
//  * That wait is for all of the kernel before and its writes, whether it let this one begin or ended. If it was itself
//    launched early, it has waited for the one before it in turn, and so on: such a kernel must wait before it ends. In
//    this one every thread of every CTA does, null slots too, which keeps the chain whole for the next.
//  * It does not let the next kernel begin: that could only gain where the next one is launched early as well, which
//    the products around a step are not, and it would hold the multiprocessors' room while this one runs.
// In a CUDA graph the launch becomes a programmatic edge, if the node before is a kernel, and an ordinary one else.
#pragma once

#include "common/async_copies.cuh"
#include "common/conv1d.cuh"
#include "common/division.cuh"
#include "common/hopper.cuh"
#include "common/state_rows.cuh"

namespace hybrid_ops {

struct Mamba2StepParams {
  const void* zxbcdt;       // (batch, d_inner + conv_dim + nheads), unit stride in a row
  void* conv_state;         // (nslots, conv_dim, width - 1), conv_dim = d_inner + 2 ngroups dstate
  void* state;              // (nslots, nheads, headdim, dstate), rows of neighbours aligned to 16 bytes
  const void* conv_weight;  // (conv_dim, width), contiguous
  const void* conv_bias;    // (conv_dim,) or null
  const float* A;           // (nheads,)
  const void* D;            // (nheads, headdim) or null
  const void* dt_bias;      // (nheads,) or null
  const void* norm_weight;  // (d_inner,)
  const int* slots;         // (batch,) or null: slot b
  const int64* seed;        // of stochastic rounding
  void* y;                  // (batch, d_inner), unit stride in a row
  int64 zxbcdt_stride, y_stride, conv_slot_stride, state_slot_stride;
  int conv_channel_stride, conv_column_stride, state_head_stride, state_p_stride;
  int conv_bias_stride, A_stride, D_head_stride, D_p_stride, dt_bias_stride, norm_weight_stride, slots_stride;
  int nslots, nheads, headdim, conv_dim, width, null_slot;
  int group_size, rows, rows_per_group;  // of the norm; of a CTA; of B and C
  int stages;                            // tiles that a warp has under way
  Divisor by_headdim, by_rows_per_group;
  float dt_min, dt_max, eps;
  DType dtype, conv_state_dtype, conv_weight_dtype, conv_bias_dtype, D_dtype, dt_bias_dtype, norm_weight_dtype;
  bool weight_aligned, dt_softplus, norm_before_gate;  // weight_aligned: four taps, in one aligned piece
  // where a CTA asks L2 for another one's windows, and states, so many CTAs further
  int ahead, window_bytes;  // of a channel
  bool asks_states;
  int64 slot_bytes;
  WideDivisor by_ctas;  // of a sequence
};

inline constexpr int kMaxWidth = 4;
inline constexpr int kMaxCluster = 8, kMaxWarps = 16, kMaxStages = 3;

// 16 elements of the state in a lane, 8 beside random bits or of long rows: what 64 registers have room for.
template <typename State, int kDstate, bool kStochastic>
using StepLayout =
    Layout<State, kDstate,
           (kStochastic || kDstate * sizeof(State) == 1024 ? 8 : 16) / Layout<State, kDstate, 1>::kColumns>;

// Of a channel: what does not depend on the slot, as bits. Taps lie at the end, so that the last is the new token's.
struct ChannelBits {
  Element x, bias;
  Bits<kMaxWidth> weight;
};

__device__ __forceinline__ ChannelBits load_channel(const Mamba2StepParams& p, int64 token, int channel) {
  ChannelBits bits;
  bits.x = load_bits(p.zxbcdt, p.dtype, token + channel);
  bits.bias = load_bits(p.conv_bias, p.conv_bias_dtype, static_cast<int64>(channel) * p.conv_bias_stride,
                        p.conv_bias != nullptr);
  if (p.weight_aligned) {
    load_runs<kMaxWidth, kMaxWidth, 0>(p.conv_weight, p.conv_weight_dtype, static_cast<int64>(channel) * kMaxWidth, 0,
                                       1, true, bits.weight);
  } else {
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
      const int tap = k - (kMaxWidth - p.width);
      bits.weight.words[k] =
          load_bits(p.conv_weight, p.conv_weight_dtype, static_cast<int64>(channel) * p.width + tap, tap >= 0).bits();
    }
  }
  return bits;
}

// The columns that a channel's token sees, as bits; zeros before them.
struct WindowBits {
  Element columns[kMaxWidth - 1];
};

__device__ __forceinline__ WindowBits load_window(const Mamba2StepParams& p, int64 first) {
  WindowBits bits;
#pragma unroll
  for (int k = 0; k < kMaxWidth - 1; ++k) {
    const int column = k - (kMaxWidth - p.width);
    bits.columns[k] = load_bits(p.conv_state, p.conv_state_dtype,
                                first + static_cast<int64>(column) * p.conv_column_stride, column >= 0);
  }
  return bits;
}

// The window without its oldest column, to where it came from. kStreaming: the first to leave L2.
template <bool kStreaming>
__device__ __forceinline__ void store_window(const Mamba2StepParams& p, int64 first, const float (&window)[kMaxWidth]) {
#pragma unroll
  for (int k = 0; k < kMaxWidth - 1; ++k) {
    const int column = k - (kMaxWidth - p.width);
    if (column >= 0) {
      store_float<kStreaming>(p.conv_state, p.conv_state_dtype,
                              first + static_cast<int64>(column) * p.conv_column_stride, window[k + 1]);
    }
  }
}

// The convolution and its activation; `window` gets the columns and the token.
__device__ __forceinline__ float convolve(const Mamba2StepParams& p, const ChannelBits& bits, const WindowBits& before,
                                          float (&window)[kMaxWidth]) {
#pragma unroll
  for (int k = 0; k < kMaxWidth - 1; ++k) window[k] = from_bits(before.columns[k], p.conv_state_dtype);
  window[kMaxWidth - 1] = from_bits(bits.x, p.dtype);
  float taps[kMaxWidth];
  runs_to_float(bits.weight, p.conv_weight_dtype, p.weight_aligned, taps);
  return silu(window_sum<float, kMaxWidth>(
      from_bits(bits.bias, p.conv_bias_dtype), [&](int k) { return taps[k]; }, [&](int k) { return window[k]; }));
}

// Of a row: z and the weights of the skip and of the norm, as bits.
struct FeatureBits {
  Element z, D, weight;
};

__device__ __forceinline__ FeatureBits load_feature(const Mamba2StepParams& p, int64 token, int feature) {
  const int head = p.by_headdim.of(feature);
  return {load_bits(p.zxbcdt, p.dtype, token + feature),
          load_bits(p.D, p.D_dtype,
                    static_cast<int64>(head) * p.D_head_stride +
                        static_cast<int64>(feature - head * p.headdim) * p.D_p_stride,
                    p.D != nullptr),
          load_bits(p.norm_weight, p.norm_weight_dtype, static_cast<int64>(feature) * p.norm_weight_stride)};
}

// Tensors of bfloat16 and a convolution of width 4, which is what the models have.
__host__ __device__ __forceinline__ bool is_usual(const Mamba2StepParams& p) {
  return p.dtype == DType::bfloat16 && p.conv_state_dtype == DType::bfloat16 &&
         p.conv_weight_dtype == DType::bfloat16 && p.conv_bias_dtype == DType::bfloat16 &&
         p.norm_weight_dtype == DType::bfloat16 && p.width == kMaxWidth;
}

__device__ __forceinline__ Mamba2StepParams as_usual(Mamba2StepParams p) {
  p.dtype = p.conv_state_dtype = p.conv_weight_dtype = p.conv_bias_dtype = p.norm_weight_dtype = DType::bfloat16;
  p.width = kMaxWidth;
  p.weight_aligned = true;
  return p;
}

// Of a row of the CTA, in shared memory. y: first the skip, then what is normalised.
struct alignas(16) StepRow {
  float x, y, gate, weight;
};

// kUsual: the dtypes and the width below are those of `is_usual`, and cost no instructions: where sequences are few the
// latency of a step is for a large part the time to issue them.
// kAsks: windows are small pieces of memory, and whoever waits for them has nothing else to do; so a CTA asks L2 for
// those of one that is about to begin, where there are so many, and its own leave L2 first. Where there are many more,
// for its states, too: while the first CTAs wait for their own, those of others are in the way.
template <typename State, int kDstate, bool kStochastic, bool kUsual, bool kAsks>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    mamba2_step_kernel(const __grid_constant__ Mamba2StepParams given) {
  const Mamba2StepParams p = kUsual ? as_usual(given) : given;
  using L = StepLayout<State, kDstate, kStochastic>;
  constexpr int kRows = L::kTile / L::kGroups;
  constexpr int kShared = 2 * kDstate;  // channels of B and C, one behind the other
  extern __shared__ float4 dynamic[];
  __shared__ float partials[kMaxCluster * kMaxWarps];
  __shared__ unsigned long long arrived;
  constexpr int kPieces = 32 * kRows * L::kLoads;  // of a tile, each of 16 bytes
  const int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // shared memory: B and C; their windows, moved on; rows; dt and decay of each head; tiles of states on their way
  float* const BC = reinterpret_cast<float*>(dynamic);
  float* const moved = BC + kShared;  // [kMaxWidth - 1][kShared]
  StepRow* const rows = reinterpret_cast<StepRow*>(moved + (kMaxWidth - 1) * kShared);
  float2* const steps = reinterpret_cast<float2*>(rows + p.rows);

  const uint32 barrier = shared_address(&arrived);
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    fence_barrier_init();
  }
  cluster_arrive();
  __shared__ int slots[kMaxWarps];
  const int b = blockIdx.y;  // the sequence
  wait_for_kernel_before();  // the first access to global memory comes behind it

  // The slot comes as a copy, which is waited for alone: loads into registers share their counters, and the first of
  // them would be waited for together with the last.
  if (p.slots != nullptr && lane == 0) {
    copy_async<4>(&slots[warp], p.slots + static_cast<int64>(b) * p.slots_stride);
  }

  const int first = blockIdx.x * p.rows;  // feature of the CTA
  const int first_head = p.by_headdim.of(first);
  const int heads = p.by_headdim.of(first + p.rows - 1) - first_head + 1;
  const int d_inner = p.nheads * p.headdim, group = p.by_rows_per_group.of(first);
  const int expected = static_cast<int>(cluster_size()) * warps;  // sums of squares
  uint4* const stages = reinterpret_cast<uint4*>(steps) + (heads + 1) / 2 + warp * p.stages * kPieces + lane;
  const int channels = kShared + p.rows;  // of the CTA: B, C, then its rows
  const auto channel_of = [&](int c) {
    const int BC = d_inner + group * kDstate + c + (c < kDstate ? 0 : (p.conv_dim - d_inner) / 2 - kDstate);
    return c < kShared ? BC : first + c - kShared;
  };
  const int part = lane % L::kLanes, column = part * L::kPerLoad;
  const int tiles = p.rows / L::kTile;

  const int64 seed = kStochastic ? *p.seed : 0;
  const auto piece_of = [&](int stage, int r, int i) { return stages + stage * kPieces + 32 * (r * L::kLoads + i); };
  // what does not need the slot, all of it under way at once
  const int64 token = static_cast<int64>(b) * p.zxbcdt_stride;
  int c = threadIdx.x;
  ChannelBits bits;
  FeatureBits feature;
  const auto load = [&] {
    bits = load_channel(p, token + d_inner, channel_of(c));
    if (c >= kShared) feature = load_feature(p, token, first + c - kShared);
  };
  if (c < channels) load();
  const int my_head = threads - 1 - threadIdx.x;  // of the CTA: the last threads have least to do
  Element dt_bits, dt_bias;
  float A;
  if (my_head < heads) {
    const int head = first_head + my_head;
    dt_bits = load_bits(p.zxbcdt, p.dtype, token + d_inner + p.conv_dim + head);
    dt_bias = load_bits(p.dt_bias, p.dt_bias_dtype, static_cast<int64>(head) * p.dt_bias_stride, p.dt_bias != nullptr);
    A = p.A[static_cast<int64>(head) * p.A_stride];
  }

  int other_slot = -1, other_first = 0;
  if (kAsks && threadIdx.x == 0) {
    const int other = static_cast<int>(blockIdx.x) + p.ahead, sequences = p.by_ctas.of(other);
    other_first = (other - sequences * static_cast<int>(gridDim.x)) * p.rows;
    if (b + sequences < static_cast<int>(gridDim.y)) {
      other_slot = p.slots == nullptr ? b + sequences : p.slots[static_cast<int64>(b + sequences) * p.slots_stride];
    }
  }

  wait_for_copies();
  __syncwarp();
  const int slot = __shfl_sync(~0u, p.slots == nullptr ? b : slots[warp], 0);         // in a uniform register
  if (slot < 0 || slot >= p.nslots || (p.slots != nullptr && slot == p.null_slot)) {  // in all CTAs of the cluster
    for (int i = threadIdx.x; i < p.rows; i += threads) {
      store_float(p.y, p.dtype, static_cast<int64>(b) * p.y_stride + first + i, 0.f);
    }
    cluster_wait();
    return;
  }
  const auto rows_of = [&](int tile) {  // the lane's part of the tile's first rows
    const int row = first + tile * L::kTile, head = p.by_headdim.of(row);
    return static_cast<State*>(p.state) + slot * p.state_slot_stride + static_cast<int64>(head) * p.state_head_stride +
           static_cast<int64>(row - head * p.headdim + lane / L::kLanes) * p.state_p_stride + column;
  };
  const auto copy_tile = [&](int tile, int stage) {
    if (tile < tiles) {
      const State* source = rows_of(tile);
#pragma unroll
      for (int r = 0; r < kRows; ++r, source += static_cast<int64>(L::kGroups) * p.state_p_stride) {
#pragma unroll
        for (int i = 0; i < L::kLoads; ++i) copy_async<16>(piece_of(stage, r, i), source + i * L::kStep);
      }
    }
    commit_copies();
  };

  // the windows first: they are small, and more waits for them
  const int64 windows = slot * p.conv_slot_stride;
  const auto place_of = [&](int c) { return windows + static_cast<int64>(channel_of(c)) * p.conv_channel_stride; };
  WindowBits before;
  if (c < channels) before = load_window(p, place_of(c));
#pragma unroll 1
  for (int s = 0; s < p.stages; ++s) copy_tile(warp + s * warps, s);
  if (threadIdx.x == 0) arrive_expecting(barrier, expected * sizeof(float));

  if (my_head < heads) {
    const float dt =
        step_size(from_bits(dt_bits, p.dtype) + from_bits(dt_bias, p.dt_bias_dtype), p.dt_softplus, p.dt_min, p.dt_max);
    steps[my_head] = make_float2(dt, expf(dt * A));
  }
  // windows of B and C are stored once the other CTAs have read them, those of rows at once
  float window[kMaxWidth];
  while (c < channels) {
    if (c >= kShared) {
      StepRow& row = rows[c - kShared];
      row.gate = silu(from_bits(feature.z, p.dtype));
      row.weight = from_bits(feature.weight, p.norm_weight_dtype);
    }
    const float value = convolve(p, bits, before, window);
    if (c < kShared) {
      BC[c] = value;
#pragma unroll
      for (int k = 1; k < kMaxWidth; ++k) moved[(k - 1) * kShared + c] = window[k];
    } else {
      StepRow& row = rows[c - kShared];
      row.x = value;
      row.y = from_bits(feature.D, p.D_dtype) * value;
      store_window<kAsks>(p, place_of(c), window);
    }
    c += threads;
    if (c < channels) {
      load();
      before = load_window(p, place_of(c));
    }
  }
  __syncthreads();
  cluster_wait();  // the others have begun, and their barriers are ready
  if (kAsks && other_slot >= 0 && other_slot < p.nslots) {
    const char* const windows = static_cast<const char*>(p.conv_state) + other_slot * p.slot_bytes;
    const auto ask = [&](int channel, int channels) {
      ask_for(windows + static_cast<int64>(channel) * p.window_bytes, channels * p.window_bytes);
    };
    const int B = d_inner + p.by_rows_per_group.of(other_first) * kDstate;
    ask(other_first, p.rows);
    if (cluster_rank() == 0) ask(B, kDstate), ask(B + (p.conv_dim - d_inner) / 2, kDstate);
    if (p.asks_states) {
      ask_for(static_cast<const State*>(p.state) + other_slot * p.state_slot_stride + other_first * kDstate,
              p.rows * kDstate * sizeof(State));
    }
  }

  float B[L::kColumns], C[L::kColumns];
#pragma unroll
  for (int i = 0; i < L::kColumns; ++i) {
    const int n = column + i / L::kPerLoad * L::kStep + i % L::kPerLoad;
    B[i] = BC[n], C[i] = BC[kDstate + n];
  }
  float S[kRows][L::kColumns];
  const auto store_rows = [&](int tile) {
    const int row = first + tile * L::kTile;
    State* target = rows_of(tile) - column;
#pragma unroll
    for (int r = 0; r < kRows; ++r, target += static_cast<int64>(L::kGroups) * p.state_p_stride) {
      store_columns<State, L, kStochastic>(
          target, column, S[r],
          static_cast<int64>(slot) * p.nheads * p.headdim + row + lane / L::kLanes + r * L::kGroups, seed, 0);
    }
  };
  const int mine = part / L::kLanesPerSum * L::kGroups + lane / L::kLanes;  // row of a tile whose y is this lane's
  float squares = 0.f;
  int tile = warp, stage = 0;
  while (tile < tiles) {
    wait_for_copies<kMaxStages - 1>(p.stages - 1);
    const int row = tile * L::kTile, head = p.by_headdim.of(first + row) - first_head;
    const auto [dt, decay] = steps[head];
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint4 raw[L::kLoads];
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) raw[i] = *piece_of(stage, r, i);
      unpack_row<State, L>(raw, 1.f, S[r]);
      sums[r] = advance(S[r], decay, dt * rows[row + lane / L::kLanes + r * L::kGroups].x, B, C);
    }
    if (tile + warps < tiles) copy_tile(tile + p.stages * warps, stage);
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    const float sum = sum_rows<L::kLanes>(sums, part);  // in each of the row's lanes
    const StepRow own = rows[row + mine];
    const float u = (own.y + sum) * (p.norm_before_gate ? 1.f : own.gate);
    squares = fmaf(u, u, squares);
    __syncwarp();                                             // all of them have read it
    if (part % L::kLanesPerSum == 0) rows[row + mine].y = u;  // who stores y later
    if (tile + warps >= tiles) break;  // the last tile's states are stored when nobody waits for this warp
    store_rows(tile);
    tile += warps;
  }
#pragma unroll
  for (int offset = 16; offset >= L::kLanesPerSum; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
  const uint32 place = shared_address(partials + cluster_rank() * warps + warp);
  if (lane < cluster_size()) store_counted(address_in_cta(place, lane), squares, address_in_cta(barrier, lane));
  if (tile < tiles) store_rows(tile);
  // what comes after the wait is ready before it: a row of y, and of B's and C's channels, which the CTAs of the
  // group share, a window
  const bool has_y = part % L::kLanesPerSum == 0;
  int row = warp * L::kTile + mine;
  StepRow own;
  if (has_y && row < p.rows) own = rows[row];
  const int share = p.by_rows_per_group.of(kShared * p.rows);
  const int begin = p.by_rows_per_group.of((first - group * p.rows_per_group) * kShared);
  c = begin + threadIdx.x;
  const auto load_moved = [&] {
#pragma unroll
    for (int k = 1; k < kMaxWidth; ++k) window[k] = moved[(k - 1) * kShared + c];
  };
  if (c < begin + share) load_moved();
  wait(barrier, 0);

  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kMaxCluster * kMaxWarps; i += 32) {
    if (i + lane < expected) total += partials[i + lane];
  }
  const float scale = rsqrtf(warp_sum(total) / static_cast<float>(p.group_size) + p.eps);
  while (has_y && row < p.rows) {
    const float v = own.y * scale * own.weight;
    store_float(p.y, p.dtype, static_cast<int64>(b) * p.y_stride + first + row, p.norm_before_gate ? v * own.gate : v);
    row += warps * L::kTile;
    if (row < p.rows) own = rows[row];
  }
  while (c < begin + share) {
    store_window<kAsks>(p, place_of(c), window);
    c += threads;
    if (c < begin + share) load_moved();
  }
}

}  // namespace hybrid_ops
