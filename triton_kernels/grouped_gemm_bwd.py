"""Gradients of the grouped matrix product: of the pre-activation, of the matrices, and the sums of rows by index, which
are the backward of a gather, in a fixed order instead of atomic additions.

Letters: N, K columns of a tile of an expert's gradient, R rows of a step; D features of a program.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import add_product, precision
from .launch import architecture, cdiv, dense, launch, on_device, rows

BLOCK_D = 1024


class WgradConfig(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@functools.cache
def wgrad_config(itemsize: int, arch: int) -> WgradConfig:
    if itemsize == 4:
        return WgradConfig(64, 64, 32, 4, 2)
    if arch in (86, 89, 120):
        return WgradConfig(128, 128, 32, 8, 3)
    return WgradConfig(128, 128, 64, 8, 3) if arch < 90 else WgradConfig(128, 256, 64, 8, 4)


@triton.jit
def preact_grad_kernel(
    dy_ptr,
    preact_ptr,
    row_scale_ptr,
    dpreact_ptr,
    dh_ptr,
    dscale_ptr,
    N,
    dy_stride_m,
    dy_stride_n,
    dpreact_stride_m,
    dpreact_stride_n,
    RELU2: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_DPREACT: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program makes one row of dh and what its row_scale gets."""
    row = tl.program_id(0).to(tl.int64)
    width = 2 * N if GATED else N
    dh_ptr += row * width
    if RELU2 or GATED or HAS_DSCALE:
        preact_ptr += row * width
    if HAS_DPREACT:
        dpreact_ptr += row * dpreact_stride_m
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(row_scale_ptr + row)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)  # [D]
        mask = d < N
        dy = tl.load(dy_ptr + row * dy_stride_m + d * dy_stride_n, mask, other=0.0).to(tl.float32)
        h = dy
        if RELU2 or GATED or HAS_DSCALE:
            h = tl.load(preact_ptr + d, mask, other=0.0).to(tl.float32)
        y = h
        dh = dy * scale
        if RELU2:
            positive = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            y = positive * positive
            dh *= 2 * positive
        if GATED:
            up = tl.load(preact_ptr + N + d, mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(h)
            y = h * s * up
            dup = dh * h * s
            dh *= up * s * (1 + h * (1 - s))
            if HAS_DPREACT:
                dup += tl.load(dpreact_ptr + (N + d) * dpreact_stride_n, mask, other=0.0).to(tl.float32)
            tl.store(dh_ptr + N + d, dup.to(dh_ptr.dtype.element_ty), mask)
        if HAS_DPREACT:
            dh += tl.load(dpreact_ptr + d * dpreact_stride_n, mask, other=0.0).to(tl.float32)
        tl.store(dh_ptr + d, dh.to(dh_ptr.dtype.element_ty), mask)
        dscale += y * dy
    if HAS_DSCALE:
        tl.store(dscale_ptr + row, tl.sum(dscale))


@triton.jit(do_not_specialize=["rows", "rows_of_a"])
def grouped_gemm_wgrad_kernel(
    dh_ptr,
    a_ptr,
    offs_ptr,
    gather_ptr,
    db_ptr,
    rows,
    rows_of_a,
    N,
    K,
    dh_stride_m,
    dh_stride_n,
    a_stride_m,
    a_stride_k,
    HAS_GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program owns [N, K] of an expert's gradient and walks the expert's rows in order."""
    n_tiles, k_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(0) // (n_tiles * k_tiles)
    tile = tl.program_id(0) % (n_tiles * k_tiles)
    start = tl.load(offs_ptr + expert - 1, expert > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), rows)
    end = tl.minimum(tl.load(offs_ptr + expert), rows)
    n = (tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [N]
    k = (tile // n_tiles * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # [K]
    dh_columns = dh_ptr + n[:, None] * dh_stride_n
    a_columns = a_ptr + k[None, :] * a_stride_k

    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first_row in range(start, end, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)  # [R]
        inside = row < end
        a_row = row
        if HAS_GATHER:
            a_row = tl.load(gather_ptr + row, inside, other=-1)
            inside = (a_row >= 0) & (a_row < rows_of_a)
        dh_mask = (n < N)[:, None] & (row < end)[None, :]
        dh = tl.load(dh_columns + row.to(tl.int64)[None, :] * dh_stride_m, dh_mask, other=0.0)  # [N, R]
        a_mask = inside[:, None] & (k < K)[None, :]
        a = tl.load(a_columns + a_row.to(tl.int64)[:, None] * a_stride_m, a_mask, other=0.0)  # [R, K]
        total = add_product(total, dh, a, PRECISION)

    pointers = db_ptr + (expert.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(pointers, total.to(db_ptr.dtype.element_ty), (n < N)[:, None] & (k < K)[None, :])


@triton.jit
def index_sum_kernel(
    values_ptr,
    weights_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    features,
    repeat,
    values_stride,
    factor,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program sums one row of the result, or a part of it, over the places that the sorted index has for this row."""
    d_blocks = tl.cdiv(features, BLOCK_D)
    row = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        place = tl.load(order_ptr + i)
        value = tl.load(values_ptr + place // repeat * values_stride + d, d < features, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + place).to(tl.float32)
        total += value
    tl.store(out_ptr + row * features + d, (total * factor).to(out_ptr.dtype.element_ty), d < features)


def preact_grad(
    dy: Tensor,
    preact: Tensor | None,
    row_scale: Tensor | None,
    dpreact: Tensor | None,
    dh: Tensor,
    dscale: Tensor | None,
    activation: str | None,
) -> None:
    """Fill the contiguous dh, the gradient of the pre-activation, and dscale, that of row_scale, where it is wanted."""
    if dy.numel() == 0:
        if dscale is not None:
            dscale.zero_()
        return
    with on_device(dy):
        launch(
            preact_grad_kernel,
            dy.shape[0],
            (dy, preact, dense(row_scale), dpreact, dh, dscale),
            (dy.shape[1], *dy.stride(), *((0, 0) if dpreact is None else dpreact.stride())),
            RELU2=activation == "relu2",
            GATED=activation == "silu_gated",
            HAS_SCALE=row_scale is not None,
            HAS_DPREACT=dpreact is not None,
            HAS_DSCALE=dscale is not None,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )


def grouped_gemm_wgrad(
    dh: Tensor, a: Tensor, offs: Tensor, gather: Tensor | None, db: Tensor, chosen: WgradConfig | None = None
) -> None:
    """Fill the contiguous db: dh[rows of e]^T a[rows of e] for each expert e."""
    experts, n, k = db.shape
    if db.numel() == 0 or a.numel() == 0 or dh.numel() == 0:
        db.zero_()
        return
    c = chosen or wgrad_config(a.element_size(), architecture(a))
    tensors = (
        dh,
        a,
        offs.contiguous(),
        offs if gather is None else gather.contiguous(),
        db,
    )
    scalars = (
        dh.shape[0],
        a.shape[0],
        n,
        k,
        *dh.stride(),
        *a.stride(),
        gather is not None,
        precision(a),
        c.BLOCK_N,
        c.BLOCK_K,
        c.BLOCK_R,
    )
    grid = experts * cdiv(n, c.BLOCK_N) * cdiv(k, c.BLOCK_K)
    with on_device(a):
        launch(grouped_gemm_wgrad_kernel, grid, tensors, scalars, num_warps=c.num_warps, num_stages=c.num_stages)


def index_sum(values: Tensor, index: Tensor, weights: Tensor | None, out: Tensor, repeat: int, factor: float) -> None:
    """Fill the contiguous out[r] = factor * sum of weights[p] * values[p // repeat] over the p with index[p] = r."""
    if out.numel() == 0 or values.numel() == 0:
        out.zero_()
        return
    in_order, order = torch.sort(index, stable=True)
    wanted = torch.arange(out.shape[0] + 1, dtype=index.dtype, device=index.device)
    starts = torch.searchsorted(in_order, wanted)
    values = rows(values)
    with on_device(values):
        launch(
            index_sum_kernel,
            out.shape[0] * cdiv(out.shape[1], BLOCK_D),
            (values, dense(weights), order, starts, out),
            (out.shape[1], repeat, values.stride(0), factor),
            HAS_WEIGHTS=weights is not None,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )
