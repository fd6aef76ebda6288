#include "conv1d_sm90.cuh"

#include "common/api.h"
#include "common/launch.cuh"

namespace hybrid_ops {
namespace {

constexpr int kThreads = 128;
constexpr int kLoads = 4;  // in flight per thread

unsigned blocks_for(int64 threads) {
  const int64 blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) throw std::runtime_error("conv1d_fwd: the grid would exceed 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

template <typename T, int kWidth>
void launch(const Conv1dParams& p, cudaStream_t stream) {
  const int64 runs = (p.seqlen + p.tokens_per_thread - 1) / p.tokens_per_thread;
  const unsigned blocks = blocks_for(runs * p.batch * (p.dim / kPerVector));
  if (blocks > 0) {
    if (p.cu_seqlens != nullptr) {
      conv1d_kernel<T, kWidth, true, kLoads, kThreads><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      conv1d_kernel<T, kWidth, false, kLoads, kThreads><<<blocks, kThreads, 0, stream>>>(p);
    }
    check(cudaGetLastError(), "conv1d_kernel");
  }
  const unsigned state_blocks = blocks_for(static_cast<int64>(p.nseq) * p.dim);
  if (p.final_states != nullptr && state_blocks > 0) {
    conv1d_final_states_kernel<T><<<state_blocks, kThreads, 0, stream>>>(p);
    check(cudaGetLastError(), "conv1d_final_states_kernel");
  }
}

template <typename T>
void launch_width(const Conv1dParams& p, std::int64_t width, cudaStream_t stream) {
  switch (width) {
    case 2: return launch<T, 2>(p, stream);
    case 3: return launch<T, 3>(p, stream);
    case 4: return launch<T, 4>(p, stream);
    default: throw std::runtime_error("conv1d_fwd: width must be 2, 3 or 4, got " + std::to_string(width));
  }
}

}  // namespace

void conv1d_fwd(const Conv1dArgs& a, Target target) {
  const Conv1dParams p{
      .x = reinterpret_cast<const void*>(a.x),
      .weight = reinterpret_cast<const void*>(a.weight),
      .bias = reinterpret_cast<const void*>(a.bias),
      .initial_states = reinterpret_cast<const void*>(a.initial_states),
      .y = reinterpret_cast<void*>(a.y),
      .final_states = reinterpret_cast<void*>(a.final_states),
      .cu_seqlens = reinterpret_cast<const int*>(a.cu_seqlens),
      .read_slots = reinterpret_cast<const int*>(a.read_slots),
      .write_slots = reinterpret_cast<const int*>(a.write_slots),
      .x_batch_stride = a.x_strides[0],
      .x_token_stride = a.x_strides[1],
      .y_batch_stride = a.y_strides[0],
      .y_token_stride = a.y_strides[1],
      .initial_strides = {a.initial_strides[0], a.initial_strides[1], a.initial_strides[2]},
      .final_strides = {a.final_strides[0], a.final_strides[1], a.final_strides[2]},
      .batch = static_cast<int>(a.batch),
      .seqlen = static_cast<int>(a.seqlen),
      .dim = static_cast<int>(a.dim),
      .nseq = static_cast<int>(a.nseq),
      .nslots = static_cast<int>(a.nslots),
      .null_slot = a.null_slot,
      .state_len = static_cast<int>(a.state_len),
      .tokens_per_thread = a.tokens_per_thread,
      .weight_fp32 = a.weight_dtype == DType::float32,
      .bias_fp32 = a.bias_dtype == DType::float32,
      .states_fp32 = a.states_dtype == DType::float32,
      .silu = a.silu,
  };
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  switch (a.dtype) {
    case DType::float32: return launch_width<float>(p, a.width, stream);
    case DType::bfloat16: return launch_width<__nv_bfloat16>(p, a.width, stream);
    case DType::float16: return launch_width<__half>(p, a.width, stream);
  }
}

}  // namespace hybrid_ops
