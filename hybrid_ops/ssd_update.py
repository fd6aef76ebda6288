"""`ssd_state_update`: Mamba-2's recurrence while decoding, with the states in a pool of slots."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _device
from ._csrc import ssd_update as _csrc_ssd_update
from ._library import Choice, define, explains
from ._torch import ssd_update as _torch_ssd_update

STATES_WITH_SCALE = (torch.float8_e4m3fn, torch.int8)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    read_slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    num_accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    update_state: bool = True,
    state_scale: Tensor | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The next tokens of each sequence through Mamba-2's state space; the pool of states moves on in place.

    For every head, with g = h // (nheads / ngroups), and step by step in t::

        dt'_t = clamp(softplus(dt_t + dt_bias), *dt_limit)          softplus only with dt_softplus
        S_t   = exp(dt'_t A) S_{t-1} + dt'_t x_t (outer) B_t[g]     S: (headdim, dstate)
        y_t   = (S_t C_t[g] + D x_t) * silu(z_t)

    Between the tokens of one call S stays in float32: what is stored is a rounded copy, and y sees the unrounded state.
    So with a float32 pool T tokens in one call give what T calls give; with a narrower one they round less often.

    Args:
        state: (nslots, nheads, headdim, dstate), any strides, updated in place.
        x: the new tokens, any strides: (batch, nheads, headdim), one each; (batch, T, nheads, headdim), T each; or
            (total, nheads, headdim), the sequences one behind the other, with `cu_seqlens`.
        dt: like x without headdim: the step in units of 1/A, before bias and softplus.
        A: (nheads,), negative; float32 (float64 where x is).
        B, C: like x with (ngroups, dstate) for its last two, x's dtype; ngroups divides nheads.
        D: (nheads,) or (nheads, headdim), the skip weight.
        z: like x, the gate.
        dt_bias: (nheads,).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) bounds of dt'; the default removes negative steps only.
        read_slots: (batch,) int32, the row of the pool that each sequence starts from; (batch, W) with `num_accepted`;
            None: sequence b has row b.
        write_slots: int32; (batch,) takes the state after the last token (a sequence without tokens: the one it
            started from), (batch, T) the state after each token. Packed, the second is (batch, at least the longest
            sequence). All distinct. None: the last state goes back to where it was read.
        num_accepted: (batch,) int32, 1 to W: sequence b starts from read_slots[b, num_accepted[b] - 1], where the call
            before stored the state after that draft token (speculative decoding).
        cu_seqlens: (batch + 1,) int32, boundaries of the packed sequences; they may be empty. On a GPU, where values
            are not read, rows of x from cu_seqlens[-1] on belong to no sequence, and y is 0 there.
        update_state: False leaves the pool as it is.
        state_scale: (nslots, nheads, headdim) float32, of a state in float8_e4m3fn or int8, updated in place: a row of
            the state is its codes times its scale. A stored row has scale = amax / 448 (e4m3) or amax / 127 (int8), in
            the order of operations of `fp8_quantize`; 1 where amax is 0 or infinite, NaN where int8 would hold a NaN.
        rounding: of a float16 or bfloat16 state when it is stored: "nearest" (even), or "stochastic": |v| goes to the
            floor, on the state's grid, of |v| + bits 2^-16 step(|v|), saturating at the largest finite value. Its mean
            is v to 2^-16 steps, where rounding to nearest loses every increment below half a step.
        seed: (1,) int64 on x's device, for stochastic rounding. Element i of the pool (row-major in its shape) after
            token t of the call takes 16 bits of Philox4x32-10 with the words of `seed` as key and counter
            (i // 8 low, i // 8 high, t, 0): word i % 8 // 2, its low half for even i. The same seed gives the same
            bits: change it for each step and layer.
        null_slot: the slot of padding. A sequence that reads it has y = 0 and writes nothing; where it stands in
            write_slots, that state is not stored. So it is, on a GPU, for any slot or num_accepted out of range.
        out: y is written here; x's shape and dtype. It may be x.
        impl: "auto", "cuda", "triton" or "torch". "torch" synchronises on a GPU.

    Returns:
        y, x's shape and dtype.

    x and state in float32, bfloat16 or float16 (float64 on the CPU), D, z, dt, dt_bias in any of them; the state in 8
    bits too, with its scale. Arithmetic is float32 (float64 where x is). Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or one that requires a gradient; nothing has
            been written then.

    Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", eq. 1. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).

    >>> state = torch.zeros(2, 4, 8, 16)
    >>> x, dt, B = torch.ones(2, 4, 8), torch.ones(2, 4), torch.ones(2, 1, 16)
    >>> y = hybrid_ops.ssd_state_update(state, x, dt, -torch.ones(4), B, B)
    >>> y[0, 0, 0], state[0, 0, 0, 0]
    (tensor(16.), tensor(1.))
    """
    _device.check_impl(impl)
    inputs = (dt, A, B, C, D, z, dt_bias)
    slots = (read_slots, write_slots, num_accepted, cu_seqlens)
    low, high, run = _check(
        *(x, state, *inputs, *slots),
        *(dt_limit, update_state, null_slot, state_scale, rounding, seed, out, dt_softplus, impl),
    )
    _checks.no_gradient(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    y = x.new_empty(*x.shape) if out is None else out
    options = (dt_softplus, low, high, update_state, null_slot, impl)
    _ssd_state_update_op(state, x, *inputs, *slots, seed, state_scale, y, *options, run=run)
    return y


@_checks.remembered
def _check(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_limit: tuple[float, float],
    update_state: bool,
    null_slot: int,
    state_scale: Tensor | None,
    rounding: str,
    seed: Tensor | None,
    out: Tensor | None,
    dt_softplus: bool,
    impl: str,
) -> tuple[float, float, Callable[..., None] | None]:
    """The bounds of dt'; the CUDA kernel's launch, where that is what a plain call comes to."""
    batch, steps = _check_inputs(state, x, dt, A, B, C, D, z, dt_bias, cu_seqlens)
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    _check_slots(state, batch, steps, read_slots, write_slots, num_accepted, cu_seqlens, update_state, null_slot)
    _checks.number("null_slot", null_slot)
    _check_scale(state, state_scale)
    check_rounding(state, rounding, seed)
    _checks.out(out, x, needs_grad=False)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not _checks.eager_on_gpu(x):
        return low, high, None
    tensors = (x, state, dt, A, B, C, D, z, dt_bias, read_slots, write_slots, num_accepted, cu_seqlens)
    if _choice(impl, *tensors, state_scale, batch)[0] != "cuda":
        return low, high, None
    y = x.new_empty(x.shape, device="meta") if out is None else out
    options = (y, dt_softplus, low, high, update_state, null_slot)
    return low, high, _csrc_ssd_update.ssd_state_update(*tensors, seed, state_scale, *options)


def _check_inputs(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, int | None]:
    """The number of sequences and of tokens of each, None where they differ (packed)."""
    if cu_seqlens is None:
        _checks.rank("x", x, (3, 4), "(batch, nheads, headdim) or (batch, T, nheads, headdim)")
    else:
        _checks.rank("x", x, (3,), "(total, nheads, headdim) with cu_seqlens")
    _checks.tensor("x", x, (None,) * x.dim())
    tokens, (nheads, headdim) = x.shape[:-2], x.shape[-2:]
    if nheads < 1 or headdim < 1:
        raise ValueError(f"x must have at least one head and one feature per head, got {tuple(x.shape)}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    floats = _checks.FLOATS if compute == torch.float64 else _checks.FLOATS[:3]
    _checks.tensor("dt", dt, (*tokens, nheads), dtype=floats, device=x.device)
    _checks.tensor("A", A, (nheads,), dtype=compute, device=x.device)
    _checks.tensor("B", B, (*tokens, None, None), dtype=x.dtype, device=x.device)
    ngroups, dstate = B.shape[-2:]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(f"B must have a number of groups that divides the {nheads} heads of x, got {tuple(B.shape)}")
    if dstate < 1:
        raise ValueError(f"B must have dstate >= 1, got {tuple(B.shape)}")
    _checks.tensor("C", C, B.shape, dtype=x.dtype, device=x.device)
    states = (*floats, *STATES_WITH_SCALE)
    _checks.tensor("state", state, (None, nheads, headdim, dstate), dtype=states, device=x.device)
    _checks.updatable("state", state)
    if D is not None:
        _checks.rank("D", D, (1, 2), "(nheads,) or (nheads, headdim)")
        _checks.tensor("D", D, (nheads, headdim)[: D.dim()], dtype=floats, device=x.device)
    if z is not None:
        _checks.tensor("z", z, x.shape, dtype=floats, device=x.device)
    if dt_bias is not None:
        _checks.tensor("dt_bias", dt_bias, (nheads,), dtype=floats, device=x.device)
    if cu_seqlens is not None:
        return _checks.cu_seqlens(cu_seqlens, x.shape[0], x.device), None
    return x.shape[0], x.shape[1] if x.dim() == 4 else 1


def _check_slots(
    state: Tensor,
    batch: int,
    steps: int | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    update_state: bool,
    null_slot: int,
) -> None:
    nslots, device = state.shape[0], state.device
    if num_accepted is not None and read_slots is None:
        raise ValueError("read_slots must be (batch, W) with num_accepted, got None")
    if read_slots is None:
        if nslots < batch:
            raise ValueError(f"state must have a row for each of the {batch} sequences, got {tuple(state.shape)}")
    else:
        shape = (batch,) if num_accepted is None else (batch, None)
        _checks.slots("read_slots", read_slots, shape, nslots, null_slot, device)
    if num_accepted is not None and read_slots is not None:
        _checks.tensor("num_accepted", num_accepted, (batch,), dtype=torch.int32, device=device)
        if _checks.readable(num_accepted):
            bad = num_accepted[(num_accepted < 1) | (num_accepted > read_slots.shape[1])]
            if bad.numel():
                raise ValueError(f"num_accepted must be in [1, {read_slots.shape[1]}], got {int(bad[0])}")
    if write_slots is not None:
        if not update_state:
            raise ValueError("write_slots must be None with update_state=False, got a tensor")
        _checks.rank("write_slots", write_slots, (1, 2), "(batch,) or (batch, T)")
        _checks.slots("write_slots", write_slots, (batch, steps)[: write_slots.dim()], nslots, null_slot, device)
        if write_slots.dim() == 2 and cu_seqlens is not None and batch and _checks.readable(cu_seqlens):
            longest = int(cu_seqlens.diff().max())
            if write_slots.shape[1] < longest:
                raise ValueError(
                    f"write_slots must have a column for each of the {longest} tokens of the longest sequence, "
                    f"got {tuple(write_slots.shape)}"
                )
    given = read_slots if write_slots is None else write_slots
    if update_state and given is not None and _checks.readable(given):
        _check_races(batch, nslots, read_slots, write_slots, num_accepted, null_slot)


def _check_races(
    batch: int,
    nslots: int,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    null_slot: int,
) -> None:
    """Sequences run side by side: none may write a slot that another reads or writes."""
    read = torch.arange(batch) if read_slots is None else read_slots
    if num_accepted is not None:
        read = read.gather(1, num_accepted.long()[:, None] - 1)[:, 0]
    if write_slots is None:
        _checks.distinct("read_slots without write_slots", read, nslots, null_slot)
        return
    _checks.distinct("write_slots", write_slots, nslots, null_slot)
    readers: dict[int, set[int]] = {}
    for b, slot in enumerate(read.tolist()):
        readers.setdefault(slot, set()).add(b)
    for b, slots in enumerate(write_slots.reshape(batch, -1).tolist() if batch else ()):
        for slot in slots:
            if slot != null_slot and readers.get(slot, set()) - {b}:
                raise ValueError(f"write_slots must not hold a slot that another sequence reads, got {slot}")


def _check_scale(state: Tensor, state_scale: Tensor | None) -> None:
    dtype = str(state.dtype).removeprefix("torch.")
    if state.dtype not in STATES_WITH_SCALE:
        if state_scale is not None:
            raise ValueError(f"state_scale must be None with a state in {dtype}, got a tensor")
        return
    if state_scale is None:
        raise ValueError(f"state_scale must be (nslots, nheads, headdim) with a state in {dtype}, got None")
    _checks.tensor("state_scale", state_scale, state.shape[:3], dtype=torch.float32, device=state.device)
    _checks.updatable("state_scale", state_scale)


def check_rounding(state: Tensor, rounding: str, seed: Tensor | None) -> None:
    _checks.one_of("rounding", rounding, ("nearest", "stochastic"))
    if rounding == "nearest":
        if seed is not None:
            raise ValueError("seed must be None with rounding='nearest', got a tensor")
        return
    _checks.tensor("state", state, state.shape, dtype=(torch.float16, torch.bfloat16))
    if seed is None:
        raise ValueError("seed must be a (1,) int64 tensor with rounding='stochastic', got None")
    _checks.tensor("seed", seed, (1,), dtype=torch.int64, device=state.device)
    elements = state.shape[1] * state.shape[2] * state.shape[3]
    if elements % 8:
        raise ValueError(
            f"state must have a multiple of 8 elements in a slot with rounding='stochastic', got {tuple(state.shape)}"
        )


def _choice(impl: str, x: Tensor, state: Tensor, *others_and_batch: Any) -> tuple[str, str]:
    *others, batch = others_and_batch
    refusal = None
    if impl in ("auto", "cuda"):
        refusal = _device.not_sm90(x.device) or _csrc_ssd_update.refusal(x, state, tuple(others), batch)
    return _device.choose(impl, x.device, refusal)


@explains("ssd_state_update")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    batch: int = 1,
    nheads: int = 128,
    headdim: int = 64,
    dstate: int = 128,
    state_dtype: torch.dtype = torch.float32,
    rounding: str = "nearest",
    **_: Any,
) -> Choice:
    x, state = torch.empty(0, device="meta"), torch.empty(1, nheads, headdim, dstate, dtype=state_dtype, device="meta")
    refusal = _device.not_sm90(torch.device(device)) or _csrc_ssd_update.refusal(x, state, (), batch)
    chosen, reason = _device.choose(impl, torch.device(device), refusal)
    problem = (headdim, dstate, state_dtype.itemsize)
    if chosen == "cuda":
        sms, stochastic = _device.num_sms_to_explain(device), rounding == "stochastic"
        config = _csrc_ssd_update.config(headdim, dstate, batch * nheads, sms, state_dtype.itemsize, stochastic)
        return Choice(chosen, config._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import ssd_update as kernels

    return Choice(chosen, kernels.config(*problem, batch * nheads)._asdict(), reason)


def _ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    state_scale: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    update_state: bool,
    null_slot: int,
    impl: str,
) -> None:
    options: Any = (dt_softplus, dt_min, dt_max, update_state, null_slot)
    inputs, slots = (dt, A, B, C, D, z, dt_bias), (read_slots, write_slots, num_accepted, cu_seqlens)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chosen = _choice(impl, x, state, *inputs, *slots, state_scale, batch)[0]
    if chosen == "cuda":
        launch = _csrc_ssd_update.ssd_state_update(x, state, *inputs, *slots, seed, state_scale, y, *options)
        launch(state, x, *inputs, *slots, seed, state_scale, y)
        return
    if chosen == "triton":
        from .triton_kernels import ssd_update as kernels

        kernels.ssd_state_update(state, x, *inputs, *slots, seed, state_scale, y, *options)
        return
    if x.dim() == 3 and cu_seqlens is None:
        x, dt, B, C, y = (t.unsqueeze(1) for t in (x, dt, B, C, y))
        z = None if z is None else z.unsqueeze(1)
    inputs = (dt, A, B, C, D, z, dt_bias)
    _torch_ssd_update.ssd_state_update(state, x, *inputs, *slots, seed, state_scale, y, *options)


_ssd_state_update_op = define(
    "ssd_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? read_slots, Tensor? write_slots, Tensor? num_accepted, Tensor? cu_seqlens, Tensor? seed, "
    "Tensor(c!)? state_scale, Tensor(b!) y, bool dt_softplus, float dt_min, float dt_max, bool update_state, "
    "int null_slot, str impl)",
    _ssd_state_update,
)
