"""FP8 quantisation in float32, in this order of operations: the bytes are the specification.

    amax = max |x| of a tile, without NaN
    s    = largest / amax        rounded to float32, at most its maximum; a power of two below it where asked; 1 where
                                 amax is 0 or infinite (Transformer Engine's current scaling)
    data = round(clamp(x s))     to nearest even; infinity saturates, NaN stays
    scale = 1 / s

"mx" (OCP Microscaling) has E8M0 scales: the smallest power of two with amax / scale <= largest.
"""

import numpy as np

from .minifloat import FORMATS, decode, encode

# rows and columns that share a scale
TILES = {"tensor": (None, None), "row": (1, None), "1x128": (1, 128), "128x128": (128, 128), "mx": (1, 32)}
FLOAT_MAX = np.finfo(np.float32).max


def fp8_quantize(x, scaling="row", *, target="e4m3", scale=None, pow2_scale=False, orientation="row"):
    """x (.., M, K) to (codes, scale), or to a pair of these for orientation "both".

    scale, float32: (..) for "tensor", (.., M, 1) for "row", (.., M, ceil(K / 128)), (.., ceil(M / 128), ceil(K / 128)),
    or uint8 (.., M, ceil(K / 32)) for "mx". A given scale is per tensor.
    """
    x = np.asarray(x, np.float32)
    results = [
        _quantize(view, scaling, target, scale, pow2_scale)
        for view, name in ((x, "row"), (x.swapaxes(-1, -2), "column"))
        if orientation in (name, "both")
    ]
    return tuple(results) if orientation == "both" else results[0]


def _quantize(x, scaling, target, scale, pow2_scale):
    tile, largest = TILES[scaling], FORMATS[target].largest
    if scale is not None:
        scale = np.broadcast_to(np.asarray(scale, np.float32), x.shape[:-2])
        s, stored = multiplier_of(scale[..., None, None]), scale
    elif scaling == "mx":
        stored = e8m0_scale(tile_amax(x, tile), largest)
        s = np.ldexp(np.float32(1), 127 - stored.astype(int))
    else:
        s = multiplier(tile_amax(x, tile), largest, pow2_scale)
        stored = np.float32(1) / s
    if scaling == "tensor":
        stored = stored.reshape(x.shape[:-2])
    with np.errstate(over="ignore", invalid="ignore"):
        return encode(x * per_element(s, tile, x.shape), target), stored


def fp8_dequantize(codes, scale, scaling, *, target="e4m3"):
    """float32: the value of the code times the scale, one rounding."""
    tile, scale = TILES[scaling], np.asarray(scale)
    if scaling == "tensor":
        scale = scale[..., None, None]
    if scaling == "mx":  # 255 is NaN
        scale = np.where(scale == 255, np.float32(np.nan), np.ldexp(np.float32(1), scale.astype(int) - 127))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return decode(codes, target) * per_element(scale.astype(np.float32), tile, codes.shape)


def multiplier(amax, largest, pow2_scale=False):
    """What x is multiplied by: largest / amax."""
    with np.errstate(divide="ignore", over="ignore"):
        s = np.minimum(np.float32(largest) / amax, FLOAT_MAX)
    if pow2_scale:
        s = (s.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
    return np.where((amax == 0) | np.isinf(amax), np.float32(1), s)


def multiplier_of(scale):
    """What x is multiplied by, for a given scale."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(np.float32(1) / scale, FLOAT_MAX)


def e8m0_scale(amax, largest):
    """The exponent + 127 of the smallest power of two, from 2^-127 on, that brings amax down to `largest`."""
    finite = np.where(np.isinf(amax), 0, amax).astype(np.float64)
    fraction, exponent = np.frexp(finite / largest)
    code = np.maximum(exponent - (fraction == 0.5) + 127, 0)
    return np.where(finite == 0, 127, code).astype(np.uint8)


def tile_amax(x, tile):
    """The largest magnitude, without NaN, of each tile of `tile` rows and columns; None is all there are."""
    *lead, M, K = x.shape
    (rows, height), (columns, width) = (
        (1, max(size, 1)) if part is None else (-(-size // part), part) for size, part in zip((M, K), tile, strict=True)
    )
    magnitude = np.zeros((*lead, rows * height, columns * width), np.float32)
    magnitude[..., :M, :K] = np.nan_to_num(np.abs(x), nan=0.0, posinf=np.inf)
    return magnitude.reshape(*lead, rows, height, columns, width).max((-3, -1), initial=0)


def per_element(scale, tile, shape):
    """Each tile's scale at each of its elements."""
    height, width = (max(size, 1) if part is None else part for size, part in zip(shape[-2:], tile, strict=True))
    return scale.repeat(height, -2).repeat(width, -1)[..., : shape[-2], : shape[-1]]
