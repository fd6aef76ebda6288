#include "ssd_replay_sm90.cuh"

#include "common/api.h"
#include "common/launch.cuh"
#include "ssd_replay_one_sm90.cuh"

namespace hybrid_ops {
namespace {

template <typename State, int kDstate, int kRows, int kItem, bool kStochastic>
void launch(const SsdReplayParams& p, const SsdReplayArgs& a, Target target) {
  using L = ReplayLayout<State, kDstate, kRows, kItem>;
  const int shared = sizeof(unsigned) * replay_shared<L>(p.tokens, a.warps);
  const dim3 grid(p.nheads / p.heads, a.batch);
  constexpr auto kernel = ssd_replay_kernel<State, kDstate, kRows, kItem, kStochastic>;
  allow_shared_memory<kernel>(shared, target.device);
  launch_early(+kernel, grid, dim3(32 * a.warps), reinterpret_cast<cudaStream_t>(target.stream), p, "ssd_replay_kernel",
               shared);
}

template <typename State, int kDstate, bool kStochastic>
void launch_one(const SsdReplayParams& p, const SsdReplayArgs& a, Target target) {
  if (a.warps > kOneWarps) throw std::runtime_error("ssd_replay: a block has at most two warps of 64 rows");
  const dim3 grid((p.headdim + kOneRows - 1) / kOneRows, p.nheads / a.warps, a.batch);
  constexpr auto kernel = ssd_replay_one_kernel<State, kDstate, kStochastic>;
  constexpr int kShared = kOneShared<State, kDstate>;
  allow_shared_memory<kernel>(kOneWarps * kShared, target.device);
  prefer_shared_memory<kernel>(100, target.device);
  launch_early(+kernel, grid, dim3(32 * a.warps), reinterpret_cast<cudaStream_t>(target.stream), p,
               "ssd_replay_one_kernel", a.warps * kShared);
}

template <typename State, int kDstate, int kRows, int kItem>
void launch_rounding(const SsdReplayParams& p, const SsdReplayArgs& a, Target target) {
  if constexpr (sizeof(State) == 2) {
    if (p.seed != nullptr) return launch<State, kDstate, kRows, kItem, true>(p, a, target);
  }
  launch<State, kDstate, kRows, kItem, false>(p, a, target);
}

// Those for which _csrc/ssd_replay.py chooses.
template <typename State, int kDstate>
void launch_rows(const SsdReplayParams& p, const SsdReplayArgs& a, Target target) {
  constexpr int kRow = sizeof(State) * kDstate;  // bytes
  constexpr int kFew = kRow == 1024 || kRow == 128 ? 4 : 8;
  if constexpr (sizeof(State) == 2) {
    if (a.rows == kOneRows) {
      if (p.seed != nullptr) return launch_one<State, kDstate, true>(p, a, target);
      return launch_one<State, kDstate, false>(p, a, target);
    }
  }
  if (a.rows == kFew) {
    if (a.dtype == DType::float32) return launch_rounding<State, kDstate, kFew, 4>(p, a, target);
    return launch_rounding<State, kDstate, kFew, 2>(p, a, target);
  }
  if constexpr (kDstate == 128) {
    if (a.rows == 16 && a.dtype != DType::float32) return launch_rounding<State, kDstate, 16, 2>(p, a, target);
  }
  throw std::runtime_error("ssd_replay: no such tile: rows " + std::to_string(a.rows));
}

template <typename State>
void launch_dstate(const SsdReplayParams& p, const SsdReplayArgs& a, Target target) {
  switch (a.dstate) {
    case 64: return launch_rows<State, 64>(p, a, target);
    case 128: return launch_rows<State, 128>(p, a, target);
    case 256: return launch_rows<State, 256>(p, a, target);
    default: throw std::runtime_error("ssd_replay: dstate must be 64, 128 or 256, got " + std::to_string(a.dstate));
  }
}

TokenStrides strides(const SsdReplayArgs::TokenStrides& s) { return {int(s[0]), int(s[1]), int(s[2]), int(s[3])}; }

}  // namespace

void ssd_replay(const SsdReplayArgs& a, const SsdReplayPointers& pointers, Target target) {
  const auto [state, cache_x, cache_B, cache_dt, ring, x, dt, A, B, C, D, z, dt_bias, slots, rollback, seed, y,
              write_slots] = pointers;
  const SsdReplayParams p{
      .state = reinterpret_cast<void*>(state),
      .cache_x = reinterpret_cast<void*>(cache_x),
      .cache_B = reinterpret_cast<void*>(cache_B),
      .cache_dt = reinterpret_cast<float*>(cache_dt),
      .ring = reinterpret_cast<int*>(ring),
      .x = reinterpret_cast<const void*>(x),
      .dt = reinterpret_cast<const void*>(dt),
      .A = reinterpret_cast<const float*>(A),
      .B = reinterpret_cast<const void*>(B),
      .C = reinterpret_cast<const void*>(C),
      .D = reinterpret_cast<const void*>(D),
      .z = reinterpret_cast<const void*>(z),
      .dt_bias = reinterpret_cast<const void*>(dt_bias),
      .slots = reinterpret_cast<const int*>(slots),
      .rollback = reinterpret_cast<const int*>(rollback),
      .seed = reinterpret_cast<const int64*>(seed),
      .y = reinterpret_cast<void*>(y),
      .write_slots = reinterpret_cast<const int*>(write_slots),
      .state_slot_stride = a.state_strides[0],
      .cache_x_slot_stride = a.cache_x_strides[0],
      .cache_B_slot_stride = a.cache_B_strides[0],
      .cache_dt_slot_stride = a.cache_dt_strides[0],
      .ring_stride = a.ring_stride,
      .state_head_stride = static_cast<int>(a.state_strides[1]),
      .state_p_stride = static_cast<int>(a.state_strides[2]),
      .cache_x_head_stride = static_cast<int>(a.cache_x_strides[1]),
      .cache_x_place_stride = static_cast<int>(a.cache_x_strides[2]),
      .cache_B_group_stride = static_cast<int>(a.cache_B_strides[1]),
      .cache_B_place_stride = static_cast<int>(a.cache_B_strides[2]),
      .cache_dt_head_stride = static_cast<int>(a.cache_dt_strides[1]),
      .cache_dt_place_stride = static_cast<int>(a.cache_dt_strides[2]),
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
      .slots_stride = static_cast<int>(a.slots_stride),
      .rollback_stride = static_cast<int>(a.rollback_stride),
      .write_stride = static_cast<int>(a.write_stride),
      .tokens = static_cast<int>(a.tokens),
      .nslots = static_cast<int>(a.nslots),
      .nheads = static_cast<int>(a.nheads),
      .headdim = static_cast<int>(a.headdim),
      .heads_per_group = static_cast<int>(a.nheads / a.ngroups),
      .capacity = static_cast<int>(a.capacity),
      .places = static_cast<int>(a.places),
      .null_slot = a.null_slot,
      .heads = a.heads,
      .dt_min = a.dt_min,
      .dt_max = a.dt_max,
      .dtype = a.dtype,
      .dt_dtype = a.dt_dtype,
      .D_dtype = a.D_dtype,
      .z_dtype = a.z_dtype,
      .dt_bias_dtype = a.dt_bias_dtype,
      .x_aligned = vectors_aligned(x, a.x_strides, a.dtype),
      .columns_aligned = vectors_aligned(B, a.B_strides, a.dtype) && vectors_aligned(C, a.C_strides, a.dtype),
      .dt_softplus = a.dt_softplus,
  };
  const DeviceGuard guard(target.device);
  switch (a.state_dtype) {
    case DType::float32: return launch_dstate<float>(p, a, target);
    case DType::bfloat16: return launch_dstate<__nv_bfloat16>(p, a, target);
    case DType::float16: return launch_dstate<__half>(p, a, target);
    default: throw std::runtime_error("ssd_replay: state must have 32 or 16 bits");
  }
}

}  // namespace hybrid_ops
