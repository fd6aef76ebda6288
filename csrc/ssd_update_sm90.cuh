// Mamba-2's recurrence while decoding: a few tokens of each sequence, with the states in a pool of slots.
//
// The state is the traffic. A warp takes tiles of kTile rows (of headdim) of one head of one sequence: kLanes lanes
// share a row, 16 bytes of it a load, and every load of a tile is under way before the first is used. What the rows
// have in common (dt, B, C) is asked for before the slot is known. No shared memory and no barriers: while one warp
// computes and stores, others load. No warp reads what another writes.
#pragma once

#include "common/ssd_step.cuh"

namespace hybrid_ops {

struct SsdUpdateParams {
  void* state;              // (nslots, nheads, headdim, dstate), rows of neighbours aligned to 16 bytes
  const void* x;            // (batch, T, nheads, headdim), or one row of tokens with cu_seqlens, as dt, B, C, z, y
  const void* dt;           // (.., nheads)
  const float* A;           // (nheads,)
  const void* B;            // (.., ngroups, dstate)
  const void* C;            // as B
  const void* D;            // (nheads, headdim) or null
  const void* z;            // as x, or null
  const void* dt_bias;      // (nheads,) or null
  const int* read_slots;    // (batch, read_width) or null: slot b
  const int* write_slots;   // (batch, write_width) or null: the slot read
  const int* num_accepted;  // (batch,) column of read_slots from 1 on, or null: column 0
  const int* cu_seqlens;    // (batch + 1,) or null
  const int64* seed;        // of stochastic rounding
  float* state_scale;       // (nslots, nheads, headdim), of 8-bit states
  void* y;                  // as x; may be x
  int64 state_slot_stride;
  int state_head_stride, state_p_stride, scale_slot_stride, scale_head_stride, scale_p_stride;
  TokenStrides x_strides, z_strides, y_strides, dt_strides, B_strides, C_strides;
  int A_stride, D_head_stride, D_p_stride, dt_bias_stride;
  int read_stride, read_column_stride, write_stride, write_column_stride, accepted_stride, bounds_stride;
  int batch, tokens, total;  // T of each sequence; all tokens, with cu_seqlens
  int nslots, nheads, headdim, heads_per_group;
  int read_width, write_width, null_slot;
  int tiles;  // of a warp
  float dt_min, dt_max;
  DType dtype, dt_dtype, D_dtype, z_dtype, dt_bias_dtype;  // dtype: of x, B, C, y
  bool columns_aligned;                                    // B and C: neighbours, each four of them aligned
  bool dt_softplus, store_each, store_last;
};

struct Rows {
  int64 first;          // token of the sequence in its row
  int length, written;  // tokens; rows of y, more than tokens behind the last sequence
};

__device__ __forceinline__ Rows find_rows(const SsdUpdateParams& p, int b) {
  if (p.cu_seqlens == nullptr) return {0, p.tokens, p.tokens};
  const int first = min(max(p.cu_seqlens[static_cast<int64>(b) * p.bounds_stride], 0), p.total);
  const int end = min(max(p.cu_seqlens[(b + int64{1}) * p.bounds_stride], first), p.total);
  return {first, end - first, (b == p.batch - 1 ? p.total : end) - first};
}

// Whether sequence b starts from a slot, and from which.
__device__ __forceinline__ bool find_slot(const SsdUpdateParams& p, int b, int& slot) {
  slot = b;
  if (p.read_slots == nullptr) return b < p.nslots;
  const int column = p.num_accepted == nullptr ? 0 : p.num_accepted[static_cast<int64>(b) * p.accepted_stride] - 1;
  if (column < 0 || column >= p.read_width) return false;
  slot = p.read_slots[static_cast<int64>(b) * p.read_stride + static_cast<int64>(column) * p.read_column_stride];
  return usable(p, slot);
}

// Whether the state after token t of `length` is stored, and where; `slot` is the one read.
__device__ __forceinline__ bool find_place(const SsdUpdateParams& p, int b, int t, int length, int slot, int& place) {
  place = slot;
  if (!p.store_each && (!p.store_last || t < length - 1)) return false;
  if (p.write_slots == nullptr) return true;
  const int column = p.store_each ? t : 0;
  if (column >= p.write_width) return false;
  place = p.write_slots[static_cast<int64>(b) * p.write_stride + static_cast<int64>(column) * p.write_column_stride];
  return usable(p, place);
}

// What is loaded for a token, as bits.
template <int kColumns>
struct Token {
  Element dt;
  Bits<kColumns> B, C;
};

template <typename L>
__device__ __forceinline__ Token<L::kColumns> load_token(const SsdUpdateParams& p, int b, int64 token, int head,
                                                         int group, int column) {
  Token<L::kColumns> loaded;
  loaded.dt = load_bits(p.dt, p.dt_dtype, offset(p.dt_strides, b, token, head, 0));
  load_runs<L::kColumns, L::kPerLoad, L::kStep>(p.B, p.dtype, offset(p.B_strides, b, token, group, 0), column,
                                                p.B_strides.element, p.columns_aligned, loaded.B);
  load_runs<L::kColumns, L::kPerLoad, L::kStep>(p.C, p.dtype, offset(p.C_strides, b, token, group, 0), column,
                                                p.C_strides.element, p.columns_aligned, loaded.C);
  return loaded;
}

// T = 1. The state stays packed until its row's turn, and what the tiles have in common stays in registers.
template <typename State, int kDstate, int kRows, bool kStochastic>
__global__ void __launch_bounds__(256, Layout<State, kDstate, kRows>::kBlocks)
    ssd_update_one_kernel(const __grid_constant__ SsdUpdateParams p) {
  using L = Layout<State, kDstate, kRows>;
  const int lane = threadIdx.x % 32, part = lane % L::kLanes, column = part * L::kPerLoad;
  const int head = blockIdx.y, b = blockIdx.z;
  const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * p.tiles * L::kTile;  // row of the warp
  const int end = min(first + p.tiles * L::kTile, p.headdim);
  if (first >= end) return;
  const int mine = part / L::kLanesPerSum * L::kGroups + lane / L::kLanes;  // row of a tile whose y is this lane's
  const bool writes = part % L::kLanesPerSum == 0;
  // what the lanes that compute a row's y have, for all lanes of the row: the r-th of the group's
  const auto of_row = [&](float own, int r) { return __shfl_sync(~0u, own, lane - part + r * L::kLanesPerSum); };

  const Token<L::kColumns> token = load_token<L>(p, b, 0, head, head / p.heads_per_group, column);
  const float A = p.A[static_cast<int64>(head) * p.A_stride];
  const Element bias = load_bias(p, head);
  const int64 seed = kStochastic ? *p.seed : 0;
  int slot, place;
  if (!find_slot(p, b, slot)) {
    for (int row = first + mine; row < end; row += L::kTile) {
      if (writes) store_float(p.y, p.dtype, offset(p.y_strides, b, 0, head, row), 0.f);
    }
    return;
  }
  const bool stored = find_place(p, b, 0, 1, slot, place);
  const State* source = head_of<State>(p, slot, head);

  uint4 raw[kRows][L::kLoads];
  RowBits bits;
  Element D;
  float scale = 1.f;  // of the lane's own row
  const auto load = [&](int tile) {
    load_tile<State, L>(p, source, tile + lane / L::kLanes, column, raw);
    bits = load_row(p, b, 0, head, tile + mine);
    D = load_D(p, head, tile + mine);
    if (sizeof(State) == 1 && tile + mine < p.headdim) scale = *scale_of(p, slot, head, tile + mine);
    bits = {bits.x.merged(), bits.z.merged()}, D = D.merged();  // while states are on their way: registers are few
  };
  load(first);
  // numbers only now that the first loads are under way
  const float dt = step_of(p, token.dt, bias), decay = expf(dt * A);
  float B[L::kColumns], C[L::kColumns];
  runs_to_float(token.B, p.dtype, p.columns_aligned, B);
  runs_to_float(token.C, p.dtype, p.columns_aligned, C);
#pragma unroll 1
  for (int tile = first;;) {
    const float input = dt * from_bits(bits.x, p.dtype);
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = tile + lane / L::kLanes + r * L::kGroups;
      float S[L::kColumns];
      unpack_row<State, L>(raw[r], of_row(scale, r), S);
      sums[r] = advance(S, decay, of_row(input, r), B, C);
      if (stored) store_row<State, L, kStochastic>(p, place, head, row, column, S, seed, 0);
    }
    const float sum = sum_rows<L::kLanes>(sums, part);
    finish_row(p, offset(p.y_strides, b, 0, head, tile + mine), sum, D, bits, writes && tile + mine < end);
    tile += L::kTile;
    if (tile >= end) break;
    load(tile);
  }
}

// Any number of tokens, each sequence its own. The state is float32 in registers from the first to the last.
template <typename State, int kDstate, int kRows, bool kStochastic>
__global__ void __launch_bounds__(256) ssd_update_kernel(const __grid_constant__ SsdUpdateParams p) {
  using L = Layout<State, kDstate, kRows>;
  const int lane = threadIdx.x % 32, part = lane % L::kLanes, column = part * L::kPerLoad;
  const int head = blockIdx.y, b = blockIdx.z;
  const int tile = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * L::kTile;
  if (tile >= p.headdim) return;
  const int above = tile + lane / L::kLanes;
  const int mine = tile + part / L::kLanesPerSum * L::kGroups + lane / L::kLanes;
  const bool writes = part % L::kLanesPerSum == 0 && mine < p.headdim;
  // what the lanes that compute a row's y have, for all lanes of the row: the r-th of the group's
  const auto of_row = [&](float own, int r) { return __shfl_sync(~0u, own, lane - part + r * L::kLanesPerSum); };

  const int group = head / p.heads_per_group;
  const Rows rows = find_rows(p, b);
  int slot, done = 0;
  if (find_slot(p, b, slot)) {
    const float A = p.A[static_cast<int64>(head) * p.A_stride];
    const Element D = load_D(p, head, mine), bias = load_bias(p, head);
    const int64 seed = kStochastic ? *p.seed : 0;
    const State* source = head_of<State>(p, slot, head);
    uint4 raw[kRows][L::kLoads];
    load_tile<State, L>(p, source, above, column, raw);
    float S[kRows][L::kColumns];
    float scale = 1.f;
    if (sizeof(State) == 1 && mine < p.headdim) scale = *scale_of(p, slot, head, mine);
#pragma unroll
    for (int r = 0; r < kRows; ++r) unpack_row<State, L>(raw[r], of_row(scale, r), S[r]);
    const auto store = [&](int r, int place, int t) {
      store_row<State, L, kStochastic>(p, place, head, above + r * L::kGroups, column, S[r], seed, t);
    };

    int place;
    for (; done < rows.length; ++done) {
      const Token<L::kColumns> token = load_token<L>(p, b, rows.first + done, head, group, column);
      const RowBits bits = load_row(p, b, rows.first + done, head, mine);
      const bool stored = find_place(p, b, done, rows.length, slot, place);
      const float dt = step_of(p, token.dt, bias), decay = expf(dt * A);
      const float input = dt * from_bits(bits.x, p.dtype);
      float B[L::kColumns], C[L::kColumns], sums[kRows];
      runs_to_float(token.B, p.dtype, p.columns_aligned, B);
      runs_to_float(token.C, p.dtype, p.columns_aligned, C);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r] = advance(S[r], decay, of_row(input, r), B, C);
        if (stored) store(r, place, done);
      }
      const float sum = sum_rows<L::kLanes>(sums, part);
      finish_row(p, offset(p.y_strides, b, rows.first + done, head, mine), sum, D, bits, writes);
    }
    if (done == 0 && p.store_last && find_place(p, b, 0, 0, slot, place)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) store(r, place, 0);
    }
  }
  for (; done < rows.written && writes; ++done) {
    store_float(p.y, p.dtype, offset(p.y_strides, b, rows.first + done, head, mine), 0.f);
  }
}

}  // namespace hybrid_ops
