"""One token of each sequence through a Mamba-2 mixer, between its projections, in two kernels.

Of the first, a program takes rows of one head of one sequence: it convolves their x and the head's B and C, moves its
part of the state on, and leaves y in float32. Of the second, a program normalises one group of one sequence, and moves
an equal part of the sequence's windows on, which no program of the first may still have to read.

Letters: P rows of a program, N dstate padded to a power of two, S padded group size, D channels, L padded columns.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv1d import silu
from .launch import Launch, cdiv, dense, next_power_of_2, on_device, plan, traits
from .ssd_update import step_size, store_state


class Config(NamedTuple):
    BLOCK_P: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def config(headdim: int, dstate: int) -> Config:
    """16 elements of the state for each thread of four warps, so that B and C are convolved for enough rows."""
    block_n = next_power_of_2(max(dstate, 16))
    return Config(BLOCK_P=min(max(2048 // block_n, 1), next_power_of_2(headdim)), BLOCK_N=block_n, num_warps=4)


@triton.jit
def convolve(
    token_ptr,
    windows_ptr,
    weight_ptr,
    bias_ptr,
    channel,
    mask,
    kept,
    state_len,
    token_stride,
    channel_stride,
    column_stride,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """silu of the convolution of `channel`s at their new token, float32; windows of nobody (not kept) are zeros."""
    y = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        y = tl.load(bias_ptr + channel, mask, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        if k < WIDTH - 1:
            column = (state_len - (WIDTH - 1) + k).to(tl.int64)
            place = windows_ptr + channel * channel_stride + column * column_stride
            u = tl.load(place, mask & kept, other=0.0).to(tl.float32)
        else:
            u = tl.load(token_ptr + channel * token_stride, mask, other=0.0).to(tl.float32)
        y += tl.load(weight_ptr + channel * WIDTH + k, mask, other=0.0).to(tl.float32) * u
    return silu(y, tl.float32)


@triton.jit(do_not_specialize=["nslots", "null_slot", "state_len"])
def mamba2_state_kernel(
    zxbcdt_ptr,
    conv_state_ptr,
    state_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    A_ptr,
    D_ptr,
    dt_bias_ptr,
    slots_ptr,
    seed_ptr,
    y_ptr,  # (batch, nheads * headdim) float32
    nslots,
    nheads,
    headdim,
    dstate,
    heads_per_group,
    conv_dim,
    state_len,
    null_slot,
    dt_min,
    dt_max,
    zxbcdt_row_stride,
    zxbcdt_column_stride,
    conv_slot_stride,
    conv_channel_stride,
    conv_column_stride,
    state_slot_stride,
    state_head_stride,
    state_p_stride,
    state_n_stride,
    D_head_stride,
    D_p_stride,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_P_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = (tl.program_id(0) // NUM_P_BLOCKS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0) % NUM_P_BLOCKS).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    n = tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    mask_p, mask_n = p < headdim, n < dstate
    mask = mask_p[:, None] & mask_n[None, :]
    inner = nheads * headdim

    slot, kept = b, b < nslots
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        kept = (slot >= 0) & (slot < nslots) & (slot != null_slot)
    state_ptr += head * state_head_stride + p[:, None] * state_p_stride + n[None, :] * state_n_stride
    S = tl.load(state_ptr + slot * state_slot_stride, mask & kept, other=0.0).to(tl.float32)  # [P, N]

    token_ptr = zxbcdt_ptr + b * zxbcdt_row_stride + inner * zxbcdt_column_stride
    windows_ptr = conv_state_ptr + slot * conv_slot_stride
    strides = (zxbcdt_column_stride, conv_channel_stride, conv_column_stride)
    group = head // heads_per_group * dstate
    x = convolve(
        token_ptr, windows_ptr, conv_weight_ptr, conv_bias_ptr, head * headdim + p, mask_p, kept, state_len,
        strides[0], strides[1], strides[2], HAS_CONV_BIAS, WIDTH,
    )  # fmt: skip
    B = convolve(
        token_ptr, windows_ptr, conv_weight_ptr, conv_bias_ptr, inner + group + n, mask_n, kept, state_len,
        strides[0], strides[1], strides[2], HAS_CONV_BIAS, WIDTH,
    )  # fmt: skip
    C = convolve(
        token_ptr, windows_ptr, conv_weight_ptr, conv_bias_ptr, (inner + conv_dim) // 2 + group + n, mask_n, kept,
        state_len, strides[0], strides[1], strides[2], HAS_CONV_BIAS, WIDTH,
    )  # fmt: skip

    dt = tl.load(token_ptr + (conv_dim + head) * zxbcdt_column_stride).to(tl.float32)
    if HAS_DT_BIAS:
        dt += tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = step_size(dt, dt_min, dt_max, DT_SOFTPLUS)
    S = S * tl.exp(dt * tl.load(A_ptr + head)) + (dt * x)[:, None] * B[None, :]
    y = tl.sum(S * C[None, :], axis=1)
    if HAS_D:
        y += tl.load(D_ptr + head * D_head_stride + p * D_p_stride, mask_p, other=0.0).to(tl.float32) * x
    tl.store(y_ptr + b * inner + head * headdim + p, y, mask_p)
    seed = tl.zeros([], tl.int64)
    if STOCHASTIC:
        seed = tl.load(seed_ptr)
    store_state(
        state_ptr, None, S, slot, head, p, 0, seed, mask & kept, state_slot_stride, 0, nheads, headdim, dstate,
        STOCHASTIC, ALIGNED, None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["nslots", "null_slot", "state_len"])
def mamba2_norm_kernel(
    zxbcdt_ptr,
    conv_state_ptr,
    slots_ptr,
    norm_weight_ptr,
    u_ptr,  # (batch, inner) float32
    y_ptr,
    nslots,
    inner,
    group_size,
    conv_dim,
    state_len,
    null_slot,
    eps,
    zxbcdt_row_stride,
    zxbcdt_column_stride,
    conv_slot_stride,
    conv_channel_stride,
    conv_column_stride,
    y_row_stride,
    y_column_stride,
    HAS_SLOTS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot, kept = b, b < nslots
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        kept = (slot >= 0) & (slot < nslots) & (slot != null_slot)

    # [D, L]: an equal part of the channels, each column from the one behind it
    share = tl.cdiv(conv_dim, tl.num_programs(1))
    channel = group * share + tl.arange(0, BLOCK_D)
    has_channel = (tl.arange(0, BLOCK_D) < share) & (channel < conv_dim) & kept
    column = tl.arange(0, BLOCK_L)[None, :].to(tl.int64)
    windows_ptr = conv_state_ptr + slot * conv_slot_stride + channel[:, None] * conv_channel_stride
    token_ptr = zxbcdt_ptr + b * zxbcdt_row_stride
    new = tl.load(token_ptr + (inner + channel) * zxbcdt_column_stride, has_channel, other=0.0).to(tl.float32)
    moved = tl.load(
        windows_ptr + (column + 1) * conv_column_stride, has_channel[:, None] & (column < state_len - 1), other=0.0
    )
    columns = tl.where(column < state_len - 1, moved.to(tl.float32), new[:, None])
    tl.debug_barrier()  # a thread may overwrite the column that another has yet to read
    stored = has_channel[:, None] & (column < state_len)
    tl.store(windows_ptr + column * conv_column_stride, columns.to(conv_state_ptr.dtype.element_ty), stored)

    feature = group * group_size + tl.arange(0, BLOCK_S)
    mask = tl.arange(0, BLOCK_S) < group_size
    u = tl.load(u_ptr + b * inner + feature, mask, other=0.0)  # [S]
    gate = silu(tl.load(token_ptr + feature * zxbcdt_column_stride, mask, other=0.0).to(tl.float32), tl.float32)
    if not NORM_BEFORE_GATE:
        u *= gate
    y = u * tl.rsqrt(tl.sum(u * u, axis=0) / group_size + eps)
    y *= tl.load(norm_weight_ptr + feature, mask, other=0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        y *= gate
    y = tl.where(kept, y, 0.0)
    tl.store(y_ptr + b * y_row_stride + feature * y_column_stride, y.to(y_ptr.dtype.element_ty), mask)


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    slots: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    null_slot: int,
) -> None:
    """Fill y; both pools move on."""
    if y.numel() == 0:
        return
    conv_weight, conv_bias, A, dt_bias, norm_weight, slots = (
        dense(t) for t in (conv_weight, conv_bias, A, dt_bias, norm_weight, slots)
    )
    u = y.new_empty(y.shape, dtype=torch.float32)
    update = (zxbcdt, conv_state, state, conv_weight, conv_bias, A, D, dt_bias, slots, seed, u)
    norm = (zxbcdt, conv_state, slots, norm_weight, u, y)
    update_options = (dt_softplus, dt_min, dt_max, null_slot)
    norm_options = (eps, group_size, norm_before_gate, null_slot)
    key = ("mamba2_step", update_options, norm_options, traits(*update), traits(*norm[3:]))

    def make_launches() -> tuple[Launch, Launch]:
        return make_update(*update, *update_options), make_norm(*norm, *norm_options)

    with on_device(zxbcdt):
        run_update, run_norm = plan(key, make_launches, zxbcdt.device)
        run_update(*update)
        run_norm(*norm)


def make_update(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    seed: Tensor | None,
    u: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    null_slot: int,
) -> Launch:
    nslots, nheads, headdim, dstate = state.shape
    conv_dim, width = conv_weight.shape
    block_p, block_n, num_warps = config(headdim, dstate)
    num_p_blocks = cdiv(headdim, block_p)
    scalars = (
        nslots,
        nheads,
        headdim,
        dstate,
        2 * nheads * dstate // (conv_dim - nheads * headdim),  # heads of a group
        conv_dim,
        conv_state.shape[2],
        null_slot,
        dt_min,
        dt_max,
        *zxbcdt.stride(),
        *conv_state.stride(),
        *state.stride(),
        0 if D is None else D.stride(0),
        D.stride(1) if D is not None and D.dim() == 2 else 0,
    )
    return Launch(
        mamba2_state_kernel,
        (zxbcdt.shape[0] * num_p_blocks, nheads),
        scalars,
        HAS_CONV_BIAS=conv_bias is not None,
        HAS_D=D is not None,
        HAS_DT_BIAS=dt_bias is not None,
        HAS_SLOTS=slots is not None,
        DT_SOFTPLUS=dt_softplus,
        STOCHASTIC=seed is not None,
        ALIGNED=dstate % 8 == 0,
        WIDTH=width,
        NUM_P_BLOCKS=num_p_blocks,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )


def make_norm(
    zxbcdt: Tensor,
    conv_state: Tensor,
    slots: Tensor | None,
    norm_weight: Tensor,
    u: Tensor,
    y: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    null_slot: int,
) -> Launch:
    nslots, conv_dim, state_len = conv_state.shape
    batch, inner = u.shape
    num_groups, block_s = inner // group_size, next_power_of_2(max(group_size, 16))
    scalars = (
        nslots,
        inner,
        group_size,
        conv_dim,
        state_len,
        null_slot,
        eps,
        *zxbcdt.stride(),
        *conv_state.stride(),
        *y.stride(),
    )
    return Launch(
        mamba2_norm_kernel,
        (batch, num_groups),
        scalars,
        HAS_SLOTS=slots is not None,
        NORM_BEFORE_GATE=norm_before_gate,
        BLOCK_S=block_s,
        BLOCK_D=next_power_of_2(max(cdiv(conv_dim, num_groups), 16)),
        BLOCK_L=next_power_of_2(max(state_len, 1)),
        num_warps=min(16, max(4, block_s // 256)),
    )
