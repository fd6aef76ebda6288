"""RMSNorm: `rms_norm`, optionally with the residual add of the layer before it, and `gated_rms_norm` of Mamba-2."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._csrc import norm as _csrc_norm
from ._library import Choice, define, explains
from ._torch import norm as _torch_norm


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of the last dimension, optionally fused with a residual add.

    ``y = h / sqrt(mean(h^2) + eps) * weight``, where ``h = x``, or ``h = x + residual`` in the residual's dtype.

    Args:
        x: (..., hidden), any strides.
        weight: (hidden,).
        eps: added to the mean square.
        residual: like x in shape; its dtype is the dtype of the residual stream.
        out: y is written here; x's shape and dtype. Not where a gradient is needed.
        impl: "auto", "cuda", "triton" or "torch".

    Returns:
        y, in x's dtype; with a residual (y, h), h in the residual's dtype.

    float32, bfloat16, float16 (float64 on the CPU). Arithmetic is float32, the weight is multiplied before the one
    cast. Differentiable in x, weight and residual.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that is not the one expected.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.

    >>> y, h = hybrid_ops.rms_norm(torch.randn(2, 8), torch.ones(8), residual=torch.randn(2, 8))
    """
    _device.check_impl(impl)
    _, run = _check(x, None, weight, residual, eps, None, False, out, impl)
    needs_grad = _checks.needs_grad(x, weight, residual)
    _checks.out(out, x, needs_grad)
    if needs_grad:
        return _RMSNorm.apply(x, weight, residual, eps, impl)
    return _rms_norm(x, weight, residual, eps, out, impl, run)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Grouped RMSNorm of Mamba-2's output, gated by ``silu(z)``.

    ``y = norm(x * silu(z)) * weight``, or with `norm_before_gate` ``y = norm(x) * weight * silu(z)``, where
    ``norm(u) = u / sqrt(mean(u^2) + eps)`` takes the mean over each group of `group_size` neighbouring features.
    Mamba-2 checkpoints of NVIDIA's hybrid models gate first and have 8 groups.

    Args:
        x: (..., hidden), any strides.
        z: like x in shape, any strides and floating dtype; None for no gate.
        weight: (hidden,).
        eps: added to the mean square.
        group_size: a divisor of hidden; None is all of it.
        norm_before_gate: the order of norm and gate.
        out: y is written here; x's shape and dtype. Not where a gradient is needed.
        impl: "auto", "cuda", "triton" or "torch".

    Returns:
        y, in x's dtype.

    float32, bfloat16, float16 (float64 on the CPU). Arithmetic is float32 with one cast at the end.
    Differentiable in x, z and weight.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that is not the one expected.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 7.1 (the extra normalisation layer).

    >>> y = hybrid_ops.gated_rms_norm(torch.randn(2, 8), torch.randn(2, 8), torch.ones(8), group_size=4)
    """
    _device.check_impl(impl)
    group_size, run = _check(x, z, weight, None, eps, group_size, norm_before_gate, out, impl)
    needs_grad = _checks.needs_grad(x, z, weight)
    _checks.out(out, x, needs_grad)
    if needs_grad:
        return _GatedRMSNorm.apply(x, z, weight, eps, group_size, norm_before_gate, impl)
    return _gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate, out, impl, run)


@_checks.remembered
def _check(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    out: Tensor | None,
    impl: str,
) -> tuple[int, Callable[..., None] | None]:
    """The size of a group; the kernel's launch, where that is what a plain call comes to."""
    if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[-1] == 0):
        raise ValueError(f"x must have shape (..., hidden) with hidden >= 1, got {tuple(x.shape)}")
    _checks.tensor("x", x, (None,) * x.dim() if isinstance(x, Tensor) else ())
    hidden = x.shape[-1]
    _checks.number("eps", eps)
    _checks.tensor("weight", weight, (hidden,), device=x.device)
    if z is not None:
        _checks.tensor("z", z, x.shape, device=x.device)
    if residual is not None:
        _checks.tensor("residual", residual, x.shape, device=x.device)
    if group_size is None:
        group_size = hidden
    elif not isinstance(group_size, int) or group_size < 1 or hidden % group_size:
        raise ValueError(f"group_size must divide the last dimension of x, {hidden}, got {group_size}")
    _checks.out(out, x, needs_grad=False)
    if not _checks.eager_on_gpu(x):
        return group_size, None
    y = x.new_empty(x.shape, device="meta") if out is None else out
    h = None if residual is None else residual.new_empty(residual.shape, device="meta")
    chosen = _choice(impl, x, z, residual, weight, y, h, group_size)
    arguments = (x, z, residual, weight, y, h, eps, group_size, norm_before_gate)
    if chosen == "cuda":
        return group_size, _csrc_norm.norm(*arguments)
    if chosen != "triton":
        return group_size, None
    from .triton_kernels import norm as kernels

    return group_size, kernels.find(*arguments)


@explains("rms_norm")
@explains("gated_rms_norm")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = 4096,
    **_: Any,
) -> Choice:
    x = torch.empty(1, group_size, dtype=dtype, device="meta")
    refusal = _device.not_sm90(torch.device(device)) or _csrc_norm.refusal(dtype, dtype, x[0], group_size, True, x=x)
    chosen, reason = _device.choose(impl, torch.device(device), refusal)
    if chosen == "cuda":
        config = _csrc_norm.config(8192, group_size, x.element_size(), written=8192 * group_size * x.element_size())
        return Choice(chosen, config._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import norm as kernels

    return Choice(chosen, kernels.config(group_size)._asdict(), reason)


def _choice(
    impl: str,
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    group_size: int,
) -> str:
    refusal = None
    if x.is_cuda and impl in ("auto", "cuda"):
        stream = next((t.dtype for t in (z, residual) if t is not None), x.dtype)
        refusal = _device.not_sm90(x.device) or _csrc_norm.refusal(
            x.dtype, stream, weight, group_size, z is not None, x=x, z=z, residual=residual, out=y, h=h
        )
    return _device.choose(impl, x.device, refusal)[0]


def _norm_fwd(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    impl: str,
) -> None:
    chosen = _choice(impl, x, z, residual, weight, y, h, group_size)
    if chosen == "cuda":
        _csrc_norm.norm(x, z, residual, weight, y, h, eps, group_size, norm_before_gate)(x, z, residual, weight, y, h)
    elif chosen == "triton":
        from .triton_kernels import norm as kernels

        kernels.norm(x, z, residual, weight, y, h, eps, group_size, norm_before_gate)
    else:
        _torch_norm.norm_fwd(x, z, residual, weight, y, h, eps, group_size, norm_before_gate)


_norm_fwd_op = define(
    "norm_fwd(Tensor x, Tensor? z, Tensor? residual, Tensor weight, Tensor(a!) y, Tensor(b!)? h, float eps, "
    "int group_size, bool norm_before_gate, str impl)",
    _norm_fwd,
)


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    out: Tensor | None,
    impl: str,
    run: Callable[..., None] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape) if out is None else out
    h = None if residual is None else residual.new_empty(*residual.shape)
    _norm_fwd_op(x, None, residual, weight, y, h, eps, x.shape[-1], False, impl, run=run)
    return y if h is None else (y, h)


def _gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    out: Tensor | None,
    impl: str,
    run: Callable[..., None] | None = None,
) -> Tensor:
    y = x.new_empty(*x.shape) if out is None else out
    _norm_fwd_op(x, z, None, weight, y, None, eps, group_size, norm_before_gate, impl, run=run)
    return y


def _norm_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    dh: Tensor | None,
    dx: Tensor,
    dz: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    impl: str,
) -> None:
    chosen = _bwd_choice(x, z, weight, dx, group_size, impl)
    if chosen == "cuda":
        if dh is not None:
            dh = _csrc_norm.in_rows(dh)
        tensors = (_csrc_norm.in_rows(dy), x, z, weight, dh, dx, dz, dresidual, dweight)
        _csrc_norm.norm_bwd(*tensors, eps, group_size, norm_before_gate)(*tensors)
        return
    if chosen == "triton":
        from .triton_kernels import norm_bwd as kernels

        kernels.norm_bwd(dy, x, z, weight, dh, dx, dz, dresidual, dweight, eps, group_size, norm_before_gate)
        return
    du, dgated, dw = _torch_norm.norm_bwd(dy, x, z, weight, eps, group_size, norm_before_gate)
    if dh is not None:
        du = du + dh.to(du.dtype)
    for target, result in ((dx, du), (dz, dgated), (dresidual, du), (dweight, dw)):
        if target is not None and result is not None:
            target.copy_(result)


@_checks.remembered
def _bwd_choice(x: Tensor, z: Tensor | None, weight: Tensor, dx: Tensor, group_size: int, impl: str) -> str:
    """As `_choice` of the forward, whose x had the dtype of dx, and of the residual stream that of this x."""
    refusal = None
    if x.is_cuda and impl in ("auto", "cuda"):
        refusal = _device.not_sm90(x.device) or _csrc_norm.refusal(
            dx.dtype, x.dtype, weight, group_size, z is not None, backward=True, x=x, z=z
        )
    return _device.choose(impl, x.device, refusal)[0]


# x is what the norm saw: with a residual their sum h, whose other gradient is dh
_norm_bwd_op = define(
    "norm_bwd(Tensor dy, Tensor x, Tensor? z, Tensor weight, Tensor? dh, Tensor(a!) dx, Tensor(b!)? dz, "
    "Tensor(c!)? dresidual, Tensor(d!) dweight, float eps, int group_size, bool norm_before_gate, str impl)",
    _norm_bwd,
)


@_checks.remembered
def _bwd_run(dy: Tensor, *others: Any) -> Callable[..., None] | None:
    """The CUDA kernel's launch, where that is what a plain call of the operator with these arguments comes to."""
    x, z, weight, dh, dx, dz, dresidual, dweight, eps, group_size, norm_before_gate, impl = others
    if not _checks.eager_on_gpu(dy) or _bwd_choice(x, z, weight, dx, group_size, impl) != "cuda":
        return None
    if not _csrc_norm.is_rows(dy) or (dh is not None and not _csrc_norm.is_rows(dh)):
        return None
    tensors = (dy, x, z, weight, dh, dx, dz, dresidual, dweight)
    return _csrc_norm.norm_bwd(*tensors, eps, group_size, norm_before_gate)


def _fill_gradients(*arguments: Any) -> None:
    """The operator, as the library calls it: a known call goes straight to its launch."""
    _norm_bwd_op(*arguments, run=_bwd_run(*arguments))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, impl):  # type: ignore[override]
        result = _rms_norm(x, weight, residual, eps, None, impl)
        ctx.save_for_backward(x if residual is None else result[1], weight)
        ctx.options = eps, impl
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):  # type: ignore[override]
        h, weight = ctx.saved_tensors
        eps, impl = ctx.options
        dtype, residual_dtype = ctx.dtypes
        if dy is None:
            dy = torch.zeros_like(h, dtype=dtype)
        dx, dweight = h.new_empty(*h.shape, dtype=dtype), torch.empty_like(weight)
        dresidual = None if residual_dtype in (None, dtype) else h.new_empty(*h.shape)
        _fill_gradients(dy, h, None, weight, dh, dx, None, dresidual, dweight, eps, h.shape[-1], False, impl)
        if residual_dtype == dtype:
            dresidual = dx
        return dx, dweight, dresidual, None, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, group_size, norm_before_gate, impl):  # type: ignore[override]
        ctx.save_for_backward(x, z, weight)
        ctx.options = eps, group_size, norm_before_gate, impl
        return _gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate, None, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        dx, dweight = x.new_empty(*x.shape), torch.empty_like(weight)
        dz = None if z is None else z.new_empty(*z.shape)
        _fill_gradients(dy, x, z, weight, None, dx, dz, None, dweight, *ctx.options)
        return dx, dz, dweight, None, None, None, None
