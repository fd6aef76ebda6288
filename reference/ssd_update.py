"""Mamba-2 while decoding (Dao and Gu, 2024, "Transformers are SSMs", eq. 1): a few tokens of each sequence.

    dt'_t = clamp(softplus(dt_t + dt_bias))            softplus only where asked
    S_t   = exp(dt'_t A) S_{t-1} + dt'_t x_t (outer) B_t
    y_t   = (S_t C_t + D x_t) * silu(z_t)

The states are rows (slots) of a pool (nslots, nheads, headdim, dstate). What is stored is a rounded copy: the running
state is not rounded between the tokens of one call. Stochastic rounding takes its bits from Philox4x32-10 (Salmon et
al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

import numpy as np

from .norm import silu
from .ssd import _cast, _step, _tokens

# smallest normal exponent, mantissa bits, largest value
GRIDS = {"float16": (-14, 10, 65504.0), "bfloat16": (-126, 7, (2 - 2.0**-7) * 2.0**127), "e2m1": (0, 1, 6.0)}


def ssd_state_update(
    state,
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
    read_slots=None,
    write_slots=None,
    num_accepted=None,
    cu_seqlens=None,
    update_state=True,
    null_slot=-1,
    store=lambda S, slot, t: S,
    dtype=np.float64,
):
    """Returns (y, the pool afterwards). `store(S, slot, t)` rounds the state after token t for its slot.

    x, z (batch, nheads, headdim), (batch, T, nheads, headdim) or (total, nheads, headdim) with cu_seqlens; dt the same
    without headdim; B, C (.., ngroups, dstate). read_slots (batch,), or (batch, W) read at num_accepted[b] - 1;
    write_slots (batch,) for the last state, (batch, T) for one per token. A sequence that reads null_slot or a row
    outside the pool has y = 0 and writes nothing; such a slot in write_slots is not written.
    """
    shape = np.shape(x)
    if cu_seqlens is None:
        length = shape[1] if len(shape) == 4 else 1
        cu_seqlens = np.arange(shape[0] + 1) * length
    x, dt, B, C, z = (None if a is None else _flat(a, shape) for a in (x, dt, B, C, z))
    x, dt, A, B, C, D, z, dt_bias = _cast(dtype, x, dt, A, B, C, D, z, dt_bias)
    tokens = _tokens(dt[None], A, dt_bias, dt_softplus, dt_limit, None, dtype)
    y, pool = np.zeros_like(x), np.array(state, dtype)

    def usable(slot):
        return slot != null_slot and 0 <= slot < len(pool)

    for b in range(len(cu_seqlens) - 1):
        begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        slot = b
        if read_slots is not None:
            slot = int(read_slots[b] if num_accepted is None else read_slots[b][num_accepted[b] - 1])
            if not usable(slot):
                continue
        S = pool[slot].copy()
        for t in range(end - begin):
            i = begin + t
            S, y[i] = _step(S, x[i], tokens.dt[0, i], tokens.decay[0, i], B[i], C[i], D)
            if z is not None:
                y[i] *= silu(z[i])
            if update_state and np.ndim(write_slots) == 2 and usable(write_slots[b][t]):
                pool[write_slots[b][t]] = store(S, int(write_slots[b][t]), t)
        if update_state and np.ndim(write_slots) != 2:
            last = slot if write_slots is None else int(write_slots[b])
            if write_slots is None or usable(last):
                pool[last] = store(S, last, max(end - begin - 1, 0))
    return y.reshape(shape), pool


def stochastic_store(seed, target):
    """The `store` of rounding="stochastic" for a pool of dtype `target` ("float16" or "bfloat16")."""

    def store(S, slot, t):
        index = slot * S.size + np.arange(S.size).reshape(S.shape)
        return round_stochastic(S.astype(np.float32), random_bits(seed, index, t), target)

    return store


def round_stochastic(v, bits, target):
    """Round float32 v to `target`, one of GRIDS: |v| goes to the floor, on its grid, of |v| + bits * 2^-16 * step(|v|).

    The step is the distance between neighbours of the grid at |v|, 2^-24 among float16's subnormal numbers. Beyond the
    largest value (infinity too) it saturates; NaN stays NaN, and zero keeps its sign. Returns float64.
    """
    min_exponent, mantissa, largest = GRIDS[target]
    v = np.asarray(v, np.float32).astype(np.float64)
    finite = np.where(np.isfinite(v), np.abs(v), largest)
    exponent = np.maximum(np.frexp(finite)[1] - 1, min_exponent)
    step = np.ldexp(1.0, exponent - mantissa)
    # frac + bits 2^-16 reaches 1 exactly where floor(frac 2^16) + bits reaches 2^16: integers, so nothing is lost
    sixteenths = np.floor(finite / step * 2.0**16) + bits
    rounded = np.minimum(np.floor(sixteenths / 2.0**16) * step, largest)
    return np.where(np.isnan(v), np.nan, np.copysign(rounded, v))


def random_bits(seed, index, t):
    """The 16 bits of the element `index` (row-major in the whole pool) after token t: half a word of its Philox block.

    key = low and high word of seed; counter = (index // 8 low, index // 8 high, t, 0); word (index % 8) // 2, the low
    half where index is even.
    """
    index = np.asarray(index, np.int64)
    block = index // 8
    words = philox4x32_10((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), (block & 0xFFFFFFFF, block >> 32, t, 0))
    word = np.choose(index % 8 // 2, words)
    return np.where(index % 2 == 0, word & 0xFFFF, word >> 16)


def philox4x32_10(key, counter):
    """Four words of 32 bits for a key of two and a counter of four; arrays broadcast."""
    mask = np.uint64(0xFFFFFFFF)
    k0, k1 = (np.uint64(k) for k in key)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & mask, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return tuple(c.astype(np.int64) for c in (c0, c1, c2, c3))


def _flat(a, shape):
    """(batch, T, ..) as (batch * T, ..)."""
    a = np.asarray(a)
    return a.reshape(-1, *a.shape[2:]) if len(shape) == 4 else a
