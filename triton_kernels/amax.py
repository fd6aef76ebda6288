"""The largest magnitude of each matrix, and the Hadamard transform that may come before it.

Letters: R rows and C columns of a program's tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, on_device
from .minifloat import amax_bits, cast, widen

# the fixed signs of the transform, bit i for element i: set where the sign is -1
NEGATIVE: tl.constexpr = tl.constexpr(0b1101_0111_1110_1000)


@triton.jit
def program_tile(num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's matrix e, its rows [R], and the number of its tile among those side by side and in the matrix."""
    across = tl.cdiv(num_columns, BLOCK_C)
    tiles = tl.cdiv(num_rows, BLOCK_R) * across
    tile = tl.program_id(0) % tiles
    row = (tile // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return (tl.program_id(0) // tiles).to(tl.int64), row, (tile % across).to(tl.int64), tile


@triton.jit
def load_tile(x_ptr, e, row, column, num_rows, num_columns, matrix_stride, row_stride, column_stride):
    """float32 [R, C] of matrix e, zero outside; row and column are int64."""
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    x_ptr += e * matrix_stride
    return widen(tl.load(x_ptr + row[:, None] * row_stride + column[None, :] * column_stride, mask, other=0.0))


@triton.jit
def hadamard16(x, dtype: tl.constexpr):
    """x diag(signs) H16 / 4 for each 16 neighbours along C, rounded to `dtype`.

    Each round pairs neighbours of the lowest index bit and moves that bit to the top of the 16: after four rounds, of
    distance 1, 2, 4 and 8, every element is back in its place.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    negative = (NEGATIVE >> (tl.arange(0, C) % 16)) & 1
    x = x * tl.where(negative != 0, -1.0, 1.0)[None, :]
    for _ in tl.static_range(4):
        first, second = tl.split(tl.reshape(x, [R, C // 16, 8, 2]))
        pair = tl.join(first + second, first - second)  # [R, C / 16, 8, 2]
        x = tl.reshape(tl.permute(pair, (0, 1, 3, 2)), [R, C])
    return widen(cast(x * 0.25, dtype))


@triton.jit
def amax_kernel(
    x_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    matrix_stride,
    row_stride,
    column_stride,
    HADAMARD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    e, row, c, _ = program_tile(num_rows, num_columns, BLOCK_R, BLOCK_C)
    column = c * BLOCK_C + tl.arange(0, BLOCK_C)
    x = load_tile(x_ptr, e, row, column, num_rows, num_columns, matrix_stride, row_stride, column_stride)
    if HADAMARD:
        x = hadamard16(x, x_ptr.dtype.element_ty)
    tl.atomic_max(amax_ptr + e, tl.max(amax_bits(x, 1), axis=0), sem="relaxed")


def matrix_amax(x: Tensor, hadamard: bool = False) -> Tensor:
    """(E,) int32, the bits of max |x[e]| without NaN. A maximum is the same in every order: no race shows."""
    E, M, K = x.shape
    amax = x.new_zeros(E, dtype=torch.int32)
    if x.numel() == 0:
        return amax
    block_r, block_c = (64, 256) if x.stride(1) == 1 else (32, 512)
    grid = E * cdiv(M, block_r) * cdiv(K, block_c)
    with on_device(x):
        launch(
            amax_kernel, grid, (x, amax), (M, K, *x.stride()),
            HADAMARD=hadamard, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return amax
