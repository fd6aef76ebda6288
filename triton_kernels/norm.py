"""RMSNorm, plain, with a residual, or gated. One pass over memory: a program normalises a few rows of one group.

Letters: R rows of a program, S padded group size. All arithmetic is float32; every result is cast once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, dense, next_power_of_2, on_device, plan, rows, traits


class Config(NamedTuple):
    BLOCK_R: int
    BLOCK_S: int
    num_warps: int


@functools.cache
def config(group_size: int) -> Config:
    """About 4096 elements a program; a row of a group is never split."""
    block = next_power_of_2(max(group_size, 16))
    return Config(BLOCK_R=max(1, 4096 // block), BLOCK_S=block, num_warps=min(16, max(4, block // 512)))


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x_ptr,
    z_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    num_rows,
    group_size,
    x_stride,
    z_stride,
    residual_stride,
    y_stride,
    h_stride,
    eps,
    HAS_Z: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [R, 1]
    feature = tl.arange(0, BLOCK_S)[None, :]  # [1, S]
    column = tl.program_id(1) * group_size + feature
    mask = (row < num_rows) & (feature < group_size)

    u = tl.load(x_ptr + row * x_stride + column, mask, other=0.0).to(tl.float32)  # [R, S]
    if HAS_RESIDUAL:
        u += tl.load(residual_ptr + row * residual_stride + column, mask, other=0.0).to(tl.float32)
        h = u.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * h_stride + column, h, mask)
        u = h.to(tl.float32)  # the next layer sees the rounded stream, so the norm does too
    if HAS_Z:
        z = tl.load(z_ptr + row * z_stride + column, mask, other=0.0).to(tl.float32)
        gate = z * tl.sigmoid(z)
        if not NORM_BEFORE_GATE:
            u *= gate

    rstd = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) / group_size + eps)  # [R, 1]
    weight = tl.load(weight_ptr + column, feature < group_size, other=0.0).to(tl.float32)  # [1, S]
    y = u * rstd * weight
    if HAS_Z:
        if NORM_BEFORE_GATE:
            y *= gate
    tl.store(y_ptr + row * y_stride + column, y.to(y_ptr.dtype.element_ty), mask)


def norm(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> None:
    """Fill y, and h = x + residual where there is a residual."""
    if x.numel() == 0:
        return
    tensors = (x, z, residual, dense(weight), y, h)
    options = (eps, group_size, norm_before_gate)
    found = plan(("norm", options, traits(*tensors)), lambda: make_launch(*tensors, *options), x.device)
    if found is not None:
        with on_device(x):
            found(*tensors)
        return
    x, z, residual = (None if t is None else rows(t) for t in (x, z, residual))
    dense_y, dense_h = (None if t is None else t.new_empty(t.shape) for t in (y, h))
    norm(x, z, residual, weight, dense_y, dense_h, *options)
    y.copy_(dense_y)
    if h is not None:
        h.copy_(dense_h)


def find(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Callable[..., None] | None:
    """What `norm` comes to for such tensors, given its arguments; None where it copies any."""
    if x.numel() == 0 or not weight.is_contiguous():
        return None
    launch = make_launch(x, z, residual, weight, y, h, eps, group_size, norm_before_gate)
    if launch is None:
        return None

    def run(*arguments: Any) -> None:
        with on_device(arguments[0]):
            launch(*arguments[:6])

    return run


def make_launch(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Launch | None:
    """None where strides ask for a copy first."""
    views = [None if t is None else rows(t) for t in (x, z, residual)]
    moved = any(v is not None and v.data_ptr() != t.data_ptr() for v, t in zip(views, (x, z, residual), strict=True))
    if moved or not (y.is_contiguous() and (h is None or h.is_contiguous())):
        return None
    num_rows, hidden = views[0].shape
    strides = (0 if v is None else v.stride(0) for v in views)
    block_r, block_s, num_warps = config(group_size)
    return Launch(
        norm_kernel,
        (cdiv(num_rows, block_r), hidden // group_size),
        (num_rows, group_size, *strides, hidden, hidden, eps),
        HAS_Z=z is not None,
        HAS_RESIDUAL=residual is not None,
        NORM_BEFORE_GATE=norm_before_gate,
        BLOCK_R=block_r,
        BLOCK_S=block_s,
        num_warps=num_warps,
    )
