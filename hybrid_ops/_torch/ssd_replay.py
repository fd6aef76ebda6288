"""The SSD recurrence from a checkpoint and a ring of tokens, in plain torch; float32 arithmetic (float64 for float64).

The capacity + T tokens of a sequence stand in one row, the cached before the new. Those that are not there have dt = 0:
they neither decay nor weigh anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .norm import compute_dtype
from .ssd_update import _read, _step_sizes, _store, _usable, _which


class Cached(NamedTuple):
    """What the sequences of a call, but those of padding, have: rows of tensors, ages 0 (oldest) to capacity - 1."""

    rows: Tensor | slice  # of the batch
    slot: Tensor  # (batch,)
    start: Tensor  # (batch,), a place of the ring
    length: Tensor  # (batch,), without the tokens dropped
    x: Tensor  # (batch, nheads, capacity, headdim)
    B: Tensor  # (batch, nheads, capacity, dstate)
    dt: Tensor  # (batch, nheads, capacity), 0 from `length` on


def ssd_replay_update(
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
) -> None:
    """Fill y, append to the cache, write states where it is full. Tokens are (batch, T, ..)."""
    dtype, steps, places = compute_dtype(x), x.shape[1], cache_x.shape[2]
    slot = torch.arange(len(x), device=x.device) if slots is None else slots.long()
    old = _cached(state, cache_x, cache_B, cache_dt, ring, slot, slots, rollback, capacity, null_slot, dtype)
    if len(old.slot) == 0:
        y.zero_()
        return
    xs, Bs, Cs, dts = (t[old.rows].to(dtype).transpose(1, 2) for t in (x, B, C, dt))  # [batch, H or G, T, ..]
    dts = _step_sizes(dts.transpose(1, 2), dt_bias, dt_softplus, dt_min, dt_max).transpose(1, 2)
    A = A.to(dtype)[:, None]

    # [batch, H, T, capacity + T]: the tokens that y_t sees, and the time from each of them to t
    all_dt = torch.cat([old.dt, dts], 2)
    number = torch.arange(capacity + steps, device=x.device)
    seen = number <= capacity + number[:steps, None]
    sums = _suffix_sums(all_dt[:, :, None].where(seen, 0.0))
    weights = torch.exp(sums[..., 1:] * A[..., None]) * all_dt[:, :, None]
    nheads = x.shape[2]
    groups = nheads // B.shape[2]
    heads_C, heads_B = (t.repeat_interleave(groups, 1) for t in (Cs, Bs))
    scores = heads_C @ torch.cat([old.B, heads_B], 2).transpose(2, 3) * weights.where(seen, 0.0)
    S = _read(state, None, old.slot, dtype)  # [batch, H, P, N], a copy
    result = heads_C @ S.transpose(2, 3) * torch.exp(sums[..., :1] * A[..., None])  # [batch, H, T, P]
    result += scores @ torch.cat([old.x, xs], 2)
    if D is not None:
        result.addcmul_(D.to(dtype).view(nheads, 1, -1), xs)
    if z is not None:
        gate = z[old.rows].to(dtype).transpose(1, 2)
        result.mul_(gate / (1 + torch.exp(-gate)))

    flush = old.length + steps > capacity
    full = _which(flush)
    _take_in(state, S[full], _select(old, full), A, old.slot[full], seed)
    place = (old.start + old.length)[:, None] + torch.arange(steps, device=x.device)
    place = (place % places)[:, None]  # [batch, 1, T]
    for cached, new in ((cache_x, xs), (cache_B, Bs), (cache_dt, dts)):
        row = torch.arange(new.shape[1], device=x.device)[:, None]  # heads or groups
        cached[old.slot[:, None, None], row, place] = new.to(cached.dtype)
    start = torch.where(flush, (old.start + old.length) % places, old.start)
    ring[old.slot] = (start + 256 * (torch.where(flush, 0, old.length) + steps)).int()
    y.zero_()
    y[old.rows] = result.transpose(1, 2).to(y.dtype)


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
) -> None:
    """States through the tokens of their cache, in place or in write_slots."""
    dtype = compute_dtype(cache_x)
    slot = torch.arange(len(state), device=state.device) if slots is None else slots.long()
    old = _cached(state, cache_x, cache_B, cache_dt, ring, slot, slots, rollback, capacity, null_slot, dtype)
    place = old.slot if write_slots is None else write_slots[old.rows].long()
    wanted = _which(_usable(place, len(state), None if write_slots is None else null_slot))
    some = _select(old, wanted)
    _take_in(state, _read(state, None, some.slot, dtype), some, A.to(dtype)[:, None], place[wanted], seed)
    if write_slots is None:
        ring[old.slot] = 0


def _cached(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    slot: Tensor,
    slots: Tensor | None,
    rollback: Tensor | None,
    capacity: int,
    null_slot: int,
    dtype: torch.dtype,
) -> Cached:
    nheads, places = cache_x.shape[1:3]
    rows = _which(_usable(slot, len(state), None if slots is None else null_slot))  # the others are padding
    slot = slot[rows]
    word = ring[slot].long()
    start, length = (word & 255) % places, (word >> 8).clamp(0, capacity)
    if rollback is not None:
        length = (length - rollback[rows].long().clamp(min=0)).clamp(min=0)
    age = torch.arange(capacity, device=slot.device)
    place, there = ((start[:, None] + age) % places)[:, None], (age < length[:, None])[:, None]  # [batch, 1, capacity]
    head = torch.arange(nheads, device=slot.device)[:, None]
    group = head // (nheads // cache_B.shape[1])
    # what no token has filled may be anything
    x, B = (
        part[slot[:, None, None], row, place].to(dtype).where(there[..., None], 0.0)
        for part, row in ((cache_x, head), (cache_B, group))
    )
    dt = cache_dt[slot[:, None, None], head, place].where(there, 0.0)
    return Cached(rows, slot, start, length, x, B, dt)


def _select(old: Cached, which: Tensor | slice) -> Cached:
    return Cached(old.rows, *(part[which] for part in old[1:]))


def _take_in(state: Tensor, S: Tensor, old: Cached, A: Tensor, place: Tensor, seed: Tensor | None) -> None:
    """state[place[b]] = S[b] through the cached tokens."""
    if len(place) == 0:
        return
    sums = _suffix_sums(old.dt)
    weights = torch.exp(sums[..., 1:] * A) * old.dt
    S = S * torch.exp(sums[..., :1] * A)[..., None]
    S += (old.x * weights[..., None]).transpose(2, 3) @ old.B
    _store(state, None, S, place, seed, torch.zeros_like(place))


def _suffix_sums(dt: Tensor) -> Tensor:
    """[.., n + 1]: the sum of all n, of all but the first, .., of none. Differences of large sums would be coarse."""
    sums = dt.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, torch.zeros_like(sums[..., :1])], -1)
