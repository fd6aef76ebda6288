// What bindings.cpp calls: one declaration per exported function, in plain C++, so that g++ compiles the bindings
// without CUDA headers and nvcc the kernels without Python's. Pointers are device addresses, 0 where absent.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace hybrid_ops {

// Where to launch: an ordinal of the CUDA runtime and a cudaStream_t.
struct Target {
  int device;
  std::uintptr_t stream;
};

// All of a convolution but its addresses, which change from call to call: made once for each signature.
struct Conv1dArgs {
  DType dtype, weight_dtype, bias_dtype, states_dtype;
  std::int64_t batch, seqlen, dim, width, nseq, nslots, state_len;
  std::array<std::int64_t, 2> x_strides, y_strides;            // batch, token
  std::array<std::int64_t, 3> initial_strides, final_strides;  // slot, channel, column
  int null_slot;
  bool silu;
  int channels, columns;  // of a thread; threads of a CTA beside each other
};

struct Conv1dTensors {
  std::uintptr_t x, weight, bias, initial_states, y, final_states, cu_seqlens, read_slots, write_slots;
};

struct Conv1dBwdArgs {
  DType dtype, weight_dtype, bias_dtype, states_dtype;
  std::int64_t batch, seqlen, dim, width, nseq;
  std::int64_t rows;  // that tiles are cut from: batch, or 1 where all batch rows lie behind each other
  std::array<std::int64_t, 2> dy_strides, x_strides, dx_strides;                  // batch, token
  std::array<std::int64_t, 3> initial_strides, dfinal_strides, dinitial_strides;  // sequence, channel, column
  bool silu;
  bool in_boxes;  // rows of x and dy begin at multiples of 16 bytes, and have whole ones; else of 8
};

struct Conv1dBwdTensors {
  std::uintptr_t dy, x, weight, bias, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, cu_seqlens;
  std::uintptr_t workspace;  // bytes, as many as workspace_bytes says, of any content; so in all that have one
};

// What an SSD scan is made of, but for the addresses: made once for all calls of a kind.
struct SsdArgs {
  DType dt_dtype, dt_bias_dtype, D_dtype, initial_dtype, final_dtype, interval_dtype;
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate, nseq, num_slots, num_intervals, state_interval;
  std::array<std::int64_t, 3> x_strides, B_strides, C_strides, z_strides, y_strides;  // batch, token, head or group
  std::array<std::int64_t, 3> dt_strides;                                             // batch, token, head
  std::int64_t dt_bias_stride;
  std::array<std::int64_t, 2> D_strides;      // head, feature
  std::array<std::int64_t, 3> state_strides;  // of a slot: initial, final, interval
  bool dt_softplus;
  float dt_min, dt_max;
  int null_slot;
  int segments;          // of a sequence, each walked by a CTA of its own; 1: sequences are not split
  int heads;             // that a CTA walks side by side: 1, or 2 of whole sequences
  bool plain_z;          // rows of z begin at multiples of 4 bytes, not of 16
  int turns;             // CTAs that all walk a sequence and take turns with its y: 1, or 2 of whole sequences
  std::uint64_t ticket;  // any number that memory is unlikely to hold
  int num_sms;
  bool normed;  // y, over the features of each group of heads
  float norm_eps;
};

struct SsdTensors {
  std::uintptr_t x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, seq_offsets, read_slots, write_slots,
      interval_slots, y, final, interval, interval_base, norm_weight;
  std::uintptr_t workspace;
};

// ssd_sm90.cu
std::int64_t workspace_bytes(const SsdArgs& args);
void ssd_fwd(const SsdArgs& args, const SsdTensors& tensors, Target target);

// All of a decoding step but its pointers, which change from call to call: made once for each signature.
struct SsdUpdateArgs {
  using TokenStrides = std::array<std::int64_t, 4>;  // sequence, token, head or group, element

  DType state_dtype, dtype, dt_dtype, D_dtype, z_dtype, dt_bias_dtype;  // dtype: of x, B, C, y
  std::int64_t batch, tokens, total, nslots, nheads, headdim, dstate, ngroups, read_width, write_width;
  std::array<std::int64_t, 3> state_strides, scale_strides;  // slot, head, p
  TokenStrides x_strides, z_strides, y_strides, dt_strides, B_strides, C_strides;
  std::int64_t A_stride, dt_bias_stride;
  std::array<std::int64_t, 2> D_strides, read_strides, write_strides;
  std::int64_t accepted_stride, bounds_stride;
  int null_slot;
  float dt_min, dt_max;
  bool dt_softplus, store_each, store_last;
  int warps, rows;  // of a CTA; of a warp: where there is one token each
  int num_sms;
};

// The pointers of SsdUpdateParams, in its order.
using SsdUpdatePointers = std::array<std::uintptr_t, 16>;

// All of a replaying decoding step, or (tokens = 0) of materialising states, but its pointers.
struct SsdReplayArgs {
  using TokenStrides = std::array<std::int64_t, 4>;  // sequence, token, head or group, element

  DType state_dtype, dtype, dt_dtype, D_dtype, z_dtype, dt_bias_dtype;  // dtype: of x, B, C, y and the cache
  std::int64_t batch, tokens, nslots, nheads, headdim, dstate, ngroups, capacity, places;
  std::array<std::int64_t, 3> state_strides;                                       // slot, head, p
  std::array<std::int64_t, 3> cache_x_strides, cache_B_strides, cache_dt_strides;  // slot, head or group, place
  std::int64_t ring_stride;
  TokenStrides x_strides, z_strides, y_strides, dt_strides, B_strides, C_strides;
  std::int64_t A_stride, dt_bias_stride;
  std::array<std::int64_t, 2> D_strides;
  std::int64_t slots_stride, rollback_stride, write_stride;
  int null_slot;
  float dt_min, dt_max;
  bool dt_softplus;
  int rows, warps, heads;  // of a lane; of a block; of a block
};

// The pointers of SsdReplayParams, in its order.
using SsdReplayPointers = std::array<std::uintptr_t, 18>;

// All of an update of the convolution but its pointers.
struct Conv1dUpdateArgs {
  DType dtype, weight_dtype, bias_dtype;  // dtype: of x, y and the state
  std::int64_t batch, dim, width, nslots;
  std::int64_t state_slot_stride, state_column_stride, x_stride, y_stride, slots_stride;
  int null_slot;
  bool silu;
};

// x, conv_state, weight, bias, slots, y
using Conv1dUpdatePointers = std::array<std::uintptr_t, 6>;

// All of a decoding step of a Mamba-2 mixer but its pointers.
struct Mamba2StepArgs {
  DType dtype, conv_state_dtype, state_dtype, conv_weight_dtype, conv_bias_dtype, D_dtype, dt_bias_dtype,
      norm_weight_dtype;  // dtype: of zxbcdt and y
  std::int64_t batch, nslots, nheads, headdim, dstate, conv_dim, width, group_size, rows_per_group;
  std::int64_t zxbcdt_stride, y_stride;
  std::array<std::int64_t, 3> conv_strides, state_strides;  // slot, channel, column; slot, head, p
  std::int64_t conv_bias_stride, A_stride;
  std::array<std::int64_t, 2> D_strides;
  std::int64_t dt_bias_stride, norm_weight_stride, slots_stride;
  int null_slot;
  float dt_min, dt_max, eps;
  bool dt_softplus, norm_before_gate;
  int cluster, warps;  // CTAs of a group of the norm; of a CTA
  bool crowded;        // not all CTAs begin at once
};

// The pointers of Mamba2StepParams, in its order.
using Mamba2StepPointers = std::array<std::uintptr_t, 12>;

// What both directions of RMSNorm are made of. The stream's dtype is that of z, the residual and its gradient.
struct NormForm {
  DType dtype, stream_dtype, weight_dtype;
  std::int64_t rows, hidden, group_size;
  bool gated, norm_before_gate;
  float eps;
  int vectors, warps, teams;  // of a lane; of a team, which has a group of a row; of a CTA
  bool streaming;             // L2 could not keep what is written
};

struct NormArgs {
  NormForm form;
  std::array<std::int64_t, 4> strides;  // of rows: x, z or residual, y, h
};

struct NormTensors {
  std::uintptr_t x, z, residual, weight, y, h;
};

struct NormBwdArgs {
  NormForm form;
  std::array<std::int64_t, 3> strides;  // of rows: dy, x, z or dh
  int ctas;                             // of a group of features
};

struct NormBwdTensors {
  std::uintptr_t dy, x, z, weight, dh, dx, dz, dresidual, dweight;
  std::uintptr_t workspace;
};

// norm_sm90.cu
void norm_fwd(const NormArgs& args, const NormTensors& tensors, Target target);

// norm_bwd_sm90.cu
std::int64_t workspace_bytes(const NormBwdArgs& args);
void norm_bwd(const NormBwdArgs& args, const NormBwdTensors& tensors, Target target);

// conv1d_sm90.cu
void conv1d_fwd(const Conv1dArgs& args, const Conv1dTensors& tensors, Target target);

// conv1d_update_sm90.cu
void conv1d_update(const Conv1dUpdateArgs& args, const Conv1dUpdatePointers& pointers, Target target);

// ssd_update_sm90.cu
void ssd_update(const SsdUpdateArgs& args, const SsdUpdatePointers& pointers, Target target);

// ssd_replay_sm90.cu
void ssd_replay(const SsdReplayArgs& args, const SsdReplayPointers& pointers, Target target);

// mamba2_step_sm90.cu
void mamba2_step(const Mamba2StepArgs& args, const Mamba2StepPointers& pointers, Target target);

// conv1d_bwd_sm90.cu
std::int64_t workspace_bytes(const Conv1dBwdArgs& args);
void conv1d_bwd(const Conv1dBwdArgs& args, const Conv1dBwdTensors& tensors, Target target);

// cutlass_layouts.cu
std::string cutlass_version();
std::int64_t scale_offset_128x4(std::int64_t row, std::int64_t block, std::int64_t rows, std::int64_t columns);

}  // namespace hybrid_ops
