"""FP8 quantisation: the order of operations of `reference/quant_fp8.py`, in the same float32, so its bytes.

One pass over memory, but for per-tensor scales, which need the largest magnitude first. Whatever rounds is an addition,
a multiplication or `tl.div_rn`, and nothing is fused: launches say `enable_fp_fusion=False`.

Letters: R rows and C columns of a program's tile, along M and K.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .amax import load_tile, matrix_amax, program_tile
from .launch import cdiv, launch, next_power_of_2, on_device
from .minifloat import FLOAT_MAX, INFINITY, amax_bits, cast, decode, decode_e8m0, encode

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
# rows and columns that share a scale; 0 is all there are
TILES = {"tensor": (0, 0), "row": (1, 0), "1x128": (1, 128), "128x128": (128, 128), "mx": (1, 32)}


class Config(NamedTuple):
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


@functools.cache
def config(scaling: str, K: int, transposed: bool = False) -> Config:
    """Some thousand elements a program, a scale's tile never split; wide in the direction that memory runs.

    A "row" of up to 16384 elements stays in registers; longer ones, and columns of x, are read twice, the second time
    from the cache.
    """
    if scaling == "128x128":
        return Config(128, 128, 8)
    if scaling == "row" and not transposed and K <= 16384:
        block = next_power_of_2(max(K, 16))
        return Config(max(1, 4096 // block), block, min(16, max(4, block // 512)))
    if transposed:
        return Config(64, 128, 8)
    return Config(32, 128, 4) if scaling == "1x128" else Config(16, 256, 4)


@triton.jit
def multiplier(amax, largest: tl.constexpr, POW2: tl.constexpr):
    """What x is multiplied by: largest / amax, at most float32's maximum; 1 where amax is 0 or infinite."""
    s = tl.minimum(tl.div_rn(largest, amax), FLOAT_MAX)
    if POW2:
        s = (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((amax > 0.0) & (amax <= FLOAT_MAX), s, 1.0)


@triton.jit
def reciprocal(v):
    """1 / v, at most float32's maximum."""
    return tl.minimum(tl.div_rn(1.0, v), FLOAT_MAX)


@triton.jit
def e8m0_scale(amax, target: tl.constexpr):
    """The exponent + 127 of the smallest power of two that brings amax, given by its bits, down to 1.75 * 2^n."""
    n: tl.constexpr = 8 if target == "e4m3" else 15
    code = tl.maximum(((amax + 0x1FFFFF) >> 23) - n, 0)
    return tl.where((amax > 0) & (amax < INFINITY), code, 127)


@triton.jit
def fp8_tile_kernel(
    x_ptr,
    amax_ptr,  # of "tensor": the bits of amax, or with GIVEN the scale
    data_ptr,
    scale_ptr,
    M,
    K,
    matrix_stride,
    row_stride,
    column_stride,
    SCALING: tl.constexpr,
    GIVEN: tl.constexpr,
    POW2: tl.constexpr,
    TARGET: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    e, row, c, tile = program_tile(M, K, BLOCK_R, BLOCK_C)
    column = c * BLOCK_C + tl.arange(0, BLOCK_C)
    x = load_tile(x_ptr, e, row, column, M, K, matrix_stride, row_stride, column_stride)
    if SCALING == "tensor":
        if GIVEN:
            y = x * reciprocal(tl.load(amax_ptr + e))
        else:
            s = multiplier(tl.load(amax_ptr + e).to(tl.float32, bitcast=True), LARGEST, POW2)
            y = x * s
            tl.store(scale_ptr + e, reciprocal(s), tile == 0)
    elif SCALING == "128x128":
        amax = tl.max(amax_bits(x, 1), axis=0)
        s = multiplier(amax.to(tl.float32, bitcast=True), LARGEST, POW2)
        y = x * s
        tl.store(scale_ptr + tl.program_id(0), reciprocal(s))
    else:
        group: tl.constexpr = 128 if SCALING == "1x128" else 32
        G: tl.constexpr = BLOCK_C // group
        tiles = tl.reshape(x, [BLOCK_R, G, group])
        amax = amax_bits(tiles, 2)  # [R, G]
        g = (c * G + tl.arange(0, G))[None, :]
        groups = tl.cdiv(K, group)
        if SCALING == "mx":
            code = e8m0_scale(amax, TARGET)
            s = ((254 - code) << 23).to(tl.float32, bitcast=True)
            mask = (row < M)[:, None] & (g < groups)
            tl.store(scale_ptr + (e * M + row[:, None]) * groups + g, code.to(tl.uint8), mask)
        else:  # along M, with rows up to a multiple of 4
            s = multiplier(amax.to(tl.float32, bitcast=True), LARGEST, POW2)
            padded = tl.cdiv(M, 4) * 4
            mask = (row < padded)[:, None] & (g < groups)
            tl.store(scale_ptr + (e * groups + g) * padded + row[:, None], reciprocal(s), mask)
        y = tl.reshape(tiles * s[:, :, None], [BLOCK_R, BLOCK_C])
    mask = (row < M)[:, None] & (column < K)[None, :]
    tl.store(data_ptr + (e * M + row[:, None]) * K + column[None, :], encode(y, TARGET).to(tl.uint8), mask)


@triton.jit
def fp8_row_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    M,
    K,
    matrix_stride,
    row_stride,
    column_stride,
    POW2: tl.constexpr,
    TARGET: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,  # a block holds the row
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    e, row, _, _ = program_tile(M, BLOCK_C, BLOCK_R, BLOCK_C)
    column = tl.arange(0, BLOCK_C)
    x = load_tile(x_ptr, e, row, column, M, K, matrix_stride, row_stride, column_stride)
    amax = amax_bits(x, 1)  # [R]
    if not WHOLE:
        for begin in range(BLOCK_C, K, BLOCK_C):
            x = load_tile(x_ptr, e, row, begin + column, M, K, matrix_stride, row_stride, column_stride)
            amax = tl.maximum(amax, amax_bits(x, 1))
    s = multiplier(amax.to(tl.float32, bitcast=True), LARGEST, POW2)
    tl.store(scale_ptr + e * M + row, reciprocal(s), row < M)
    data_ptr += (e * M + row[:, None]) * K
    if WHOLE:
        mask = (row < M)[:, None] & (column < K)[None, :]
        tl.store(data_ptr + column[None, :], encode(x * s[:, None], TARGET).to(tl.uint8), mask)
    else:
        for begin in range(0, K, BLOCK_C):
            x = load_tile(x_ptr, e, row, begin + column, M, K, matrix_stride, row_stride, column_stride)
            mask = (row < M)[:, None] & (begin + column < K)[None, :]
            tl.store(data_ptr + begin + column[None, :], encode(x * s[:, None], TARGET).to(tl.uint8), mask)


@triton.jit
def fp8_dequantize_kernel(
    data_ptr,
    scale_ptr,
    y_ptr,
    M,
    K,
    data_matrix_stride,
    data_row_stride,
    data_column_stride,
    scale_matrix_stride,
    scale_row_stride,
    scale_column_stride,
    TARGET: tl.constexpr,
    E8M0: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    e, row, c, _ = program_tile(M, K, BLOCK_R, BLOCK_C)
    column = c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < M)[:, None] & (column < K)[None, :]
    place = e * data_matrix_stride + row[:, None] * data_row_stride + column[None, :] * data_column_stride
    code = tl.load(data_ptr + place, mask, other=0).to(tl.int32)
    scale_ptr += e * scale_matrix_stride
    if TILE_M == 0:
        scale = tl.load(scale_ptr)
    elif TILE_K == 0:
        scale = tl.load(scale_ptr + row * scale_row_stride, row < M, other=0)[:, None]
    else:
        place = (row // TILE_M)[:, None] * scale_row_stride + (column // TILE_K)[None, :] * scale_column_stride
        scale = tl.load(scale_ptr + place, mask, other=0)
    if E8M0:
        scale = decode_e8m0(scale.to(tl.int32))
    y = decode(code, TARGET) * scale
    tl.store(y_ptr + (e * M + row[:, None]) * K + column[None, :], cast(y, y_ptr.dtype.element_ty), mask)


def fp8_quantize(
    x: Tensor, given: Tensor | None, data: Tensor, scale: Tensor | None, target: str, scaling: str, pow2_scale: bool
) -> None:
    """Fill data (E, M, K), and scale unless it is given; "1x128" has it (E, ceil(K / 128), round_up(M, 4))."""
    E, M, K = x.shape
    if x.numel() == 0:
        if scale is not None:
            scale.fill_(1)
        return
    block_r, block_c, num_warps = config(scaling, K, transposed=x.stride(1) == 1 and x.stride(2) != 1)
    sizes, options = (M, K, *x.stride()), dict(POW2=pow2_scale, TARGET=target, LARGEST=LARGEST[target])
    options |= dict(BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps, enable_fp_fusion=False)
    rows = E * cdiv(M, block_r)
    with on_device(x):
        if scaling == "row":
            launch(fp8_row_kernel, rows, (x, data, scale), sizes, WHOLE=block_c >= K, **options)
            return
        known = given if given is not None else matrix_amax(x) if scaling == "tensor" else x
        grid, tensors = rows * cdiv(K, block_c), (x, known, data, scale)
        launch(fp8_tile_kernel, grid, tensors, sizes, SCALING=scaling, GIVEN=given is not None, **options)


def fp8_dequantize(data: Tensor, scale: Tensor, y: Tensor, target: str, scaling: str) -> None:
    """Fill y (E, M, K) with code * scale, cast once. scale is (E, rows, columns of tiles)."""
    E, M, K = data.shape
    if data.numel() == 0:
        return
    block_r, block_c, num_warps = 16, 256, 4
    tile_m, tile_k = TILES[scaling]
    grid = E * cdiv(M, block_r) * cdiv(K, block_c)
    with on_device(data):
        launch(
            fp8_dequantize_kernel, grid, (data, scale, y), (M, K, *data.stride(), *scale.stride()),
            TARGET=target, E8M0=scaling == "mx", TILE_M=tile_m, TILE_K=tile_k, BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
