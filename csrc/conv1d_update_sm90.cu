#include "conv1d_update_sm90.cuh"

#include "common/api.h"
#include "common/launch.cuh"

namespace hybrid_ops {
namespace {

template <typename T, int kWidth, bool kColumnsTogether>
void launch(const Conv1dUpdateParams& p, const Conv1dUpdateArgs& a, cudaStream_t stream) {
  constexpr int kChannels = kUpdateThreads * kUpdateChannels;
  const dim3 grid((p.dim + kChannels - 1) / kChannels, a.batch);
  const bool bias_aligned = reinterpret_cast<std::uintptr_t>(p.bias) % (kUpdateChannels * sizeof(T)) == 0;
  const bool usual = a.weight_dtype == a.dtype && (p.bias == nullptr || (a.bias_dtype == a.dtype && bias_aligned));
  const auto kernel = usual ? conv1d_update_kernel<T, kWidth, kColumnsTogether, true>
                            : conv1d_update_kernel<T, kWidth, kColumnsTogether, false>;
  launch_early(kernel, grid, dim3(kUpdateThreads), stream, p, "conv1d_update_kernel");
}

template <typename T>
void launch_width(const Conv1dUpdateParams& p, const Conv1dUpdateArgs& a, cudaStream_t stream) {
  const bool together = p.state_column_stride == 1;
  switch (a.width) {
    case 2: return launch<T, 2, true>(p, a, stream);
    case 3: return together ? launch<T, 3, true>(p, a, stream) : launch<T, 3, false>(p, a, stream);
    case 4: return together ? launch<T, 4, true>(p, a, stream) : launch<T, 4, false>(p, a, stream);
    default: throw std::runtime_error("conv1d_update: width must be 2, 3 or 4, got " + std::to_string(a.width));
  }
}

}  // namespace

void conv1d_update(const Conv1dUpdateArgs& a, const Conv1dUpdatePointers& pointers, Target target) {
  const auto [x, conv_state, weight, bias, slots, y] = pointers;
  const Conv1dUpdateParams p{
      .x = reinterpret_cast<const void*>(x),
      .conv_state = reinterpret_cast<void*>(conv_state),
      .weight = reinterpret_cast<const void*>(weight),
      .bias = reinterpret_cast<const void*>(bias),
      .slots = reinterpret_cast<const int*>(slots),
      .y = reinterpret_cast<void*>(y),
      .state_slot_stride = a.state_slot_stride,
      .state_column_stride = static_cast<int>(a.state_column_stride),
      .x_stride = static_cast<int>(a.x_stride),
      .y_stride = static_cast<int>(a.y_stride),
      .slots_stride = static_cast<int>(a.slots_stride),
      .dim = static_cast<int>(a.dim),
      .nslots = static_cast<int>(a.nslots),
      .null_slot = a.null_slot,
      .weight_dtype = a.weight_dtype,
      .bias_dtype = a.bias_dtype,
      .silu = a.silu,
  };
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  switch (a.dtype) {
    case DType::float32: return launch_width<float>(p, a, stream);
    case DType::bfloat16: return launch_width<__nv_bfloat16>(p, a, stream);
    case DType::float16: return launch_width<__half>(p, a, stream);
    default: throw std::runtime_error("conv1d_update: x must be float32, bfloat16 or float16");
  }
}

}  // namespace hybrid_ops
