"""`nvfp4_gemm` and `nvfp4_grouped_gemm`: products with an NVFP4 matrix, and the layout `Nvfp4Packed` of weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _device
from .quant_fp8 import INPUTS, Fp8Tensor
from .quant_nvfp4 import BLOCK, Nvfp4Tensor, check_nvfp4, swizzle_scales, unswizzle_scales
from .scaled_gemm import LAYOUTS, Operand, dense_product, fp8_operand, grouped_product, nvfp4_operand


class Nvfp4Packed(NamedTuple):
    """An NVFP4 weight in the layout that the kernels of this version read fastest; what that is may change.

    Made by `nvfp4_prepack`, undone by `nvfp4_unpack`. Do not store it: store the Nvfp4Tensor.
    """

    data: Tensor
    scale: Tensor
    tensor_scale: Tensor
    scale_layout: str  # of the Nvfp4Tensor that it was made from


def nvfp4_prepack(w: Nvfp4Tensor) -> Nvfp4Packed:
    """Arrange a weight (N, K) or (E, N, K), once after loading, for `nvfp4_gemm` and `nvfp4_grouped_gemm`.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> w = hybrid_ops.nvfp4_quantize(torch.randn(4, 32, 64), scale_layout="128x4")
    >>> packed = hybrid_ops.nvfp4_prepack(w)
    >>> torch.equal(hybrid_ops.nvfp4_unpack(packed).data, w.data)
    True
    """
    if not isinstance(w, Nvfp4Tensor):
        raise TypeError(f"w must be an Nvfp4Tensor, got {type(w).__name__}")
    _checks.rank("w.data", w.data, (2, 3), "(N, K / 2) or (E, N, K / 2)")
    check_nvfp4(w, "w.")
    scale = w.scale
    if w.scale_layout == "128x4":
        scale = unswizzle_scales(scale, w.data.shape[-2], 2 * w.data.shape[-1] // BLOCK)
    return Nvfp4Packed(w.data.contiguous(), scale.contiguous(), w.tensor_scale, w.scale_layout)


def nvfp4_unpack(p: Nvfp4Packed) -> Nvfp4Tensor:
    """The Nvfp4Tensor that `nvfp4_prepack` was given: the same codes and scales, in the same scale layout.

    Raises:
        TypeError: an argument that is not the one expected.

    >>> w = hybrid_ops.nvfp4_quantize(torch.randn(32, 64))
    >>> torch.equal(hybrid_ops.nvfp4_unpack(hybrid_ops.nvfp4_prepack(w)).data, w.data)
    True
    """
    if not isinstance(p, Nvfp4Packed):
        raise TypeError(f"p must be an Nvfp4Packed, got {type(p).__name__}")
    scale = swizzle_scales(p.scale) if p.scale_layout == "128x4" else p.scale
    return Nvfp4Tensor(p.data, scale, p.tensor_scale, p.scale_layout)


def nvfp4_gemm(
    a: Tensor | Fp8Tensor | Nvfp4Tensor,
    b: Nvfp4Tensor | Nvfp4Packed,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product with an NVFP4 matrix: ``y = a @ b^T + bias``, ``b = code * block scale * tensor scale``.

    Args:
        a: (M, K), K a multiple of 16, any strides: a float32, bfloat16 or float16 tensor ("W4A16"), an Fp8Tensor of any
            scaling ("W4A8"), or an Nvfp4Tensor ("W4A4").
        b: (N, K), of either scale layout, or prepacked.
        bias: (N,), any of the dtypes of out.
        out_dtype: float32, bfloat16 or float16; None is a's dtype, bfloat16 where a is quantised.
        batch_invariant: the bits of a row do not depend on how many others there are.
        out: the result is written here, (M, N) in out_dtype.
        impl: "auto", "triton" or "torch".

    Returns:
        (M, N).

    code * block scale is exact in every dtype that is multiplied: a's own, or float16 where a is quantised. Sums are
    float32; tensor scales, and those of a row of a, multiply the sum; then the bias is added and the result cast once.
    Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    Source: Abecassis et al. 2025, "Pretraining Large Language Models with NVFP4", appendix B.

    >>> w = hybrid_ops.nvfp4_quantize(torch.randn(8, 64))
    >>> hybrid_ops.nvfp4_gemm(torch.randn(3, 64), w).shape
    torch.Size([3, 8])
    """
    _device.check_impl(impl)
    left, dtype = _left(a, out_dtype)
    options = dict(batch_invariant=batch_invariant, out=out, impl=impl)
    return dense_product(left, right_operand("b", b, 2), bias, dtype, **options)  # type: ignore[arg-type]


def nvfp4_grouped_gemm(
    a: Tensor | Fp8Tensor | Nvfp4Tensor,
    b: Nvfp4Tensor | Nvfp4Packed,
    offs: Tensor,
    *,
    gather: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`grouped_gemm` with NVFP4 weights: ``h[i] = b[e] @ a[gather[i]]``, ``y[i] = activation(h[i]) * row_scale[i]``.

    Args:
        a: (M, K), as in `nvfp4_gemm`. Rows are gathered together with their scales.
        b: (E, N, K), with "silu_gated" (E, 2 N, K), and a tensor scale for each expert.
        offs, gather, activation, row_scale: as in `grouped_gemm`.
        out_dtype, batch_invariant, impl: as in `nvfp4_gemm`.
        out: y is written here, (R, N) in out_dtype.

    Returns:
        y (R, N). Rows of no expert are 0.

    Sums, scales, activation and row_scale are float32, with one cast at the end. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    Source: as `nvfp4_gemm` and `grouped_gemm`.

    >>> w = hybrid_ops.nvfp4_quantize(torch.randn(2, 8, 64))
    >>> hybrid_ops.nvfp4_grouped_gemm(torch.randn(5, 64), w, torch.tensor([3, 5], dtype=torch.int32)).shape
    torch.Size([5, 8])
    """
    _device.check_impl(impl)
    left, dtype = _left(a, out_dtype)
    return grouped_product(
        left,
        right_operand("b", b, 3),
        offs,
        dtype,
        gather=gather,
        activation=activation,
        row_scale=row_scale,
        batch_invariant=batch_invariant,
        out=out,
        impl=impl,
    )


def _left(a: Tensor | Fp8Tensor | Nvfp4Tensor, out_dtype: torch.dtype | None) -> tuple[Operand, torch.dtype]:
    """The operand, and the dtype of the result."""
    if isinstance(a, Fp8Tensor):
        return fp8_operand("a", a, 2), out_dtype or torch.bfloat16
    if isinstance(a, Nvfp4Tensor):
        return nvfp4_operand("a", a, 2), out_dtype or torch.bfloat16
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a torch.Tensor, an Fp8Tensor or an Nvfp4Tensor, got {type(a).__name__}")
    _checks.rank("a", a, (2,), LAYOUTS[2])
    _checks.tensor("a", a, (None, None), dtype=INPUTS)
    return Operand(a, None, None, "plain"), out_dtype or a.dtype


def right_operand(name: str, b: Nvfp4Tensor | Nvfp4Packed, dims: int) -> Operand:
    """Of a checked weight, packed or not."""
    if isinstance(b, Nvfp4Packed):
        b = Nvfp4Tensor(b.data, b.scale, b.tensor_scale, "linear")
    if not isinstance(b, Nvfp4Tensor):
        raise TypeError(f"{name} must be an Nvfp4Tensor or an Nvfp4Packed, got {type(b).__name__}")
    return nvfp4_operand(name, b, dims)
