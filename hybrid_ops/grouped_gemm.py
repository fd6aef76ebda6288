"""`grouped_gemm`: rows sorted by expert, each times the matrix of its own expert."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import grouped_gemm as _torch_grouped_gemm

ACTIVATIONS = (None, "relu2", "silu_gated")
MAX_EXPERTS = 1024


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    *,
    gather: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    return_preact: bool = False,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The matrix product of a mixture of experts: every expert has its own matrix, and some of the rows.

    ``h[i] = b[e] @ a[gather[i]]`` and ``y[i] = activation(h[i]) * row_scale[i]`` for the rows ``i`` from
    ``offs[e - 1]`` up to ``offs[e]``, those of expert e. An expert may have none.

    R below is the number of rows of the result: that of gather, else of a.

    Args:
        a: (R, K), sorted by expert; with gather (M, K), in any order. Any strides.
        b: (E, N, K), with "silu_gated" (E, 2 N, K), in a's dtype. Any strides: the transposed view of an (E, K, N)
            tensor is read in place. E at most 1024.
        offs: (E,) int32, where each expert's rows end. Rows from offs[-1] on belong to none: they are 0.
        gather: (R,) int32, the row of a that row i of the result is made from; read for rows before offs[-1] only.
        activation: None; "relu2", ``max(h, 0)^2``; or "silu_gated", ``silu(gate) * up`` with ``h = (gate, up)``, so the
            first N rows of a matrix make the gate.
        row_scale: (R,) float32 (float64 for float64), the router's weights for instance.
        return_preact: also return h, in y's dtype.
        out_dtype: of y; None is a's.
        batch_invariant: the bits of a row do not depend on how many others there are.
        out: y is written here, (R, N) in out_dtype. Not where a gradient is needed.
        impl: "auto", "triton" or "torch".

    Returns:
        y (R, N), or (y, h).

    float32, bfloat16, float16 (float64 on the CPU). Products are summed, activated and scaled in float32 and cast once.
    Differentiable in a, b and row_scale, from y and h; the same bits from run to run.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or index that is not the one expected.

    Source: Gale et al. 2022, "MegaBlocks", section 3; "relu2": So et al. 2021, "Primer"; "silu_gated": Shazeer 2020,
    "GLU Variants Improve Transformer".

    >>> offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    >>> y = hybrid_ops.grouped_gemm(torch.randn(5, 8), torch.randn(3, 4, 8), offs, activation="relu2")
    """
    _device.check_impl(impl)
    _checks.rank("a", a, (2,), "(rows, K)")
    _checks.tensor("a", a, (None, None))
    _checks.rank("b", b, (3,), "(E, N, K)")
    _checks.tensor("b", b, (None, None, a.shape[1]), dtype=a.dtype, device=a.device)
    rows, n = check_rows(a, b, offs, gather, activation)
    if row_scale is not None:
        scale_dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        _checks.tensor("row_scale", row_scale, (rows,), dtype=scale_dtype, device=a.device)
    out_dtype = a.dtype if out_dtype is None else out_dtype
    _checks.one_of("out_dtype", out_dtype, _checks.FLOATS)
    needs_grad = _checks.needs_grad(a, b, row_scale)
    if out is not None:
        _checks.out(out, a.new_empty(1, dtype=out_dtype).expand(rows, n), needs_grad)
    if needs_grad:
        y, preact = _GroupedGemm.apply(
            a, b, row_scale, offs, gather, activation, return_preact, out_dtype, batch_invariant, impl
        )
    else:
        y = a.new_empty((rows, n), dtype=out_dtype) if out is None else out
        preact = a.new_empty((rows, b.shape[1]), dtype=out_dtype) if return_preact else None
        _grouped_gemm_fwd_op(a, b, offs, gather, row_scale, y, preact, activation, batch_invariant, impl)
    return (y, preact) if return_preact else y


def check_rows(a: Tensor, b: Tensor, offs: Tensor, gather: Tensor | None, activation: str | None) -> tuple[int, int]:
    """Rows and columns of the result, from the shapes of a and b: (M, any), (E, N or 2 N, any)."""
    _checks.one_of("activation", activation, ACTIVATIONS)
    experts, width = b.shape[0], b.shape[1]
    if experts > MAX_EXPERTS:
        raise ValueError(f"b must have at most {MAX_EXPERTS} experts, got {experts}")
    if activation == "silu_gated" and width % 2:
        raise ValueError(f"b must have shape (E, 2 N, K) with activation='silu_gated', got {tuple(b.shape)}")
    if gather is not None:
        _checks.tensor("gather", gather, (None,), dtype=torch.int32, device=a.device)
    rows = a.shape[0] if gather is None else gather.shape[0]
    _check_offs(offs, experts, rows, a.device)
    _check_gather(gather, offs, a.shape[0])
    return rows, width // 2 if activation == "silu_gated" else width


def _check_offs(offs: Tensor, experts: int, rows: int, device: torch.device) -> None:
    _checks.tensor("offs", offs, (experts,), dtype=torch.int32, device=device)
    if experts and _checks.readable(offs):
        steps = offs.diff(prepend=offs.new_zeros(1))
        if (steps < 0).any():
            e = int((steps < 0).nonzero()[0])
            raise ValueError(f"offs must not fall and not be negative, got {int(offs[e])} at expert {e}")
        if offs[-1] > rows:
            raise ValueError(f"offs must end at the number of rows, {rows}, or before, got {int(offs[-1])}")


def _check_gather(gather: Tensor | None, offs: Tensor, rows_of_a: int) -> None:
    if gather is not None and _checks.readable(gather):
        used = gather[: int(offs[-1])] if offs.numel() else gather[:0]
        bad = used[(used < 0) | (used >= rows_of_a)]
        if bad.numel():
            raise ValueError(f"gather must be in [0, {rows_of_a}), got {int(bad[0])}")


@explains("grouped_gemm")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 49152,
    experts: int = 128,
    n: int = 1856,
    k: int = 2688,
    activation: str | None = None,
    batch_invariant: bool = False,
    **_: Any,
) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import grouped_gemm as kernels

    arch = kernels.architecture(torch.empty(0, device=device)) if torch.cuda.is_available() else 90
    gated = activation == "silu_gated"
    return Choice(
        chosen, kernels.config(rows, experts, n, k, dtype.itemsize, gated, arch, batch_invariant)._asdict(), reason
    )


def _grouped_gemm_fwd(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
    preact: Tensor | None,
    activation: str | None,
    batch_invariant: bool,
    impl: str,
) -> None:
    if _device.choose(impl, a.device)[0] == "triton":
        from .triton_kernels import grouped_gemm as kernels

        kernels.grouped_gemm(a, b, offs, gather, row_scale, out, preact, activation, batch_invariant)
    else:
        _torch_grouped_gemm.grouped_gemm_fwd(a, b, offs, gather, row_scale, out, preact, activation, batch_invariant)


_grouped_gemm_fwd_op = define(
    "grouped_gemm_fwd(Tensor a, Tensor b, Tensor offs, Tensor? gather, Tensor? row_scale, Tensor(a!) out, "
    "Tensor(b!)? preact, str? activation, bool batch_invariant, str impl)",
    _grouped_gemm_fwd,
)


def _preact_grad(
    dy: Tensor,
    preact: Tensor | None,
    row_scale: Tensor | None,
    dpreact: Tensor | None,
    dh: Tensor,
    dscale: Tensor | None,
    activation: str | None,
    impl: str,
) -> None:
    if _device.choose(impl, dy.device)[0] == "triton":
        from .triton_kernels import grouped_gemm_bwd as kernels

        kernels.preact_grad(dy, preact, row_scale, dpreact, dh, dscale, activation)
    else:
        _torch_grouped_gemm.preact_grad(dy, preact, row_scale, dpreact, dh, dscale, activation)


_preact_grad_op = define(
    "grouped_gemm_preact_grad(Tensor dy, Tensor? preact, Tensor? row_scale, Tensor? dpreact, Tensor(a!) dh, "
    "Tensor(b!)? dscale, str? activation, str impl)",
    _preact_grad,
)


def _grouped_gemm_wgrad(dh: Tensor, a: Tensor, offs: Tensor, gather: Tensor | None, db: Tensor, impl: str) -> None:
    if _device.choose(impl, a.device)[0] == "triton":
        from .triton_kernels import grouped_gemm_bwd as kernels

        kernels.grouped_gemm_wgrad(dh, a, offs, gather, db)
    else:
        _torch_grouped_gemm.grouped_gemm_wgrad(dh, a, offs, gather, db)


_grouped_gemm_wgrad_op = define(
    "grouped_gemm_wgrad(Tensor dh, Tensor a, Tensor offs, Tensor? gather, Tensor(a!) db, str impl)",
    _grouped_gemm_wgrad,
)


def _index_sum(
    values: Tensor, index: Tensor, weights: Tensor | None, out: Tensor, repeat: int, factor: float, impl: str
) -> None:
    if _device.choose(impl, values.device)[0] == "triton":
        from .triton_kernels import grouped_gemm_bwd as kernels

        kernels.index_sum(values, index, weights, out, repeat, factor)
    else:
        _torch_grouped_gemm.index_sum(values, index, weights, out, repeat, factor)


# out[r] = factor * sum of weights[p] * values[p // repeat] over the p with index[p] = r: what a gather's backward is,
# of rows here and of `moe_combine`; in the order of p, so with the same bits from run to run, as atomics would not be
index_sum_op = define(
    "index_sum(Tensor values, Tensor index, Tensor? weights, Tensor(a!) out, int repeat, float factor, str impl)",
    _index_sum,
)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, a, b, row_scale, offs, gather, activation, return_preact, out_dtype, batch_invariant, impl
    ):
        rows = a.shape[0] if gather is None else gather.shape[0]
        width = b.shape[1]
        n = width // 2 if activation == "silu_gated" else width
        scale_grad = row_scale is not None and row_scale.requires_grad
        keep = activation is not None or scale_grad
        y = a.new_empty((rows, n), dtype=out_dtype)
        preact = a.new_empty((rows, width), dtype=out_dtype) if keep or return_preact else None
        _grouped_gemm_fwd_op(a, b, offs, gather, row_scale, y, preact, activation, batch_invariant, impl)
        ctx.save_for_backward(a, b, row_scale, offs, gather, preact if keep else None)
        ctx.options = activation, batch_invariant, impl
        ctx.set_materialize_grads(False)
        return y, preact if return_preact else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dpreact):  # type: ignore[override]
        a, b, row_scale, offs, gather, preact = ctx.saved_tensors
        activation, batch_invariant, impl = ctx.options
        needs_a, needs_b, needs_scale = ctx.needs_input_grad[:3]
        da = db = dscale = None
        if dy is None and dpreact is None:
            return (None,) * 10
        if dy is None:
            dh = dpreact.to(a.dtype)
        elif activation is None and row_scale is None and dpreact is None:
            dh = dy.to(a.dtype)
        else:
            dh = a.new_empty((dy.shape[0], b.shape[1]))
            dscale = row_scale.new_empty(row_scale.shape) if needs_scale else None
            _preact_grad_op(dy, preact, row_scale, dpreact, dh, dscale, activation, impl)
        if needs_a:
            da = _rows_grad(dh, b, offs, gather, a, batch_invariant, impl)
        if needs_b:
            db = b.new_empty(b.shape)
            _grouped_gemm_wgrad_op(dh, a, offs, gather, db, impl)
        return da, db, dscale, *(None,) * 7


def _rows_grad(
    dh: Tensor, b: Tensor, offs: Tensor, gather: Tensor | None, a: Tensor, batch_invariant: bool, impl: str
) -> Tensor:
    """dh b: the forward's own kernel with the transposed view of b."""
    # rows that are yet to be summed are not rounded
    dtype = a.dtype if gather is None or a.dtype == torch.float64 else torch.float32
    rows = a.new_empty((dh.shape[0], a.shape[1]), dtype=dtype)
    _grouped_gemm_fwd_op(dh, b.transpose(1, 2), offs, None, None, rows, None, None, batch_invariant, impl)
    if gather is None:
        return rows
    da = a.new_empty(a.shape)
    index_sum_op(rows, gather, None, da, 1, 1.0, impl)
    return da
