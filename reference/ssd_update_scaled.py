"""States of `ssd_state_update` in 8 bits: codes, and a float32 scale for each row of dstate elements."""

import numpy as np

from .minifloat import round_nearest
from .quant_fp8 import multiplier, tile_amax

LARGEST = {"e4m3": 448.0, "int8": 127.0}


def scaled_store(target):
    """The `store` of `ssd_state_update` for a pool of `target`, "e4m3" or "int8": what the rounded codes stand for."""

    def store(S, slot, t):
        codes, scale = quantize_rows(S, target)
        return codes * scale.astype(np.float64)[..., None]

    return store


def quantize_rows(S, target):
    """(codes, float64, and scale, float32) of the rows of S, in float32 as `reference/quant_fp8.py` does it.

    int8 has the largest code 127, so that -128 is none; as it has no NaN, a NaN makes the scale of its row NaN.
    """
    S = np.asarray(S, np.float32)
    s = multiplier(tile_amax(S, (1, None)), LARGEST[target])  # (.., P, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        v = S * s
        if target == "e4m3":
            return round_nearest(v, target), np.float32(1) / s[..., 0]
        codes = np.rint(np.clip(np.nan_to_num(v, nan=0.0), -127, 127)).astype(np.float64)
    return codes, np.where(np.isnan(S).any(-1), np.float32(np.nan), np.float32(1) / s[..., 0])
