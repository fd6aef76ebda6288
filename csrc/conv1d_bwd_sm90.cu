#include "conv1d_bwd_sm90.cuh"

#include "common/api.h"
#include "common/conv1d_dispatch.cuh"
#include "common/tensor_map.cuh"

namespace hybrid_ops {
namespace {

struct Tiles {
  std::int64_t row_tokens, of_a_row, all;
};

Tiles tiles_of(const Conv1dBwdArgs& a) {
  const std::int64_t row_tokens = a.rows == 0 ? 0 : a.batch * a.seqlen / a.rows;
  const std::int64_t of_a_row = (row_tokens + kBwdTokens - 1) / kBwdTokens;
  return {row_tokens, of_a_row, of_a_row * a.rows};
}

}  // namespace

std::int64_t workspace_bytes(const Conv1dBwdArgs& a) { return (a.width + 1) * tiles_of(a).all * a.dim * sizeof(float); }

void conv1d_bwd(const Conv1dBwdArgs& a, const Conv1dBwdTensors& t, Target target) {
  const auto [row_tokens, tiles, ctas] = tiles_of(a);
  const std::int64_t itemsize = a.dtype == DType::float32 ? 4 : 2;
  Conv1dBwdParams p{
      .dy = reinterpret_cast<const void*>(t.dy),
      .x = reinterpret_cast<const void*>(t.x),
      .weight = reinterpret_cast<const void*>(t.weight),
      .bias = reinterpret_cast<const void*>(t.bias),
      .initial_states = reinterpret_cast<const void*>(t.initial_states),
      .dfinal_states = reinterpret_cast<const void*>(t.dfinal_states),
      .dx = reinterpret_cast<void*>(t.dx),
      .dweight = reinterpret_cast<void*>(t.dweight),
      .dbias = reinterpret_cast<void*>(t.dbias),
      .dinitial_states = reinterpret_cast<void*>(t.dinitial_states),
      .partials = reinterpret_cast<void*>(t.workspace),
      .cu_seqlens = reinterpret_cast<const int*>(t.cu_seqlens),
      .dy_batch_stride = a.dy_strides[0],
      .x_batch_stride = a.x_strides[0],
      .dx_batch_stride = a.dx_strides[0],
      .dy_token_stride = static_cast<unsigned>(a.dy_strides[1]),
      .x_token_stride = static_cast<unsigned>(a.x_strides[1]),
      .dx_token_stride = static_cast<unsigned>(a.dx_strides[1]),
      .initial_strides = {a.initial_strides[0], a.initial_strides[1], a.initial_strides[2]},
      .dfinal_strides = {a.dfinal_strides[0], a.dfinal_strides[1], a.dfinal_strides[2]},
      .dinitial_strides = {a.dinitial_strides[0], a.dinitial_strides[1], a.dinitial_strides[2]},
      .batch = static_cast<int>(a.batch),
      .seqlen = static_cast<int>(a.seqlen),
      .dim = static_cast<int>(a.dim),
      .nseq = static_cast<int>(a.nseq),
      .rows = static_cast<int>(a.rows),
      .row_tokens = static_cast<int>(row_tokens),
      .tiles = static_cast<unsigned>(tiles),
      .ctas = static_cast<unsigned>(ctas),
      .weight_fp32 = a.weight_dtype == DType::float32,
      .bias_fp32 = a.bias_dtype == DType::float32,
      .states_fp32 = a.states_dtype == DType::float32,
  };
  if (p.dim == 0) return;
  const std::int64_t columns = kBwdRowBytes / itemsize;
  const dim3 grid = conv1d_grid((p.dim + columns - 1) / columns, ctas);
  const unsigned state_blocks = p.dinitial_states == nullptr ? 0 : conv1d_blocks(static_cast<int64>(p.nseq) * p.dim);
  const DeviceGuard guard(target.device);
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  const auto run = [&]<typename T, int kWidth, bool kSilu, bool kPacked>() {
    if (grid.y > 0) {
      using Memory = BwdMemory<kWidth>;
      if (a.in_boxes) {
        const auto map = [&](std::uintptr_t data, const std::array<std::int64_t, 2>& strides, std::int64_t tokens) {
          return tensor_map(data, a.dtype, {a.rows, row_tokens, 1, a.dim}, {strides[0], strides[1], 0},
                            {.tokens = tokens, .columns = columns, .swizzled = false});
        };
        p.in_boxes = true;
        p.x_map = map(t.x, a.x_strides, Memory::kXRows);
        p.dy_map = map(t.dy, a.dy_strides, Memory::kDyRows);
      }
      constexpr auto kernel = conv1d_bwd_kernel<T, kWidth, kSilu, kPacked>;
      allow_shared_memory<kernel>(Memory::kBytes, target.device);
      launch_early(+kernel, grid, dim3(kBwdThreads), stream, p, "conv1d_bwd_kernel", Memory::kBytes);
    }
    const dim3 sums((p.dim + 4 * kSumThreads - 1) / (4 * kSumThreads), kWidth + (p.dbias != nullptr));
    launch_early(conv1d_bwd_sum_kernel<T, kWidth>, sums, dim3(kSumThreads, kSumRows), stream, p,
                 "conv1d_bwd_sum_kernel");
    if (state_blocks > 0) {
      conv1d_bwd_states_kernel<T, kWidth, kSilu><<<state_blocks, kConvThreads, 0, stream>>>(p);
      check(cudaGetLastError(), "conv1d_bwd_states_kernel");
    }
  };
  conv1d_dispatch(a.dtype, a.width, a.silu, p.cu_seqlens != nullptr, run);
}

}  // namespace hybrid_ops
