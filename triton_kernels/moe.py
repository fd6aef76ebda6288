"""Combining the experts' rows, and LatentMoE's projections.

Letters: T tokens, D features; of the projections M tokens, N columns, K inner size of a tile.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import add_product
from .launch import cdiv, launch, next_power_of_2, on_device, rows


class CombineConfig(NamedTuple):
    BLOCK_D: int
    num_warps: int


class ProjConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@functools.cache
def combine_config(features: int) -> CombineConfig:
    """16 bytes of a 16-bit row for each thread of a program."""
    block = min(next_power_of_2(max(features, 256)), 1024)
    return CombineConfig(BLOCK_D=block, num_warps=block // 256)


@functools.cache
def proj_config(itemsize: int) -> ProjConfig:
    """One for all numbers of tokens: what a token's bits are does not depend on the others."""
    return ProjConfig(32, 32, 32, 4, 2) if itemsize == 4 else ProjConfig(64, 128, 64, 4, 3)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    y_ptr,
    row_index_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    features,
    y_stride,
    residual_stride,
    out_stride,
    scaling_factor,
    HAS_WEIGHTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program makes BLOCK_D features of one token."""
    d_blocks = tl.cdiv(features, BLOCK_D)
    t = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    mask = d < features
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(row_index_ptr + t * TOPK + j).to(tl.int64)
        here = (row >= 0) & (row < num_rows)
        value = tl.load(y_ptr + row * y_stride + d, mask & here, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + t * TOPK + j).to(tl.float32)
            value *= tl.where(here, weight, 0.0)
        total += value
    total *= scaling_factor
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + t * residual_stride + d, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * out_stride + d, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def combine_weights_grad_kernel(
    dout_ptr,
    y_ptr,
    row_index_ptr,
    dweights_ptr,
    num_rows,
    features,
    dout_stride,
    y_stride,
    scaling_factor,
    BLOCK_D: tl.constexpr,
):
    """A program makes the gradient of one weight: <dout[t], y[row_index[t, j]]>, 0 for a row that is not here."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)  # t * k + j
    row = tl.load(row_index_ptr + place).to(tl.int64)
    here = (row >= 0) & (row < num_rows)
    dout_ptr += tl.program_id(0).to(tl.int64) * dout_stride
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, tl.where(here, features, 0), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)  # [D]
        dout = tl.load(dout_ptr + d, d < features, other=0.0).to(tl.float32)
        total += dout * tl.load(y_ptr + row * y_stride + d, d < features, other=0.0).to(tl.float32)
    tl.store(dweights_ptr + place, tl.sum(total) * scaling_factor)


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    m,
    n,
    tokens,
    N,
    K,
    x_stride_m,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    WIDEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[M, N] of x weight^T in float32; rows and columns beyond the last repeat it."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)  # [K]
    x_pointers = x_ptr + tl.minimum(m, tokens - 1)[:, None] * x_stride_m + k[None, :] * x_stride_k  # [M, K]
    weight_pointers = weight_ptr + tl.minimum(n, N - 1)[None, :] * weight_stride_n + k[:, None] * weight_stride_k
    x_step = tl.full([], BLOCK_K, tl.int64) * x_stride_k
    weight_step = tl.full([], BLOCK_K, tl.int64) * weight_stride_k
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k_start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_pointers), tl.load(weight_pointers)
        else:
            x = tl.load(x_pointers, k[None, :] < K - k_start, other=0.0)
            w = tl.load(weight_pointers, k[:, None] < K - k_start, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = add_product(total, x, w, PRECISION)
        x_pointers += x_step
        weight_pointers += weight_step
    return total


@triton.jit(do_not_specialize=["tokens"])
def latent_proj_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    residual_ptr,
    out_ptr,
    logits_ptr,
    tokens,
    N,
    E,
    K,
    x_stride_m,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    gate_stride_n,
    gate_stride_k,
    residual_stride_m,
    residual_stride_n,
    out_stride_m,
    out_stride_n,
    HAS_RESIDUAL: tl.constexpr,
    WIDEN_GATE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The column tiles of the projection come first, then those of the router's logits, if there are any."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    all_tiles = n_tiles + tl.cdiv(E, BLOCK_N)
    tile = tl.program_id(0) % all_tiles
    m = (tl.program_id(0) // all_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [M]
    if tile < n_tiles:
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [N]
        mask = (m < tokens)[:, None] & (n < N)[None, :]
        y = product(
            x_ptr, weight_ptr, m, n, tokens, N, K, x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HAS_RESIDUAL:
            residual = residual_ptr + m[:, None] * residual_stride_m + n[None, :] * residual_stride_n
            y += tl.load(residual, mask, other=0.0).to(tl.float32)
        pointers = out_ptr + m[:, None] * out_stride_m + n[None, :] * out_stride_n
        tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask)
    else:
        e = ((tile - n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [N]
        logits = product(
            x_ptr, gate_ptr, m, e, tokens, E, K, x_stride_m, x_stride_k, gate_stride_n, gate_stride_k,
            WIDEN_GATE, EVEN_K, "ieee" if WIDEN_GATE else PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(logits_ptr + m[:, None] * E + e[None, :], logits, (m < tokens)[:, None] & (e < E)[None, :])


def moe_combine(
    y: Tensor, row_index: Tensor, weights: Tensor | None, residual: Tensor | None, out: Tensor, scaling_factor: float
) -> None:
    """Fill out = scaling_factor * sum_j weights[:, j] * y[row_index[:, j]] + residual."""
    if out.numel() == 0:
        return
    if out.stride(1) != 1:  # odd `out=` strides: one copy
        dense = out.new_empty(out.shape)
        moe_combine(y, row_index, weights, residual, dense, scaling_factor)
        out.copy_(dense)
        return
    (tokens, features), topk = out.shape, row_index.shape[1]
    c = combine_config(features)
    y2, residual2 = rows(y), None if residual is None else rows(residual)
    tensors = (
        y2,
        row_index.contiguous(),
        row_index if weights is None else weights.contiguous(),
        out if residual2 is None else residual2,
        out,
    )
    scalars = (
        y.shape[0],
        features,
        y2.stride(0),
        0 if residual2 is None else residual2.stride(0),
        out.stride(0),
        scaling_factor,
        weights is not None,
        residual is not None,
        topk,
        c.BLOCK_D,
    )
    with on_device(y):
        launch(combine_kernel, tokens * cdiv(features, c.BLOCK_D), tensors, scalars, num_warps=c.num_warps)


def combine_weights_grad(dout: Tensor, y: Tensor, row_index: Tensor, dweights: Tensor, scaling_factor: float) -> None:
    """Fill the contiguous dweights[t, j] = scaling_factor * <dout[t], y[row_index[t, j]]>."""
    if dweights.numel() == 0:
        return
    dout, y2 = rows(dout), rows(y)
    c = combine_config(y.shape[1])
    with on_device(y):
        launch(
            combine_weights_grad_kernel,
            tuple(row_index.shape),
            (dout, y2, row_index.contiguous(), dweights),
            (*y.shape, dout.stride(0), y2.stride(0), scaling_factor),
            BLOCK_D=c.BLOCK_D,
            num_warps=c.num_warps,
        )


def latent_proj(
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    logits: Tensor | None,
) -> None:
    """Fill out = x weight^T + residual and the contiguous logits = x gate_weight^T."""
    tokens, k = x.shape
    n, experts = weight.shape[0], 0 if logits is None else logits.shape[1]
    if tokens == 0 or n + experts == 0:
        return
    c = proj_config(max(t.element_size() for t in (x, weight, gate_weight) if t is not None))
    tensors = (
        x,
        weight,
        weight if gate_weight is None else gate_weight,
        out if residual is None else residual,
        out,
        out if logits is None else logits,
    )
    scalars = (
        tokens,
        n,
        experts,
        k,
        *x.stride(),
        *weight.stride(),
        *(weight if gate_weight is None else gate_weight).stride(),
        *((0, 0) if residual is None else residual.stride()),
        *out.stride(),
        residual is not None,
        gate_weight is not None and gate_weight.dtype != x.dtype,
        k % c.BLOCK_K == 0,
        "ieee" if x.dtype == torch.float32 else "tf32",
        c.BLOCK_M,
        c.BLOCK_N,
        c.BLOCK_K,
    )
    tiles = cdiv(n, c.BLOCK_N) + cdiv(experts, c.BLOCK_N)
    grid = cdiv(tokens, c.BLOCK_M) * tiles
    with on_device(x):
        launch(latent_proj_kernel, grid, tensors, scalars, num_warps=c.num_warps, num_stages=c.num_stages)
