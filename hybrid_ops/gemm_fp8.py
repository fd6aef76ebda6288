"""`fp8_gemm` and `fp8_grouped_gemm`: products of two FP8 matrices."""

from typing import cast

import torch
from torch import Tensor

from . import _checks, _device
from .quant_fp8 import Fp8Tensor, fp8_quantize
from .scaled_gemm import dense_product, fp8_operand, grouped_product


def fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    *,
    bias: Tensor | None = None,
    fast_accum: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product of two FP8 matrices: ``y = a @ b^T + bias``, with ``a = a.data * a.scale``, and b likewise.

    Args:
        a: (M, K), as `fp8_quantize` returns it, with any scaling, E4M3 or E5M2; any strides.
        b: (N, K), with a scaling and a dtype of its own.
        bias: (N,), any of the dtypes of out.
        fast_accum: sum as the tensor cores do. On Hopper these keep 14 bits of a sum of FP8 products; otherwise their
            sums go into float32 every 32 products. Of no consequence elsewhere.
        out_dtype: float32, bfloat16 or float16. float32 is never summed by FP8 tensor cores, float16 with fast_accum
            alone.
        batch_invariant: the bits of a row do not depend on how many others there are.
        out: the result is written here, (M, N) in out_dtype.
        impl: "auto", "triton" or "torch".

    Returns:
        (M, N).

    Sums are float32: a scale of a row or of the tensor multiplies the sum over K, one of 128 or 32 columns the sum over
    these; then the bias is added and the result cast once. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; scales of 1x128 and 128x128: DeepSeek-AI 2024,
    "DeepSeek-V3 Technical Report", section 3.3.

    >>> a, b = (hybrid_ops.fp8_quantize(torch.randn(n, 256), "1x128") for n in (3, 8))
    >>> hybrid_ops.fp8_gemm(a, b).shape
    torch.Size([3, 8])
    """
    _device.check_impl(impl)
    operands = fp8_operand("a", a, 2), fp8_operand("b", b, 2)
    options = dict(fast_accum=fast_accum, batch_invariant=batch_invariant, out=out, impl=impl)
    return dense_product(*operands, bias, out_dtype, **options)  # type: ignore[arg-type]


def fp8_grouped_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    offs: Tensor,
    *,
    gather: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    fast_accum: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    out_scaling: str | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | Fp8Tensor:
    """`grouped_gemm` of FP8 matrices: ``h[i] = b[e] @ a[gather[i]]``, ``y[i] = activation(h[i]) * row_scale[i]``.

    Args:
        a: (M, K), as in `fp8_gemm`. Rows are gathered together with their scales.
        b: (E, N, K), with "silu_gated" (E, 2 N, K); a scale for each expert where the scaling is "tensor".
        offs, gather, activation, row_scale: as in `grouped_gemm`.
        fast_accum, out_dtype, batch_invariant, impl: as in `fp8_gemm`.
        out_scaling: "1x128" returns ``fp8_quantize(y, "1x128")``, the input of the next product, where y is already
            rounded to out_dtype.
        out: y is written here, (R, N) in out_dtype. Not with out_scaling.

    Returns:
        y (R, N), or an Fp8Tensor of it. Rows of no expert are 0.

    Sums, scales, activation and row_scale are float32, with one cast at the end. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    Source: as `fp8_gemm` and `grouped_gemm`.

    >>> a, b = hybrid_ops.fp8_quantize(torch.randn(5, 64)), hybrid_ops.fp8_quantize(torch.randn(2, 8, 64))
    >>> hybrid_ops.fp8_grouped_gemm(a, b, torch.tensor([3, 5], dtype=torch.int32)).shape
    torch.Size([5, 8])
    """
    _device.check_impl(impl)
    operands = fp8_operand("a", a, 2), fp8_operand("b", b, 3)
    _checks.one_of("out_scaling", out_scaling, (None, "1x128"))
    if out_scaling is not None and out is not None:
        raise ValueError(f"out must be None with out_scaling={out_scaling!r}, got a tensor")
    y = grouped_product(
        *operands,
        offs,
        out_dtype,
        gather=gather,
        activation=activation,
        row_scale=row_scale,
        fast_accum=fast_accum,
        batch_invariant=batch_invariant,
        out=out,
        impl=impl,
    )
    return y if out_scaling is None else cast(Fp8Tensor, fp8_quantize(y, out_scaling, impl=impl))
