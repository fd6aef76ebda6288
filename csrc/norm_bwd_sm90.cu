#include "norm_bwd_sm90.cuh"

#include "common/norm_dispatch.cuh"

namespace hybrid_ops {

void norm_bwd(const NormBwdArgs& a, const NormBwdTensors& t, Target target) {
  const NormForm& form = a.form;
  if (a.stages < 1 || a.stages > kMaxNormStages) throw std::runtime_error("norm: a backward has 1 to 4 stages");
  const NormBwdParams p{
      .dy = reinterpret_cast<const void*>(t.dy),
      .x = reinterpret_cast<const void*>(t.x),
      .third = reinterpret_cast<const void*>(form.gated ? t.z : t.dh),
      .weight = reinterpret_cast<const void*>(t.weight),
      .dx = reinterpret_cast<void*>(t.dx),
      .dthird = reinterpret_cast<void*>(form.gated ? t.dz : t.dresidual),
      .dweight = reinterpret_cast<void*>(t.dweight),
      .partials = reinterpret_cast<float*>(t.partials),
      .dy_stride = a.strides[0],
      .x_stride = a.strides[1],
      .third_stride = a.strides[2],
      .rows = static_cast<int>(form.rows),
      .groups = static_cast<int>(form.hidden / form.group_size),
      .group_size = static_cast<int>(form.group_size),
      .step = a.ctas * form.teams,
      .stages = a.stages,
      .eps = form.eps,
      .weight_fp32 = form.weight_dtype == DType::float32,
  };
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  norm_dispatch(form, [&]<typename T, typename Stream, Gate kGate, int kVectors>() {
    constexpr auto kernel = norm_bwd_kernel<T, Stream, kGate, kVectors>;
    const int shared = form.warps * form.teams * a.stages * NormBwdSlot<T, Stream, kVectors>::kBytes;
    allow_shared_memory<kernel>(shared, target.device);
    kernel<<<norm_grid(form, a.ctas), norm_block(form), shared, stream>>>(p);
    check(cudaGetLastError(), "norm_bwd_kernel");
    const auto blocks = static_cast<unsigned>((form.hidden + kSumFeatures - 1) / kSumFeatures);
    norm_dweight_kernel<T><<<blocks, dim3(kSumFeatures, kSumRows), 0, stream>>>(p, a.ctas);
    check(cudaGetLastError(), "norm_dweight_kernel");
  });
}

}  // namespace hybrid_ops
