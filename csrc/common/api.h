// What bindings.cpp calls: one declaration per exported function, in plain C++, so that g++ compiles the bindings
// without CUDA headers and nvcc the kernels without Python's. Pointers are device addresses, 0 where absent.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace hybrid_ops {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Where to launch: an ordinal of the CUDA runtime and a cudaStream_t.
struct Target {
  int device;
  std::uintptr_t stream;
};

struct Conv1dArgs {
  std::uintptr_t x, weight, bias, initial_states, y, final_states, cu_seqlens, read_slots, write_slots;
  DType dtype, weight_dtype, bias_dtype, states_dtype;
  std::int64_t batch, seqlen, dim, width, nseq, nslots, state_len;
  std::array<std::int64_t, 2> x_strides, y_strides;            // batch, token
  std::array<std::int64_t, 3> initial_strides, final_strides;  // slot, channel, column
  int null_slot;
  bool silu;
  int tokens_per_thread;
};

struct Conv1dBwdArgs {
  std::uintptr_t dy, x, weight, bias, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, partials,
      cu_seqlens;
  DType dtype, weight_dtype, bias_dtype, states_dtype;
  std::int64_t batch, seqlen, dim, width, nseq;
  std::array<std::int64_t, 2> dy_strides, x_strides, dx_strides;                  // batch, token
  std::array<std::int64_t, 3> initial_strides, dfinal_strides, dinitial_strides;  // sequence, channel, column
  bool silu;
  int tokens_per_thread;
};

// conv1d_sm90.cu
void conv1d_fwd(const Conv1dArgs& args, Target target);

// conv1d_bwd_sm90.cu
void conv1d_bwd(const Conv1dBwdArgs& args, Target target);

// cutlass_layouts.cu
std::string cutlass_version();
std::int64_t scale_offset_128x4(std::int64_t row, std::int64_t block, std::int64_t rows, std::int64_t columns);

}  // namespace hybrid_ops
