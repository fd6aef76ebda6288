"""NVFP4: `nvfp4_quantize`, `nvfp4_dequantize`, `Nvfp4Tensor`, and the layouts of its scales."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import quant_nvfp4 as _torch_quant
from .quant_fp8 import INPUTS, ORIENTATIONS, check_matrix, check_scale, flat, oriented, per_matrix

BLOCK = 16
LAYOUTS = ("linear", "128x4")


class Nvfp4Tensor(NamedTuple):
    """x ≈ E2M1 code * scale * tensor_scale; two codes a byte, a scale for each 16 codes."""

    data: Tensor
    scale: Tensor
    tensor_scale: Tensor
    scale_layout: str


def nvfp4_quantize(
    x: Tensor,
    *,
    tensor_scale: Tensor | None = None,
    block: str = "1x16",
    mode: str = "te",
    rounding: str = "nearest",
    seed: Tensor | None = None,
    hadamard: bool = False,
    four_over_six: str | None = None,
    scale_layout: str = "linear",
    orientation: str = "row",
    impl: str = "auto",
) -> Nvfp4Tensor | tuple[Nvfp4Tensor, Nvfp4Tensor]:
    """Quantise to 4 bits: E2M1 codes, an E4M3 scale for each block of 16, a float32 scale for the tensor.

    In float32 and in exactly this order, `max` being float32's maximum and amax_b the largest |x| of the block::

        mode="te"                                      mode="modelopt"
        S = min(2688 / amax, max)                      t = amax / 2688
        t = 1 / S
        b = e4m3(amax_b * (S * (1/6)))                 b = e4m3(clamp(amax_b / (6 t), 2^-9, 448))
        q = e2m1(clamp(x * min(1 / (b t), max), ±6))   q = e2m1(clamp(x / (b t), ±6))

    x ≈ q b t. Every implementation gives the same bytes, those of `hybrid_ops.reference.quant_nvfp4`, which has the
    order for four over six too. Where amax is 0 or infinite, S or t is 1. NaN is left out of amax and becomes 6,
    infinity saturates. A block of zeros has b = 0 in "te", 1 before the clamp in "modelopt".

    Args:
        x: (..., M, K), K a multiple of 16, float32, bfloat16 or float16, any strides.
        tensor_scale: t, known beforehand (then S = 1 / t): float32, positive and finite, () or x's leading shape.
        block: "1x16" along K, or "16x16", whose scale is repeated for its 16 rows, so that x and x^T agree.
        mode: "te" (Transformer Engine) or "modelopt" (NVIDIA ModelOpt): whose bytes.
        rounding: "nearest" (ties to the even code) or "stochastic": |q| goes to the floor, on E2M1's grid, of
            |q| + bits 2^-16 step(|q|), saturating.
        seed: (1,) int64 on x's device, for stochastic rounding. Element i of what is quantised (row-major) takes 16
            bits of Philox4x32-10 with the words of `seed` as key and counter (i // 8 low, i // 8 high, 0, 0): word
            i % 8 // 2, its low half for even i. The same seed gives the same bits: change it for each step and layer.
        hadamard: first transform each 16 neighbours along K with diag(s) H16 / 4, s fixed signs, and round to x's
            dtype. Orthogonal: it cancels in a product of two operands that are both transformed.
        four_over_six: None, "mse" or "mae": choose for each block whether its largest value maps to 6 or to 4, by the
            error that remains; a tie maps to 6. 256 takes the place of 448, 1536 that of 2688. Not with stochastic
            rounding.
        scale_layout: "linear", or "128x4", the tiles that cuBLAS reads (see `swizzle_scales`).
        orientation: "row"; "column" quantises x^T, along M; "both" returns the pair.
        impl: "auto", "triton" or "torch".

    Returns:
        `Nvfp4Tensor(data, scale, tensor_scale, scale_layout)`, or two: data uint8 (..., M, K / 2), element 2 i in the
        low half of byte i; scale float8_e4m3fn (..., M, K / 16), or (..., round_up(M, 128) * round_up(K / 16, 4));
        tensor_scale float32 (...): each matrix of the leading dimensions (expert) has its own.

    Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or x requires a gradient.

    Source: Abecassis et al. 2025, "Pretraining Large Language Models with NVFP4", appendix B; Cook et al. 2025, "Four
    Over Six"; Transformer Engine 2.x `reference_nvfp4.py`; NVIDIA ModelOpt 0.47 `nvfp4_tensor.py`.

    >>> q = hybrid_ops.nvfp4_quantize(torch.randn(4, 64))
    >>> q.data.shape, q.scale.shape
    (torch.Size([4, 32]), torch.Size([4, 4]))
    """
    _device.check_impl(impl)
    check_matrix(x)
    _checks.one_of("block", block, ("1x16", "16x16"))
    _checks.one_of("mode", mode, ("te", "modelopt"))
    _checks.one_of("four_over_six", four_over_six, (None, "mse", "mae"))
    _checks.one_of("scale_layout", scale_layout, LAYOUTS)
    _checks.one_of("orientation", orientation, ORIENTATIONS)
    _check_rounding(x, rounding, seed, four_over_six)
    views = oriented(x, orientation)
    for view in views:
        if view.shape[-1] % BLOCK:
            which = "K (the last dimension)" if view is x else "M (the last but one, for x^T)"
            raise ValueError(f"x must have {which} divisible by {BLOCK}, got {tuple(x.shape)}")
    if tensor_scale is not None:
        check_scale("tensor_scale", tensor_scale, x)
    _checks.no_gradient(x=x, tensor_scale=tensor_scale)
    options = (block, mode, four_over_six, hadamard, scale_layout, impl)
    results = tuple(_quantize(view, tensor_scale, seed, *options) for view in views)
    return results if orientation == "both" else results[0]  # type: ignore[return-value]


def nvfp4_dequantize(q: Nvfp4Tensor, *, dtype: torch.dtype = torch.bfloat16, impl: str = "auto") -> Tensor:
    """(code * scale) * tensor_scale: float32 products, rounded once to `dtype` (nearest even).

    Args:
        q: what `nvfp4_quantize` returns, or the like from a checkpoint: data uint8 (..., M, K / 2), scale
            float8_e4m3fn in its layout, tensor_scale float32 of the leading shape.
        dtype: float32, bfloat16 or float16.
        impl: "auto", "triton" or "torch".

    Returns:
        (..., M, K).

    Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> q = hybrid_ops.nvfp4_quantize(torch.full((1, 16), 3.0))
    >>> hybrid_ops.nvfp4_dequantize(q, dtype=torch.float32).unique()
    tensor([3.])
    """
    _device.check_impl(impl)
    _checks.one_of("dtype", dtype, INPUTS)
    check_nvfp4(q)
    data, scale, tensor_scale, scale_layout = q
    *lead, M, half = data.shape
    y = data.new_empty(*lead, M, 2 * half, dtype=dtype)
    scale = scale.view(torch.uint8).reshape(math.prod(lead), *scale.shape[len(lead) :])
    _nvfp4_dequantize_op(flat(data), scale, tensor_scale.reshape(-1), flat(y), scale_layout, impl)
    return y


def swizzle_scales(scale: Tensor) -> Tensor:
    """Block scales (..., M, S) in the layout "128x4" of cuBLAS: flat, (..., round_up(M, 128) * round_up(S, 4)).

    Tiles of 128 rows and 4 columns lie one behind the other, along S first, 512 bytes each, filled up with zeros. In a
    tile row r and column c are at byte ``r % 32 * 16 + r // 32 * 4 + c``.

    Args:
        scale: one byte an element (float8_e4m3fn of NVFP4, uint8 of "mx"), at least two dimensions.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> hybrid_ops.swizzle_scales(torch.zeros(100, 6, dtype=torch.uint8)).shape
    torch.Size([1024])
    """
    check_matrix(scale, "scale", (torch.float8_e4m3fn, torch.uint8))
    return _torch_quant.swizzle_scales(scale)


def unswizzle_scales(scale: Tensor, M: int, S: int) -> Tensor:
    """The inverse of `swizzle_scales`: (..., M, S) from (..., round_up(M, 128) * round_up(S, 4)).

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> scale = torch.arange(200, dtype=torch.uint8).view(100, 2)
    >>> hybrid_ops.unswizzle_scales(hybrid_ops.swizzle_scales(scale), 100, 2).equal(scale)
    True
    """
    lead = scale.shape[:-1] if isinstance(scale, Tensor) else ()
    dtypes = (torch.float8_e4m3fn, torch.uint8)
    _checks.tensor("scale", scale, (*lead, *_scale_shape(M, S, "128x4")), dtype=dtypes)
    return _torch_quant.unswizzle_scales(scale, M, S)


def check_nvfp4(q: Nvfp4Tensor, prefix: str = "") -> None:
    """The parts of an Nvfp4Tensor fit each other; `prefix` names the argument, as "b."."""
    data, scale, tensor_scale, scale_layout = q
    _checks.one_of(f"{prefix}scale_layout", scale_layout, LAYOUTS)
    check_matrix(data, f"{prefix}data", (torch.uint8,))
    *lead, M, half = data.shape
    if half % (BLOCK // 2):
        raise ValueError(f"{prefix}data must have K / 2 divisible by 8 in its last dimension, got {tuple(data.shape)}")
    shape = (*lead, *_scale_shape(M, half // 8, scale_layout))
    _checks.tensor(f"{prefix}scale", scale, shape, dtype=torch.float8_e4m3fn, device=data.device)
    _checks.tensor(f"{prefix}tensor_scale", tensor_scale, lead, dtype=torch.float32, device=data.device)


def _scale_shape(M: int, S: int, scale_layout: str) -> tuple[int, ...]:
    return (M, S) if scale_layout == "linear" else (-(-M // 128) * 128 * (-(-S // 4) * 4),)


def _check_rounding(x: Tensor, rounding: str, seed: Tensor | None, four_over_six: str | None) -> None:
    _checks.one_of("rounding", rounding, ("nearest", "stochastic"))
    if rounding == "nearest":
        if seed is not None:
            raise ValueError("seed must be None with rounding='nearest', got a tensor")
        return
    if four_over_six is not None:
        raise ValueError(f"four_over_six must be None with rounding='stochastic', got {four_over_six!r}")
    if seed is None:
        raise ValueError("seed must be a (1,) int64 tensor with rounding='stochastic', got None")
    _checks.tensor("seed", seed, (1,), dtype=torch.int64, device=x.device)


def _quantize(
    x: Tensor,
    given: Tensor | None,
    seed: Tensor | None,
    block: str,
    mode: str,
    four_over_six: str | None,
    hadamard: bool,
    scale_layout: str,
    impl: str,
) -> Nvfp4Tensor:
    *lead, M, K = x.shape
    E = math.prod(lead)
    data = x.new_empty(*lead, M, K // 2, dtype=torch.uint8)
    shape = _scale_shape(M, K // BLOCK, scale_layout)
    scale = x.new_empty(E, *shape, dtype=torch.uint8)
    computed = x.new_empty(E, dtype=torch.float32) if given is None else None
    known = None if given is None else per_matrix(given, x)
    options = (block, mode, four_over_six, hadamard, scale_layout, impl)
    _nvfp4_quantize_op(flat(x), known, seed, flat(data), scale, computed, *options)
    tensor_scale = computed.view(lead) if given is None else given.expand(lead)  # type: ignore[union-attr]
    return Nvfp4Tensor(data, scale.view(*lead, *shape).view(torch.float8_e4m3fn), tensor_scale, scale_layout)


@explains("nvfp4_quantize")
@explains("nvfp4_dequantize")
def _choose(*, device: str = "cuda", impl: str = "auto", **_: Any) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import quant_nvfp4 as kernels

    return Choice(chosen, kernels.config()._asdict(), reason)


def _nvfp4_quantize(
    x: Tensor,
    given: Tensor | None,
    seed: Tensor | None,
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    block: str,
    recipe: str,
    four_over_six: str | None,
    hadamard: bool,
    scale_layout: str,
    impl: str,
) -> None:
    arguments = (x, given, seed, data, scale, tensor_scale, block, recipe, four_over_six, hadamard, scale_layout)
    if _device.choose(impl, x.device)[0] == "triton":
        from .triton_kernels import quant_nvfp4 as kernels

        kernels.nvfp4_quantize(*arguments)
    else:
        _torch_quant.nvfp4_quantize(*arguments)


def _nvfp4_dequantize(
    data: Tensor, scale: Tensor, tensor_scale: Tensor, y: Tensor, scale_layout: str, impl: str
) -> None:
    if _device.choose(impl, data.device)[0] == "triton":
        from .triton_kernels import quant_nvfp4 as kernels

        kernels.nvfp4_dequantize(data, scale, tensor_scale, y, scale_layout)
    else:
        _torch_quant.nvfp4_dequantize(data, scale, tensor_scale, y, scale_layout)


# `recipe` is the mode; torch does not take an argument named so
_nvfp4_quantize_op = define(
    "nvfp4_quantize(Tensor x, Tensor? given, Tensor? seed, Tensor(a!) data, Tensor(b!) scale, Tensor(c!)? tensor_scale,"
    " str block, str recipe, str? four_over_six, bool hadamard, str scale_layout, str impl)",
    _nvfp4_quantize,
)
_nvfp4_dequantize_op = define(
    "nvfp4_dequantize(Tensor data, Tensor scale, Tensor tensor_scale, Tensor(a!) y, str scale_layout, str impl)",
    _nvfp4_dequantize,
)
