"""Products of quantised matrices: what `gemm_fp8` and `gemm_nvfp4` have in common.

An operand's scales are of two sorts. Inner ones change along K, so they multiply before the sum over K is complete: a
sum of 128 products, of 32 for "mx", or each NVFP4 code. Outer ones, of a row or of all, multiply the sum.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import scaled_gemm as _torch_scaled_gemm
from .grouped_gemm import check_rows
from .quant_fp8 import INPUTS, Fp8Tensor, check_fp8
from .quant_nvfp4 import Nvfp4Tensor, check_nvfp4

LAYOUTS = {2: "(M, K)", 3: "(E, N, K)"}


class Operand(NamedTuple):
    """One side of a product, (M, K) or (E, N, K), as the operator takes it.

    `kind` is "plain" (floats without scales), a scaling of `Fp8Tensor` or a scale layout of `Nvfp4Tensor`. `outer` is
    (1 or M,) or (E, 1 or N), `inner` as in those tuples.
    """

    data: Tensor
    inner: Tensor | None
    outer: Tensor | None
    kind: str

    @property
    def shape(self) -> torch.Size:
        """Of the values: a byte of NVFP4 holds two."""
        *lead, K = self.data.shape
        return torch.Size((*lead, 2 * K if self.kind in ("linear", "128x4") else K))


def fp8_operand(name: str, q: Fp8Tensor, dims: int) -> Operand:
    """Of a checked Fp8Tensor; its data has `dims` dimensions."""
    if not isinstance(q, Fp8Tensor):
        raise TypeError(f"{name} must be an Fp8Tensor, got {type(q).__name__}")
    _checks.rank(f"{name}.data", q.data, (dims,), LAYOUTS[dims] if name == "a" or dims == 3 else "(N, K)")
    check_fp8(q, f"{name}.")
    if q.scaling == "tensor":
        return Operand(q.data, None, q.scale[..., None], q.scaling)
    if q.scaling == "row":
        return Operand(q.data, None, q.scale[..., 0], q.scaling)
    return Operand(q.data, q.scale, None, q.scaling)


def nvfp4_operand(name: str, q: Nvfp4Tensor, dims: int) -> Operand:
    """Of a checked Nvfp4Tensor; its data has `dims` dimensions."""
    _checks.rank(f"{name}.data", q.data, (dims,), LAYOUTS[dims] if name == "a" or dims == 3 else "(N, K)")
    check_nvfp4(q, f"{name}.")
    return Operand(q.data, q.scale.view(torch.uint8), q.tensor_scale[..., None], q.scale_layout)


def dense_product(
    a: Operand,
    b: Operand,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    fast_accum: bool = False,
    batch_invariant: bool,
    out: Tensor | None,
    impl: str,
) -> Tensor:
    """a (M, K), b (N, K) to (M, N): the grouped product with one expert, which has all rows."""
    _check_pair(a, b)
    N = b.shape[0]
    if bias is not None:
        _checks.tensor("bias", bias, (N,), dtype=INPUTS, device=a.data.device)
    _checks.no_gradient(a=a.data, bias=bias)
    y = _result(out, a, (a.shape[0], N), out_dtype)
    matrices = (None if part is None else part[None] for part in b[:3])
    _scaled_gemm_op(*a, *matrices, b.kind, None, None, bias, None, y, None, fast_accum, batch_invariant, impl)
    return y


def grouped_product(
    a: Operand,
    b: Operand,
    offs: Tensor,
    out_dtype: torch.dtype,
    *,
    gather: Tensor | None,
    activation: str | None,
    row_scale: Tensor | None,
    fast_accum: bool = False,
    batch_invariant: bool,
    out: Tensor | None,
    impl: str,
) -> Tensor:
    """a (M, K), b (E, N, K) to (R, N), as `grouped_gemm`."""
    _check_pair(a, b)
    rows, n = check_rows(a.data, b.data, offs, gather, activation)
    if row_scale is not None:
        _checks.tensor("row_scale", row_scale, (rows,), dtype=torch.float32, device=a.data.device)
    _checks.no_gradient(a=a.data, row_scale=row_scale)
    y = _result(out, a, (rows, n), out_dtype)
    _scaled_gemm_op(*a, *b, offs, gather, None, row_scale, y, activation, fast_accum, batch_invariant, impl)
    return y


def _check_pair(a: Operand, b: Operand) -> None:
    if a.data.device != b.data.device:
        raise ValueError(f"b must be on {a.data.device}, got {b.data.device}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b must have K = {a.shape[-1]}, as a has, got {b.shape[-1]}")


def _result(out: Tensor | None, a: Operand, shape: tuple[int, int], out_dtype: torch.dtype) -> Tensor:
    _checks.one_of("out_dtype", out_dtype, INPUTS)
    if out is None:
        return a.data.new_empty(shape, dtype=out_dtype)
    _checks.tensor("out", out, shape, dtype=out_dtype, device=a.data.device)
    return out


@explains("fp8_gemm")
@explains("fp8_grouped_gemm")
def _choose_fp8(**problem: Any) -> Choice:
    return _choose("row", "row", **problem)


@explains("nvfp4_gemm")
@explains("nvfp4_grouped_gemm")
def _choose_nvfp4(**problem: Any) -> Choice:
    return _choose("plain", "linear", **problem)


def _choose(
    a_kind: str,
    b_kind: str,
    *,
    device: str = "cuda",
    impl: str = "auto",
    rows: int = 8192,
    experts: int = 1,
    n: int = 1856,
    k: int = 2688,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    scaling: str | None = None,
    **_: Any,
) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import scaled_gemm as kernels

    cores = kernels.fp8_cores(torch.empty(0, device=device)) if torch.cuda.is_available() else True
    kinds = (a_kind, b_kind) if scaling is None else (scaling, b_kind if a_kind == "plain" else scaling)
    operands = kernels.operand_dtype(*kinds, torch.bfloat16, out_dtype, fast_accum, cores)
    gated = activation == "silu_gated"
    c = kernels.config(rows, experts, n, operands, kernels.step_of_scales(*kinds), gated, batch_invariant)
    return Choice(chosen, c._asdict(), reason)


def _scaled_gemm_fwd(
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
    fast_accum: bool,
    batch_invariant: bool,
    impl: str,
) -> None:
    operands = (a, a_inner, a_outer, a_kind, b, b_inner, b_outer, b_kind)
    if _device.choose(impl, a.device)[0] == "triton":
        from .triton_kernels import scaled_gemm as kernels

        kernels.scaled_gemm(*operands, offs, gather, bias, row_scale, out, activation, fast_accum, batch_invariant)
    else:
        _torch_scaled_gemm.scaled_gemm_fwd(*operands, offs, gather, bias, row_scale, out, activation, batch_invariant)


_scaled_gemm_op = define(
    "scaled_gemm_fwd(Tensor a, Tensor? a_inner, Tensor? a_outer, str a_kind, Tensor b, Tensor? b_inner, "
    "Tensor? b_outer, str b_kind, Tensor? offs, Tensor? gather, Tensor? bias, Tensor? row_scale, Tensor(a!) out, "
    "str? activation, bool fast_accum, bool batch_invariant, str impl)",
    _scaled_gemm_fwd,
)
