"""Mamba-2 while decoding, the newest tokens kept beside the state: the plain recurrence, through them each time.

The state of slot s is state[s] carried through the `length` tokens of its cache, which lie from place `start` on in a
ring: ring[s] = start + 256 length.
"""

import numpy as np

from .norm import silu
from .ssd import _cast, _step, _tokens


def ssd_replay_update(
    state,
    cache,
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, np.inf),
    slots=None,
    rollback=None,
    null_slot=-1,
    store=lambda S, slot, t: S,
    dtype=np.float64,
):
    """Returns (y, the pool and the parts (x, B, dt, ring, capacity) of the cache afterwards).

    x, z (batch, nheads, headdim) or (batch, T, nheads, headdim), dt without headdim, B, C (.., ngroups, dstate).
    `store(S, slot, t)` rounds a state that is written.
    """
    shape = np.shape(x)
    if len(shape) == 3:
        x, dt, B, C, z = (None if a is None else np.asarray(a)[:, None] for a in (x, dt, B, C, z))
    x, dt, A, B, C, D, z, dt_bias = _cast(dtype, x, dt, A, B, C, D, z, dt_bias)
    tokens = _tokens(dt, A, dt_bias, dt_softplus, dt_limit, None, dtype)
    pool, cache = np.array(state, dtype), _copy(cache, dtype)
    places, y, T = cache[0].shape[2], np.zeros_like(x), x.shape[1]
    for b in range(len(x)):
        slot, S, start, length = _checkpoint(pool, cache, A, b, slots, rollback, null_slot)
        if slot is None:
            continue
        if length + T > cache[-1]:
            pool[slot] = store(S, slot, 0)
            start, length = (start + length) % places, 0
        for t in range(T):
            S, y[b, t] = _step(S, x[b, t], tokens.dt[b, t], tokens.decay[b, t], B[b, t], C[b, t], D)
            if z is not None:
                y[b, t] *= silu(z[b, t])
            place = (start + length + t) % places
            for part, new in zip(cache, (x, B, tokens.dt), strict=False):
                part[slot, :, place] = new[b, t]
        cache[3][slot] = start + 256 * (length + T)
    return y.reshape(shape), pool, cache


def ssd_replay_materialize(
    state,
    cache,
    A,
    *,
    slots=None,
    rollback=None,
    write_slots=None,
    null_slot=-1,
    store=lambda S, slot, t: S,
    dtype=np.float64,
):
    """Returns the pool and the cache afterwards."""
    pool, cache, A = np.array(state, dtype), _copy(cache, dtype), np.asarray(A, dtype)
    for b in range(len(pool) if slots is None else len(slots)):
        slot, S, _, _ = _checkpoint(pool, cache, A, b, slots, rollback, null_slot)
        if slot is None:
            continue
        place = slot if write_slots is None else int(write_slots[b])
        if place != null_slot and 0 <= place < len(pool):
            pool[place] = store(S, place, 0)
        if write_slots is None:
            cache[3][slot] = 0
    return pool, cache


def _checkpoint(pool, cache, A, b, slots, rollback, null_slot):
    """The slot of sequence b (None: padding), its state after all tokens but the rejected, and where those lie."""
    slot = b if slots is None else int(slots[b])
    if not 0 <= slot < len(pool) or (slots is not None and slot == null_slot):
        return None, None, 0, 0
    x, B, dt, ring, _ = cache
    start, length = int(ring[slot]) % 256, int(ring[slot]) // 256
    length -= min(max(0 if rollback is None else int(rollback[b]), 0), length)
    S = pool[slot].copy()
    for j in range(length):
        place = (start + j) % x.shape[2]
        step = dt[slot, :, place]
        S, _ = _step(S, x[slot, :, place], step, np.exp(step * A), B[slot, :, place], B[slot, :, place], None)
    return slot, S, start, length


def _copy(cache, dtype):
    *parts, ring, capacity = cache
    return (*(np.array(part, dtype) for part in parts), np.array(ring), capacity)
