"""NVFP4 quantisation: the order of operations of `reference/quant_nvfp4.py`, in the same float32, so its bytes.

The largest magnitude first (unless the tensor scale is given), then one pass: a program quantises a tile. Whatever
rounds is an addition, a multiplication or `tl.div_rn`, and nothing is fused: launches say `enable_fp_fusion=False`.

Letters: R rows and C columns of a program's tile, along M and K; S = C / 16 blocks in a row of it.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .amax import hadamard16, load_tile, matrix_amax, program_tile
from .launch import cdiv, launch, on_device
from .minifloat import FLOAT_MAX, amax_bits, cast, decode, encode, encode_e2m1_stochastic
from .quant_fp8 import multiplier, reciprocal
from .ssd_update import random_bits


class Config(NamedTuple):
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


@functools.cache
def config(transposed: bool = False, four_over_six: bool = False) -> Config:
    """4096 elements a program, wide in the direction that memory runs; two candidates need twice the registers."""
    num_warps = 8 if four_over_six else 4
    return Config(64, 64, num_warps) if transposed else Config(16, 256, num_warps)


@triton.jit
def tensor_scales(value_ptr, GIVEN: tl.constexpr, TE: tl.constexpr, LARGEST: tl.constexpr):
    """(S, t, the amax that t stands for), from the bits of amax or from a given t."""
    if GIVEN:
        t = tl.load(value_ptr)
        return reciprocal(t), t, t * LARGEST
    amax = tl.load(value_ptr).to(tl.float32, bitcast=True)
    if TE:
        S = multiplier(amax, LARGEST, False)
        t = reciprocal(S)
    else:
        t = tl.div_rn(amax, LARGEST)
        usable = (t > 0.0) & (t <= FLOAT_MAX)
        S, t, amax = t, tl.where(usable, t, 1.0), tl.where(usable, amax, LARGEST)  # S has no part in this mode
    return S, t, amax


@triton.jit
def block_scale(amax_b, S, t, amax, c: tl.constexpr, TE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr):
    """The codes of the block scales; c is 1 or 1.5 with four over six."""
    if TE:
        if FOUR_OVER_SIX:
            b = tl.div_rn(amax_b, 6.0) * S * c
        else:
            b = amax_b * (S * tl.div_rn(1.0, 6.0))
    else:
        if FOUR_OVER_SIX:
            b = tl.div_rn(amax_b * c, 6.0)
        else:
            b = tl.div_rn(amax_b, 6.0 * t)
        b = tl.where(b == 0.0, 1.0, b)
        if FOUR_OVER_SIX:
            b = tl.div_rn(b * 256.0, tl.div_rn(amax, 6.0))
        b = tl.where(b > 0.001953125, b, 0.001953125)
    return encode(b, "e4m3")


@triton.jit
def encode_blocks(x, bits, b, t, TE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes of E2M1 [R, S, 16], for block scales b [R, S]."""
    scale = decode(b, "e4m3") * t
    if TE:
        v = x * reciprocal(scale)[:, :, None]
    else:
        v = tl.div_rn(x, scale[:, :, None])
    if STOCHASTIC:
        return encode_e2m1_stochastic(v, bits)
    return encode(v, "e2m1")


@triton.jit
def block_errors(
    x, codes, b, t, amax, LARGEST: tl.constexpr, TE: tl.constexpr, MAE: tl.constexpr, SQUARE: tl.constexpr
):
    """[R, S]: the error of each block, or of the 16 x 16 block that it belongs to; elements in their order."""
    R: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1]
    value, scale = decode(codes, "e2m1"), decode(b, "e4m3")
    if TE:
        value = tl.div_rn(value * scale[:, :, None] * amax, LARGEST)
    else:
        value = value * (scale * t)[:, :, None]
    difference = value - x
    error = tl.abs(difference) if MAE else difference * difference
    element = tl.arange(0, 16)[None, None, :]
    total = tl.zeros([R, S], tl.float32)
    for i in tl.static_range(16):
        total += tl.sum(tl.where(element == i, error, 0.0), axis=2)  # one of the 16: nothing is added in another order
    if SQUARE:  # row r with row r + 8, then + 4, + 2, + 1
        halves = tl.permute(tl.reshape(total, [R // 16, 2, 8, S]), (0, 2, 3, 1))
        first, second = tl.split(halves)
        halves = tl.permute(tl.reshape(first + second, [R // 16, 2, 4, S]), (0, 2, 3, 1))
        first, second = tl.split(halves)
        halves = tl.permute(tl.reshape(first + second, [R // 16, 2, 2, S]), (0, 2, 3, 1))
        first, second = tl.split(halves)
        halves = tl.permute(tl.reshape(first + second, [R // 16, 2, 1, S]), (0, 2, 3, 1))
        first, second = tl.split(halves)
        total = tl.reshape(tl.broadcast_to(first + second, [R // 16, 16, S]), [R, S])
    return total


@triton.jit
def swizzled(m, s, num_blocks):
    """The place of block scale (m, s) in the layout "128x4"."""
    tile = m // 128 * tl.cdiv(num_blocks, 4) + s // 4
    return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + s % 4


@triton.jit
def nvfp4_kernel(
    x_ptr,
    value_ptr,  # the bits of amax, or with GIVEN the tensor scale
    seed_ptr,
    data_ptr,
    scale_ptr,
    tensor_scale_ptr,
    M,
    K,
    padded_rows,  # of the scales, and padded_blocks: those of whole tiles where the layout has tiles
    padded_blocks,
    matrix_stride,
    row_stride,
    column_stride,
    GIVEN: tl.constexpr,
    TE: tl.constexpr,
    SQUARE: tl.constexpr,
    HADAMARD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FOUR_OVER_SIX: tl.constexpr,  # None, "mse" or "mae"
    SWIZZLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    S: tl.constexpr = BLOCK_C // 16
    CHOOSE: tl.constexpr = FOUR_OVER_SIX is not None
    LARGEST: tl.constexpr = 1536.0 if CHOOSE else 2688.0
    e, row, c, tile = program_tile(padded_rows, padded_blocks * 16, BLOCK_R, BLOCK_C)
    column = c * BLOCK_C + tl.arange(0, BLOCK_C)
    x = load_tile(x_ptr, e, row, column, M, K, matrix_stride, row_stride, column_stride)
    if HADAMARD:
        x = hadamard16(x, x_ptr.dtype.element_ty)
    encode_scale, t, amax = tensor_scales(value_ptr + e, GIVEN, TE, LARGEST)
    if not GIVEN:
        tl.store(tensor_scale_ptr + e, t, tile == 0)

    x = tl.reshape(x, [BLOCK_R, S, 16])
    bits = 0
    if STOCHASTIC:
        begin = (e * M + row) * K + c * BLOCK_C  # [R]
        bits = tl.reshape(random_bits(tl.load(seed_ptr), begin, K, 0, BLOCK_C, True), [BLOCK_R, S, 16])
    largest = amax_bits(x, 2)  # [R, S]
    if SQUARE:
        tiles = tl.max(tl.reshape(largest, [BLOCK_R // 16, 16, S]), axis=1)
        largest = tl.reshape(tl.broadcast_to(tiles[:, None, :], [BLOCK_R // 16, 16, S]), [BLOCK_R, S])
    amax_b = largest.to(tl.float32, bitcast=True)

    b = block_scale(amax_b, encode_scale, t, amax, 1.0, TE, CHOOSE)
    codes = encode_blocks(x, bits, b, t, TE, STOCHASTIC)
    if CHOOSE:
        b4 = block_scale(amax_b, encode_scale, t, amax, 1.5, TE, CHOOSE)
        codes4 = encode_blocks(x, bits, b4, t, TE, STOCHASTIC)
        MAE: tl.constexpr = FOUR_OVER_SIX == "mae"
        error = block_errors(x, codes, b, t, amax, LARGEST, TE, MAE, SQUARE)
        four = block_errors(x, codes4, b4, t, amax, LARGEST, TE, MAE, SQUARE) < error
        b, codes = tl.where(four, b4, b), tl.where(four[:, :, None], codes4, codes)

    low, high = tl.split(tl.reshape(codes, [BLOCK_R, BLOCK_C // 2, 2]))
    byte = c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
    mask = (row < M)[:, None] & (byte < K // 2)[None, :]
    tl.store(data_ptr + (e * M + row[:, None]) * (K // 2) + byte[None, :], (low | (high << 4)).to(tl.uint8), mask)

    s = (c * S + tl.arange(0, S))[None, :]
    inside = (row < M)[:, None] & (s < K // 16)
    scale_ptr += e * padded_rows * padded_blocks
    if SWIZZLED:
        place = swizzled(row[:, None], s, K // 16)
        b = tl.where(inside, b, 0)
        inside = (row < padded_rows)[:, None] & (s < padded_blocks)
    else:
        place = row[:, None] * (K // 16) + s
    tl.store(scale_ptr + place, b.to(tl.uint8), inside)


@triton.jit
def nvfp4_dequantize_kernel(
    data_ptr,
    scale_ptr,
    tensor_scale_ptr,
    y_ptr,
    M,
    K,
    data_matrix_stride,
    data_row_stride,
    data_column_stride,
    scale_matrix_stride,
    scale_row_stride,
    scale_column_stride,
    SWIZZLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    S: tl.constexpr = BLOCK_C // 16
    e, row, c, _ = program_tile(M, K, BLOCK_R, BLOCK_C)
    byte = c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
    mask = (row < M)[:, None] & (byte < K // 2)[None, :]
    place = e * data_matrix_stride + row[:, None] * data_row_stride + byte[None, :] * data_column_stride
    codes = tl.load(data_ptr + place, mask, other=0).to(tl.int32)
    s = (c * S + tl.arange(0, S))[None, :]
    if SWIZZLED:
        place = swizzled(row[:, None], s, K // 16) * scale_column_stride
    else:
        place = row[:, None] * scale_row_stride + s * scale_column_stride
    mask = (row < M)[:, None] & (s < K // 16)
    b = decode(tl.load(scale_ptr + e * scale_matrix_stride + place, mask, other=0).to(tl.int32), "e4m3")
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), [BLOCK_R, S, 16])
    y = decode(codes, "e2m1") * b[:, :, None] * tl.load(tensor_scale_ptr + e)
    y = tl.reshape(cast(y, y_ptr.dtype.element_ty), [BLOCK_R, BLOCK_C])
    column = c * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(y_ptr + (e * M + row[:, None]) * K + column[None, :], y, (row < M)[:, None] & (column < K)[None, :])


def nvfp4_quantize(
    x: Tensor,
    given: Tensor | None,
    seed: Tensor | None,
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    block: str,
    mode: str,
    four_over_six: str | None,
    hadamard: bool,
    scale_layout: str,
) -> None:
    """Fill data (E, M, K / 2), scale (E, M, K / 16) or swizzled, and tensor_scale (E,) unless it is given."""
    E, M, K = x.shape
    if x.numel() == 0:
        if tensor_scale is not None:
            tensor_scale.fill_(1.0)
        return
    swizzle = scale_layout == "128x4"
    rows, blocks = (cdiv(M, 128) * 128, cdiv(K, 64) * 4) if swizzle else (M, K // 16)
    block_r, block_c, num_warps = config(x.stride(1) == 1 and x.stride(2) != 1, four_over_six is not None)
    value = matrix_amax(x, hadamard) if given is None else given
    grid = E * cdiv(rows, block_r) * cdiv(blocks * 16, block_c)
    with on_device(x):
        launch(
            nvfp4_kernel,
            grid,
            (x, value, seed, data, scale, tensor_scale),
            (M, K, rows, blocks, *x.stride()),
            GIVEN=given is not None,
            TE=mode == "te",
            SQUARE=block == "16x16",
            HADAMARD=hadamard,
            STOCHASTIC=seed is not None,
            FOUR_OVER_SIX=four_over_six,
            SWIZZLED=swizzle,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


def nvfp4_dequantize(data: Tensor, scale: Tensor, tensor_scale: Tensor, y: Tensor, scale_layout: str) -> None:
    """Fill y (E, M, K) with (code * block scale) * tensor scale, cast once."""
    E, M, K = y.shape
    if y.numel() == 0:
        return
    swizzle = scale_layout == "128x4"
    strides = (scale.stride(0), 0, scale.stride(1)) if swizzle else scale.stride()
    block_r, block_c, num_warps = config()
    grid = E * cdiv(M, block_r) * cdiv(K, block_c)
    with on_device(data):
        launch(
            nvfp4_dequantize_kernel,
            grid,
            (data, scale, tensor_scale.contiguous(), y),
            (M, K, *data.stride(), *strides),
            SWIZZLED=swizzle,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
