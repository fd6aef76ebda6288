"""Gradients of RMSNorm, plain, with a residual, or gated. One pass over memory, then the weight's gradient.

Letters: R rows of a block, S padded group size, P rows and H features of a tile of partial sums.

Programs are as many as the GPU holds at once. Each walks blocks of rows of one group and keeps the group's part of the
weight's gradient in registers; what it has in the end is one row of `partials`, and a second kernel adds those in
their order. So nothing is atomic, and the bits are the same from run to run on the same GPU.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, dense, launch, next_power_of_2, num_sms, on_device, rows


class Config(NamedTuple):
    BLOCK_R: int
    BLOCK_S: int
    NUM_STAGES: int
    num_warps: int
    programs_per_sm: int


@functools.cache
def config(group_size: int, gated: bool, itemsize: int) -> Config:
    """16 elements a thread; the next rows are read while these are computed.

    That takes up to 128 registers a thread, gated 170, in float32 up to 200: hence the warps of a multiprocessor.
    """
    block = next_power_of_2(max(group_size, 16))
    num_warps = min(16, max(1024, block) // 512)
    warps_per_sm = 16 if not gated else 12 if itemsize == 2 else 10
    return Config(
        BLOCK_R=max(1, 1024 // block),
        BLOCK_S=block,
        NUM_STAGES=2 if block <= 4096 else 1,
        num_warps=num_warps,
        programs_per_sm=max(1, warps_per_sm // num_warps),
    )


@triton.jit(do_not_specialize=["num_rows", "programs"])
def norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    z_ptr,
    weight_ptr,
    dh_ptr,
    dx_ptr,
    dz_ptr,
    dresidual_ptr,
    partials_ptr,
    num_rows,
    programs,
    group_size,
    dy_stride,
    x_stride,
    z_stride,
    dh_stride,
    result_stride,
    eps,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    feature = tl.arange(0, BLOCK_S)[None, :]  # [1, S]
    column = tl.program_id(1) * group_size + feature
    inside = feature < group_size
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)  # [1, S]
    dweight = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    for block in tl.range(program, tl.cdiv(num_rows, BLOCK_R), programs, num_stages=NUM_STAGES):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)  # [R, 1]
        mask = (row < num_rows) & inside
        x = tl.load(x_ptr + row * x_stride + column, mask, other=0.0).to(tl.float32)  # [R, S]
        dy = tl.load(dy_ptr + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        u = x
        dyg = dy
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_stride + column, mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(z)
            gate = z * sigmoid
            dgate = sigmoid + gate * (1 - sigmoid)
            if NORM_BEFORE_GATE:
                dyg *= gate
            else:
                u *= gate
        dn = dyg * weight
        rstd = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) / group_size + eps)  # [R, 1]
        n = u * rstd
        du = rstd * (dn - n * (tl.sum(dn * u, axis=1, keep_dims=True) * (rstd / group_size)))
        dweight += dyg * n
        target = row * result_stride + column
        if z_ptr is not None:
            if NORM_BEFORE_GATE:
                dz = dy * n * weight * dgate
            else:
                dz = du * x * dgate
                du *= gate
            tl.store(dz_ptr + target, dz.to(dz_ptr.dtype.element_ty), mask)
        if dh_ptr is not None:
            du += tl.load(dh_ptr + row * dh_stride + column, mask, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + target, du.to(dresidual_ptr.dtype.element_ty), mask)
        tl.store(dx_ptr + target, du.to(dx_ptr.dtype.element_ty), mask)
    sums = tl.sum(dweight, axis=0)[None, :]
    tl.store(partials_ptr + program.to(tl.int64) * group_size * tl.num_programs(1) + column, sums, inside)


@triton.jit(do_not_specialize=["num_partials"])
def norm_dweight_kernel(partials_ptr, dweight_ptr, num_partials, hidden, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    column = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]  # [1, H]
    place = tl.arange(0, BLOCK_P)[:, None]  # [P, 1]
    sums = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for first in range(0, num_partials, BLOCK_P):
        row = (first + place).to(tl.int64)
        mask = (row < num_partials) & (column < hidden)
        sums += tl.load(partials_ptr + row * hidden + column, mask, other=0.0)
    dweight = tl.sum(sums, axis=0)[None, :]
    tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), column < hidden)


def norm_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    dh: Tensor | None,
    dx: Tensor,
    dz: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> None:
    """Fill the gradients, all of them contiguous. x is what the norm saw; dh is added to its gradient."""
    dy, x, z, dh = (None if t is None else rows(t) for t in (dy, x, z, dh))
    num_rows, hidden = x.shape
    block_r, block_s, num_stages, num_warps, programs_per_sm = config(group_size, z is not None, x.element_size())
    groups = hidden // group_size
    programs = max(1, min(cdiv(num_rows, block_r), num_sms(x) * programs_per_sm // groups))
    partials = x.new_empty((programs, hidden), dtype=torch.float32)
    strides = (0 if t is None else t.stride(0) for t in (dy, x, z, dh))
    with on_device(x):
        launch(
            norm_bwd_kernel,
            (programs, groups),
            (dy, x, z, dense(weight), dh, dx, dz, dresidual, partials),
            (num_rows, programs, group_size, *strides, hidden, eps),
            NORM_BEFORE_GATE=norm_before_gate,
            BLOCK_R=block_r,
            BLOCK_S=block_s,
            NUM_STAGES=num_stages,
            num_warps=num_warps,
        )
        launch(
            norm_dweight_kernel,
            cdiv(hidden, 32),
            (partials, dweight),
            (programs, hidden),
            BLOCK_P=32,
            BLOCK_H=32,
            num_warps=4,
        )
