#include "norm_sm90.cuh"

#include <algorithm>

#include "common/norm_dispatch.cuh"

namespace hybrid_ops {
namespace {

struct Launch {
  const NormForm& form;
  const NormParams& params;
  cudaStream_t stream;

  template <typename T, typename Stream, Gate kGate>
  static constexpr int most() {
    return kMostNormVectors;
  }

  template <typename T, typename Stream, Gate kGate, int kVectors>
  void operator()() const {
    const dim3 grid = norm_grid(form, (form.rows + form.teams - 1) / form.teams);
    launch_early(norm_kernel<T, Stream, kGate, kVectors>, grid, dim3(32 * form.warps, form.teams), stream, params,
                 "norm_kernel");
  }
};

}  // namespace

void norm_fwd(const NormArgs& a, const NormTensors& t, Target target) {
  const NormForm& form = a.form;
  if (form.warps * form.teams > kMaxNormWarps) throw std::runtime_error("norm: a CTA has at most 16 warps");
  const NormParams p{
      .x = reinterpret_cast<const void*>(t.x),
      .second = reinterpret_cast<const void*>(form.gated ? t.z : t.residual),
      .weight = reinterpret_cast<const void*>(t.weight),
      .y = reinterpret_cast<void*>(t.y),
      .h = reinterpret_cast<void*>(t.h),
      .x_stride = a.strides[0],
      .second_stride = a.strides[1],
      .y_stride = a.strides[2],
      .h_stride = a.strides[3],
      .rows = static_cast<int>(form.rows),
      .group_size = static_cast<int>(form.group_size),
      .inverse_size = 1.f / static_cast<float>(form.group_size),
      .eps = form.eps,
      .weight_fp32 = form.weight_dtype == DType::float32,
      .streaming = form.streaming,
  };
  const DeviceGuard guard(target.device);
  norm_dispatch(form, Launch{form, p, reinterpret_cast<cudaStream_t>(target.stream)});
}

}  // namespace hybrid_ops
