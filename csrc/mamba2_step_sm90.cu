#include "mamba2_step_sm90.cuh"

#include "common/api.h"
#include "common/launch.cuh"

namespace hybrid_ops {
namespace {

template <typename State, int kDstate, bool kStochastic, bool kUsual>
void launch(const Mamba2StepParams& p, const Mamba2StepArgs& a, Target target) {
  const int heads = (p.rows + p.headdim - 1) / p.headdim;
  // also for a cluster of one, without which its stores to itself are illegal instructions
  cudaLaunchAttribute cluster{.id = cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim = {static_cast<unsigned>(a.cluster), 1, 1};
  std::array attributes{cluster, early_launch()};
  const int shared = StepMemory<kUsual, kDstate>::words(p.rows, heads, 32 * a.warps) * static_cast<int>(sizeof(float));
  constexpr auto kernel = mamba2_step_kernel<State, kDstate, kStochastic, kUsual>;
  allow_shared_memory<kernel>(shared, target.device);
  const cudaLaunchConfig_t config{
      .gridDim = dim3(p.nheads * p.headdim / p.rows, static_cast<unsigned>(a.batch)),
      .blockDim = dim3(32 * a.warps),
      .dynamicSmemBytes = static_cast<unsigned>(shared),
      .stream = reinterpret_cast<cudaStream_t>(target.stream),
      .attrs = attributes.data(),
      .numAttrs = attributes.size(),
  };
  check(cudaLaunchKernelEx(&config, kernel, p), "mamba2_step_kernel");
}

template <typename State, int kDstate, bool kStochastic>
void launch_dtypes(const Mamba2StepParams& p, const Mamba2StepArgs& a, Target target) {
  if (is_usual(p, kDstate)) return launch<State, kDstate, kStochastic, true>(p, a, target);
  launch<State, kDstate, kStochastic, false>(p, a, target);
}

template <typename State, int kDstate>
void launch_rounding(const Mamba2StepParams& p, const Mamba2StepArgs& a, Target target) {
  if constexpr (sizeof(State) == 2) {
    if (p.seed != nullptr) return launch_dtypes<State, kDstate, true>(p, a, target);
  }
  launch_dtypes<State, kDstate, false>(p, a, target);
}

template <typename State>
void launch_dstate(const Mamba2StepParams& p, const Mamba2StepArgs& a, Target target) {
  switch (a.dstate) {
    case 64: return launch_rounding<State, 64>(p, a, target);
    case 128: return launch_rounding<State, 128>(p, a, target);
    case 256: return launch_rounding<State, 256>(p, a, target);
    default: throw std::runtime_error("mamba2_step: dstate must be 64, 128 or 256, got " + std::to_string(a.dstate));
  }
}

}  // namespace

void mamba2_step(const Mamba2StepArgs& a, const Mamba2StepPointers& pointers, Target target) {
  const auto [zxbcdt, conv_state, state, conv_weight, conv_bias, A, D, dt_bias, norm_weight, slots, seed, y] = pointers;
  const int rows = static_cast<int>(a.group_size / a.cluster);
  const Mamba2StepParams p{
      .zxbcdt = reinterpret_cast<const void*>(zxbcdt),
      .conv_state = reinterpret_cast<void*>(conv_state),
      .state = reinterpret_cast<void*>(state),
      .conv_weight = reinterpret_cast<const void*>(conv_weight),
      .conv_bias = reinterpret_cast<const void*>(conv_bias),
      .A = reinterpret_cast<const float*>(A),
      .D = reinterpret_cast<const void*>(D),
      .dt_bias = reinterpret_cast<const void*>(dt_bias),
      .norm_weight = reinterpret_cast<const void*>(norm_weight),
      .slots = reinterpret_cast<const int*>(slots),
      .seed = reinterpret_cast<const int64*>(seed),
      .y = reinterpret_cast<void*>(y),
      .zxbcdt_stride = a.zxbcdt_stride,
      .y_stride = a.y_stride,
      .conv_slot_stride = a.conv_strides[0],
      .state_slot_stride = a.state_strides[0],
      .conv_channel_stride = static_cast<int>(a.conv_strides[1]),
      .conv_column_stride = static_cast<int>(a.conv_strides[2]),
      .state_head_stride = static_cast<int>(a.state_strides[1]),
      .state_p_stride = static_cast<int>(a.state_strides[2]),
      .conv_bias_stride = static_cast<int>(a.conv_bias_stride),
      .A_stride = static_cast<int>(a.A_stride),
      .D_head_stride = static_cast<int>(a.D_strides[0]),
      .D_p_stride = static_cast<int>(a.D_strides[1]),
      .dt_bias_stride = static_cast<int>(a.dt_bias_stride),
      .norm_weight_stride = static_cast<int>(a.norm_weight_stride),
      .slots_stride = static_cast<int>(a.slots_stride),
      .nslots = static_cast<int>(a.nslots),
      .nheads = static_cast<int>(a.nheads),
      .headdim = static_cast<int>(a.headdim),
      .conv_dim = static_cast<int>(a.conv_dim),
      .width = static_cast<int>(a.width),
      .null_slot = a.null_slot,
      .group_size = static_cast<int>(a.group_size),
      .rows = rows,
      .rows_per_group = static_cast<int>(a.rows_per_group),
      .by_headdim = divisor(a.headdim),
      .by_rows_per_group = divisor(a.rows_per_group),
      .dt_min = a.dt_min,
      .dt_max = a.dt_max,
      .eps = a.eps,
      .dtype = a.dtype,
      .conv_state_dtype = a.conv_state_dtype,
      .conv_weight_dtype = a.conv_weight_dtype,
      .conv_bias_dtype = a.conv_bias_dtype,
      .D_dtype = a.D_dtype,
      .dt_bias_dtype = a.dt_bias_dtype,
      .norm_weight_dtype = a.norm_weight_dtype,
      .dt_softplus = a.dt_softplus,
      .norm_before_gate = a.norm_before_gate,
      .crowded = a.crowded,
  };
  const DeviceGuard guard(target.device);
  switch (a.state_dtype) {
    case DType::float32: return launch_dstate<float>(p, a, target);
    case DType::bfloat16: return launch_dstate<__nv_bfloat16>(p, a, target);
    case DType::float16: return launch_dstate<__half>(p, a, target);
    default: throw std::runtime_error("mamba2_step: the state must be float32, bfloat16 or float16");
  }
}

}  // namespace hybrid_ops
