"""`ssd_replay_update`: Mamba-2's recurrence while decoding, with states that are written once in many tokens.

The state is a checkpoint and the tokens behind it, which a ring keeps: most steps only read the checkpoint.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _device
from ._csrc import ssd_replay as _csrc_ssd_replay
from ._library import Choice, define, explains
from ._torch import ssd_replay as _torch_ssd_replay
from .ssd_update import _check_inputs, _check_races, check_rounding

MAX_CAPACITY = 16


class ReplayCache(NamedTuple):
    """The newest tokens of each slot, which its state has not taken in.

    They lie one behind the other in a ring of places, of which `capacity` may hold tokens between calls. The others
    are for the tokens of a call: what one program writes is no place from which another still reads.
    """

    x: Tensor  # (nslots, nheads, places, headdim)
    B: Tensor  # (nslots, ngroups, places, dstate)
    dt: Tensor  # (nslots, nheads, places) float32, after bias, softplus and bounds; float64 where x is
    ring: Tensor  # (nslots,) int32: the place of the oldest token + 256 times the number of tokens; 0 empties a slot
    capacity: int

    @property
    def length(self) -> Tensor:
        """(nslots,) int32, the number of tokens."""
        return self.ring >> 8

    @classmethod
    def new(
        cls,
        nslots: int,
        nheads: int,
        headdim: int,
        ngroups: int,
        dstate: int,
        *,
        capacity: int = MAX_CAPACITY,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ReplayCache":
        """An empty cache for x and B of `dtype`; `max_tokens`: the most that a call may bring, None for `capacity`."""
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity must be from 1 to {MAX_CAPACITY}, got {capacity}")
        tokens = capacity if max_tokens is None else max_tokens
        if not 1 <= tokens <= capacity:
            raise ValueError(f"max_tokens must be from 1 to the capacity, {capacity}, got {max_tokens}")
        x = torch.zeros(nslots, nheads, capacity + tokens, headdim, dtype=dtype, device=device)
        return cls(
            x=x,
            B=x.new_zeros(nslots, ngroups, capacity + tokens, dstate),
            dt=x.new_zeros(x.shape[:3], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
            ring=x.new_zeros(nslots, dtype=torch.int32),
            capacity=capacity,
        )


def ssd_replay_update(
    state: Tensor,
    cache: ReplayCache,
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
    slots: Tensor | None = None,
    rollback: Tensor | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The next tokens of each sequence through Mamba-2's state space, as `ssd_state_update`, of states seldom written.

    What a slot stands for is state[slot] carried through the tokens of its cache, oldest first. First the newest
    `rollback` tokens are dropped. If those left, n, and the T new ones are more than `cache.capacity`, the state takes
    the n in and is rewritten; the cache then holds the T new tokens, otherwise the n and the T. For every head, with
    g = h // (nheads / ngroups), tokens j up to t, the cached before the new, and S the state before all of them::

        dt'_t = clamp(softplus(dt_t + dt_bias), *dt_limit)          softplus only with dt_softplus
        w_tj  = exp(A sum_{j < i <= t} dt'_i)
        y_t   = (exp(A sum_{i <= t} dt'_i) S C_t[g] + sum_j w_tj dt'_j (B_j[g] . C_t[g]) x_j + D x_t) * silu(z_t)

    which is y of `ssd_state_update` but for rounding: it sees no rounding of the tokens in the cache.

    Args:
        state: (nslots, nheads, headdim, dstate), any strides, updated in place.
        cache: of `ReplayCache.new`, updated in place.
        x: the new tokens, any strides: (batch, nheads, headdim), one each, or (batch, T, nheads, headdim), T each; T at
            most cache.capacity, and what the ring has room for beyond it (max_tokens).
        dt: like x without headdim: the step in units of 1/A, before bias and softplus.
        A: (nheads,), negative; float32 (float64 where x is).
        B, C: like x with (ngroups, dstate) for its last two, x's dtype; ngroups divides nheads.
        D: (nheads,) or (nheads, headdim), the skip weight.
        z: like x, the gate.
        dt_bias: (nheads,).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) bounds of dt'; the default removes negative steps only.
        slots: (batch,) int32, the row of state and cache that each sequence has, all distinct; None: sequence b has
            row b.
        rollback: (batch,) int32: how many of the newest tokens to drop first, as those of rejected draft tokens in
            speculative decoding; as many as there are where it is more. None drops none.
        rounding: of a float16 or bfloat16 state when it is stored, "nearest" or "stochastic", as in `ssd_state_update`.
        seed: (1,) int64 on x's device, for stochastic rounding; random bits as in `ssd_state_update`, with t = 0.
        null_slot: the slot of padding: y is 0 and nothing is written. So it is, on a GPU, for any slot out of range.
        out: y is written here; x's shape and dtype. It may be x.
        impl: "auto", "cuda", "triton" or "torch". "torch" synchronises on a GPU.

    Returns:
        y, x's shape and dtype.

    x and state in float32, bfloat16 or float16 (float64 on the CPU), cache.x and cache.B in x's dtype, D, z, dt and
    dt_bias in any of them. Arithmetic is float32 (float64 where x is). No length is read on the host: a CUDA graph
    replays through the steps that write the state. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or one that requires a gradient; nothing has
            been written then.

    Source: Dao and Gu 2024, "Transformers are SSMs", eq. 1 and section 3.

    >>> state, cache = torch.zeros(2, 4, 8, 16), hybrid_ops.ReplayCache.new(2, 4, 8, 1, 16)
    >>> x, dt, B = torch.ones(2, 4, 8), torch.ones(2, 4), torch.ones(2, 1, 16)
    >>> y = hybrid_ops.ssd_replay_update(state, cache, x, dt, -torch.ones(4), B, B)
    >>> y[0, 0, 0], state[0, 0, 0, 0], cache.length
    (tensor(16.), tensor(0.), tensor([1, 1], dtype=torch.int32))
    """
    _device.check_impl(impl)
    kept, capacity = _parts(cache)
    inputs, index = (dt, A, B, C, D, z, dt_bias), (slots, rollback)
    low, high, run = _check(
        *(x, state, *kept, *inputs, *index, seed),
        *(capacity, dt_limit, rounding, null_slot, out, dt_softplus, impl),
    )
    _checks.no_gradient(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    y = x.new_empty(*x.shape) if out is None else out
    options = (capacity, dt_softplus, low, high, null_slot, impl)
    _ssd_replay_update_op(state, *kept, x, *inputs, *index, seed, y, *options, run=run)
    return y


def ssd_replay_materialize(
    state: Tensor,
    cache: ReplayCache,
    A: Tensor,
    *,
    slots: Tensor | None = None,
    rollback: Tensor | None = None,
    write_slots: Tensor | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    null_slot: int = -1,
    impl: str = "auto",
) -> None:
    """What slots stand for, written out: each state through the tokens of its cache but the newest `rollback`.

    In place without `write_slots`, and the cache of those slots is empty then; otherwise into the states of
    `write_slots` (their caches are left alone), and slots stay as they are.

    Args:
        state: (nslots, nheads, headdim, dstate), any strides, updated in place.
        cache: of `ReplayCache.new`, updated in place.
        A: (nheads,), negative; float32 (float64 where cache.x is).
        slots: (batch,) int32, the rows to write out, all distinct; None: all.
        rollback: (batch,) int32, as in `ssd_replay_update`.
        write_slots: (batch,) int32, where the states go: all distinct, and none in `slots`. `null_slot`: that one is
            not written.
        rounding: of a float16 or bfloat16 state, "nearest" or "stochastic", as in `ssd_state_update`.
        seed: (1,) int64 on the state's device, for stochastic rounding; random bits as there, with t = 0.
        null_slot: the slot of padding, for which nothing happens; as any slot out of range on a GPU.
        impl: "auto", "cuda", "triton" or "torch". "torch" synchronises on a GPU.

    Raises:
        ValueError, TypeError: an argument that is not the one expected, or one that requires a gradient; nothing has
            been written then.

    >>> state, cache = torch.zeros(1, 4, 8, 16), hybrid_ops.ReplayCache.new(1, 4, 8, 1, 16)
    >>> x, dt, A, B = torch.ones(1, 4, 8), torch.ones(1, 4), -torch.ones(4), torch.ones(1, 1, 16)
    >>> y = hybrid_ops.ssd_replay_update(state, cache, x, dt, A, B, B)
    >>> hybrid_ops.ssd_replay_materialize(state, cache, A)
    >>> state[0, 0, 0, 0], cache.length
    (tensor(1.), tensor([0], dtype=torch.int32))
    """
    _device.check_impl(impl)
    kept, capacity = _parts(cache)
    index = (slots, rollback, write_slots)
    run = _check_materialize(state, *kept, A, *index, seed, capacity, rounding, null_slot, impl)
    _checks.no_gradient(state=state, A=A)
    _ssd_replay_materialize_op(state, *kept, A, *index, seed, capacity, null_slot, impl, run=run)


def _parts(cache: ReplayCache) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
    if not isinstance(cache, ReplayCache):
        raise TypeError(f"cache must be a hybrid_ops.ReplayCache, got {type(cache).__name__}")
    x, B, dt, ring, capacity = cache
    return (x, B, dt, ring), capacity


@_checks.remembered
def _check(
    x: Tensor,
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    seed: Tensor | None,
    capacity: int,
    dt_limit: tuple[float, float],
    rounding: str,
    null_slot: int,
    out: Tensor | None,
    dt_softplus: bool,
    impl: str,
) -> tuple[float, float, Callable[..., None] | None]:
    """The bounds of dt'; the CUDA kernel's launch, where that is what a plain call comes to."""
    _checks.number("null_slot", null_slot)
    batch, steps = _check_inputs(state, x, dt, A, B, C, D, z, dt_bias, None)
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    kept = (cache_x, cache_B, cache_dt, ring)
    _check_cache(state, *kept, capacity, x.dtype, B.shape[-2])
    most = min(capacity, cache_x.shape[2] - capacity)
    if steps is not None and not 1 <= steps <= most:
        raise ValueError(f"x must have 1 to {most} tokens, as cache has room for, got {tuple(x.shape)}")
    _check_slots(state, batch, slots, rollback, capacity, null_slot)
    if slots is not None:
        _checks.distinct("slots", slots, state.shape[0], null_slot)
    check_rounding(state, rounding, seed)
    _checks.out(out, x, needs_grad=False)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not _checks.eager_on_gpu(x):
        return low, high, None
    inputs = (dt, A, B, C, D, z, dt_bias, slots, rollback)
    if _choice(impl, state, *kept, steps or 1, batch, (x, *inputs))[0] != "cuda":
        return low, high, None
    y = x.new_empty(x.shape, device="meta") if out is None else out
    rest: Any = (*kept, *inputs, seed, y, capacity, dt_softplus, low, high, null_slot)
    return low, high, _csrc_ssd_replay.ssd_replay_update(x, state, *rest)


@_checks.remembered
def _check_materialize(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    A: Tensor,
    slots: Tensor | None,
    rollback: Tensor | None,
    write_slots: Tensor | None,
    seed: Tensor | None,
    capacity: int,
    rounding: str,
    null_slot: int,
    impl: str,
) -> Callable[..., None] | None:
    """The CUDA kernel's launch, where that is what a plain call comes to."""
    _checks.number("null_slot", null_slot)
    _checks.rank("state", state, (4,), "(nslots, nheads, headdim, dstate)")
    _checks.rank("cache.B", cache_B, (4,), "(nslots, ngroups, places, dstate)")
    nslots, nheads, ngroups = *state.shape[:2], cache_B.shape[1]
    _checks.updatable("state", state)
    kept = (cache_x, cache_B, cache_dt, ring)
    _check_cache(state, *kept, capacity, cache_x.dtype, ngroups)
    floats = _checks.FLOATS if cache_x.dtype == torch.float64 else _checks.FLOATS[:3]
    _checks.tensor("state", state, state.shape, dtype=floats)
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(
            f"cache.B must have a number of groups that divides {nheads} heads, got {tuple(cache_B.shape)}"
        )
    _checks.tensor("A", A, (nheads,), dtype=cache_dt.dtype, device=state.device)
    batch = nslots if slots is None else slots.shape[0]
    _check_slots(state, batch, slots, rollback, capacity, null_slot)
    if write_slots is not None:
        _checks.slots("write_slots", write_slots, (batch,), nslots, null_slot, state.device)
    if _checks.readable(state):
        read = torch.arange(batch, dtype=torch.int32) if slots is None else slots
        _check_races(batch, nslots, read, write_slots, None, null_slot)
        if write_slots is not None and (both := set(read.tolist()) & set(write_slots.tolist()) - {null_slot}):
            raise ValueError(f"write_slots must hold none of slots, got {min(both)}")
    check_rounding(state, rounding, seed)
    if not _checks.eager_on_gpu(state):
        return None
    index = (slots, rollback, write_slots)
    if _choice(impl, state, *kept, 1, batch, (A, *index))[0] != "cuda":
        return None
    return _csrc_ssd_replay.ssd_replay_materialize(state, *kept, A, *index, seed, capacity, null_slot)


def _check_cache(
    state: Tensor,
    x: Tensor,
    B: Tensor,
    dt: Tensor,
    ring: Tensor,
    capacity: int,
    dtype: torch.dtype,
    ngroups: int,
) -> None:
    nslots, nheads, headdim, dstate = state.shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    floats = _checks.FLOATS if dtype == torch.float64 else _checks.FLOATS[:3]
    _checks.tensor("state", state, state.shape, dtype=floats)
    _checks.tensor("cache.x", x, (nslots, nheads, None, headdim), dtype=dtype, device=state.device)
    places = x.shape[2]
    if not 1 <= capacity <= MAX_CAPACITY or not capacity < places < 256:
        raise ValueError(
            f"cache.capacity must be from 1 to {MAX_CAPACITY}, and less than the places of cache.x, which are below "
            f"256; got {capacity} and {tuple(x.shape)}"
        )
    _checks.tensor("cache.B", B, (nslots, ngroups, places, dstate), dtype=dtype, device=state.device)
    _checks.tensor("cache.dt", dt, (nslots, nheads, places), dtype=compute, device=state.device)
    _checks.tensor("cache.ring", ring, (nslots,), dtype=torch.int32, device=state.device)
    for name, part in (("x", x), ("B", B), ("dt", dt), ("ring", ring)):
        _checks.updatable(f"cache.{name}", part)


def _check_slots(
    state: Tensor, batch: int, slots: Tensor | None, rollback: Tensor | None, capacity: int, null_slot: int
) -> None:
    nslots, device = state.shape[0], state.device
    if slots is not None:
        _checks.slots("slots", slots, (batch,), nslots, null_slot, device)
    elif nslots < batch:
        raise ValueError(f"state must have a row for each of the {batch} sequences, got {tuple(state.shape)}")
    if rollback is not None:
        _checks.tensor("rollback", rollback, (batch,), dtype=torch.int32, device=device)
        if _checks.readable(rollback):
            bad = rollback[(rollback < 0) | (rollback > capacity)]
            if bad.numel():
                raise ValueError(f"rollback must be in [0, {capacity}], the capacity, got {int(bad[0])}")


def _choice(
    impl: str,
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    steps: int,
    batch: int,
    others: tuple[Tensor | None, ...],
) -> tuple[str, str]:
    refusal = None
    if impl in ("auto", "cuda"):
        kept = (cache_x, cache_B, cache_dt, ring)
        refusal = _device.not_sm90(state.device) or _csrc_ssd_replay.refusal(state, *kept, steps, batch, others)
    return _device.choose(impl, state.device, refusal)


def _explain(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    tokens: int = 1,
    nheads: int = 128,
    headdim: int = 64,
    ngroups: int = 8,
    dstate: int = 128,
    state_dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Choice:
    state = torch.empty(1, nheads, headdim, dstate, dtype=state_dtype, device="meta")
    kept, _capacity = _parts(ReplayCache.new(1, nheads, headdim, ngroups, dstate, dtype=dtype, device="meta"))
    where = torch.device(device)
    refusal = _device.not_sm90(where) or _csrc_ssd_replay.refusal(state, *kept, tokens, batch, ())
    chosen, reason = _device.choose(impl, where, refusal)
    if chosen == "cuda":
        if _csrc_ssd_replay.takes_one(state, kept[0], tokens, (), ()):
            return Choice(chosen, _csrc_ssd_replay.config_of_one(nheads)._asdict(), reason)
        sms = _device.num_sms_to_explain(device)
        problem = (headdim, dstate, state_dtype.itemsize, dtype.itemsize, nheads, ngroups, batch)
        return Choice(chosen, _csrc_ssd_replay.config(*problem, sms)._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import ssd_replay as kernels

    return Choice(chosen, kernels.config(headdim, dstate, state_dtype.itemsize, batch * nheads)._asdict(), reason)


explains("ssd_replay_update")(_explain)
explains("ssd_replay_materialize")(lambda **problem: _explain(**problem | dict(tokens=0)))


def _ssd_replay_update(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    capacity: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    null_slot: int,
    impl: str,
) -> None:
    kept = (cache_x, cache_B, cache_dt, ring)
    inputs: Any = (dt, A, B, C, D, z, dt_bias, slots, rollback)
    options = (capacity, dt_softplus, dt_min, dt_max, null_slot)
    steps = x.shape[1] if x.dim() == 4 else 1
    chosen = _choice(impl, state, *kept, steps, x.shape[0], (x, *inputs, y))[0]
    if chosen == "cuda":
        rest: Any = (*kept, *inputs, seed, y, *options)
        _csrc_ssd_replay.ssd_replay_update(x, state, *rest)(state, *kept, x, *inputs, seed, y)
        return
    if x.dim() == 3:
        x, dt, B, C, y = (t.unsqueeze(1) for t in (x, dt, B, C, y))
        z = None if z is None else z.unsqueeze(1)
    rest = (*kept, x, dt, A, B, C, D, z, dt_bias, slots, rollback, seed, y, *options)
    if chosen == "triton":
        from .triton_kernels import ssd_replay as kernels

        kernels.ssd_replay_update(state, *rest)
        return
    _torch_ssd_replay.ssd_replay_update(state, *rest)


_ssd_replay_update_op = define(
    "ssd_replay_update(Tensor(a!) state, Tensor(b!) cache_x, Tensor(c!) cache_B, Tensor(d!) cache_dt, Tensor(e!) ring, "
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? slots, "
    "Tensor? rollback, Tensor? seed, Tensor(f!) y, int capacity, bool dt_softplus, float dt_min, float dt_max, "
    "int null_slot, str impl)",
    _ssd_replay_update,
)


def _ssd_replay_materialize(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    A: Tensor,
    slots: Tensor | None,
    rollback: Tensor | None,
    write_slots: Tensor | None,
    seed: Tensor | None,
    capacity: int,
    null_slot: int,
    impl: str,
) -> None:
    kept, index = (cache_x, cache_B, cache_dt, ring), (slots, rollback, write_slots)
    batch = state.shape[0] if slots is None else slots.shape[0]
    chosen = _choice(impl, state, *kept, 1, batch, (A, *index))[0]
    if chosen == "cuda":
        launch = _csrc_ssd_replay.ssd_replay_materialize(state, *kept, A, *index, seed, capacity, null_slot)
        launch(state, *kept, A, *index, seed)
        return
    if chosen == "triton":
        from .triton_kernels import ssd_replay as kernels

        kernels.ssd_replay_materialize(state, *kept, A, *index, seed, capacity, null_slot)
        return
    _torch_ssd_replay.ssd_replay_materialize(state, *kept, A, *index, seed, capacity, null_slot)


_ssd_replay_materialize_op = define(
    "ssd_replay_materialize(Tensor(a!) state, Tensor cache_x, Tensor cache_B, Tensor cache_dt, Tensor(b!) ring, "
    "Tensor A, Tensor? slots, Tensor? rollback, Tensor? write_slots, Tensor? seed, int capacity, int null_slot, "
    "str impl)",
    _ssd_replay_materialize,
)
