#include "ssd_update_sm90.cuh"

#include <algorithm>
#include <array>

#include "common/api.h"
#include "common/launch.cuh"

namespace hybrid_ops {
namespace {

// Of the CTAs that run at a time, how far ahead one asks L2. Measured: for 64 sequences 30, 38, 52, 60 and 75 are
// slower, and what is asked for much too early is in the way, by up to a third.
constexpr int kPercentAhead = 45;

template <typename State, int kDstate, int kWarps, int kRowsOfWarp, bool kStochastic>
void launch_one(SsdUpdateParams p, int num_sms, cudaStream_t stream) {
  constexpr int kRows = OneLayout<State, kDstate, kWarps, kRowsOfWarp>::kRowsOfBlock;
  constexpr int kCtas = kUpdateWarps<State, kDstate, kWarps, kRowsOfWarp> / kWarps;  // of a multiprocessor
  const dim3 grid((p.headdim + kRows - 1) / kRows, p.nheads, p.batch);
  p.ahead = num_sms * kCtas * kPercentAhead / 100 / static_cast<int>(grid.x);
  launch_early(ssd_update_one_kernel<State, kDstate, kWarps, kRowsOfWarp, kStochastic>, grid, dim3(32 * kWarps), stream,
               p, "ssd_update_one_kernel");
}

template <typename State, int kDstate, bool kStochastic>
void launch_many(const SsdUpdateParams& p, cudaStream_t stream) {
  constexpr int kRows = 4;  // of which the float32 fits into registers
  constexpr int kTile = UpdateLayout<State, kDstate, kRows>::kTile;
  const int warps = std::min(4, (p.headdim + kTile - 1) / kTile);
  const dim3 grid((p.headdim + kTile * warps - 1) / (kTile * warps), p.nheads, p.batch);
  ssd_update_kernel<State, kDstate, kRows, kStochastic><<<grid, 32 * warps, 0, stream>>>(p);
  check(cudaGetLastError(), "ssd_update_kernel");
}

template <typename State, int kDstate, bool kStochastic>
void launch(const SsdUpdateParams& p, const SsdUpdateArgs& a, cudaStream_t stream) {
  if (p.cu_seqlens != nullptr || p.tokens != 1 || (p.headdim > 1 && p.state_p_stride != kDstate)) {
    return launch_many<State, kDstate, kStochastic>(p, stream);
  }
  const std::array<int, 2> form{a.warps, a.rows};
  if (form == std::array{4, 4}) return launch_one<State, kDstate, 4, 4, kStochastic>(p, a.num_sms, stream);
  if constexpr (sizeof(State) == 1 || kStochastic) {
    if (form == std::array{4, 16}) return launch_one<State, kDstate, 4, 16, kStochastic>(p, a.num_sms, stream);
    if (form == std::array{5, 16}) return launch_one<State, kDstate, 5, 16, kStochastic>(p, a.num_sms, stream);
  } else {
    constexpr int kRows = 2048 / (kDstate * sizeof(State));
    if (form == std::array{2, kRows}) return launch_one<State, kDstate, 2, kRows, kStochastic>(p, a.num_sms, stream);
  }
  throw std::runtime_error("ssd_update: no CTA has " + std::to_string(a.warps) + " warps of " + std::to_string(a.rows) +
                           " rows of such states");
}

template <typename State, int kDstate>
void launch_rounding(const SsdUpdateParams& p, const SsdUpdateArgs& a, cudaStream_t stream) {
  if constexpr (sizeof(State) == 2) {
    if (p.seed != nullptr) return launch<State, kDstate, true>(p, a, stream);
  }
  launch<State, kDstate, false>(p, a, stream);
}

template <typename State>
void launch_dstate(const SsdUpdateParams& p, const SsdUpdateArgs& a, cudaStream_t stream) {
  switch (a.dstate) {
    case 64: return launch_rounding<State, 64>(p, a, stream);
    case 128: return launch_rounding<State, 128>(p, a, stream);
    case 256: return launch_rounding<State, 256>(p, a, stream);
    default: throw std::runtime_error("ssd_update: dstate must be 64, 128 or 256, got " + std::to_string(a.dstate));
  }
}

TokenStrides strides(const SsdUpdateArgs::TokenStrides& s) { return {int(s[0]), int(s[1]), int(s[2]), int(s[3])}; }

}  // namespace

void ssd_update(const SsdUpdateArgs& a, const SsdUpdatePointers& pointers, Target target) {
  const auto [state, x, dt, A, B, C, D, z, dt_bias, read_slots, write_slots, num_accepted, cu_seqlens, seed, scale, y] =
      pointers;
  const SsdUpdateParams p{
      .state = reinterpret_cast<void*>(state),
      .x = reinterpret_cast<const void*>(x),
      .dt = reinterpret_cast<const void*>(dt),
      .A = reinterpret_cast<const float*>(A),
      .B = reinterpret_cast<const void*>(B),
      .C = reinterpret_cast<const void*>(C),
      .D = reinterpret_cast<const void*>(D),
      .z = reinterpret_cast<const void*>(z),
      .dt_bias = reinterpret_cast<const void*>(dt_bias),
      .read_slots = reinterpret_cast<const int*>(read_slots),
      .write_slots = reinterpret_cast<const int*>(write_slots),
      .num_accepted = reinterpret_cast<const int*>(num_accepted),
      .cu_seqlens = reinterpret_cast<const int*>(cu_seqlens),
      .seed = reinterpret_cast<const int64*>(seed),
      .state_scale = reinterpret_cast<float*>(scale),
      .y = reinterpret_cast<void*>(y),
      .state_slot_stride = a.state_strides[0],
      .state_head_stride = static_cast<int>(a.state_strides[1]),
      .state_p_stride = static_cast<int>(a.state_strides[2]),
      .scale_slot_stride = static_cast<int>(a.scale_strides[0]),
      .scale_head_stride = static_cast<int>(a.scale_strides[1]),
      .scale_p_stride = static_cast<int>(a.scale_strides[2]),
      .x_strides = strides(a.x_strides),
      .z_strides = strides(a.z_strides),
      .y_strides = strides(a.y_strides),
      .dt_strides = strides(a.dt_strides),
      .B_strides = strides(a.B_strides),
      .C_strides = strides(a.C_strides),
      .A_stride = static_cast<int>(a.A_stride),
      .D_head_stride = static_cast<int>(a.D_strides[0]),
      .D_p_stride = static_cast<int>(a.D_strides[1]),
      .dt_bias_stride = static_cast<int>(a.dt_bias_stride),
      .read_stride = static_cast<int>(a.read_strides[0]),
      .read_column_stride = static_cast<int>(a.read_strides[1]),
      .write_stride = static_cast<int>(a.write_strides[0]),
      .write_column_stride = static_cast<int>(a.write_strides[1]),
      .accepted_stride = static_cast<int>(a.accepted_stride),
      .bounds_stride = static_cast<int>(a.bounds_stride),
      .batch = static_cast<int>(a.batch),
      .tokens = static_cast<int>(a.tokens),
      .total = static_cast<int>(a.total),
      .nslots = static_cast<int>(a.nslots),
      .nheads = static_cast<int>(a.nheads),
      .headdim = static_cast<int>(a.headdim),
      .heads_per_group = static_cast<int>(a.nheads / a.ngroups),
      .by_heads_per_group = divisor(a.nheads / a.ngroups),
      .by_nheads = wide_divisor(a.nheads),
      .read_width = static_cast<int>(a.read_width),
      .write_width = static_cast<int>(a.write_width),
      .null_slot = a.null_slot,
      .dt_min = a.dt_min,
      .dt_max = a.dt_max,
      .dtype = a.dtype,
      .dt_dtype = a.dt_dtype,
      .D_dtype = a.D_dtype,
      .z_dtype = a.z_dtype,
      .dt_bias_dtype = a.dt_bias_dtype,
      .columns_aligned = vectors_aligned(B, a.B_strides, a.dtype) && vectors_aligned(C, a.C_strides, a.dtype),
      .dt_softplus = a.dt_softplus,
      .store_each = a.store_each,
      .store_last = a.store_last,
  };
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  switch (a.state_dtype) {
    case DType::float32: return launch_dstate<float>(p, a, stream);
    case DType::bfloat16: return launch_dstate<__nv_bfloat16>(p, a, stream);
    case DType::float16: return launch_dstate<__half>(p, a, stream);
    case DType::float8_e4m3: return launch_dstate<E4m3>(p, a, stream);
    case DType::int8: return launch_dstate<Int8>(p, a, stream);
  }
}

}  // namespace hybrid_ops
