"""Products of FP8 matrices: dequantised exactly and multiplied.

    y[m, n] = sum_k a[m, k] b[n, k] + bias[n]        a = code * scale of its tile, and so is b

A matrix is (codes, scale, scaling, target), as `reference/quant_fp8.py` makes and names them.
"""

import numpy as np

from .grouped_gemm import grouped_gemm
from .minifloat import decode
from .products import product
from .quant_fp8 import TILES, per_element


def fp8_gemm(a, b, *, bias=None, dtype=np.float64):
    """a (M, K), b (N, K) to (M, N)."""
    y = product(fp8_values(a, dtype), fp8_values(b, dtype).T)
    return y if bias is None else y + np.asarray(bias, dtype)


def fp8_grouped_gemm(a, b, offs, *, gather=None, activation=None, row_scale=None, dtype=np.float64):
    """a (M, K), b (E, N, K), the rest as in `reference/grouped_gemm.py`, to (R, N)."""
    options = dict(gather=gather, activation=activation, row_scale=row_scale)
    return grouped_gemm(fp8_values(a, dtype), fp8_values(b, dtype), offs, **options, dtype=dtype)[0]


def fp8_values(q, dtype=np.float64):
    """code * scale; exact in float64."""
    codes, scale, scaling, target = q
    scale = np.asarray(scale)
    if scaling == "tensor":
        scale = scale[..., None, None]
    if scaling == "mx":  # E8M0; 255 is NaN
        scale = np.where(scale == 255, np.nan, np.ldexp(1.0, scale.astype(int) - 127))
    return decode(codes, target).astype(dtype) * per_element(scale.astype(dtype), TILES[scaling], codes.shape)
