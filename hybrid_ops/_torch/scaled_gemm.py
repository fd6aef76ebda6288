"""Products of quantised matrices in plain torch: dequantised to float32, then `grouped_gemm`'s products.

An expert is dequantised when it has rows, so that a few tokens do not pay for all experts.
"""

import torch
from torch import Tensor

from .grouped_gemm import grouped_gemm_fwd
from .quant_fp8 import fp8_dequantize
from .quant_nvfp4 import nvfp4_dequantize

FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def scaled_gemm_fwd(
    a: Tensor,
    a_inner: Tensor | None,
    a_outer: Tensor | None,
    a_kind: str,
    b: Tensor,
    b_inner: Tensor | None,
    b_outer: Tensor | None,
    b_kind: str,
    offs: Tensor | None,
    gather: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
    activation: str | None,
    batch_invariant: bool,
) -> None:
    """Fill out (R, N): each row of a with its expert of b (E, N, K), or, without offs, with the only one."""
    wide = dequantized(a, a_inner, a_outer, a_kind)
    experts = _Dequantized(b, b_inner, b_outer, b_kind)
    ends = torch.full((1,), out.shape[0], dtype=torch.int32) if offs is None else offs
    product = out if bias is None else out.new_empty(out.shape, dtype=torch.float32)
    grouped_gemm_fwd(wide, experts, ends, gather, row_scale, product, None, activation, batch_invariant)
    if bias is not None:
        out.copy_(product + bias.float())


class _Dequantized:
    """Item e is the expert's matrix in float32."""

    def __init__(self, data: Tensor, inner: Tensor | None, outer: Tensor | None, kind: str) -> None:
        self._parts, self._kind = (data, inner, outer), kind

    def __getitem__(self, e: int, /) -> Tensor:
        data, inner, outer = (None if part is None else part[e] for part in self._parts)
        assert data is not None
        return dequantized(data, inner, outer, self._kind)


def dequantized(data: Tensor, inner: Tensor | None, outer: Tensor | None, kind: str) -> Tensor:
    """One matrix (M, K) in float32; what is not quantised as it is."""
    if kind == "plain":
        return data
    y = data.new_empty(data.shape, dtype=torch.float32)
    if kind in ("linear", "128x4"):
        assert inner is not None
        assert outer is not None
        y = data.new_empty(data.shape[0], 2 * data.shape[1], dtype=torch.float32)
        nvfp4_dequantize(data[None], inner[None], outer, y[None], kind)
        return y
    scale = inner if inner is not None else outer[:, None]  # type: ignore[index]
    fp8_dequantize(data.view(torch.uint8)[None], scale[None], y[None], FP8_NAMES[data.dtype], kind)
    return y
