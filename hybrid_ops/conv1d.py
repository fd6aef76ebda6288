"""`causal_conv1d`: the short causal depthwise convolution before the scan, for whole sequences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._csrc import conv1d as _csrc_conv1d
from ._library import Choice, define, explains
from ._torch import conv1d as _torch_conv1d

MAX_WIDTH = 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    conv_state: Tensor | None = None,
    read_slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution with a window of 1 to 8 tokens, optionally followed by SiLU.

    ``y_t = act(bias + sum_j weight[:, j] * u_{t - (width - 1) + j})``, where ``u`` is a sequence behind its history:
    the last width - 1 inputs that came before it, or zeros.

    B below is the number of sequences that may have a history: batch, or nseq with `cu_seqlens`.

    Args:
        x: (batch, seqlen, dim), any strides: channel-last, a slice of a wider tensor, or a transposed
            (batch, dim, seqlen).
        weight: (dim, width), width 1 to 8; the last column multiplies the newest token.
        bias: (dim,).
        activation: None or "silu".
        initial_states: (B, dim, width - 1), the history of each sequence, oldest first; None for zeros.
        seq_idx: (batch, seqlen) int32, sequences inside the rows: where the index changes from one token to the next, a
            new sequence starts, without history. `initial_states` belong to the first sequence of a row,
            the final states to the last. A negative index is padding, anywhere in the row: y is 0 there, and the
            window of later tokens sees what was before it as if it were not there.
        cu_seqlens: (nseq + 1,) int32, boundaries of sequences packed into one row (batch 1); they may be empty. On a
            GPU, where values are not read, tokens from cu_seqlens[-1] on belong to none, and y is 0 there.
        return_final_states: also return the last width - 1 inputs of each sequence, reaching back into its history
            where it is shorter.
        conv_state: (nslots, dim, state_len), state_len >= width - 1, any strides: a pool of states, updated in place,
            in the place of `initial_states` and `return_final_states`. A slot holds the newest state_len inputs of a
            sequence, newest last, so its older columns move left by the number of new tokens.
        read_slots: (B,) int32, the slot that holds each sequence's history; None for zeros.
        write_slots: (B,) int32, the slot that takes each sequence's final state, all distinct; None to write none. It
            may be the sequence's own read slot, but not that of another.
        null_slot: a slot that reads zeros and is not written; so is, on a GPU, any slot out of range.
        out: y is written here; x's shape and dtype. Not x's memory, and not where a gradient is needed.
        impl: "auto", "cuda", "triton" or "torch".

    Returns:
        y, in x's dtype and order of strides; with return_final_states (y, final_states), final_states
        (B, dim, width - 1) in the dtype of initial_states, else of x.

    float32, bfloat16, float16 (float64 on the CPU), each tensor its own. Arithmetic is float32, every result cast once.
    Differentiable in x, weight, bias and initial_states, from y and final_states; not with a pool.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or index that is not the one expected.

    Source: Gu and Dao 2023, "Mamba", section 3.4; Dao and Gu 2024, "Transformers are SSMs", section 7.

    >>> y = hybrid_ops.causal_conv1d(torch.randn(2, 16, 8), torch.randn(8, 4), torch.randn(8), activation="silu")
    """
    _device.check_impl(impl)
    slots = (read_slots, write_slots)
    nseq, run = _check(
        *(x, weight, bias, activation, initial_states, seq_idx, cu_seqlens, return_final_states, conv_state),
        *(*slots, null_slot, out, impl),
    )
    needs_grad = _checks.needs_grad(x, weight, bias, initial_states)
    _checks.out(out, x, needs_grad)
    if out is not None and not torch.compiler.is_compiling() and out.numel() and out.data_ptr() == x.data_ptr():
        raise ValueError("out must not be x's memory, got the same: windows overlap, so it cannot be overwritten")
    silu = activation == "silu"
    if needs_grad:
        if conv_state is not None:
            raise ValueError("conv_state must be None where a gradient is needed, got a tensor: pass initial_states")
        return _CausalConv1d.apply(
            x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, return_final_states, nseq, impl
        )
    y = torch.empty_like(x) if out is None else out
    final = _empty_final_states(x, initial_states, nseq, weight.shape[1]) if return_final_states else None
    tensors = (x, weight, bias, initial_states, seq_idx, cu_seqlens, *slots, y, final, conv_state)
    _conv1d_fwd_op(*tensors, silu, null_slot, impl, run=run)
    return y if final is None else (y, final)


@_checks.remembered
def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_states: bool,
    conv_state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    null_slot: int,
    out: Tensor | None,
    impl: str,
) -> tuple[int, Callable[..., None] | None]:
    """The number of sequences that have a state; the CUDA kernel's launch, where that is what a plain call comes to."""
    _checks.rank("x", x, (3,), "(batch, seqlen, dim)")
    _checks.tensor("x", x, (None, None, None))
    dim = x.shape[2]
    _checks.rank("weight", weight, (2,), "(dim, width)")
    _checks.tensor("weight", weight, (dim, None), device=x.device)
    width = weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"weight must have shape (dim, width) with width from 1 to {MAX_WIDTH}, got {(dim, width)}")
    if bias is not None:
        _checks.tensor("bias", bias, (dim,), device=x.device)
    _checks.one_of("activation", activation, (None, "silu"))
    _checks.number("null_slot", null_slot)
    nseq = _check_sequences(x, cu_seqlens, seq_idx)
    if initial_states is not None:
        _checks.tensor("initial_states", initial_states, (nseq, dim, width - 1), device=x.device)
    _checks.out(out, x, needs_grad=False)
    if conv_state is not None or read_slots is not None or write_slots is not None:
        _checks.at_most_one(conv_state=conv_state, initial_states=initial_states)
        _check_pool(x, conv_state, read_slots, write_slots, null_slot, nseq, width, return_final_states)
    if not _checks.eager_on_gpu(x):
        return nseq, None
    y = torch.empty_like(x, device="meta") if out is None else out
    final = _empty_final_states(x, initial_states, nseq, width, "meta") if return_final_states else None
    states = _states(initial_states, final, conv_state, read_slots, write_slots)
    small = (cu_seqlens, read_slots, write_slots)
    if not _csrc_conv1d.is_dense(weight, bias, *small) or _choice(x, weight, bias, y, *states, seq_idx, impl) != "cuda":
        return nseq, None
    launch = _csrc_conv1d.make_launch(x, weight, bias, states[0], y, states[1], *small, activation == "silu", null_slot)

    def run(*arguments: Any) -> None:
        x, weight, bias, initial, _, cu_seqlens, read, write, y, final, pool = arguments[:11]
        history, state = _states(initial, final, pool, read, write)
        launch((x, weight, bias, history, y, state, cu_seqlens, read, write))

    return nseq, run


def _check_sequences(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> int:
    """The number of sequences that have a state."""
    _checks.at_most_one(cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    batch, seqlen, _ = x.shape
    if seq_idx is not None:
        _checks.tensor("seq_idx", seq_idx, (batch, seqlen), dtype=torch.int32, device=x.device)
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"x must have shape (1, total, dim) with cu_seqlens, got {tuple(x.shape)}")
    return _checks.cu_seqlens(cu_seqlens, seqlen, x.device)


def _check_pool(
    x: Tensor,
    conv_state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    null_slot: int,
    nseq: int,
    width: int,
    return_final_states: bool,
) -> None:
    if conv_state is None:
        raise ValueError("conv_state must be given with read_slots and write_slots, got None")
    if read_slots is None and write_slots is None:
        raise ValueError("read_slots or write_slots must be given with conv_state, got neither")
    if return_final_states:
        raise ValueError("return_final_states must be False with conv_state, got True: write_slots take the states")
    _checks.tensor("conv_state", conv_state, (None, x.shape[2], None), device=x.device)
    if conv_state.shape[2] < width - 1:
        raise ValueError(
            f"conv_state must have shape (nslots, dim, at least width - 1 = {width - 1}), got {tuple(conv_state.shape)}"
        )
    nslots = conv_state.shape[0]
    for name, slots in (("read_slots", read_slots), ("write_slots", write_slots)):
        if slots is not None:
            _checks.slots(name, slots, (nseq,), nslots, null_slot, x.device)
    if write_slots is None:
        return
    _checks.distinct("write_slots", write_slots, nslots, null_slot)
    if read_slots is not None and _checks.readable(write_slots):
        clash = (read_slots[:, None] == write_slots).fill_diagonal_(False) & (write_slots != null_slot)
        if clash.any():
            slot = int(write_slots[clash.any(0)][0])
            raise ValueError(f"write_slots must not hold another sequence's read slot, got {slot}")


@explains("causal_conv1d")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    seqlen: int = 8192,
    dim: int = 10240,
    width: int = 4,
    channel_last: bool = True,
    **_: Any,
) -> Choice:
    x = torch.empty(1, seqlen, dim, dtype=dtype, device="meta")
    if not channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    refusal = _device.not_sm90(torch.device(device)) or _csrc_conv1d.refusal(
        x, x.new_empty(dim, width), None, x, None, None
    )
    chosen, reason = _device.choose(impl, torch.device(device), refusal)
    if chosen == "cuda":
        return Choice(chosen, _csrc_conv1d.config(dim, x.element_size(), alignment=16)._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import conv1d as kernels

    return Choice(chosen, kernels.config(x.element_size(), channel_last)._asdict(), reason)


@_checks.remembered
def _choice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    history: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    impl: str,
) -> str:
    refusal = None
    if x.is_cuda and impl in ("auto", "cuda"):
        states = state if history is None else history
        refusal = _device.not_sm90(x.device) or _csrc_conv1d.refusal(x, weight, bias, y, states, seq_idx)
    return _device.choose(impl, x.device, refusal)[0]


def _states(
    initial_states: Tensor | None,
    final_states: Tensor | None,
    conv_state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Where histories are read from and final states go: the pool, wherever slots say so."""
    return initial_states if read_slots is None else conv_state, final_states if write_slots is None else conv_state


def _conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    y: Tensor,
    final_states: Tensor | None,
    conv_state: Tensor | None,
    silu: bool,
    null_slot: int,
    impl: str,
) -> None:
    history, state = _states(initial_states, final_states, conv_state, read_slots, write_slots)
    chosen = _choice(x, weight, bias, y, history, state, seq_idx, impl)
    if chosen == "cuda":
        _csrc_conv1d.conv1d(x, weight, bias, y, history, state, read_slots, write_slots, cu_seqlens, silu, null_slot)
        return
    if chosen == "triton":
        from .triton_kernels import conv1d as kernels

        order = None if seq_idx is None else _torch_conv1d.order_of(seq_idx)[:3]
        kernels.conv1d(x, weight, bias, y, history, state, read_slots, write_slots, cu_seqlens, order, silu, null_slot)
        return
    history = initial_states
    if conv_state is not None and read_slots is not None:
        history = _torch_conv1d.read_slots(conv_state, read_slots, null_slot)
    state_len = weight.shape[1] - 1 if conv_state is None else conv_state.shape[2]
    rows = _torch_conv1d.rows_of(x.shape[0], x.shape[1], state_len, x.device, cu_seqlens, seq_idx)
    result, final = _torch_conv1d.conv1d_fwd(x, weight, bias, history, rows, silu)
    y.copy_(result)
    if final_states is not None:
        final_states.copy_(final)
    if conv_state is not None and write_slots is not None:
        _torch_conv1d.write_slots(conv_state, write_slots, null_slot, final)


_conv1d_fwd_op = define(
    "conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, "
    "Tensor? read_slots, Tensor? write_slots, Tensor(a!) y, Tensor(b!)? final_states, Tensor(c!)? conv_state, "
    "bool silu, int null_slot, str impl)",
    _conv1d_fwd,
)


def _conv1d_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial: Tensor | None,
    silu: bool,
    impl: str,
) -> None:
    if x.is_cuda and _choice(x, weight, bias, dx, initial_states, dfinal, seq_idx, impl) == "cuda":
        _csrc_conv1d.conv1d_bwd(
            dy, dfinal, x, weight, bias, initial_states, cu_seqlens, dx, dweight, dbias, dinitial, silu
        )
        return
    rows = _torch_conv1d.rows_of(x.shape[0], x.shape[1], weight.shape[1] - 1, x.device, cu_seqlens, seq_idx)
    results = _torch_conv1d.conv1d_bwd(dy, dfinal, x, weight, bias, initial_states, rows, silu)
    for target, result in zip((dx, dweight, dbias, dinitial), results, strict=True):
        if target is not None:
            target.copy_(result)


_conv1d_bwd_op = define(
    "conv1d_bwd(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, "
    "Tensor? seq_idx, Tensor? cu_seqlens, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial, "
    "bool silu, str impl)",
    _conv1d_bwd,
)


@_checks.remembered
def _bwd_run(dy: Tensor, *others: Any) -> Callable[..., None] | None:
    """The CUDA kernel's launch, where that is what a plain call of the operator with these arguments comes to."""
    dfinal, x, weight, bias, initial_states, seq_idx, cu_seqlens, dx, dweight, dbias, dinitial, silu, impl = others
    if not _checks.eager_on_gpu(dy) or _choice(x, weight, bias, dx, initial_states, dfinal, seq_idx, impl) != "cuda":
        return None
    if not _csrc_conv1d.is_readable(dy) or not _csrc_conv1d.is_dense(weight, bias, cu_seqlens):
        return None
    launch = _csrc_conv1d.make_bwd_launch(
        dy, x, weight, bias, initial_states, dfinal, dx, dweight, dbias, dinitial, cu_seqlens, silu
    )

    def run(*arguments: Any) -> None:
        dy, dfinal, x, weight, bias, initial_states, _, cu_seqlens, *gradients = arguments[:12]
        launch((dy, x, weight, bias, initial_states, dfinal, *gradients, cu_seqlens))

    return run


def _gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    impl: str,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and initial_states."""
    dx = torch.empty_like(x)
    dweight = weight.new_empty(*weight.shape)
    dbias = None if bias is None else torch.empty_like(bias)
    dinitial = None if initial_states is None else initial_states.new_empty(*initial_states.shape)
    given = (dy, dfinal, x, weight, bias, initial_states, seq_idx, cu_seqlens)
    arguments = (*given, dx, dweight, dbias, dinitial, silu, impl)
    _conv1d_bwd_op(*arguments, run=_bwd_run(*arguments))
    return dx, dweight, dbias, dinitial


def _empty_final_states(
    x: Tensor, initial_states: Tensor | None, nseq: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    like = x if initial_states is None else initial_states
    return like.new_empty((nseq, x.shape[2], width - 1), device=device)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, return_final_states, nseq, impl
    ):
        y = torch.empty_like(x)
        final = _empty_final_states(x, initial_states, nseq, weight.shape[1]) if return_final_states else None
        _conv1d_fwd_op(x, weight, bias, initial_states, seq_idx, cu_seqlens, None, None, y, final, None, silu, -1, impl)
        ctx.save_for_backward(x, weight, bias, initial_states, seq_idx, cu_seqlens)
        ctx.options = silu, impl
        ctx.set_materialize_grads(False)
        return y if final is None else (y, final)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal=None):  # type: ignore[override]
        x, weight, bias, initial_states, seq_idx, cu_seqlens = ctx.saved_tensors
        silu, impl = ctx.options
        if dy is None:
            dy = torch.zeros_like(x)
        gradients = _gradients(dy, dfinal, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, impl)
        return *gradients, *(None,) * 6
