"""NVFP4 quantisation in float32, in exactly this order of operations: the bytes are the specification.

A value is code * block scale * tensor scale: E2M1, E4M3 for 16 neighbours along K (or 16 x 16), float32 for the tensor.
Two published quantisers differ in how they get there; `mode` names the one that is followed to the bit.

"te", Transformer Engine (Abecassis et al., 2025, "Pretraining Large Language Models with NVFP4", appendix B):

    S = min(2688 / amax, max)         1 where amax is 0 or infinite; tensor scale t = 1 / S
    b = e4m3(amax_b * (S * (1/6)))    clamped at 448
    q = e2m1(clamp(x * min(1 / (b * t), max), -6, 6))

"modelopt", NVIDIA ModelOpt:

    t = amax / 2688                   1 where that is 0 or infinite (ModelOpt makes NaN of a tensor of zeros)
    b = e4m3(amax_b / (6 t))          1 for a block of zeros, clamped to [2^-9, 448]
    q = e2m1(x / (b * t))             saturating

amax is the largest |x| of the tensor, amax_b of the block; both leave NaN out, and NaN itself becomes 6.

Four over six (Cook et al., 2025): each block may map its largest value to 4 instead, by a block scale 1.5 times as
large, where that has the smaller error. The tensor scale leaves room for it: 256 takes the place of 448, so 2688 is
1536. Then b is, with c 1 or 1.5:

    te        e4m3((amax_b / 6 * S) * c)
    modelopt  e4m3(((c amax_b) / 6) * 256 / (amax / 6))      where (c amax_b) / 6 is 0 it counts as 1
"""

import numpy as np

from .minifloat import decode, encode
from .quant_fp8 import FLOAT_MAX, multiplier, per_element, tile_amax
from .ssd_update import random_bits

SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float32)
f32 = np.float32


def nvfp4_quantize(
    x,
    *,
    tensor_scale=None,
    block="1x16",
    mode="te",
    rounding="nearest",
    seed=None,
    hadamard=False,
    four_over_six=None,
    scale_layout="linear",
    orientation="row",
    round_hadamard=lambda h: h,
):
    """x (.., M, K) to (bytes, scale codes, tensor scale), or to a pair of these for orientation "both".

    The shapes are (.., M, K / 2), (.., M, K / 16) or flat for "128x4", and (..). `round_hadamard` rounds what the
    Hadamard transform returns to the dtype of x.
    """
    x = np.asarray(x, np.float32)
    results = []
    for view, name in ((x, "row"), (x.swapaxes(-1, -2), "column")):
        if orientation not in (name, "both"):
            continue
        if hadamard:
            view = np.asarray(round_hadamard(hadamard16(view)), np.float32)
        tile = (16, 16) if block == "16x16" else (1, 16)
        codes, scale, t = _quantize(view, tensor_scale, tile, mode, four_over_six, seed)
        if scale_layout == "128x4":
            scale = swizzle_scales(scale)
        results.append((pack(codes), scale, t))
    return tuple(results) if orientation == "both" else results[0]


@np.errstate(all="ignore")
def _quantize(x, tensor_scale, tile, mode, four_over_six, seed):
    largest = f32(6 * (448 if four_over_six is None else 256))
    amax = tile_amax(x, (None, None))
    if tensor_scale is None:
        S, t, amax = tensor_scales(amax, largest, mode)
    else:
        t = np.broadcast_to(np.asarray(tensor_scale, np.float32), x.shape[:-2])[..., None, None]
        S, amax = np.minimum(1 / t, FLOAT_MAX), t * largest
    blocks = tile_amax(x, tile)
    candidates = []
    for c in (1.0,) if four_over_six is None else (1.0, 1.5):
        b = block_scale(blocks, S, t, amax, mode, None if four_over_six is None else f32(c))
        v = scaled(x, per_element(decode(b, "e4m3"), tile, x.shape), t, mode)
        bits = None if seed is None else random_bits(seed, np.arange(x.size).reshape(x.shape), 0)
        candidates.append((encode(v, "e2m1", bits), b))
    codes, b = candidates[0]
    if four_over_six is not None:
        errors = [_error(x, *candidate, tile, mode, t, amax, largest, four_over_six) for candidate in candidates]
        four = errors[1] < errors[0]  # a tie maps to 6, and so does NaN
        codes = np.where(per_element(four, tile, x.shape), candidates[1][0], codes)
        b = np.where(four, candidates[1][1], b)
    return codes, b.repeat(tile[0], -2)[..., : x.shape[-2], :], t.reshape(x.shape[:-2])


def tensor_scales(amax, largest, mode):
    """(S, t, the amax that t stands for), each (.., 1, 1)."""
    if mode == "te":
        S = multiplier(amax, largest)
        return S, 1 / S, amax
    t = amax / largest
    odd = (t == 0) | np.isinf(t)
    return None, np.where(odd, f32(1), t), np.where(odd, largest, amax)


def block_scale(amax_b, S, t, amax, mode, c):
    """The codes of the block scales; c is None without four over six."""
    if mode == "te":
        b = amax_b * (S * (f32(1) / f32(6))) if c is None else (amax_b / f32(6) * S) * c
        return encode(np.minimum(b, f32(448)), "e4m3")
    b = amax_b / (f32(6) * t) if c is None else (c * amax_b) / f32(6)
    b = np.where(b == 0, f32(1), b)
    if c is not None:
        b = b * f32(256) / (amax / f32(6))
    b = np.where(b > f32(2.0**-9), b, f32(2.0**-9))
    return encode(np.minimum(b, f32(448)), "e4m3")


def scaled(x, b, t, mode):
    """What is rounded to E2M1."""
    return x * np.minimum(1 / (b * t), FLOAT_MAX) if mode == "te" else x / (b * t)


def _error(x, codes, b, tile, mode, t, amax, largest, kind):
    """The error of each block, (.., rows of blocks, K / 16), summed over its elements in the order of K.

    Each decodes as its upstream does: "te" ((code * b) * amax) / 1536, "modelopt" code * (b * t). The 16 rows of a
    16 x 16 block are added in pairs, row r with row r + 8, then + 4, + 2, + 1.
    """
    value, scale = decode(codes, "e2m1"), per_element(decode(b, "e4m3"), tile, x.shape)
    difference = (value * scale * amax / largest if mode == "te" else value * (scale * t)) - x
    error = np.abs(difference) if kind == "mae" else difference * difference
    *lead, M, K = x.shape
    error = error.reshape(*lead, M, K // 16, 16)
    total = np.zeros(error.shape[:-1], np.float32)
    for i in range(16):
        total = total + error[..., i]
    if tile[0] == 1:
        return total
    rows = np.zeros((*lead, b.shape[-2] * 16, K // 16), np.float32)
    rows[..., :M, :] = total
    rows = rows.reshape(*lead, b.shape[-2], 16, K // 16)
    for half in (8, 4, 2, 1):
        rows = rows[..., :half, :] + rows[..., half:, :]
    return rows[..., 0, :]


def hadamard16(x):
    """x M for each 16 neighbours along K, M = diag(SIGNS) H16 / 4 with Sylvester's H16.

    Four rounds of sums and differences, of neighbours at distance 1, 2, 4 and 8, then the factor 1/4.
    """
    with np.errstate(all="ignore"):
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16) * SIGNS
        for distance in (1, 2, 4, 8):
            pairs = groups.reshape(*groups.shape[:-1], 8 // distance, 2, distance)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            groups = np.stack([first + second, first - second], -2).reshape(groups.shape)
        return (groups * f32(0.25)).reshape(x.shape)


def nvfp4_dequantize(data, scale, tensor_scale, *, scale_layout="linear"):
    """float32: (code * block scale) * tensor scale; the first product is exact, the second rounds."""
    codes = unpack(data)
    if scale_layout == "128x4":
        scale = unswizzle_scales(scale, codes.shape[-2], codes.shape[-1] // 16)
    with np.errstate(all="ignore"):
        b = decode(scale, "e4m3").repeat(16, -1)
        return decode(codes, "e2m1") * b * np.asarray(tensor_scale, np.float32)[..., None, None]


def pack(codes):
    """Element 2 i in the low half of byte i."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(data):
    return np.stack([data & 0xF, data >> 4], -1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def swizzle_scales(scale):
    """(.., M, S) to (.., round_up(M, 128) * round_up(S, 4)): tiles of 128 x 4, filled up with zeros."""
    *lead, M, S = scale.shape
    flat = np.zeros((*lead, -(-M // 128) * 128 * -(-S // 4) * 4), scale.dtype)
    m, s = np.arange(M)[:, None], np.arange(S)[None, :]
    flat[..., swizzled_offset(m, s, S)] = scale
    return flat


def unswizzle_scales(flat, M, S):
    return flat[..., swizzled_offset(np.arange(M)[:, None], np.arange(S)[None, :], S)]


def swizzled_offset(m, s, S):
    """Where the scale of row m and block s lies."""
    tile = m // 128 * -(-S // 4) + s // 4
    return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + s % 4
