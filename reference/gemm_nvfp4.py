"""Products with NVFP4 matrices: dequantised exactly and multiplied.

    y[m, n] = sum_k a[m, k] b[n, k] + bias[n]        b = E2M1 code * E4M3 block scale * tensor scale

An NVFP4 matrix is (data, scale, tensor_scale, scale_layout), as `reference/quant_nvfp4.py` makes them; a may be that,
an FP8 matrix of `reference/gemm_fp8.py`, or an array.
"""

import numpy as np

from .gemm_fp8 import fp8_values
from .grouped_gemm import grouped_gemm
from .minifloat import decode
from .products import product
from .quant_nvfp4 import unpack, unswizzle_scales


def nvfp4_gemm(a, b, *, bias=None, dtype=np.float64):
    """a (M, K), b (N, K) to (M, N)."""
    y = product(values(a, dtype), nvfp4_values(b, dtype).T)
    return y if bias is None else y + np.asarray(bias, dtype)


def nvfp4_grouped_gemm(a, b, offs, *, gather=None, activation=None, row_scale=None, dtype=np.float64):
    """a (M, K), b (E, N, K), the rest as in `reference/grouped_gemm.py`, to (R, N)."""
    options = dict(gather=gather, activation=activation, row_scale=row_scale)
    return grouped_gemm(values(a, dtype), nvfp4_values(b, dtype), offs, **options, dtype=dtype)[0]


def values(a, dtype=np.float64):
    """Of an array, an FP8 or an NVFP4 matrix."""
    if not isinstance(a, tuple):
        return np.asarray(a, dtype)
    return nvfp4_values(a, dtype) if a[3] in ("linear", "128x4") else fp8_values(a, dtype)


def nvfp4_values(q, dtype=np.float64):
    """code * block scale * tensor scale; exact in float64."""
    data, scale, tensor_scale, scale_layout = q
    codes = unpack(np.asarray(data))
    if scale_layout == "128x4":
        scale = unswizzle_scales(np.asarray(scale), codes.shape[-2], codes.shape[-1] // 16)
    b = decode(scale, "e4m3").astype(dtype).repeat(16, -1)
    return decode(codes, "e2m1").astype(dtype) * b * np.asarray(tensor_scale, dtype)[..., None, None]
