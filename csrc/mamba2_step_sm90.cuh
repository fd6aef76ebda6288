// The next token of each sequence through a Mamba-2 mixer, from in_proj's output to out_proj's input, in one launch.
//
// A cluster takes one group of the norm of one sequence: whole groups of B and C, of which a CTA has consecutive rows
// (features of heads) of one. The state is the traffic, and what binds is how early and how evenly it is asked for:
//  * As soon as a CTA knows the slot it asks for its windows, then for the first two tiles of each warp, 128 KB on a
//    multiprocessor, and does everything else while they are on their way: the convolution, four channels a thread, of
//    its rows and of its group's B and C (which its neighbours compute too: a few KB from L2, against a barrier).
//  * Tiles are loaded into registers, which measured faster than any copy to shared memory. ptxas has one counter for
//    all that is being loaded into registers: who waits for one load waits for all before it. So what is needed before
//    the states comes as a copy (the slot, windows), or is waited for before they are asked for.
//  * Few warps with much to do each: with twice as many, instructions took longer than memory.
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
//  * It lets the next kernel begin behind that wait: once all its CTAs have begun, those of the next one take places
//    that they leave. Before the wait, launches of few CTAs would pile up.
// In a CUDA graph the launch becomes a programmatic edge, if the node before is a kernel, and an ordinary one else.
#pragma once

#include "common/async_copies.cuh"
#include "common/hopper.cuh"
#include "common/state_rows.cuh"
#include "common/step_channels.cuh"

namespace hybrid_ops {

inline constexpr int kMaxCluster = 8, kMaxWarps = 8;

// A tile is what a warp takes at once: eight rows, or four of the longest.
template <typename State, int kDstate>
using StepLayout = Layout<State, kDstate, (kDstate == 256 ? 4 : 8) / Layout<State, kDstate, 1>::kGroups>;

// Shared memory of a CTA, in order, for `rows` features of `heads` heads; all arrays begin at multiples of 16 bytes.
template <bool kUsual, int kDstate>
struct StepMemory {
  static constexpr int kShared = 2 * kDstate;  // channels of B and C, one behind the other
  float *BC, *x, *y, *gate, *weight;           // of rows; y: first the skip, then what is normalised
  unsigned *moved, *windows;                   // of B and C, moved on; of each thread, on their way
  float2* steps;                               // dt and decay of each head

  static __host__ __device__ constexpr int words(int rows, int heads, int threads) {
    return kShared + 4 * rows + Windows<kUsual>::kWords * (kShared / kChannels + threads) + 2 * heads;
  }

  __device__ __forceinline__ StepMemory(void* memory, int rows, int threads)
      : BC(static_cast<float*>(memory)),
        x(BC + kShared),
        y(x + rows),
        gate(y + rows),
        weight(gate + rows),
        moved(reinterpret_cast<unsigned*>(weight + rows)),
        windows(moved + Windows<kUsual>::kWords * (kShared / kChannels)),
        steps(reinterpret_cast<float2*>(windows + Windows<kUsual>::kWords * threads)) {}
};

// An instruction that needs these bits, and does nothing: what they are of has been loaded by here.
__device__ __forceinline__ void need(unsigned bits) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0x7fc1a53d;\n@p nanosleep.u32 0;\n}" ::"r"(bits) : "memory");
}

// From shared memory, aligned to all of them, or to four.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* place, float (&values)[kCount]) {
  if constexpr (kCount == 2) {
    const float2 two = *reinterpret_cast<const float2*>(place);
    values[0] = two.x, values[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(place + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
}

// CTAs on a multiprocessor, for which there are registers.
template <typename State, int kDstate, bool kUsual>
inline constexpr int kStepCtas = kUsual || kDstate > 64 || sizeof(State) == 4 ? 2 : 1;

// Asks L2 for the first states of a CTA that has its place before the kernel before has ended. The slot, and what is in
// it, may be that kernel's work, so nothing is taken from here: the slot is read again, and lines in L2 are written to
// there. Asking for 64 KB holds back what is asked for behind it.
template <typename State>
__device__ __forceinline__ void ask_for_states(const Mamba2StepParams& p, const State* states, int b, int count) {
  int slot = b;
  if (p.slots != nullptr) {  // not through L1, where the line would stay
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
                 : "=r"(slot)
                 : "l"(p.slots + static_cast<int64>(b) * p.slots_stride)
                 : "memory");
  }
  if (slot < 0 || slot >= p.nslots) return;
  const unsigned bytes = static_cast<unsigned>(count * sizeof(State));
  ask_for(states + slot * p.state_slot_stride, min(bytes, 16384u));
}

// kUsual: what `is_usual` says is known at compile time and costs no instructions: where sequences are few the latency
// of a step is for a large part the time to issue them.
template <typename State, int kDstate, bool kStochastic, bool kUsual>
__global__ void __launch_bounds__(32 * kMaxWarps, kStepCtas<State, kDstate, kUsual>)
    mamba2_step_kernel(const __grid_constant__ Mamba2StepParams given) {
  const Mamba2StepParams p = kUsual ? as_usual(given, kDstate) : given;
  using L = StepLayout<State, kDstate>;
  constexpr int kRows = L::kTile / L::kGroups;  // of a lane, one behind the other
  constexpr int kShared = StepMemory<kUsual, kDstate>::kShared;
  extern __shared__ float4 dynamic[];
  __shared__ float partials[kMaxCluster * kMaxWarps];
  __shared__ unsigned long long arrived;
  __shared__ int slots[kMaxWarps];
  __shared__ int64 seed;
  const int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const StepMemory<kUsual, kDstate> shared(dynamic, p.rows, threads);

  const uint32 barrier = shared_address(&arrived);
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    fence_barrier_init();
  }
  cluster_arrive();
  const int b = blockIdx.y;               // the sequence
  const int first = blockIdx.x * p.rows;  // feature of the CTA
  const int first_head = p.by_headdim.of(first);
  const int heads = p.by_headdim.of(first + p.rows - 1) - first_head + 1;
  const int d_inner = p.nheads * p.headdim, group = p.by_rows_per_group.of(first);
  const int expected = static_cast<int>(cluster_size()) * warps;  // sums of squares
  const int channels = kShared + p.rows;                          // of the CTA: B, C, then its rows
  const auto channel_of = [&](int c) {
    const int BC = d_inner + group * kDstate + c + (c < kDstate ? 0 : (p.conv_dim - d_inner) / 2 - kDstate);
    return c < kShared ? BC : first + c - kShared;
  };

  const int64 token = static_cast<int64>(b) * p.zxbcdt_stride;
  int c = kChannels * threadIdx.x;
  const int my_head = threads - 1 - threadIdx.x;  // of the CTA: the last threads have least to do

  if (kUsual && !p.crowded && threadIdx.x == threads - 32) {
    ask_for_states(p, static_cast<const State*>(p.state) + static_cast<int64>(first) * kDstate, b, p.rows * kDstate);
  }
  wait_for_kernel_before();  // the first access to global memory whose result is used comes behind it
  let_next_kernel_start();
  if (p.slots != nullptr && lane == 0) {
    copy_async<4>(&slots[warp], p.slots + static_cast<int64>(b) * p.slots_stride);
  }
  if (kStochastic && threadIdx.x == 0) copy_async<8>(&seed, p.seed);
  // what does not need the slot, all of it under way at once
  ChannelBits<kUsual> bits{};
  FeatureBits<kUsual> feature{};
  const auto load = [&] {
    bits.load(p, token + d_inner, channel_of(c));
    if (c >= kShared) feature.load(p, token, first + c - kShared);
  };
  if (c < channels) load();
  Element dt_bits{}, dt_bias{};
  float A = 0.f;
  if (my_head < heads) {
    const int head = first_head + my_head;
    dt_bits = load_bits(p.zxbcdt, p.dtype, token + d_inner + p.conv_dim + head);
    dt_bias = load_bits(p.dt_bias, p.dt_bias_dtype, static_cast<int64>(head) * p.dt_bias_stride, p.dt_bias != nullptr);
    A = p.A[static_cast<int64>(head) * p.A_stride];
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

  // the windows first: they are small, and more waits for them
  const auto window_of = [&](int c) {
    return slot * p.conv_slot_stride + static_cast<int64>(channel_of(c)) * p.conv_channel_stride;
  };
  unsigned* const own_windows = shared.windows + 2 * threadIdx.x;
  const auto fetch = [&] {
    Windows<kUsual>::fetch(p, window_of(c), own_windows, threads);
    commit_copies();
    need(bits.any() ^ feature.any());
  };
  if (c < channels) fetch();
  need(dt_bits.bits() ^ dt_bias.bits() ^ __float_as_uint(A));

  // a lane has consecutive rows of a tile, of each the columns from `column` on, and at last y of row `mine`
  const int part = lane % L::kLanes, column = part * L::kPerLoad, above = lane / L::kLanes * kRows;
  const int mine = above + part / L::kLanesPerSum;
  const int tiles = p.rows / L::kTile;
  State* const states = static_cast<State*>(p.state) + slot * p.state_slot_stride + column;
  const auto rows_of = [&](int tile) {
    const int row = first + tile * L::kTile + above;
    if constexpr (kUsual) return states + static_cast<int64>(row) * kDstate;
    const int head = p.by_headdim.of(row);
    return states + static_cast<int64>(head) * p.state_head_stride +
           static_cast<int64>(row - head * p.headdim) * p.state_p_stride;
  };
  using Tile = uint4[kRows][L::kLoads];
  const auto load_tile = [&](Tile& raw, int tile) {
    if (tile >= tiles) return;
    const State* source = rows_of(tile);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        raw[r][i] = load_state(source + static_cast<int64>(r) * p.state_p_stride + i * L::kStep);
      }
    }
  };
  const auto store_tile = [&](const Tile& raw, int tile) {
    State* target = rows_of(tile);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        store_state(target + static_cast<int64>(r) * p.state_p_stride + i * L::kStep, raw[r][i]);
      }
    }
  };
  Tile even, odd;  // tiles of the warp
  const auto load_first = [&] {
    load_tile(even, warp);
    load_tile(odd, warp + warps);
  };
  if (p.crowded) wait_for_copies<0>();
  if constexpr (kUsual) load_first();

  if (threadIdx.x == 0) arrive_expecting(barrier, expected * sizeof(float));
  if (my_head < heads) {
    const float dt =
        step_size(from_bits(dt_bits, p.dtype) + from_bits(dt_bias, p.dt_bias_dtype), p.dt_softplus, p.dt_min, p.dt_max);
    shared.steps[my_head] = make_float2(dt, expf(dt * A));
  }
  wait_for_copies<0>();
  // windows of B and C are stored once the other CTAs have read them, those of rows at once
  while (c < channels) {
    Windows<kUsual> windows;
    windows.take(own_windows, threads);
    const float4 v = convolve(p, bits, windows);
    const Windows<kUsual> moved = windows.moved_on(p, bits.x);
    if (c < kShared) {
      *reinterpret_cast<float4*>(shared.BC + c) = v;
      moved.put(shared.moved + c / kChannels * 2, kShared / kChannels);
    } else {
      const int row = c - kShared;
      *reinterpret_cast<float4*>(shared.x + row) = v;
      *reinterpret_cast<float4*>(shared.y + row) = feature.skip(p, v);
      *reinterpret_cast<float4*>(shared.gate + row) = feature.gate(p);
      *reinterpret_cast<float4*>(shared.weight + row) = feature.weight.all(p.norm_weight_dtype);
      moved.store(p, window_of(c));
    }
    c += kChannels * threads;
    if (c < channels) {
      load();
      fetch();
      wait_for_copies<0>();
    }
  }
  if constexpr (!kUsual) load_first();  // for which there are no registers before
  __syncthreads();
  cluster_wait();  // the others have begun, and their barriers are ready

  float B[L::kColumns], C[L::kColumns];
#pragma unroll
  for (int i = 0; i < L::kColumns; ++i) {
    const int n = column + i / L::kPerLoad * L::kStep + i % L::kPerLoad;
    B[i] = shared.BC[n], C[i] = shared.BC[kDstate + n];
  }
  float squares = 0.f;
  // a tile's states through the token, as they are to be stored, and the lane's part of their products with C
  const auto advance_tile = [&](Tile& raw, int tile, float (&sums)[kRows]) {
    const int row = tile * L::kTile, head = p.by_headdim.of(first + row) - first_head;
    const auto [dt, decay] = shared.steps[head];
    float x[kRows];
    load_floats(shared.x + row + above, x);
    const int64 number = (static_cast<int64>(slot) * p.nheads * p.headdim + first + row + above) * kDstate + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float S[L::kColumns];
      unpack_row<State, L>(raw[r], 1.f, S);
      sums[r] = advance(S, decay, dt * x[r], B, C);
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        const float* const v = S + i * L::kPerLoad;
        if constexpr (kStochastic) {
          raw[r][i] = round_stochastic<State>(v, philox(seed, (number + r * kDstate + i * L::kStep) / 8, 0));
        } else {
          raw[r][i] = pack_nearest<State>(v);
        }
      }
    }
  };
  // rows of y, not normalised, to shared memory
  const auto finish_rows = [&](const float (&sums)[kRows], int tile) {
    const int row = tile * L::kTile + mine;
    const float sum = sum_rows<L::kLanes>(sums, part);  // in each of the row's lanes
    const float u = (shared.y[row] + sum) * (p.norm_before_gate ? 1.f : shared.gate[row]);
    squares = fmaf(u, u, squares);
    __syncwarp();                                        // all of them have read it
    if (part % L::kLanesPerSum == 0) shared.y[row] = u;  // who stores y later
  };
  const auto send_squares = [&] {
#pragma unroll
    for (int offset = 16; offset >= L::kLanesPerSum; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    const uint32 place = shared_address(partials + cluster_rank() * warps + warp);
    if (lane < cluster_size()) store_counted(address_in_cta(place, lane), squares, address_in_cta(barrier, lane));
  };
  // returns whether it was the last; that one is stored when nobody waits for this warp
  int tile = warp;
  const auto take = [&](Tile& raw) {
    const bool last = tile + warps >= tiles;
    float sums[kRows];
    advance_tile(raw, tile, sums);
    if (!last) {
      store_tile(raw, tile);
      load_tile(raw, tile + 2 * warps);
    }
    finish_rows(sums, tile);
    if (last) {
      send_squares();
      store_tile(raw, tile);
    }
    tile += warps;
    return last;
  };
  if (tile >= tiles) {
    send_squares();
  } else {
    while (!take(even) && !take(odd)) {
    }
  }

  // what comes after the wait is ready before it: of the warp's rows of y, two to a lane, and of B's and C's channels,
  // which the CTAs of the group share, a part of the windows
  __syncwarp();
  constexpr int kPairs = L::kTile / 2, kFours = kShared / kChannels;
  int row = (warp + lane / kPairs * warps) * L::kTile + lane % kPairs * 2;
  float y[2], weight[2];
  const auto load_rows = [&] { load_floats(shared.y + row, y), load_floats(shared.weight + row, weight); };
  if (row < p.rows) load_rows();
  int four = p.by_rows_per_group.of((first - group * p.rows_per_group) * kFours);
  const int end = four + p.by_rows_per_group.of(kFours * p.rows);
  four += threadIdx.x;
  Windows<kUsual> windows;
  if (four < end) windows.take(shared.moved + 2 * four, kFours);
  wait(barrier, 0);

  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kMaxCluster * kMaxWarps; i += 32) {
    if (i + lane < expected) total += partials[i + lane];
  }
  const float scale = rsqrtf(__fdividef(warp_sum(total), static_cast<float>(p.group_size)) + p.eps);
  while (row < p.rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y[i] *= scale * weight[i];
      if (p.norm_before_gate) y[i] *= shared.gate[row + i];
    }
    const int64 place = static_cast<int64>(b) * p.y_stride + first + row;
    if constexpr (kUsual) {
      *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.y) + place) = __floats2bfloat162_rn(y[0], y[1]);
    } else {
      store_float(p.y, p.dtype, place, y[0]);
      store_float(p.y, p.dtype, place + 1, y[1]);
    }
    row += 64 * warps;
    if (row < p.rows) load_rows();
  }
  while (four < end) {
    windows.store(p, window_of(kChannels * four));
    four += threads;
    if (four < end) windows.take(shared.moved + 2 * four, kFours);
  }
}

}  // namespace hybrid_ops
