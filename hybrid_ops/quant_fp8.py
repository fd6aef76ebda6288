"""FP8: `fp8_quantize`, `fp8_dequantize` and what they pass around, `Fp8Tensor`."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import quant_fp8 as _torch_quant

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
SCALINGS = ("tensor", "row", "1x128", "128x128", "mx")
ORIENTATIONS = ("row", "column", "both")


class Fp8Tensor(NamedTuple):
    """x ≈ data * scale, with a scale for each tile that `scaling` names."""

    data: Tensor
    scale: Tensor
    scaling: str


def fp8_quantize(
    x: Tensor,
    scaling: str = "row",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    pow2_scale: bool = False,
    orientation: str = "row",
    impl: str = "auto",
) -> Fp8Tensor | tuple[Fp8Tensor, Fp8Tensor]:
    """Quantise to 8 bits, with the scales computed from x.

    For each tile, in float32 and in this order::

        amax  = max |x|                      NaN left out
        s     = min(largest / amax, max)     largest is 448 (E4M3) or 57344 (E5M2); 1 where amax is 0 or infinite
        data  = round(clamp(x * s))          to nearest even; infinity saturates, NaN stays NaN (code 0x7F)
        scale = 1 / s

    Every implementation gives the same bytes, those of `hybrid_ops.reference.quant_fp8`.

    Args:
        x: (..., M, K), float32, bfloat16 or float16, any strides.
        scaling: the tile that shares a scale: "tensor", all of (M, K), so that experts (E, N, K) have one each;
            "row"; "1x128"; "128x128"; or "mx", 1x32 with E8M0 scales: the smallest power of two with
            amax <= largest * scale. The last tile of a row or column may be smaller.
        dtype: float8_e4m3fn or float8_e5m2.
        scale: for "tensor", known beforehand: float32, positive and finite, () or x's leading shape; s = 1 / scale.
        pow2_scale: round s down to a power of two.
        orientation: "row"; "column" quantises x^T, so data is (..., K, M) and contiguous; "both" returns the pair.
        impl: "auto", "triton" or "torch".

    Returns:
        `Fp8Tensor(data, scale, scaling)`, or two. scale is float32 of shape (...) for "tensor", (..., M, 1) for "row",
        (..., M, ceil(K / 128)) for "1x128", with unit stride along M and round_up(M, 4) to the next column (of which
        the padding is 1), (..., ceil(M / 128), ceil(K / 128)) for "128x128"; and uint8 (..., M, ceil(K / 32)) for "mx".

    Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or x requires a gradient.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; Open Compute Project 2023, "OCP Microscaling
    Formats (MX) Specification v1.0" (E8M0); the order of operations is that of Transformer Engine's current scaling.

    >>> q = hybrid_ops.fp8_quantize(torch.randn(4, 256), "1x128")
    >>> q.data.dtype, q.scale.shape
    (torch.float8_e4m3fn, torch.Size([4, 2]))
    """
    _device.check_impl(impl)
    check_matrix(x)
    _checks.one_of("scaling", scaling, SCALINGS)
    _checks.one_of("dtype", dtype, tuple(FP8))
    _checks.one_of("orientation", orientation, ORIENTATIONS)
    if scale is not None:
        if scaling != "tensor":
            raise ValueError(f"scale must be None with scaling={scaling!r}, got a tensor: only 'tensor' takes one")
        check_scale("scale", scale, x)
    _checks.no_gradient(x=x, scale=scale)
    views = oriented(x, orientation)
    results = tuple(_quantize(view, scaling, dtype, scale, pow2_scale, impl) for view in views)
    return results if orientation == "both" else results[0]  # type: ignore[return-value]


def fp8_dequantize(q: Fp8Tensor, *, dtype: torch.dtype = torch.bfloat16, impl: str = "auto") -> Tensor:
    """data * scale: a float32 product, rounded once to `dtype` (nearest even).

    Args:
        q: what `fp8_quantize` returns, or the like: data (..., M, K) and scale of the shape for its scaling, any
            strides.
        dtype: float32, bfloat16 or float16.
        impl: "auto", "triton" or "torch".

    Returns:
        (..., M, K).

    Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> x = torch.tensor([[1.0, 2.0, 448.0]])
    >>> hybrid_ops.fp8_dequantize(hybrid_ops.fp8_quantize(x), dtype=torch.float32)
    tensor([[  1.,   2., 448.]])
    """
    _device.check_impl(impl)
    _checks.one_of("dtype", dtype, INPUTS)
    check_fp8(q)
    data, scale, scaling = q
    y = data.new_empty(data.shape, dtype=dtype)
    tiles = scale.unsqueeze(-1).unsqueeze(-1) if scaling == "tensor" else scale
    _fp8_dequantize_op(flat(data.view(torch.uint8)), flat(tiles), flat(y), FP8[data.dtype], scaling, impl)
    return y


def check_matrix(x: Tensor, name: str = "x", dtypes: tuple[torch.dtype, ...] = INPUTS) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"{name} must have shape (..., M, K), got {tuple(x.shape)}")
    _checks.tensor(name, x, (None,) * x.dim() if isinstance(x, Tensor) else (), dtype=dtypes)


def check_fp8(q: Fp8Tensor, prefix: str = "") -> None:
    """The parts of an Fp8Tensor fit each other; `prefix` names the argument, as "a."."""
    data, scale, scaling = q
    _checks.one_of(f"{prefix}scaling", scaling, SCALINGS)
    check_matrix(data, f"{prefix}data", tuple(FP8))
    *lead, M, K = data.shape
    shape = tuple(lead) if scaling == "tensor" else (*lead, *scales_of(scaling, M, K))
    kind = torch.uint8 if scaling == "mx" else torch.float32
    _checks.tensor(f"{prefix}scale", scale, shape, dtype=kind, device=data.device)


def check_scale(name: str, scale: Tensor, x: Tensor) -> None:
    """A scale for each matrix of x, or one for all."""
    one = isinstance(scale, Tensor) and scale.dim() == 0
    _checks.tensor(name, scale, () if one else x.shape[:-2], dtype=torch.float32, device=x.device)
    if _checks.readable(scale):
        bad = scale[~((scale > 0) & (scale < math.inf))]
        if bad.numel():
            raise ValueError(f"{name} must be positive and finite, got {float(bad[0])}")


def oriented(x: Tensor, orientation: str) -> tuple[Tensor, ...]:
    """What is quantised along its last dimension: x, x^T, or both."""
    views = {"row": (x,), "column": (x.mT,), "both": (x, x.mT)}
    return views[orientation]


def flat(x: Tensor) -> Tensor:
    """(..., M, K) as (E, M, K), a view where strides allow it."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def per_matrix(scale: Tensor, x: Tensor) -> Tensor:
    """() or (...) as (E,)."""
    return scale.expand(x.shape[:-2]).reshape(-1).contiguous()


def scales_of(scaling: str, M: int, K: int) -> tuple[int, int]:
    """How many rows and columns of tiles (M, K) has."""
    height, width = _torch_quant.TILES[scaling]
    return 1 if height is None else -(-M // height), 1 if width is None else -(-K // width)


def _quantize(
    x: Tensor, scaling: str, dtype: torch.dtype, given: Tensor | None, pow2_scale: bool, impl: str
) -> Fp8Tensor:
    *lead, M, K = x.shape
    data = x.new_empty(x.shape, dtype=torch.uint8)
    rows, columns = scales_of(scaling, M, K)
    E = math.prod(lead)
    if given is not None:
        _fp8_quantize_op(flat(x), per_matrix(given, x), flat(data), None, FP8[dtype], scaling, pow2_scale, impl)
        return Fp8Tensor(data.view(dtype), given.expand(lead), scaling)
    if scaling == "1x128":  # stored along M, so that a block of rows is read at once
        padded = x.new_empty(E, columns, -(-M // 4) * 4, dtype=torch.float32)
        scale = padded[..., :M].mT.view(*lead, M, columns)
    else:
        padded = x.new_empty(E, rows, columns, dtype=torch.uint8 if scaling == "mx" else torch.float32)
        scale = padded.view(lead if scaling == "tensor" else (*lead, rows, columns))
    _fp8_quantize_op(flat(x), None, flat(data), padded, FP8[dtype], scaling, pow2_scale, impl)
    return Fp8Tensor(data.view(dtype), scale, scaling)


@explains("fp8_quantize")
@explains("fp8_dequantize")
def _choose(*, device: str = "cuda", impl: str = "auto", scaling: str = "row", K: int = 4096, **_: Any) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import quant_fp8 as kernels

    return Choice(chosen, kernels.config(scaling, K)._asdict(), reason)


def _fp8_quantize(
    x: Tensor,
    given: Tensor | None,
    data: Tensor,
    scale: Tensor | None,
    target: str,
    scaling: str,
    pow2_scale: bool,
    impl: str,
) -> None:
    if _device.choose(impl, x.device)[0] == "triton":
        from .triton_kernels import quant_fp8 as kernels

        kernels.fp8_quantize(x, given, data, scale, target, scaling, pow2_scale)
    else:
        _torch_quant.fp8_quantize(x, given, data, scale, target, scaling, pow2_scale)


def _fp8_dequantize(data: Tensor, scale: Tensor, y: Tensor, target: str, scaling: str, impl: str) -> None:
    if _device.choose(impl, data.device)[0] == "triton":
        from .triton_kernels import quant_fp8 as kernels

        kernels.fp8_dequantize(data, scale, y, target, scaling)
    else:
        _torch_quant.fp8_dequantize(data, scale, y, target, scaling)


_fp8_quantize_op = define(
    "fp8_quantize(Tensor x, Tensor? given, Tensor(a!) data, Tensor(b!)? scale, str target, str scaling,"
    " bool pow2_scale, str impl)",
    _fp8_quantize,
)
_fp8_dequantize_op = define(
    "fp8_dequantize(Tensor data, Tensor scale, Tensor(a!) y, str target, str scaling, str impl)", _fp8_dequantize
)
