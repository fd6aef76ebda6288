// Mamba-2's recurrence while decoding: a few tokens of each sequence, with the states in a pool of slots.
//
// The state is the traffic. A warp takes a tile of rows (of headdim) of one head of one sequence: kLanes lanes share a
// row, 16 bytes of it a load, and every load of a tile is under way before the first is used. What the rows have in
// common (dt, B, C) is asked for before the slot is known. While some warps compute and store, others load: of many
// small CTAs, in the order of memory. No warp reads what another writes.
#pragma once

#include "common/async_copies.cuh"
#include "common/division.cuh"
#include "common/hopper.cuh"
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
  Divisor by_heads_per_group;  // where those are more than one
  WideDivisor by_nheads;
  int ahead;  // heads from a CTA's to that whose states it asks L2 for
  int read_width, write_width, null_slot;
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

// A lane has 8 columns of a row, or 16 bytes. In both kernels: so a row's sum has the same order, and the same bits.
template <typename State, int kDstate, int kRows>
using UpdateLayout = Layout<State, kDstate, kRows, kDstate / 8>;

// T = 1, and rows of a head that lie one behind the other: a CTA has kWarps times kRowsOfWarp of them, or less. All
// pieces of a lane are under way at once, to places in shared memory of its own: in registers they would leave room for
// three quarters of the warps. (Where sequences are few, so are warps; one took longer by copies than by registers.)
// Meanwhile the warps make what they have in common: two B and C, the last one dt and its decay, and the first ones the
// rows of x and at last of y.
//
// Measured: CTAs of 4 KB are fastest, perhaps for they ask for memory nearly in its order, unless arithmetic leaves no
// time for what each warp has to find out for itself. Then rows have to share that, and a CTA is a head. Such CTAs are
// 2 to 5% faster if each asks L2 for the states of one that is about to begin; perhaps for they wait for memory
// together, and then compute together while memory rests.
template <typename State, int kDstate, int kWarps, int kRowsOfWarp>
struct OneLayout {
  static constexpr int kGroups = UpdateLayout<State, kDstate, 1>::kGroups;
  static constexpr int kRows = kRowsOfWarp / kGroups < 1 ? 1 : kRowsOfWarp / kGroups > 8 ? 8 : kRowsOfWarp / kGroups;
  using Type = UpdateLayout<State, kDstate, kRows>;
  static constexpr int kThreads = 32 * kWarps, kRowsOfBlock = kWarps * Type::kTile;
  static constexpr int kMaker = kWarps > 2 ? 1 : 0;              // the warp that makes B; the next one makes C
  static constexpr bool kFew = kWarps == 4 && kRowsOfWarp == 4;  // what is chosen for few sequences
  static constexpr bool kAhead = kRowsOfWarp == 16;              // asks for others' states
  static_assert(kRowsOfBlock <= kThreads);
};

// Warps of a multiprocessor for which there are registers.
template <typename State, int kDstate, int kWarps, int kRowsOfWarp>
inline constexpr int kUpdateWarps = kWarps == 2          ? 40
                                    : kRowsOfWarp == 4   ? (kDstate == 256 ? 16 : 32)
                                    : sizeof(State) == 1 ? 20
                                    : kDstate < 256      ? 32
                                    : kWarps == 5        ? 10
                                                         : 24;

template <typename State, int kDstate, int kWarps, int kRowsOfWarp, bool kStochastic>
__global__ void __launch_bounds__(32 * kWarps, kUpdateWarps<State, kDstate, kWarps, kRowsOfWarp> / kWarps)
    ssd_update_one_kernel(const __grid_constant__ SsdUpdateParams p) {
  using Form = OneLayout<State, kDstate, kWarps, kRowsOfWarp>;
  using L = typename Form::Type;
  constexpr int kRows = Form::kRows, kPieces = kRows * L::kLoads;                         // of a lane; of 16 bytes
  constexpr int kMade = kDstate / 32 < kPerVector ? kPerVector : kDstate / 32;            // columns of B or C of a lane
  __shared__ alignas(16) float columns[2 * kDstate], rows[Form::kRowsOfBlock], steps[2];  // B, C; x, y; dt, decay
  __shared__ float scales[sizeof(State) == 1 ? Form::kRowsOfBlock : 1];
  __shared__ uint4 pieces[Form::kFew ? 1 : kPieces][Form::kThreads];  // of states, a lane's own
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % L::kLanes, column = part * L::kPerLoad;
  const int head = blockIdx.y, b = blockIdx.z, first = blockIdx.x * Form::kRowsOfBlock;
  const int local = warp * L::kTile + lane / L::kLanes, above = first + local;  // the lane's first row
  const int mine = first + threadIdx.x;                                         // the row whose y is the thread's
  const bool has_row = threadIdx.x < Form::kRowsOfBlock && mine < p.headdim;
  const bool makes = (warp == Form::kMaker || warp == Form::kMaker + 1) && lane * kMade < kDstate;

  let_next_kernel_start();
  wait_for_kernel_before();
  int slot, place;
  const bool present = find_slot(p, b, slot);
  Bits<kMade> column_bits{};
  Element dt_bits{}, bias{}, D{};
  const int group = p.heads_per_group == 1 ? head : p.by_heads_per_group.of(head);
  if (makes) {
    const TokenStrides& s = warp == Form::kMaker ? p.B_strides : p.C_strides;
    load_runs<kMade, kMade, kMade>(warp == Form::kMaker ? p.B : p.C, p.dtype, offset(s, b, 0, group, 0), lane * kMade,
                                   s.element, p.columns_aligned, column_bits);
  }
  RowBits bits{};
  float A = 0.f;
  if (warp * 32 < Form::kRowsOfBlock) {
    bits = load_row(p, b, 0, head, has_row ? mine : p.headdim);
    D = load_D(p, head, has_row ? mine : p.headdim);
  }
  if (warp == kWarps - 1) {
    dt_bits = load_bits(p.dt, p.dt_dtype, offset(p.dt_strides, b, 0, head, 0));
    bias = load_bias(p, head);
    A = p.A[static_cast<int64>(head) * p.A_stride];
  }
  const int64 seed = kStochastic ? *p.seed : 0;
  int other_slot = -1, other_head = 0;
  if (Form::kAhead && threadIdx.x == 0) {
    const int sequences = p.by_nheads.of(head + p.ahead);
    other_head = head + p.ahead - sequences * p.nheads;
    if (b + sequences >= p.batch || !find_slot(p, b + sequences, other_slot)) other_slot = -1;
  }
  if (!present) {
    if (has_row) store_float(p.y, p.dtype, offset(p.y_strides, b, 0, head, mine), 0.f);
    return;
  }
  const int begin = above * kDstate + column;  // of the lane in a head
  const State* const source = head_of<State>(p, slot, head) + begin;
  const auto offset_of = [](int piece) {
    return piece / L::kLoads * L::kGroups * kDstate + piece % L::kLoads * L::kStep;
  };
  const auto exists = [&](int r) { return above + r * L::kGroups < p.headdim; };
  constexpr int kBits = kPieces < 2 ? kPieces : 2;          // pieces whose random bits are made together
  constexpr int kTogether = kStochastic ? kBits : kPieces;  // pieces that are waited for together
  uint4 few[Form::kFew ? kPieces : 1];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const bool there = exists(i / L::kLoads);
    if constexpr (Form::kFew) {
      few[i] = load_state_if(there, source + offset_of(i));
    } else if (there) {
      copy_async<16>(&pieces[i][threadIdx.x], source + offset_of(i));
    }
    if (!Form::kFew && i % kTogether == kTogether - 1) commit_copies();
  }
  float scale = 1.f;
  if (sizeof(State) == 1 && has_row) scale = *scale_of(p, slot, head, mine);
  const bool stored = find_place(p, b, 0, 1, slot, place);
  // numbers only now that the loads are under way
  if (makes) {
    float made[kMade];
    runs_to_float(column_bits, p.dtype, p.columns_aligned, made);
    float4* const target = reinterpret_cast<float4*>(columns + (warp - Form::kMaker) * kDstate + lane * kMade);
#pragma unroll
    for (int i = 0; i < kMade; i += 4) target[i / 4] = make_float4(made[i], made[i + 1], made[i + 2], made[i + 3]);
  }
  bits = {bits.x.merged(), bits.z.merged()}, D = D.merged();
  if (threadIdx.x < Form::kRowsOfBlock) {
    rows[threadIdx.x] = from_bits(bits.x, p.dtype);
    if (sizeof(State) == 1) scales[threadIdx.x] = scale;
  }
  if (warp == kWarps - 1) {
    const float dt = step_of(p, dt_bits, bias);
    if (lane == 0) steps[0] = dt, steps[1] = expf(dt * A);
  }
  // random bits of the first pieces as well, and those of the next after them
  uint4 random[kBits];
  const int64 number = (static_cast<int64>(place) * p.nheads + head) * p.headdim * kDstate + begin;
  const auto make_random = [&](int from) {
    int64 blocks[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) blocks[i] = (number >> 3) + offset_of(from + i) / 8;
    philox(seed, blocks, 0, random);
#pragma unroll
    for (int i = 0; i < kBits; ++i) {  // here and now
      asm volatile("" : "+r"(random[i].x), "+r"(random[i].y), "+r"(random[i].z), "+r"(random[i].w));
    }
  };
  if constexpr (kStochastic) make_random(0);
  if constexpr (!Form::kFew) wait_for_copies<kPieces / kTogether - 1>();
  __syncthreads();
  if (Form::kAhead && other_slot >= 0) {
    ask_for(head_of<State>(p, other_slot, other_head) + first * kDstate,
            min(Form::kRowsOfBlock, p.headdim - first) * kDstate * sizeof(State));
  }
  const float dt = steps[0], decay = steps[1];
  float B[L::kColumns], C[L::kColumns], sums[kRows];
#pragma unroll
  for (int i = 0; i < L::kColumns; i += 4) {
    const int n = column + i / L::kPerLoad * L::kStep + i % L::kPerLoad;
    *reinterpret_cast<float4*>(B + i) = *reinterpret_cast<const float4*>(columns + n);
    *reinterpret_cast<float4*>(C + i) = *reinterpret_cast<const float4*>(columns + kDstate + n);
  }
  State* const target = head_of<State>(p, place, head) + begin;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kStochastic) {
      if (r > 0 && r * L::kLoads % kBits == 0) {
        make_random(r * L::kLoads);
        if constexpr (!Form::kFew) wait_for_copies<kPieces / kBits>((kPieces - r * L::kLoads) / kBits - 1);
      }
    }
    uint4 raw[L::kLoads];
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      raw[i] = Form::kFew ? few[r * L::kLoads + i] : pieces[r * L::kLoads + i][threadIdx.x];
    }
    float S[L::kColumns];
    unpack_row<State, L>(raw, sizeof(State) == 1 ? scales[local + r * L::kGroups] : 1.f, S);
    sums[r] = advance(S, decay, dt * rows[local + r * L::kGroups], B, C);
    const bool goes = stored && exists(r);
    if constexpr (sizeof(State) == 1) {
      float new_scale;
      const float multiplier = multiplier_of<State, L>(S, new_scale);
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) S[c] = __fmul_rn(S[c], multiplier);
      if (goes && part == 0) *scale_of(p, place, head, above + r * L::kGroups) = new_scale;
    }
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      const int piece = r * L::kLoads + i;
      const float* const v = S + i * L::kPerLoad;
      uint4 packed;
      if constexpr (kStochastic) {
        packed = round_stochastic<State>(v, random[piece % kBits]);
      } else {
        packed = pack_nearest<State>(v);
      }
      store_state_if(goes, target + offset_of(piece), packed);
    }
  }
  const float sum = sum_rows<L::kLanes>(sums, part);
  __syncwarp();
  // to the row's thread; of x, nobody else reads the row any more
  if (part % L::kLanesPerSum == 0) rows[local + part / L::kLanesPerSum * L::kGroups] = sum;
  __syncthreads();
  if (has_row) finish_row(p, offset(p.y_strides, b, 0, head, mine), rows[threadIdx.x], D, bits, true);
}

// Any number of tokens, each sequence its own. The state is float32 in registers from the first to the last.
template <typename State, int kDstate, int kRows, bool kStochastic>
__global__ void __launch_bounds__(256) ssd_update_kernel(const __grid_constant__ SsdUpdateParams p) {
  using L = UpdateLayout<State, kDstate, kRows>;
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
