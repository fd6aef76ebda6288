"""Causal convolution of new tokens while decoding, with the windows in a pool of slots.

A program takes a block of channels of one sequence: it reads the window that its first token sees, moves the columns of
the pool on, then walks the tokens with the window in registers. No program reads what another writes.

Letters: D channels of a program, L padded columns of a slot. All arithmetic is float32.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .conv1d import silu
from .launch import Launch, cdiv, next_power_of_2, on_device, plan, traits


class Config(NamedTuple):
    BLOCK_D: int
    num_warps: int


@functools.cache
def config(batch: int, dim: int) -> Config:
    """Small blocks fill the machine while there are few sequences, large ones save programs when there are many."""
    block = 128 if batch * dim < 2**19 else 512
    return Config(BLOCK_D=min(block, next_power_of_2(max(dim, 16))), num_warps=4)


@triton.jit(
    do_not_specialize=["T", "total", "nslots", "null_slot"]
)  # they change from call to call: one kernel for all
def conv1d_update_kernel(
    x_ptr,
    conv_state_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    rollback_ptr,
    cu_seqlens_ptr,
    y_ptr,
    T,
    total,
    dim,
    nslots,
    state_len,
    null_slot,
    x_seq_stride,
    x_token_stride,
    x_dim_stride,
    y_seq_stride,
    y_token_stride,
    y_dim_stride,
    state_slot_stride,
    state_dim_stride,
    state_column_stride,
    weight_dim_stride,
    weight_tap_stride,
    slots_stride,
    rollback_stride,
    cu_seqlens_stride,
    bias_stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ROLLBACK: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    mask = d < dim

    first, length, rows = b * 0, T, T
    if PACKED:
        first = tl.load(cu_seqlens_ptr + b * cu_seqlens_stride).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), total)
        end = tl.load(cu_seqlens_ptr + (b + 1) * cu_seqlens_stride).to(tl.int64)
        length = tl.minimum(tl.maximum(end, first), total) - first
        rows = tl.where(b == tl.num_programs(0) - 1, total - first, length)  # rows behind the last sequence are 0
    x_ptr += b * x_seq_stride + first * x_token_stride + d * x_dim_stride
    y_ptr += b * y_seq_stride + first * y_token_stride + d * y_dim_stride

    slot, kept = b, b < nslots
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + b * slots_stride).to(tl.int64)
        kept = (slot >= 0) & (slot < nslots) & (slot != null_slot)
    old = state_len  # columns that remain
    if HAS_ROLLBACK:
        dropped = tl.load(rollback_ptr + b * rollback_stride)
        old -= tl.minimum(tl.maximum(dropped, 0), state_len - (WIDTH - 1))
    conv_state_ptr += slot * state_slot_stride + d * state_dim_stride
    keep = mask & kept

    window = ()
    for k in tl.static_range(WIDTH - 1):
        column = (old - (WIDTH - 1) + k).to(tl.int64)
        window = window + (tl.load(conv_state_ptr + column * state_column_stride, keep, other=0.0).to(tl.float32),)

    column = tl.arange(0, BLOCK_L)[None, :].to(tl.int64)  # [1, L]
    source = column + length - state_len + old  # of the stream: `old` columns, then the tokens
    is_old = (source >= 0) & (source < old)
    moved = tl.load(conv_state_ptr[:, None] + source * state_column_stride, keep[:, None] & is_old, other=0.0)
    token = source - old
    is_new = (token >= 0) & (token < length)
    added = tl.load(x_ptr[:, None] + token * x_token_stride, keep[:, None] & is_new, other=0.0)
    columns = tl.where(is_new, added.to(tl.float32), moved.to(tl.float32))  # [D, L]
    # a thread may overwrite the column, or (where y is x) the token, that another has yet to read
    tl.debug_barrier()
    tl.store(
        conv_state_ptr[:, None] + column * state_column_stride,
        columns.to(conv_state_ptr.dtype.element_ty),
        keep[:, None] & (column < state_len),
    )

    taps = ()
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + d * weight_dim_stride + k * weight_tap_stride, mask, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_stride, mask, other=0.0).to(tl.float32)
    done = tl.where(kept, length, 0)
    for _ in range(done):
        window = window + (tl.load(x_ptr, mask, other=0.0).to(tl.float32),)
        y = bias
        for k in tl.static_range(WIDTH):
            y += taps[k] * window[k]
        if SILU:
            y = silu(y, y_ptr.dtype.element_ty)
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask)
        window = window[1:]
        x_ptr += x_token_stride
        y_ptr += y_token_stride
    for _ in range(done, rows):
        tl.store(y_ptr, tl.zeros([BLOCK_D], y_ptr.dtype.element_ty), mask)
        y_ptr += y_token_stride


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    silu: bool,
    null_slot: int,
) -> None:
    """Fill y, move the columns of conv_state on. x (batch, dim), (batch, T, dim), or (total, dim) with cu_seqlens."""
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if batch == 0 or conv_state.shape[1] == 0:
        y.zero_()
        return
    tensors = (x, conv_state, weight, bias, slots, rollback, cu_seqlens, y)
    key = ("causal_conv1d_update", silu, null_slot, traits(*tensors))
    with on_device(x):
        plan(key, lambda: make_launch(*tensors, silu, null_slot), x.device)(*tensors)


def make_launch(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    silu: bool,
    null_slot: int,
) -> Launch:
    nslots, dim, state_len = conv_state.shape
    packed = cu_seqlens is not None
    one_each = not packed and x.dim() == 2
    batch = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    block_d, num_warps = config(batch, dim)

    def strides(tensor):  # sequence, token, channel
        first, *rest = tensor.stride()
        return (0, first, *rest) if packed else (first, 0, *rest) if one_each else (first, *rest)

    scalars = (
        0 if packed else 1 if one_each else x.shape[1],
        x.shape[0] if packed else 0,
        dim,
        nslots,
        state_len,
        null_slot,
        *strides(x),
        *strides(y),
        *conv_state.stride(),
        *weight.stride(),
        *(0 if t is None else t.stride(0) for t in (slots, rollback, cu_seqlens, bias)),
    )
    return Launch(
        conv1d_update_kernel,
        (batch, cdiv(dim, block_d)),
        scalars,
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=silu,
        HAS_SLOTS=slots is not None,
        HAS_ROLLBACK=rollback is not None,
        PACKED=packed,
        BLOCK_D=block_d,
        BLOCK_L=next_power_of_2(max(state_len, 1)),
        num_warps=num_warps,
    )
