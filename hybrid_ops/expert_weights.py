"""Experts' matrices in every format, and the product that each takes."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _checks
from .gemm_fp8 import fp8_grouped_gemm
from .gemm_nvfp4 import Nvfp4Packed, nvfp4_grouped_gemm, right_operand
from .grouped_gemm import grouped_gemm
from .quant_fp8 import INPUTS, Fp8Tensor, fp8_quantize
from .quant_nvfp4 import Nvfp4Tensor
from .scaled_gemm import fp8_operand

ExpertWeight = Tensor | Fp8Tensor | Nvfp4Tensor | Nvfp4Packed

# how the rows that meet a matrix are quantised: each by itself, and as finely as the matrix
ROW_SCALINGS = {"tensor": "row", "row": "row", "1x128": "1x128", "128x128": "1x128", "mx": "mx"}


def check_expert_weight(
    name: str, weight: ExpertWeight, shape: Sequence[int | None], layout: str, x: Tensor
) -> torch.Size:
    """The weight has `shape` and fits rows of x's dtype and device; returns its shape."""
    if not isinstance(weight, Fp8Tensor | Nvfp4Tensor | Nvfp4Packed):
        _checks.rank(name, weight, (3,), layout)
        _checks.tensor(name, weight, shape, dtype=x.dtype, device=x.device)
        return weight.shape
    operand = fp8_operand(name, weight, 3) if isinstance(weight, Fp8Tensor) else right_operand(name, weight, 3)
    _checks.tensor(name, x.new_empty(1, device=operand.data.device).expand(operand.shape), shape, device=x.device)
    _checks.tensor("x", x, (None, None), dtype=INPUTS)
    _checks.no_gradient(x=x)
    return operand.shape


def expert_product(a: Tensor, weight: ExpertWeight, offs: Tensor, *, impl: str, **options: Any) -> Tensor:
    """`grouped_gemm` of rows in full precision, in a's dtype: FP8 matrices meet quantised rows, NVFP4 ones do not."""
    if isinstance(weight, Fp8Tensor):
        q = cast(Fp8Tensor, fp8_quantize(a, ROW_SCALINGS[weight.scaling], impl=impl))
        return cast(Tensor, fp8_grouped_gemm(q, weight, offs, out_dtype=a.dtype, impl=impl, **options))
    if isinstance(weight, Tensor):
        return cast(Tensor, grouped_gemm(a, weight, offs, impl=impl, **options))
    return nvfp4_grouped_gemm(a, weight, offs, impl=impl, **options)
