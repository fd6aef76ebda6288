"""Grouped matrix product; with the transposed view of b it is the gradient of the rows too.

How many tiles there are is known on the device only, so as many programs as the machine holds at once share them: each
finds the expert, rows and columns of its next tile in the prefix sum of the experts' tiles, kept in its registers.

Letters: M rows, N columns, K inner size of a tile; E experts, padded to a power of two with one more for rows of none.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture, cdiv, launch, next_power_of_2, num_sms, on_device

__all__ = ["architecture", "config", "grouped_gemm", "precision"]

FEW_TILES = 132  # the multiprocessors of an H100; a constant, so that a problem has one configuration everywhere


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int  # row tiles of an expert that take turns with one column tile, which stays in L2
    num_warps: int
    num_stages: int
    programs_per_sm: int


@functools.cache
def config(
    rows: int, experts: int, n: int, k: int, itemsize: int, gated: bool, arch: int, batch_invariant: bool
) -> Config:
    """By the rows of an average expert: tiles are as high as they fill, and as wide as shared memory allows.

    A gated product has two column tiles, each half as wide. With batch_invariant the rows do not matter.
    """
    small = arch in (86, 89, 120)  # 99 KiB of shared memory
    mean = 128 if batch_invariant else rows / max(experts, 1)
    if itemsize == 4:
        chosen = Config(64, 64, 32, 8, 4, 2, 2)
    elif mean <= 8:
        chosen = Config(16, 64, 128, 8, 4, 3 if small else 4, 2)
    elif mean <= 24:
        chosen = Config(32, 64, 128, 8, 4, 3, 2)
    elif mean <= 64:
        chosen = Config(64, 128, 64, 8, 4, 3, 1 if small else 2)
    elif small:
        chosen = Config(128, 128, 32, 8, 8, 3, 1)
    elif arch < 90:
        chosen = Config(128, 128, 64, 8, 8, 3, 1)
    elif arch < 100:
        chosen = Config(128, 256, 64, 8, 8, 4, 1)
    else:  # of 256 columns some would be spilled
        chosen = Config(128, 128, 64, 8, 8, 4, 1)
    if mean <= 64:
        chosen = narrowed(chosen, rows, experts, n)
    return chosen._replace(BLOCK_N=chosen.BLOCK_N // 2) if gated else chosen


def narrowed(chosen: Config, rows: int, experts: int, n: int) -> Config:
    """Where weights are the traffic: narrower tiles if there are fewer than the machine has programs for."""
    row_tiles = max(cdiv(rows, chosen.BLOCK_M), min(experts, rows))
    while chosen.BLOCK_N > 32 and row_tiles * cdiv(n, chosen.BLOCK_N) < FEW_TILES:
        chosen = chosen._replace(BLOCK_N=chosen.BLOCK_N // 2)
    return chosen


@triton.jit
def expert_tiles(offs_ptr, num_experts, rows, n_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """[E]: where the rows of each expert end, and its tiles; expert `num_experts` has the rows of none."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offs_ptr + e, e < num_experts, other=rows)
    starts = tl.load(offs_ptr + e - 1, (e > 0) & (e <= num_experts), other=0)
    ends = tl.minimum(tl.maximum(ends, 0), rows)
    starts = tl.where(e > num_experts, rows, tl.minimum(tl.maximum(starts, 0), rows))
    tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M) * n_tiles
    return ends, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(tile, ends, tile_ends, rows, n_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(expert, first row, where the expert's rows end, column tile): rows first within GROUP_M row tiles.

    Where `offs` falls the tiles make no sense, but stay inside.
    """
    before = tile_ends <= tile
    expert = tl.sum(before.to(tl.int32))
    local = tile - tl.max(tl.where(before, tile_ends, 0))
    first_row = tl.max(tl.where(before, ends, 0))
    end = tl.min(tl.where(before, rows, ends))
    m_tiles = tl.cdiv(end - first_row, BLOCK_M)
    group, local = local // (GROUP_M * n_tiles), local % (GROUP_M * n_tiles)
    height = tl.maximum(tl.minimum(m_tiles - group * GROUP_M, GROUP_M), 1)
    row = first_row + (group * GROUP_M + local % height) * BLOCK_M
    return expert, row, end, tl.minimum(local // height, n_tiles - 1)


@triton.jit
def load_b(pointers, k, k_left, n_mask, EVEN_K: tl.constexpr, MASK_N: tl.constexpr):
    if EVEN_K and MASK_N:
        return tl.load(pointers, n_mask[None, :], other=0.0)
    elif EVEN_K:
        return tl.load(pointers)
    elif MASK_N:
        return tl.load(pointers, (k[:, None] < k_left) & n_mask[None, :], other=0.0)
    else:
        return tl.load(pointers, k[:, None] < k_left, other=0.0)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b. In float32 ("ieee") the terms of one tile are summed apart from the others: hundreds of terms one
    after the other lose too much. The bound on imprecise sums keeps the compiler from making `total` the accumulator.
    """
    if PRECISION == "ieee":
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


# these change from call to call: one kernel for all values
@triton.jit(do_not_specialize=["rows", "rows_of_a"])
def grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    offs_ptr,
    gather_ptr,
    row_scale_ptr,
    out_ptr,
    preact_ptr,
    rows,
    rows_of_a,
    num_experts,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_e,
    b_stride_n,
    b_stride_k,
    out_stride_m,
    out_stride_n,
    HAS_GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_PREACT: tl.constexpr,
    RELU2: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    CLAMP_N: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    ends, tile_ends = expert_tiles(offs_ptr, num_experts, rows, n_tiles, BLOCK_M, BLOCK_E)
    a_step = tl.full([], BLOCK_K, tl.int64) * a_stride_k
    b_step = tl.full([], BLOCK_K, tl.int64) * b_stride_k
    b_second = tl.full([], 1, tl.int64) * N * b_stride_n  # where the gated product's second matrix begins
    for tile in range(tl.program_id(0), tl.max(tile_ends), tl.num_programs(0)):
        expert, first_row, end, n_tile = find_tile(tile, ends, tile_ends, rows, n_tiles, BLOCK_M, GROUP_M)
        row = first_row + tl.arange(0, BLOCK_M)  # [M]
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
        k = tl.arange(0, BLOCK_K).to(tl.int64)  # [K]

        # rows and columns beyond the last are read from the last, and not stored: no masks in the loop. Only where the
        # columns of b lie side by side they are masked: clamped ones could not be read 16 bytes at a time
        a_row = tl.maximum(tl.minimum(row, end - 1), 0)
        if HAS_GATHER:
            source = tl.load(gather_ptr + a_row)
            a_row = tl.minimum(tl.maximum(source, 0), rows_of_a - 1)
        a_pointers = a_ptr + a_row.to(tl.int64)[:, None] * a_stride_m + k[None, :] * a_stride_k  # [M, K]
        n_read = tl.minimum(n, N - 1) if CLAMP_N else n
        b_expert = b_ptr + tl.minimum(expert, num_experts - 1).to(tl.int64) * b_stride_e
        b_pointers = b_expert + n_read.to(tl.int64)[None, :] * b_stride_n + k[:, None] * b_stride_k  # [K, N]

        h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = h
        for k_start in range(0, tl.where(expert < num_experts, K, 0), BLOCK_K):
            if EVEN_K:
                a = tl.load(a_pointers)
            else:
                a = tl.load(a_pointers, k[None, :] < K - k_start, other=0.0)
            b = load_b(b_pointers, k, K - k_start, n < N, EVEN_K, MASK_N)
            h = add_product(h, a, b, PRECISION)
            if GATED:
                b = load_b(b_pointers + b_second, k, K - k_start, n < N, EVEN_K, MASK_N)
                up = add_product(up, a, b, PRECISION)
            a_pointers += a_step
            b_pointers += b_step

        row_offset = row.to(tl.int64)[:, None]
        mask = (row < end)[:, None] & (n < N)[None, :]
        if HAS_GATHER:  # a row from outside a is 0
            inside = ((source >= 0) & (source < rows_of_a))[:, None]
            h = tl.where(inside, h, 0.0)
            up = tl.where(inside, up, 0.0)
        if HAS_PREACT:
            preact = preact_ptr + row_offset * (2 * N if GATED else N) + n[None, :]
            tl.store(preact, h.to(preact_ptr.dtype.element_ty), mask)
            if GATED:
                tl.store(preact + N, up.to(preact_ptr.dtype.element_ty), mask)
        if RELU2:
            h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            h *= h
        if GATED:
            h = h * tl.sigmoid(h) * up
        if HAS_SCALE:
            h *= tl.load(row_scale_ptr + row, row < end, other=0.0).to(tl.float32)[:, None]
        pointers = out_ptr + row_offset * out_stride_m + n.to(tl.int64)[None, :] * out_stride_n
        tl.store(pointers, h.to(out_ptr.dtype.element_ty), mask)


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
    preact: Tensor | None,
    activation: str | None,
    batch_invariant: bool,
    chosen: Config | None = None,
) -> None:
    """Fill out and, where it is wanted, the contiguous pre-activation; `chosen` is to measure other configurations."""
    (rows, n), (experts, _, k) = out.shape, b.shape
    if rows == 0 or n == 0 or experts == 0 or a.numel() == 0:
        for filled in (out, preact):
            if filled is not None:
                filled.zero_()
        return
    gated = activation == "silu_gated"
    c = chosen or config(rows, experts, n, k, a.element_size(), gated, architecture(a), batch_invariant)
    most_tiles = (cdiv(rows, c.BLOCK_M) + min(experts, rows) + 1) * cdiv(n, c.BLOCK_N)
    columns_adjoin = b.stride(1) == 1 and b.stride(2) != 1
    tensors = (
        a,
        b,
        offs.contiguous(),
        offs if gather is None else gather.contiguous(),
        offs if row_scale is None else row_scale.contiguous(),
        out,
        out if preact is None else preact,
    )
    scalars = (
        rows,
        a.shape[0],
        experts,
        n,
        k,
        *a.stride(),
        *b.stride(),
        *out.stride(),
        gather is not None,
        row_scale is not None,
        preact is not None,
        activation == "relu2",
        gated,
        k % c.BLOCK_K == 0,
        not columns_adjoin and n % c.BLOCK_N != 0,
        columns_adjoin and n % c.BLOCK_N != 0,
        precision(a),
        next_power_of_2(experts + 1),
        c.BLOCK_M,
        c.BLOCK_N,
        c.BLOCK_K,
        c.GROUP_M,
    )
    grid = min(most_tiles, num_sms(a) * c.programs_per_sm)
    with on_device(a):
        launch(grouped_gemm_kernel, grid, tensors, scalars, num_warps=c.num_warps, num_stages=c.num_stages)


def precision(a: Tensor) -> str:
    """float32 is multiplied as float32: TF32 keeps 11 of its 24 bits."""
    return "ieee" if a.dtype == torch.float32 else "tf32"
