"""Launcher of csrc/ssd_replay_sm90.cu, and what its kernels do not take."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES
from .ssd_update import DSTATES


class Config(NamedTuple):
    rows: int  # of a lane, in a warp's tile
    warps: int  # of a block
    heads: int  # of a block, of one group


def config_of_one(nheads: int) -> Config:
    """Of csrc/ssd_replay_one_sm90.cuh: rows of a warp, two of which, each of another head, are counted at once."""
    warps = math.gcd(nheads, 2)
    return Config(rows=64, warps=warps, heads=warps)


def takes_one(
    state: Tensor, cache_x: Tensor, steps: int, tokens: tuple[Tensor | None, ...], columns: tuple[Tensor, ...]
) -> bool:
    """Whether a problem that is not refused is one for the kernel of one token, csrc/ssd_replay_one_sm90.cuh.

    That has tokens in bfloat16, whose rows begin where its loads need it: those of `tokens` (x, z, y) at multiples of 4
    bytes, of `columns` (B and C) of 16; and states of 16 bits, where each head's are neighbours.
    """
    pieces = [(t, 4) for t in tokens if t is not None] + [(t, 16) for t in columns]
    return (
        (steps, cache_x.dtype, state.element_size()) == (1, torch.bfloat16, 2)
        and state.stride(2) == state.shape[3]
        and all(t.dtype == torch.bfloat16 and _in_pieces(t, size) for t, size in pieces)
    )


def _in_pieces(tensor: Tensor, size: int) -> bool:
    """Whether rows are of neighbours, and begin at multiples of `size` bytes."""
    number = size // tensor.element_size()
    return (
        tensor.stride(-1) == 1 and not any(s % number for s in tensor.stride()[:-1]) and tensor.data_ptr() % size == 0
    )


def tile(rows: int, dstate: int, itemsize: int) -> int:
    """Rows of a warp's tile."""
    return rows * 32 // min(32, dstate * itemsize // 16)


def config(
    headdim: int, dstate: int, itemsize: int, x_itemsize: int, nheads: int, ngroups: int, batch: int, num_sms: int
) -> Config:
    """Up to four heads of a group to a block, whose dots with B and C are the same: fewer where blocks would be few."""
    rows = 16 if (dstate, x_itemsize) == (128, 2) else 4 if dstate * itemsize in (128, 1024) else 8
    filling = batch * nheads / num_sms  # heads of a multiprocessor
    most = 1 if filling < 4 else 2 if filling < 32 else 4
    heads = next(heads for heads in (4, 2, 1) if heads <= most and nheads // ngroups % heads == 0)
    return Config(rows, min(4, heads * math.ceil(headdim / tile(rows, dstate, itemsize))), heads)


def refusal(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    steps: int,
    batch: int,
    others: tuple[Tensor | None, ...],
) -> str | None:
    """Why this kernel cannot take the problem; None where it can."""
    for name, tensor in (("x", cache_x), ("state", state)):
        if tensor.dtype not in DTYPES:
            return f"the CUDA kernel has no {tensor.dtype} for {name}"
    nslots, nheads, headdim, dstate = state.shape
    if dstate not in DSTATES:
        return f"the CUDA kernel has dstate {', '.join(map(str, DSTATES))}, not {dstate}"
    for name, tensor in (("state", state), ("cache.x", cache_x), ("cache.B", cache_B)):
        number = 16 // tensor.element_size()
        whole = tensor.shape[3] % number == 0 and not any(s % number for s in tensor.stride()[:3])
        if tensor.stride(3) != 1 or not whole or tensor.data_ptr() % 16:
            return f"the CUDA kernel needs rows of {name} of, and at, multiples of 16 bytes"
    if batch > 65535 or nheads * headdim > 2**17:
        return f"the CUDA kernel has 65535 sequences of 2^17 features, not {batch} of {nheads * headdim}"
    if steps > 16:
        return f"the CUDA kernel takes 16 tokens at once, not {steps}"
    kept = (state, cache_x, cache_B, cache_dt)
    strides = [stride for tensor in kept for stride in tensor.stride()[1:]]
    strides += [stride for tensor in others if tensor is not None for stride in tensor.stride()]
    if max(nslots, *strides) >= 2**31:
        return "the CUDA kernel has 32 bits for every stride but that of slots"
    return None


@_checks.remembered
def ssd_replay_update(
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
    y: Tensor,
    capacity: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    null_slot: int,
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills y and moves cache and state on, given the operator's arguments; for those of one signature."""
    batch, steps = x.shape[0], x.shape[1] if x.dim() == 4 else 1
    if chosen is None and takes_one(state, cache_x, steps, (x, z, y), (B, C)):
        chosen = config_of_one(state.shape[1])
    tokens = [None if t is None else t.stride() for t in (x, z)]
    tokens += [t.stride() for t in (y, dt, B, C)]
    launch = _launcher(
        *(state, cache_x, cache_B, cache_dt, ring, A, slots, rollback, None, capacity, null_slot, batch, chosen),
        steps=steps,
        dtypes=(dt, D, z, dt_bias),
        tokens=[(0, 0, 0, 0) if s is None else (*(s if x.dim() == 4 else (s[0], 0, *s[1:])), 0)[:4] for s in tokens],
        small=(0 if dt_bias is None else dt_bias.stride(0), *((0, 0) if D is None else (*D.stride(), 0)[:2])),
        dt_limit=(dt_min, dt_max),
        dt_softplus=dt_softplus,
    )

    def run(*arguments: Any) -> None:
        """state, cache_x, cache_B, cache_dt, ring, x, dt, A, B, C, D, z, dt_bias, slots, rollback, seed, y, .."""
        if batch:
            launch((*arguments[:17], None))

    return run


@_checks.remembered
def ssd_replay_materialize(
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
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What writes states out, given the operator's arguments; for those of one signature."""
    batch = state.shape[0] if slots is None else slots.shape[0]
    kept = (state, cache_x, cache_B, cache_dt, ring)
    launch = _launcher(*kept, A, slots, rollback, write_slots, capacity, null_slot, batch, chosen)

    def run(*arguments: Any) -> None:
        """state, cache_x, cache_B, cache_dt, ring, A, slots, rollback, write_slots, seed, .."""
        if batch:
            kept, (A, slots, rollback, write_slots, seed) = arguments[:5], arguments[5:10]
            launch((*kept, None, None, A, *(None,) * 5, slots, rollback, seed, None, write_slots))

    return run


def _launcher(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    A: Tensor,
    slots: Tensor | None,
    rollback: Tensor | None,
    write_slots: Tensor | None,
    capacity: int,
    null_slot: int,
    batch: int,
    chosen: Config | None,
    steps: int = 0,
    dtypes: tuple[Tensor | None, ...] = (None,) * 4,
    tokens: Any = ((0, 0, 0, 0),) * 6,
    small: tuple[int, ...] = (0, 0, 0),
    dt_limit: tuple[float, float] = (0.0, math.inf),
    dt_softplus: bool = False,
) -> Callable[..., None]:
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (nslots, nheads, headdim, dstate), (ngroups, places) = state.shape, cache_B.shape[1:3]
    index = state.device.index
    if chosen is None:
        problem = (headdim, dstate, state.element_size(), cache_x.element_size(), nheads, ngroups, batch)
        chosen = config(*problem, _device.num_sms(index))
    launch = extension.SsdReplay(
        dtypes=tuple(DTYPES[(cache_x if t is None else t).dtype] for t in (state, cache_x, *dtypes)),
        sizes=(batch, steps, nslots, nheads, headdim, dstate, ngroups, capacity, places),
        slot_strides=tuple(t.stride()[:3] for t in (state, cache_x, cache_B, cache_dt)),
        token_strides=tuple(tokens),
        small_strides=(
            *(ring.stride(0), A.stride(0), *small),
            *(0 if t is None else t.stride(0) for t in (slots, rollback, write_slots)),
        ),
        null_slot=null_slot,
        dt_limit=dt_limit,
        dt_softplus=dt_softplus,
        config=chosen,
    )

    def run(tensors: tuple[Tensor | None, ...]) -> None:
        """In the order of SsdReplayPointers."""
        launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))

    return run
