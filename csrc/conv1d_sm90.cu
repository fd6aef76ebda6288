#include "conv1d_sm90.cuh"

#include "common/api.h"
#include "common/conv1d_dispatch.cuh"

namespace hybrid_ops {

void conv1d_fwd(const Conv1dArgs& a, const Conv1dTensors& t, Target target) {
  const int itemsize = a.dtype == DType::float32 ? 4 : 2;
  const int groups = kTileThreads / a.columns, tokens = groups * kTileBytes / (a.channels * itemsize);
  const auto tiles = static_cast<unsigned>((a.seqlen + tokens - 1) / tokens);
  const Conv1dParams p{
      .x = reinterpret_cast<const void*>(t.x),
      .weight = reinterpret_cast<const void*>(t.weight),
      .bias = reinterpret_cast<const void*>(t.bias),
      .initial_states = reinterpret_cast<const void*>(t.initial_states),
      .y = reinterpret_cast<void*>(t.y),
      .final_states = reinterpret_cast<void*>(t.final_states),
      .cu_seqlens = reinterpret_cast<const int*>(t.cu_seqlens),
      .read_slots = reinterpret_cast<const int*>(t.read_slots),
      .write_slots = reinterpret_cast<const int*>(t.write_slots),
      .x_batch_stride = a.x_strides[0],
      .y_batch_stride = a.y_strides[0],
      .x_token_stride = static_cast<unsigned>(a.x_strides[1]),
      .y_token_stride = static_cast<unsigned>(a.y_strides[1]),
      .initial_strides = {a.initial_strides[0], a.initial_strides[1], a.initial_strides[2]},
      .final_strides = {a.final_strides[0], a.final_strides[1], a.final_strides[2]},
      .batch = static_cast<int>(a.batch),
      .seqlen = static_cast<int>(a.seqlen),
      .dim = static_cast<int>(a.dim),
      .nseq = static_cast<int>(a.nseq),
      .nslots = static_cast<int>(a.nslots),
      .null_slot = a.null_slot,
      .state_len = static_cast<int>(a.state_len),
      .tiles = tiles,
      .by_tiles = wide_divisor(tiles),
      .weight_fp32 = a.weight_dtype == DType::float32,
      .bias_fp32 = a.bias_dtype == DType::float32,
      .states_fp32 = a.states_dtype == DType::float32,
  };
  if (itemsize == 2 && a.channels > 4 && (p.weight_fp32 || p.bias_fp32)) {
    throw std::runtime_error("conv1d: float32 weights beside 16-bit inputs take vectors of 4 channels");
  }
  const int vectors = p.dim / a.channels;
  const dim3 grid = conv1d_grid((vectors + a.columns - 1) / a.columns, static_cast<int64>(p.tiles) * p.batch);
  const unsigned state_blocks = p.final_states == nullptr ? 0 : conv1d_blocks(static_cast<int64>(p.nseq) * p.dim);
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  const auto run = [&]<typename T, int kWidth, bool kSilu, bool kPacked>() {
    if (grid.x > 0 && grid.y > 0) {
      const dim3 threads(a.columns, groups);
      if (a.channels * sizeof(T) == 16) {
        launch_early(conv1d_kernel<T, kWidth, kSilu, kPacked, 16 / sizeof(T)>, grid, threads, stream, p,
                     "conv1d_kernel");
      } else {  // 16 bits
        launch_early(conv1d_kernel<T, kWidth, kSilu, kPacked, 4>, grid, threads, stream, p, "conv1d_kernel");
      }
    }
    if (state_blocks > 0) {
      conv1d_final_states_kernel<T><<<state_blocks, kConvThreads, 0, stream>>>(p);
      check(cudaGetLastError(), "conv1d_final_states_kernel");
    }
  };
  conv1d_dispatch(a.dtype, a.width, a.silu, p.cu_seqlens != nullptr, run);
}

}  // namespace hybrid_ops
