"""`causal_conv1d_update`: the short causal depthwise convolution while decoding, with its windows in a pool."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _device
from ._csrc import conv1d_update as _csrc_conv1d_update
from ._library import Choice, define, explains
from ._torch import conv1d_update as _torch_conv1d_update
from .conv1d import MAX_WIDTH


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
    rollback: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal depthwise convolution of the next tokens of each sequence; the pool of windows moves on in place.

    ``y_t = act(bias + sum_k weight[:, k] * u_{t - (width - 1) + k})``, where the stream ``u`` of a sequence is the
    columns of its slot, oldest first, without the newest `rollback` ones, and then its tokens x. Afterwards the slot
    holds the last state_len columns of ``u``, newest last, zeros where ``u`` is shorter.

    Args:
        x: the new tokens, any strides: (batch, dim), one each; (batch, T, dim), T each; or (total, dim), the
            sequences one behind the other, with `cu_seqlens`.
        conv_state: (nslots, dim, state_len), any strides, updated in place; state_len >= width - 1 + the largest
            `rollback`. Between tokens of one call the window holds x itself, in x's dtype.
        weight: (dim, width), width 1 to 8; the last column multiplies the newest token.
        bias: (dim,).
        activation: None or "silu".
        slots: (batch,) int32, the row of conv_state that each sequence has, all distinct; None: sequence b has row b.
        rollback: (batch,) int32, 0 to state_len - (width - 1): how many of the newest columns to drop first, as those
            of rejected draft tokens in speculative decoding. None drops none.
        cu_seqlens: (batch + 1,) int32, boundaries of the packed sequences; they may be empty. On a GPU, where values
            are not read, rows of x from cu_seqlens[-1] on belong to no sequence, and y is 0 there.
        null_slot: the slot of padding: y is 0 and nothing is written. So it is, on a GPU, for any slot out of range.
        out: y is written here; x's shape and dtype. It may be x.
        impl: "auto", "cuda", "triton" or "torch". "torch" synchronises on a GPU.

    Returns:
        y, x's shape and dtype.

    float32, bfloat16, float16 (float64 on the CPU), each tensor its own. Arithmetic is float32, every result cast once.
    Not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name, slot or rollback that is not the one expected, or an
            argument that requires a gradient; nothing has been written then.

    Source: Gu and Dao 2023, "Mamba", section 3.4; Dao and Gu 2024, "Transformers are SSMs", section 7.

    >>> conv_state = torch.zeros(2, 8, 3)
    >>> y = hybrid_ops.causal_conv1d_update(torch.ones(2, 8), conv_state, torch.ones(8, 4))
    >>> conv_state[0, 0]
    tensor([0., 0., 1.])
    """
    _device.check_impl(impl)
    run = _check(x, conv_state, weight, bias, activation, slots, rollback, cu_seqlens, null_slot, out, impl)
    _checks.no_gradient(x=x, conv_state=conv_state, weight=weight, bias=bias)
    y = x.new_empty(*x.shape) if out is None else out
    silu = activation == "silu"
    _conv1d_update_op(x, conv_state, weight, bias, slots, rollback, cu_seqlens, y, silu, null_slot, impl, run=run)
    return y


@_checks.remembered
def _check(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    null_slot: int,
    out: Tensor | None,
    impl: str,
) -> Callable[..., None] | None:
    """The CUDA kernel's launch, where that is what a plain call comes to."""
    if cu_seqlens is None:
        _checks.rank("x", x, (2, 3), "(batch, dim) or (batch, T, dim)")
    else:
        _checks.rank("x", x, (2,), "(total, dim) with cu_seqlens")
    _checks.tensor("x", x, (None,) * x.dim())
    dim = x.shape[-1]
    batch = x.shape[0] if cu_seqlens is None else _checks.cu_seqlens(cu_seqlens, x.shape[0], x.device)
    _checks.rank("weight", weight, (2,), "(dim, width)")
    _checks.tensor("weight", weight, (dim, None), device=x.device)
    width = weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"weight must have shape (dim, width) with width from 1 to {MAX_WIDTH}, got {(dim, width)}")
    if bias is not None:
        _checks.tensor("bias", bias, (dim,), device=x.device)
    _checks.one_of("activation", activation, (None, "silu"))
    _checks.number("null_slot", null_slot)
    _checks.tensor("conv_state", conv_state, (None, dim, None), device=x.device)
    _checks.updatable("conv_state", conv_state)
    nslots, _, state_len = conv_state.shape
    if state_len < width - 1:
        raise ValueError(
            f"conv_state must have shape (nslots, dim, at least width - 1 = {width - 1}), got {tuple(conv_state.shape)}"
        )
    if slots is not None:
        _checks.slots("slots", slots, (batch,), nslots, null_slot, x.device)
        _checks.distinct("slots", slots, nslots, null_slot)
    elif nslots < batch:
        raise ValueError(f"conv_state must have a row for each of the {batch} sequences, got {tuple(conv_state.shape)}")
    if rollback is not None:
        _check_rollback(rollback, batch, state_len - (width - 1), x.device)
    _checks.out(out, x, needs_grad=False)
    if not _checks.eager_on_gpu(x):
        return None
    y = x.new_empty(x.shape, device="meta") if out is None else out
    refusal = _csrc_conv1d_update.refusal(x, conv_state, weight, bias, rollback, cu_seqlens, y)
    if _choice(impl, x.device, refusal)[0] != "cuda":
        return None
    rest = (y, activation == "silu", null_slot)
    return _csrc_conv1d_update.causal_conv1d_update(x, conv_state, weight, bias, slots, *rest)


def _check_rollback(rollback: Tensor, batch: int, most: int, device: torch.device) -> None:
    _checks.tensor("rollback", rollback, (batch,), dtype=torch.int32, device=device)
    if _checks.readable(rollback):
        bad = rollback[(rollback < 0) | (rollback > most)]
        if bad.numel():
            raise ValueError(
                f"rollback must be in [0, {most}], what conv_state holds beyond width - 1, got {int(bad[0])}"
            )


def _choice(impl: str, device: torch.device, refusal: str | None) -> tuple[str, str]:
    return _device.choose(impl, device, refusal or _device.not_sm90(device))


@explains("causal_conv1d_update")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    dim: int = 10240,
    width: int = 4,
    **_: Any,
) -> Choice:
    x, state, weight = (
        torch.empty(s, dtype=dtype, device="meta") for s in ((1, dim), (1, dim, width - 1), (dim, width))
    )
    refusal = _csrc_conv1d_update.refusal(x, state, weight, None, None, None, x)
    chosen, reason = _choice(impl, torch.device(device), refusal)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import conv1d_update as kernels

    return Choice(chosen, kernels.config(batch, dim)._asdict(), reason)


def _conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    silu: bool,
    null_slot: int,
    impl: str,
) -> None:
    rest = (conv_state, weight, bias, slots, rollback, cu_seqlens)
    refusal = _csrc_conv1d_update.refusal(x, conv_state, weight, bias, rollback, cu_seqlens, y)
    chosen = _choice(impl, x.device, refusal)[0]
    if chosen == "cuda":
        launch = _csrc_conv1d_update.causal_conv1d_update(x, conv_state, weight, bias, slots, y, silu, null_slot)
        launch(x, *rest, y)
        return
    if chosen == "triton":
        from .triton_kernels import conv1d_update as kernels

        kernels.causal_conv1d_update(x, *rest, y, silu, null_slot)
        return
    if x.dim() == 2 and cu_seqlens is None:
        x, y = x.unsqueeze(1), y.unsqueeze(1)
    _torch_conv1d_update.causal_conv1d_update(x, *rest, y, silu, null_slot)


_conv1d_update_op = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? slots, "
    "Tensor? rollback, Tensor? cu_seqlens, Tensor(b!) y, bool silu, int null_slot, str impl)",
    _conv1d_update,
)
