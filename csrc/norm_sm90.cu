#include "norm_sm90.cuh"

#include "common/norm_dispatch.cuh"

namespace hybrid_ops {

void norm_fwd(const NormArgs& a, const NormTensors& t, Target target) {
  const NormForm& form = a.form;
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
      .groups = static_cast<int>(form.hidden / form.group_size),
      .group_size = static_cast<int>(form.group_size),
      .eps = form.eps,
      .weight_fp32 = form.weight_dtype == DType::float32,
  };
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  norm_dispatch(form, [&]<typename T, typename Stream, Gate kGate, int kVectors>() {
    const std::int64_t ctas = (form.rows + form.teams - 1) / form.teams;
    norm_kernel<T, Stream, kGate, kVectors><<<norm_grid(form, ctas), norm_block(form), 0, stream>>>(p);
    check(cudaGetLastError(), "norm_kernel");
  });
}

}  // namespace hybrid_ops
