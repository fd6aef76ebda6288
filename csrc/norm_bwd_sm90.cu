#include "norm_bwd_sm90.cuh"

#include <algorithm>

#include "common/norm_dispatch.cuh"

namespace hybrid_ops {
namespace {

struct Launch {
  const NormForm& form;
  const NormBwdParams& params;
  cudaStream_t stream;

  template <typename T, typename Stream, Gate kGate>
  static constexpr int most() {
    return kMostNormBwdVectors<T, Stream, kGate>;
  }

  template <typename T, typename Stream, Gate kGate, int kVectors>
  void operator()() const {
    launch_early(norm_bwd_kernel<T, Stream, kGate, kVectors>, norm_grid(form, params.ctas),
                 dim3(32 * form.warps, form.teams), stream, params, "norm_bwd_kernel",
                 form.teams * params.group_size * static_cast<int>(sizeof(float)));
    const auto blocks = static_cast<unsigned>((form.hidden + kSumFeatures - 1) / kSumFeatures);
    launch_early(norm_dweight_kernel<T>, dim3(blocks), dim3(kSumFeatures, kSumRows), stream, params,
                 "norm_dweight_kernel");
  }
};

}  // namespace

std::int64_t workspace_bytes(const NormBwdArgs& a) { return a.ctas * a.form.hidden * sizeof(float); }

void norm_bwd(const NormBwdArgs& a, const NormBwdTensors& t, Target target) {
  const NormForm& form = a.form;
  const NormBwdParams p{
      .dy = reinterpret_cast<const void*>(t.dy),
      .x = reinterpret_cast<const void*>(t.x),
      .third = reinterpret_cast<const void*>(form.gated ? t.z : t.dh),
      .weight = reinterpret_cast<const void*>(t.weight),
      .dx = reinterpret_cast<void*>(t.dx),
      .dthird = reinterpret_cast<void*>(form.gated ? t.dz : t.dresidual),
      .dweight = reinterpret_cast<void*>(t.dweight),
      .partials = reinterpret_cast<float*>(t.workspace),
      .dy_stride = a.strides[0],
      .x_stride = a.strides[1],
      .third_stride = a.strides[2],
      .hidden = form.hidden,
      .rows = static_cast<int>(form.rows),
      .group_size = static_cast<int>(form.group_size),
      .ctas = a.ctas,
      .step = a.ctas * form.teams,
      .inverse_size = 1.f / static_cast<float>(form.group_size),
      .eps = form.eps,
      .weight_fp32 = form.weight_dtype == DType::float32,
      .streaming = form.streaming,
  };
  const DeviceGuard guard(target.device);
  norm_dispatch(form, Launch{form, p, reinterpret_cast<cudaStream_t>(target.stream)});
}

}  // namespace hybrid_ops
