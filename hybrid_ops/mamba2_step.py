"""`mamba2_step`: all that a Mamba-2 mixer does for the next token of each sequence between its two projections."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _device
from ._csrc import mamba2_step as _csrc_mamba2_step
from ._library import Choice, define, explains
from ._torch import mamba2_step as _torch_mamba2_step
from .conv1d import MAX_WIDTH
from .ssd_update import check_rounding


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    norm_weight: Tensor,
    *,
    conv_bias: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    slots: Tensor | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The next token of each sequence through a Mamba-2 mixer, from in_proj's output to out_proj's input.

    With d_inner = nheads * headdim, and both pools moving on in place::

        z, xBC, dt = split(zxbcdt)                       d_inner, d_inner + 2 ngroups dstate, nheads
        x, B, C    = split(causal_conv1d_update(xBC, conv_state, conv_weight, conv_bias, activation="silu"))
        y          = ssd_state_update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, ..)
        return       gated_rms_norm(y, z, norm_weight, ..)

    That is what the three operators of these names compute, but for roundings: what lies between them stays in float32.

    Args:
        zxbcdt: (batch, 2 d_inner + 2 ngroups dstate + nheads), any strides; ngroups follows from it, dividing nheads.
        conv_state: (nslots, d_inner + 2 ngroups dstate, state_len), any strides, updated in place: newest column last,
            state_len >= width - 1.
        state: (nslots, nheads, headdim, dstate), any strides, updated in place.
        conv_weight: (d_inner + 2 ngroups dstate, width), width 1 to 8; the last column multiplies the new token.
        A: (nheads,), negative; float32 (float64 where zxbcdt is).
        norm_weight: (d_inner,).
        conv_bias: (d_inner + 2 ngroups dstate,).
        D: (nheads,) or (nheads, headdim), the skip weight.
        dt_bias: (nheads,).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) bounds of dt after that; the default removes negative steps only.
        eps: of the norm.
        group_size: of the norm, a divisor of d_inner; None is all of it.
        norm_before_gate: the order of norm and gate.
        slots: (batch,) int32, the row of both pools that each sequence has, all distinct; None: sequence b has row b.
        rounding: of a float16 or bfloat16 state when it is stored: "nearest", or "stochastic" with the bits that
            `ssd_state_update` takes from `seed`.
        seed: (1,) int64 on zxbcdt's device, for stochastic rounding.
        null_slot: the slot of padding: y is 0 and nothing is written. So it is, on a GPU, for any slot out of range.
        out: y is written here; y's shape and zxbcdt's dtype, memory of its own.
        impl: "auto", "cuda", "triton" or "torch". "torch" synchronises on a GPU.

    Returns:
        y, (batch, d_inner), zxbcdt's dtype.

    float32, bfloat16, float16 (float64 on the CPU), each tensor its own. Arithmetic is float32 (float64 where zxbcdt
    is), every result cast once. Not differentiable. Several tokens a call, drafts and states in 8 bits: the three
    operators do that.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or one that requires a gradient; nothing has
            been written then.

    Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", section 7 and eq. 1.

    >>> conv_state, state = torch.zeros(3, 64, 3), torch.zeros(3, 4, 8, 16)  # 32 + 2 * 1 * 16 channels
    >>> weight, A = torch.ones(64, 4), -torch.ones(4)
    >>> y = hybrid_ops.mamba2_step(torch.ones(3, 100), conv_state, state, weight, A, torch.ones(32))
    >>> y.shape, conv_state[0, 0]
    (torch.Size([3, 32]), tensor([0., 0., 1.]))
    """
    _device.check_impl(impl)
    inputs = (conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    group_size, low, high, run = _check(
        *(zxbcdt, conv_state, state, *inputs, slots, seed, out),
        *(dt_softplus, dt_limit, eps, group_size, norm_before_gate, rounding, null_slot, impl),
    )
    _checks.no_gradient(
        zxbcdt=zxbcdt, conv_state=conv_state, state=state, conv_weight=conv_weight, conv_bias=conv_bias, A=A, D=D,
        dt_bias=dt_bias, norm_weight=norm_weight,
    )  # fmt: skip
    y = zxbcdt.new_empty(zxbcdt.shape[0], norm_weight.shape[0]) if out is None else out
    options = (dt_softplus, low, high, eps, group_size, norm_before_gate, null_slot, impl)
    _mamba2_step_op(zxbcdt, conv_state, state, *inputs, slots, seed, y, *options, run=run)
    return y


@_checks.remembered
def _check(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    slots: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    rounding: str,
    null_slot: int,
    impl: str,
) -> tuple[int, float, float, Callable[..., None] | None]:
    """The norm's group size, the bounds of dt; the CUDA kernel's launch, where that is what a plain call comes to."""
    _checks.number("eps", eps)
    _checks.number("null_slot", null_slot)
    batch, d_inner = _check_inputs(zxbcdt, conv_state, state, conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    if group_size is None:
        group_size = d_inner
    elif not isinstance(group_size, int) or group_size < 1 or d_inner % group_size:
        raise ValueError(f"group_size must divide d_inner, {d_inner}, got {group_size}")
    nslots = state.shape[0]
    if slots is not None:
        _checks.slots("slots", slots, (batch,), nslots, null_slot, zxbcdt.device)
        _checks.distinct("slots", slots, nslots, null_slot)
    elif nslots < batch:
        raise ValueError(f"state must have a row for each of the {batch} sequences, got {tuple(state.shape)}")
    check_rounding(state, rounding, seed)
    if out is not None:
        _checks.tensor("out", out, (batch, d_inner), dtype=zxbcdt.dtype, device=zxbcdt.device)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not _checks.eager_on_gpu(zxbcdt):
        return group_size, low, high, None
    tensors = (zxbcdt, conv_state, state, conv_weight, conv_bias, A, D, dt_bias, norm_weight, slots)
    y = zxbcdt.new_empty((batch, d_inner), device="meta") if out is None else out
    if _choice(impl, *tensors, y, group_size)[0] != "cuda":
        return group_size, low, high, None
    options = (y, dt_softplus, low, high, eps, group_size, norm_before_gate, null_slot)
    return group_size, low, high, _csrc_mamba2_step.mamba2_step(*tensors, seed, *options)


def _check_inputs(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
) -> tuple[int, int]:
    """(batch, d_inner)."""
    _checks.rank("zxbcdt", zxbcdt, (2,), "(batch, 2 d_inner + 2 ngroups dstate + nheads)")
    _checks.tensor("zxbcdt", zxbcdt, (None, None))
    device, compute = zxbcdt.device, torch.float64 if zxbcdt.dtype == torch.float64 else torch.float32
    floats = _checks.FLOATS if compute == torch.float64 else _checks.FLOATS[:3]
    _checks.rank("state", state, (4,), "(nslots, nheads, headdim, dstate)")
    _checks.tensor("state", state, (None,) * 4, dtype=floats, device=device)
    nslots, nheads, headdim, dstate = state.shape
    if min(nheads, headdim, dstate) < 1:
        raise ValueError(f"state must have at least one head, feature and state of each, got {tuple(state.shape)}")
    d_inner, columns = nheads * headdim, zxbcdt.shape[1]
    shared = columns - 2 * d_inner - nheads  # of B and C
    ngroups = shared // (2 * dstate)
    if shared % (2 * dstate) or ngroups < 1 or nheads % ngroups:
        raise ValueError(
            f"zxbcdt must have 2 * {d_inner} + 2 * ngroups * {dstate} + {nheads} columns for this state, with an "
            f"ngroups that divides {nheads}, got {columns}"
        )
    conv_dim = d_inner + 2 * ngroups * dstate
    _checks.rank("conv_weight", conv_weight, (2,), "(d_inner + 2 ngroups dstate, width)")
    _checks.tensor("conv_weight", conv_weight, (conv_dim, None), dtype=floats, device=device)
    width = conv_weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"conv_weight must have a width from 1 to {MAX_WIDTH}, got {tuple(conv_weight.shape)}")
    _checks.tensor("conv_state", conv_state, (nslots, conv_dim, None), dtype=floats, device=device)
    if conv_state.shape[2] < width - 1:
        raise ValueError(
            f"conv_state must have shape (nslots, d_inner + 2 ngroups dstate, at least width - 1 = {width - 1}), "
            f"got {tuple(conv_state.shape)}"
        )
    _checks.updatable("conv_state", conv_state)
    _checks.updatable("state", state)
    _checks.tensor("A", A, (nheads,), dtype=compute, device=device)
    _checks.tensor("norm_weight", norm_weight, (d_inner,), dtype=floats, device=device)
    if conv_bias is not None:
        _checks.tensor("conv_bias", conv_bias, (conv_dim,), dtype=floats, device=device)
    if D is not None:
        _checks.rank("D", D, (1, 2), "(nheads,) or (nheads, headdim)")
        _checks.tensor("D", D, (nheads, headdim)[: D.dim()], dtype=floats, device=device)
    if dt_bias is not None:
        _checks.tensor("dt_bias", dt_bias, (nheads,), dtype=floats, device=device)
    return zxbcdt.shape[0], d_inner


def _choice(impl: str, zxbcdt: Tensor, *problem: Any) -> tuple[str, str]:
    refusal = None
    if impl in ("auto", "cuda"):
        refusal = _device.not_sm90(zxbcdt.device) or _csrc_mamba2_step.refusal(zxbcdt, *problem)
    return _device.choose(impl, zxbcdt.device, refusal)


@explains("mamba2_step")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    batch: int = 1,
    nheads: int = 128,
    headdim: int = 64,
    ngroups: int = 8,
    dstate: int = 128,
    width: int = 4,
    group_size: int | None = None,
    **_: Any,
) -> Choice:
    d_inner = nheads * headdim
    group_size, conv_dim = group_size or d_inner // ngroups, d_inner + 2 * ngroups * dstate

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    state = meta(1, nheads, headdim, dstate, dtype=state_dtype)
    tensors = (meta(batch, d_inner + conv_dim + nheads), meta(1, conv_dim, width - 1), state, meta(conv_dim, width))
    refusal = _device.not_sm90(torch.device(device))
    refusal = refusal or _csrc_mamba2_step.refusal(*tensors, *(None,) * 6, meta(batch, d_inner), group_size)
    chosen, reason = _device.choose(impl, torch.device(device), refusal)
    if chosen == "cuda":
        sizes = (group_size, d_inner // ngroups)
        config = _csrc_mamba2_step.config(batch, nheads, headdim, dstate, *sizes, _device.num_sms_to_explain(device))
        assert config is not None  # or it would have refused
        return Choice(chosen, config._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import mamba2_step as kernels

    return Choice(chosen, kernels.config(headdim, dstate)._asdict(), reason)


def _mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    slots: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    null_slot: int,
    impl: str,
) -> None:
    tensors = (zxbcdt, conv_state, state, conv_weight, conv_bias, A, D, dt_bias, norm_weight, slots)
    options: Any = (dt_softplus, dt_min, dt_max, eps, group_size, norm_before_gate, null_slot)
    chosen = _choice(impl, *tensors, y, group_size)[0]
    if chosen == "cuda":
        _csrc_mamba2_step.mamba2_step(*tensors, seed, y, *options)(*tensors, seed, y)
    elif chosen == "triton":
        from .triton_kernels import mamba2_step as kernels

        kernels.mamba2_step(*tensors, seed, y, *options)
    else:
        _torch_mamba2_step.mamba2_step(*tensors, seed, y, *options)


_mamba2_step_op = define(
    "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor A, Tensor? D, Tensor? dt_bias, Tensor norm_weight, Tensor? slots, Tensor? seed, Tensor(c!) y, "
    "bool dt_softplus, float dt_min, float dt_max, float eps, int group_size, bool norm_before_gate, int null_slot, "
    "str impl)",
    _mamba2_step,
)
