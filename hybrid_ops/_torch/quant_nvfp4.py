"""NVFP4 quantisation in plain torch: the order of operations of `reference/quant_nvfp4.py`, so its bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .minifloat import FLOAT_MAX, constant, decode_e2m1, decode_e4m3, encode_e2m1, encode_fp8
from .quant_fp8 import Tile, multiplier, multiplier_of, per_element, tile_amax
from .ssd_update import random_bits

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


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
    M = x.shape[1]
    x = hadamard16(x.float()).to(x.dtype).float() if hadamard else x.float()
    tile: Tile = (16, 16) if block == "16x16" else (1, 16)
    largest = 2688.0 if four_over_six is None else 1536.0
    amax = tile_amax(x, (None, None))
    if given is not None:
        t = given[:, None, None]
        S, amax = multiplier_of(t), t * largest
    else:
        S, t, amax = _tensor_scales(amax, largest, mode)
    if tensor_scale is not None:
        tensor_scale.copy_(t[:, 0, 0])
    bits = None
    if seed is not None:
        index = torch.arange(x.numel(), device=x.device)[None]
        bits = random_bits(seed, index, index.new_zeros(1, 1)).view(x.shape)

    def encoded(c: float | None) -> tuple[Tensor, Tensor]:
        b = _block_scale(tile_amax(x, tile), S, t, amax, mode, c)
        return encode_e2m1(_scaled(x, per_element(decode_e4m3(b), tile, x.shape), t, mode), bits), b

    if four_over_six is None:
        codes, b = encoded(None)
    else:
        six, four = encoded(1.0), encoded(1.5)
        error_six, error_four = (_error(x, *each, tile, mode, t, amax, largest, four_over_six) for each in (six, four))
        choose_four = error_four < error_six  # a tie maps to 6, and so does NaN
        codes = torch.where(per_element(choose_four, tile, x.shape), four[0], six[0])
        b = torch.where(choose_four, four[1], six[1])
    data.copy_(codes[..., ::2] | codes[..., 1::2] << 4)
    b = b.repeat_interleave(tile[0] or 1, 1)[:, :M]
    scale.copy_(swizzle_scales(b) if scale_layout == "128x4" else b)


def _tensor_scales(amax: Tensor, largest: float, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """(S, t, the amax that t stands for), each (E, 1, 1)."""
    one = constant(1.0, amax)
    if mode == "te":
        S = multiplier(amax, largest)
        return S, torch.div(one, S), amax
    t = torch.div(amax, constant(largest, amax))
    usable = (t > 0) & (t <= FLOAT_MAX)
    return one, t.where(usable, one), amax.where(usable, largest)


def _block_scale(amax_b: Tensor, S: Tensor, t: Tensor, amax: Tensor, mode: str, c: float | None) -> Tensor:
    """Codes of E4M3; c is None without four over six."""
    six = constant(6.0, amax_b)
    if mode == "te":
        sixth = torch.div(constant(1.0, six), six)
        b = amax_b * (S * sixth) if c is None else torch.div(amax_b, six) * S * c
    else:
        b = torch.div(amax_b, six * t) if c is None else torch.div(amax_b * c, six)
        b = b.where(b != 0, 1.0)
        if c is not None:
            b = torch.div(b * 256.0, torch.div(amax, six))
        b = b.where(b > 2.0**-9, 2.0**-9)
    return encode_fp8(b, "e4m3")


def _scaled(x: Tensor, b: Tensor, t: Tensor, mode: str) -> Tensor:
    return x * multiplier_of(b * t) if mode == "te" else torch.div(x, b * t)


def _error(
    x: Tensor, codes: Tensor, b: Tensor, tile: Tile, mode: str, t: Tensor, amax: Tensor, largest: float, kind: str
) -> Tensor:
    """The error of each block, (E, rows of blocks, K / 16); see the reference for the order of its sums."""
    value, scale = decode_e2m1(codes), per_element(decode_e4m3(b), tile, x.shape)
    value = torch.div(value * scale * amax, constant(largest, x)) if mode == "te" else value * (scale * t)
    difference = value - x
    error = difference.abs() if kind == "mae" else difference * difference
    elements = error.unflatten(2, (-1, 16)).unbind(3)
    total = torch.zeros_like(elements[0])
    for element in elements:
        total = total + element
    if tile[0] == 1:
        return total
    rows = F.pad(total, (0, 0, 0, 16 * b.shape[1] - x.shape[1])).unflatten(1, (b.shape[1], 16))
    for half in (8, 4, 2, 1):
        rows = rows[:, :, :half] + rows[:, :, half:]
    return rows[:, :, 0]


def hadamard16(x: Tensor) -> Tensor:
    """x diag(SIGNS) H16 / 4 for each 16 neighbours along K, by sums and differences at distance 1, 2, 4 and 8."""
    groups = x.unflatten(-1, (-1, 16)) * torch.tensor(SIGNS, dtype=x.dtype, device=x.device)
    for distance in (1, 2, 4, 8):
        first, second = groups.unflatten(-1, (8 // distance, 2, distance)).unbind(-2)
        groups = torch.stack([first + second, first - second], -2).flatten(-3)
    return (groups * 0.25).flatten(-2)


def nvfp4_dequantize(data: Tensor, scale: Tensor, tensor_scale: Tensor, y: Tensor, scale_layout: str) -> None:
    """Fill y (E, M, K) with (code * block scale) * tensor scale in float32, cast once."""
    codes = torch.stack([data & 0xF, data >> 4], -1).flatten(-2)
    if scale_layout == "128x4":
        scale = unswizzle_scales(scale, y.shape[1], y.shape[2] // 16)
    b = decode_e4m3(scale).repeat_interleave(16, 2)
    y.copy_(decode_e2m1(codes) * b * tensor_scale[:, None, None])


def swizzle_scales(scale: Tensor) -> Tensor:
    """(.., M, S) of one byte each to (.., round_up(M, 128) * round_up(S, 4)), filled up with zeros."""
    M, S = scale.shape[-2:]
    padded = F.pad(scale.view(torch.uint8), (0, -S % 4, 0, -M % 128))
    tiles = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))  # [.., M / 128, 4, 32, S / 4, 4]
    return tiles.movedim((-2, -3, -4), (-4, -3, -2)).flatten(-5).view(scale.dtype)


def unswizzle_scales(flat: Tensor, M: int, S: int) -> Tensor:
    """The inverse: (.., M, S)."""
    tiles = flat.view(torch.uint8).unflatten(-1, (-(-M // 128), -(-S // 4), 32, 4, 4))
    linear = tiles.movedim((-4, -3, -2), (-2, -3, -4)).flatten(-5, -3).flatten(-2)
    return linear[..., :M, :S].contiguous().view(flat.dtype)
