"""FP8 quantisation in plain torch: the order of operations of `reference/quant_fp8.py`, so its bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .minifloat import FLOAT_MAX, FP8, LARGEST, constant, encode_fp8

Tile = tuple[int | None, int | None]

# rows and columns that share a scale; None is all there are
TILES: dict[str, Tile] = {"tensor": (None, None), "row": (1, None), "1x128": (1, 128), "128x128": (128, 128)}
TILES["mx"] = (1, 32)


def fp8_quantize(
    x: Tensor, given: Tensor | None, data: Tensor, scale: Tensor | None, target: str, scaling: str, pow2_scale: bool
) -> None:
    """Fill data (E, M, K), and scale unless it is given; "1x128" has it (E, ceil(K / 128), round_up(M, 4))."""
    x, tile, largest = x.float(), TILES[scaling], LARGEST[target]
    if given is not None:
        s = multiplier_of(given[:, None, None])
    elif scaling == "mx":
        stored = e8m0_scale(tile_amax(x, tile), largest)
        s = ((254 - stored) << 23).view(torch.float32)
    else:
        s = multiplier(tile_amax(x, tile), largest, pow2_scale)
        stored = torch.div(constant(1.0, x), s)
    if scale is not None:
        if scaling == "1x128":
            scale.fill_(1.0)[..., : x.shape[1]] = stored.transpose(1, 2)
        else:
            scale.copy_(stored.view(scale.shape))
    data.copy_(encode_fp8(x * per_element(s, tile, x.shape), target))


def fp8_dequantize(data: Tensor, scale: Tensor, y: Tensor, target: str, scaling: str) -> None:
    """Fill y (E, M, K) with code * scale, in float32, cast once. scale is (E, rows, columns of tiles)."""
    if scaling == "mx":  # 2^-127 is subnormal, 255 is NaN
        exponent = scale.int()
        bits = torch.where(exponent == 0, 0x00400000, exponent << 23).where(exponent < 255, 0x7FC00000)
        scale = bits.view(torch.float32)
    y.copy_(data.view(FP8[target]).float() * per_element(scale, TILES[scaling], data.shape))


def multiplier(amax: Tensor, largest: float, pow2_scale: bool = False) -> Tensor:
    """What x is multiplied by: largest / amax, at most float32's maximum; 1 where amax is 0 or infinite."""
    s = torch.div(constant(largest, amax), amax).clamp(max=FLOAT_MAX)
    if pow2_scale:
        s = (s.view(torch.int32) & 0x7F800000).view(torch.float32)
    return s.where((amax > 0) & (amax <= FLOAT_MAX), 1.0)


def multiplier_of(scale: Tensor) -> Tensor:
    """What x is multiplied by, for a given scale."""
    return torch.div(constant(1.0, scale), scale).clamp(max=FLOAT_MAX)


def e8m0_scale(amax: Tensor, largest: float) -> Tensor:
    """int32: the exponent + 127 of the smallest power of two that brings amax down to `largest`.

    Both largest values are 1.75 * 2^n: amax's own exponent serves up to a mantissa of 1.75, beyond that the next.
    """
    pattern = amax.view(torch.int32)
    exponent = (pattern + 0x1FFFFF >> 23) - (8 if largest == 448.0 else 15)
    return exponent.clamp(min=0).where((pattern > 0) & (pattern < 0x7F800000), 127)


def tile_amax(x: Tensor, tile: Tile) -> Tensor:
    """(E, rows, columns of tiles): the largest magnitude, without NaN, of each tile."""
    E, M, K = x.shape
    height, width = tile[0] or max(M, 1), tile[1] or max(K, 1)
    rows = 1 if tile[0] is None else -(-M // height)
    columns = 1 if tile[1] is None else -(-K // width)
    magnitude = F.pad(x.abs().nan_to_num(nan=0.0, posinf=torch.inf), (0, columns * width - K, 0, rows * height - M))
    return magnitude.view(E, rows, height, columns, width).amax((2, 4))


def per_element(scale: Tensor, tile: Tile, shape: torch.Size) -> Tensor:
    """Each tile's scale at each of its elements, or one that broadcasts."""
    _, M, K = shape
    if tile[0] is not None and tile[0] > 1:
        scale = scale.repeat_interleave(tile[0], 1)[:, :M]
    if tile[1] is not None:
        scale = scale.repeat_interleave(tile[1], 2)[..., :K]
    return scale
