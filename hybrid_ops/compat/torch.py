"""`grouped_mm` and `scaled_mm` of `torch.nn.functional`, and `torch._scaled_mm`. Differences: docs/compat.md."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from ..gemm_fp8 import fp8_gemm
from ..gemm_nvfp4 import nvfp4_gemm
from ..grouped_gemm import grouped_gemm
from ..quant_fp8 import Fp8Tensor
from ..quant_nvfp4 import Nvfp4Tensor, unswizzle_scales
from ._arguments import must_be_none

__all__ = ["grouped_mm", "scaled_mm"]

FP8_SCALINGS = {
    ScalingType.TensorWise: "tensor",
    ScalingType.RowWise: "row",
    ScalingType.BlockWise1x32: "mx",
    ScalingType.BlockWise1x128: "1x128",
    ScalingType.BlockWise128x128: "128x128",
}


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`hybrid_ops.grouped_gemm` for `torch.nn.functional.grouped_mm`: a matrix product for each of E groups.

    Args:
        mat_a, mat_b: (R, K) and (E, K, N), rows belong to groups; (E, M, K) and (K, C), columns do; or (E, M, K)
            and (E, K, N). Any strides. Not (M, R) and (R, N), with groups along the sum.
        offs: (E,) int32, where the rows or columns of each group end; None for two 3-D operands.
        bias: must be None, as in torch.
        out_dtype: of the result; None is mat_a's.

    Returns:
        (R, N), (M, C) or (E, M, N); rows or columns that belong to no group are 0. Differentiable.

    Raises:
        ValueError, TypeError: as `hybrid_ops.grouped_gemm`.

    >>> offs = torch.tensor([2, 5], dtype=torch.int32)
    >>> grouped_mm(torch.randn(5, 8), torch.randn(2, 8, 4), offs=offs).shape
    torch.Size([5, 4])
    """
    must_be_none("hybrid_ops.grouped_gemm has row_scale and activation, but no bias", bias=bias)
    dims = mat_a.dim(), mat_b.dim()
    if dims == (2, 2):
        raise ValueError(
            "mat_a and mat_b must not both be 2-D: groups along the sum are in the gradient of hybrid_ops.grouped_gemm "
            "with respect to b, which has no function of its own"
        )
    if dims == (3, 3):
        must_be_none("it has no meaning for two 3-D operands", offs=offs)
        experts, rows = mat_a.shape[:2]
        offs = torch.arange(1, experts + 1, dtype=torch.int32, device=mat_a.device) * rows
        return _grouped(mat_a.flatten(0, 1), mat_b.mT, offs, out_dtype).unflatten(0, (experts, rows))
    if dims not in ((2, 3), (3, 2)):
        raise ValueError(f"mat_a and mat_b must be 2-D or 3-D, got {dims[0]}-D and {dims[1]}-D")
    if offs is None:
        raise ValueError("offs must be given where mat_a or mat_b is 2-D, got None")
    return _grouped(mat_a, mat_b.mT, offs, out_dtype) if dims == (2, 3) else _grouped(mat_b.T, mat_a, offs, out_dtype).T


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """`hybrid_ops.fp8_gemm` and `nvfp4_gemm` for `torch.nn.functional.scaled_mm`: a product of quantised matrices.

    Args:
        mat_a: (M, K), float8_e4m3fn or float8_e5m2; or float4_e2m1fn_x2 (M, K / 2). Any strides.
        mat_b: (K, N), or (K / 2, N). Any strides.
        scale_a, scale_b: of the recipe, each of its own; for NVFP4 that of the blocks, or with that of the tensor.
        scale_recipe_a, scale_recipe_b: TensorWise, one scale; RowWise, (M, 1) and (1, N); BlockWise1x128, (M, K / 128)
            and (N, K / 128) or (K / 128, N); BlockWise128x128, (K / 128, M / 128) and (K / 128, N / 128), their first
            dimension possibly rounded up to a multiple of 4; BlockWise1x32, float8_e8m0fnu; BlockWise1x16, of float4,
            with or without TensorWise behind it.
        swizzle_a, swizzle_b: of blocks of 16 or 32: SWIZZLE_32_4_4, or NO_SWIZZLE for (rows, blocks).
        bias: (N,).
        output_dtype: float32, bfloat16 or float16; None is bfloat16.
        contraction_dim: the dimensions of mat_a and mat_b that are K; () is (1, 0).
        use_fast_accum: as `fast_accum` of `hybrid_ops.fp8_gemm`.

    Returns:
        (M, N). Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> a, b = (torch.randn(16, 32).to(torch.float8_e4m3fn) for _ in range(2))
    >>> one, recipe = torch.tensor(1.0), ScalingType.TensorWise
    >>> scaled_mm(a, b.T, one, recipe, one, recipe).shape
    torch.Size([16, 16])
    """
    dims = tuple(contraction_dim) or (1, 0)
    if len(dims) != 2 or any(dim not in (-2, -1, 0, 1) for dim in dims):
        raise ValueError(f"contraction_dim must be () or a dimension of each matrix, got {contraction_dim}")
    if mat_a.dim() != 2 or mat_b.dim() != 2:
        raise ValueError(f"mat_a and mat_b must be 2-D, got {tuple(mat_a.shape)} and {tuple(mat_b.shape)}")
    a = _operand("a", mat_a if dims[0] % 2 else mat_a.T, _list(scale_a), _list(scale_recipe_a), swizzle_a)
    b = _operand("b", mat_b if dims[1] % 2 else mat_b.T, _list(scale_b), _list(scale_recipe_b), swizzle_b)
    dtype = torch.bfloat16 if output_dtype is None else output_dtype
    if isinstance(a, Fp8Tensor) and isinstance(b, Fp8Tensor):
        return fp8_gemm(a, b, bias=bias, fast_accum=use_fast_accum, out_dtype=dtype)
    if isinstance(a, Fp8Tensor) or isinstance(b, Fp8Tensor):
        raise ValueError("mat_a and mat_b must both be float8 or float4: hybrid_ops.nvfp4_gemm multiplies them mixed")
    if use_fast_accum:
        raise ValueError("use_fast_accum must be False for float4, got True")
    return nvfp4_gemm(a, b, bias=bias, out_dtype=dtype)


def _scaled_mm(
    input: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """`torch._scaled_mm`: `scaled_mm` with the recipes that the scales' dtypes and shapes say.

    Scales of one element are TensorWise, (M, 1) and (1, N) RowWise, (M, K / 128) and (K / 128, N) BlockWise1x128,
    (M / 128, K / 128) and (K / 128, N / 128) BlockWise128x128; of blocks of 32 (float8_e8m0fnu) and of 16
    (float8_e4m3fn, for float4) they are swizzled.

    Raises:
        ValueError, TypeError: as `scaled_mm`; out_dtype None or a float8, and scale_result.

    >>> a, b = (torch.randn(16, 32).to(torch.float8_e4m3fn) for _ in range(2))
    >>> _scaled_mm(a, b.T, torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16).shape
    torch.Size([16, 16])
    """
    must_be_none("the result is not float8: see hybrid_ops.fp8_quantize", scale_result=scale_result)
    if out_dtype is None or out_dtype.itemsize == 1:
        raise ValueError(
            f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}: hybrid_ops.fp8_quantize makes it float8"
        )
    recipe_a, swizzle_a = _recipe("scale_a", scale_a, input.shape[0])
    recipe_b, swizzle_b = _recipe("scale_b", scale_b.T if scale_b.dim() == 2 else scale_b, mat2.shape[1])
    if recipe_a == ScalingType.BlockWise128x128:
        scale_a = scale_a.T  # K first, as `scaled_mm` has it
    return scaled_mm(
        *(input, mat2, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, bias, out_dtype),
        use_fast_accum=use_fast_accum,
    )


def _recipe(name: str, scale: Tensor, rows: int) -> tuple[ScalingType, SwizzleType]:
    if scale.dtype == torch.float8_e8m0fnu:
        return ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    if scale.dtype == torch.float8_e4m3fn:
        return ScalingType.BlockWise1x16, SwizzleType.SWIZZLE_32_4_4
    if scale.numel() == 1:
        return ScalingType.TensorWise, SwizzleType.NO_SWIZZLE
    if scale.dim() == 2 and scale.shape[0] in (rows, -(-rows // 128)):
        if scale.shape[0] != rows:
            return ScalingType.BlockWise128x128, SwizzleType.NO_SWIZZLE
        return ScalingType.RowWise if scale.shape[1] == 1 else ScalingType.BlockWise1x128, SwizzleType.NO_SWIZZLE
    raise ValueError(f"{name} must be of a tensor, of {rows} rows or of blocks, got shape {tuple(scale.shape)}")


def _grouped(a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return cast(Tensor, grouped_gemm(a, b, offs, out_dtype=out_dtype))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _operand(
    side: str,
    matrix: Tensor,
    scales: list[Tensor],
    recipes: list[ScalingType],
    swizzle: SwizzleType | list[SwizzleType] | None,
) -> Fp8Tensor | Nvfp4Tensor:
    """One side of the product, (rows, K), with its scales as hybrid_ops has them."""
    if len(scales) != len(recipes):
        raise ValueError(f"scale_{side} and scale_recipe_{side} must be as many, got {len(scales)} and {len(recipes)}")
    rows, recipe = matrix.shape[0], recipes[0]
    swizzled = SwizzleType.SWIZZLE_32_4_4 in _list(swizzle)
    if recipe == ScalingType.BlockWise1x16 and recipes[1:] in ([], [ScalingType.TensorWise]):
        layout, scale = "128x4", scales[0].flatten()
        if not swizzled:
            layout, scale = "linear", scale.view(rows, -1)
        tensor_scale = scales[1].reshape(()) if recipes[1:] else torch.ones((), device=matrix.device)
        return Nvfp4Tensor(matrix.view(torch.uint8), scale, tensor_scale, layout)
    if len(recipes) != 1 or recipe not in FP8_SCALINGS:
        names = [getattr(r, "name", r) for r in recipes]
        raise ValueError(f"scale_recipe_{side} must be one that torch has for float8 or float4, got {names}")
    if swizzled and recipe != ScalingType.BlockWise1x32:
        raise ValueError(f"swizzle_{side} must be NO_SWIZZLE with {recipe.name}, got SWIZZLE_32_4_4")
    return Fp8Tensor(matrix, _fp8_scale(side, matrix, scales[0], recipe, swizzled), FP8_SCALINGS[recipe])


def _fp8_scale(side: str, matrix: Tensor, scale: Tensor, recipe: ScalingType, swizzled: bool) -> Tensor:
    rows, k = matrix.shape
    if recipe == ScalingType.TensorWise:
        return scale.reshape(())
    if recipe == ScalingType.RowWise:
        return scale if side == "a" else scale.T
    if recipe == ScalingType.BlockWise1x32:
        codes = scale.view(torch.uint8).flatten()
        return unswizzle_scales(codes, rows, -(-k // 32)) if swizzled else codes.view(rows, -1)
    by_row, columns = recipe == ScalingType.BlockWise1x128, -(-k // 128)
    tiles, padded = rows if by_row else -(-rows // 128), -(-columns // 4) * 4
    shape = tuple(scale.shape)
    if by_row and shape == (tiles, columns):
        return scale
    if (side == "b" or not by_row) and shape in ((columns, tiles), (padded, tiles)):
        return scale[:columns].T
    expected = (tiles, columns) if by_row else (padded, tiles)
    raise ValueError(f"scale_{side} must have shape {expected} for {recipe.name}, got {shape}")
