"""Quantised weights under the names of ModelOpt's checkpoints, and linear layers with them. For inference."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..gemm_fp8 import fp8_gemm
from ..gemm_nvfp4 import nvfp4_gemm
from ..quant_fp8 import Fp8Tensor, fp8_dequantize, fp8_quantize
from ..quant_nvfp4 import BLOCK, Nvfp4Tensor, nvfp4_dequantize, nvfp4_quantize


class QuantizedWeight(nn.Module):
    """A matrix (N, K), or one for each expert (E, N, K), as a checkpoint stores it: buffers, without gradients.

    `.to(dtype)`, `.half()` and the like leave these buffers as they are: their dtypes are the format.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], input_scale: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.register_parameter("bias", None)
        self._add("input_scale", shape[:-2] if input_scale else None, torch.float32, device)

    @property
    def value(self) -> Fp8Tensor | Nvfp4Tensor:
        """What the operators take; it shares this module's memory."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrices themselves: float32 products, rounded once to a floating dtype."""
        kind: type = type(self.value)
        dequantize: Callable[..., Tensor] = fp8_dequantize if kind is Fp8Tensor else nvfp4_dequantize
        through = torch.float32 if dtype == torch.float64 else dtype
        result = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        for expert in range(self.shape[0]) if len(self.shape) == 3 else (...,):  # all at once would take much memory
            q = kind(*(part[expert] if isinstance(part, Tensor) else part for part in self.value))
            result[expert] = dequantize(q, dtype=through)
        return result

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, input_scale={self.input_scale is not None}, bias={self.bias is not None}"

    def _add(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype, device: Any) -> None:
        self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        def moved(t: Tensor) -> Tensor:
            result = fn(t)
            return result if t is self.bias or result.dtype == t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)


class Fp8Weight(QuantizedWeight):
    """``weight * weight_scale``: E4M3 with one scale for a matrix, or one for each of its rows.

    Buffers: weight float8_e4m3fn (..., N, K); weight_scale float32 (...) or, where `scaling` is "row", (..., N);
    input_scale float32 (...), the scale with which rows are quantised, or None.

    Args:
        shape: (N, K) or (E, N, K).
        scaling: "tensor" or "row".
        input_scale: whether there is one.
        device: of the buffers, whose values are undefined until they are filled.

    Raises:
        ValueError: another scaling.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        scaling: str = "tensor",
        input_scale: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, input_scale, device)
        if scaling not in ("tensor", "row"):
            raise ValueError(f"scaling must be 'tensor' or 'row', got {scaling!r}")
        self.scaling = scaling
        self._add("weight", shape, torch.float8_e4m3fn, device)
        self._add("weight_scale", shape[:-2] if scaling == "tensor" else shape[:-1], torch.float32, device)

    @property
    def value(self) -> Fp8Tensor:
        scale = self.weight_scale if self.scaling == "tensor" else self.weight_scale[..., None]
        return Fp8Tensor(self.weight, scale, self.scaling)


class Nvfp4Weight(QuantizedWeight):
    """``code * weight_scale * weight_scale_2``: E2M1, two codes a byte, the low half first.

    Buffers: weight uint8 (..., N, K / 2); weight_scale float8_e4m3fn (..., N, K / 16); weight_scale_2 float32 (...);
    input_scale float32 (...) or None. It is kept and not used: rows are multiplied as they are ("W4A16").

    Args:
        shape: (N, K) or (E, N, K), K a multiple of 16.
        input_scale: whether there is one.
        device: of the buffers, whose values are undefined until they are filled.

    Raises:
        ValueError: another K.
    """

    weight_scale_2: Tensor

    def __init__(
        self, shape: tuple[int, ...], *, input_scale: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__(shape, input_scale, device)
        *rows, K = shape
        if K % BLOCK:
            raise ValueError(f"shape must have K divisible by {BLOCK} for NVFP4, got {tuple(shape)}")
        self._add("weight", (*rows, K // 2), torch.uint8, device)
        self._add("weight_scale", (*rows, K // BLOCK), torch.float8_e4m3fn, device)
        self._add("weight_scale_2", shape[:-2], torch.float32, device)

    @property
    def value(self) -> Nvfp4Tensor:
        return Nvfp4Tensor(self.weight, self.weight_scale, self.weight_scale_2, "linear")


class Fp8Linear(Fp8Weight):
    """``fp8(x) @ (weight * weight_scale)^T + bias``, with both operands in FP8.

    x is quantised with `input_scale` where there is one, otherwise each row with a scale of its own.

    Args:
        in_features, out_features: K and N.
        bias, dtype: whether there is a bias, and its dtype.
        scaling, input_scale, device: as in `Fp8Weight`.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".

    >>> from hybrid_ops.nn import Fp8Linear
    >>> linear = Fp8Linear.from_linear(torch.nn.Linear(32, 8))
    >>> linear(torch.randn(2, 5, 32)).shape, linear.weight.dtype
    (torch.Size([2, 5, 8]), torch.float8_e4m3fn)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        scaling: str = "tensor",
        input_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), scaling=scaling, input_scale=input_scale, device=device)
        self.bias = _frozen(torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, *, scaling: str = "tensor") -> "Fp8Linear":
        """Quantise a layer's weight; x is then quantised row by row."""
        q = cast(Fp8Tensor, fp8_quantize(linear.weight, scaling))
        self = cls(linear.in_features, linear.out_features, bias=False, scaling=scaling, device="meta")
        self.weight, self.weight_scale = q.data, q.scale if scaling == "tensor" else q.scale[..., 0]
        self.bias = _frozen(linear.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        scaling = "row" if self.input_scale is None else "tensor"
        q = fp8_quantize(rows, scaling, scale=self.input_scale)
        y = fp8_gemm(cast(Fp8Tensor, q), self.value, bias=self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class Nvfp4Linear(Nvfp4Weight):
    """``x @ (code * weight_scale * weight_scale_2)^T + bias``, with x as it is.

    Args:
        in_features, out_features: K, a multiple of 16, and N.
        bias, dtype: whether there is a bias, and its dtype.
        input_scale, device: as in `Nvfp4Weight`.

    Source: Abecassis et al. 2025, "Pretraining Large Language Models with NVFP4".

    >>> from hybrid_ops.nn import Nvfp4Linear
    >>> linear = Nvfp4Linear.from_linear(torch.nn.Linear(32, 8))
    >>> linear(torch.randn(2, 5, 32)).shape, linear.weight.shape
    (torch.Size([2, 5, 8]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        input_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), input_scale=input_scale, device=device)
        self.bias = _frozen(torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> "Nvfp4Linear":
        """Quantise a layer's weight, as ModelOpt does."""
        q = cast(Nvfp4Tensor, nvfp4_quantize(linear.weight, mode="modelopt"))
        self = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.weight_scale, self.weight_scale_2 = q.data, q.scale, q.tensor_scale
        self.bias = _frozen(linear.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype."""
        y = nvfp4_gemm(x.reshape(-1, x.shape[-1]), self.value, bias=self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
