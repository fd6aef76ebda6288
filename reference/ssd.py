"""The scan of Mamba-2 (Dao and Gu, 2024, "Transformers are SSMs", eq. 1 and section 5), token by token.

    dt'_t = clamp(softplus(dt_t + dt_bias))            softplus only where asked
    S_t   = exp(dt'_t A) S_{t-1} + dt'_t x_t (outer) B_t
    y_t   = (S_t C_t + D x_t) * silu(z_t)

Shapes: x, z (batch, seqlen, nheads, headdim); dt (batch, seqlen, nheads); B, C (batch, seqlen, ngroups, dstate); head h
reads group h // (nheads / ngroups); states (nheads, headdim, dstate) for each sequence.
"""

import itertools
from typing import NamedTuple

import numpy as np

from .norm import silu, silu_grad


class Tokens(NamedTuple):
    """What the recurrence sees of every token: dt' (0 at padding) and exp(dt' A) (0 where a new sequence begins)."""

    dt: np.ndarray
    decay: np.ndarray
    padding: np.ndarray


def ssd_chunk_scan(
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
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    state_interval=0,
    seq_offsets=None,
    dtype=np.float64,
):
    """Returns (y, final_states, interval_states); the last is None where state_interval is 0."""
    x, dt, A, B, C, D, z, dt_bias = _cast(dtype, x, dt, A, B, C, D, z, dt_bias)
    tokens = _tokens(dt, A, dt_bias, dt_softplus, dt_limit, seq_idx, dtype)
    sequences = _sequences(x, cu_seqlens)
    finals = np.zeros((len(sequences), *x.shape[2:], B.shape[-1]), dtype)
    places, shape = _interval_places(sequences, x.shape, cu_seqlens, state_interval, seq_offsets)
    intervals = np.zeros((*shape, *finals.shape[1:]), dtype) if state_interval else None
    y = np.zeros_like(x)
    for b, (row, begin, end) in enumerate(sequences):
        state = finals[b] if initial_states is None else np.array(initial_states[b], dtype)
        for t in range(begin, end):
            state, y[row, t] = _step(state, x[row, t], tokens.dt[row, t], tokens.decay[row, t], B[row, t], C[row, t], D)
            if (row, t) in places:
                intervals[places[row, t]] = state
        finals[b] = state
    if z is not None:
        y = y * silu(z)
    y[tokens.padding] = 0
    return y, finals, intervals


def ssd_chunk_scan_pool(
    x, dt, A, B, C, *, ssm_state, read_slots=None, write_slots=None, interval_slots=None, null_slot=-1, **options
):
    """The same on a pool of states (nslots, nheads, headdim, dstate). Returns (y, the pool afterwards).

    A slot that is null_slot or outside the pool reads zeros and writes nothing.
    """
    dtype = options.get("dtype", np.float64)
    pool = np.array(ssm_state, dtype)

    def usable(slot):
        return slot != null_slot and 0 <= slot < len(pool)

    sequences = _sequences(np.asarray(x), options.get("cu_seqlens"))
    start = np.zeros((len(sequences), *pool.shape[1:]), dtype)
    for b, slot in enumerate([] if read_slots is None else read_slots):
        if usable(slot):
            start[b] = pool[slot]
    y, finals, intervals = ssd_chunk_scan(x, dt, A, B, C, initial_states=start, **options)
    for b, slot in enumerate([] if write_slots is None else write_slots):
        if usable(slot):
            pool[slot] = finals[b]
    if interval_slots is not None:
        places, _ = _interval_places(
            sequences,
            np.shape(x),
            options.get("cu_seqlens"),
            options["state_interval"],
            options.get("seq_offsets"),
        )
        for b, (row, begin, end) in enumerate(sequences):
            mine = [places[row, t] for t in range(begin, end) if (row, t) in places]
            for place, slot in zip(mine, interval_slots[b], strict=False):  # states beyond the slots are not kept
                if usable(slot):
                    pool[slot] = intervals[place]
    return y, pool


def ssd_chunk_scan_bwd(
    dy,
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
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    state_interval=0,
    seq_offsets=None,
    dfinal_states=None,
    dinterval_states=None,
    dtype=np.float64,
):
    """The adjoint, token by token from the last to the first. Returns the gradients by name.

    dt that was clamped has no gradient. With W_t the gradient of S_t, collected from later tokens and from y_t:
    dx_t = dt'_t W_t B_t + D dy_t, dB_t = sum_h dt'_t W_t^T x_t, dC_t = sum_h S_t^T dy_t,
    ddt'_t = <W_t, x_t (outer) B_t> + A exp(dt'_t A) <W_t, S_{t-1}>,
    W_{t-1} = exp(dt'_t A) W_t + dy_{t-1} (outer) C_{t-1}.
    """
    raw_dt = np.asarray(dt, dtype)
    dy, x, dt, A, B, C, D, z, dt_bias = _cast(dtype, dy, x, dt, A, B, C, D, z, dt_bias)
    tokens = _tokens(dt, A, dt_bias, dt_softplus, dt_limit, seq_idx, dtype)
    sequences = _sequences(x, cu_seqlens)
    places, _ = _interval_places(sequences, x.shape, cu_seqlens, state_interval, seq_offsets)
    nheads, ngroups = x.shape[2], B.shape[2]
    dy = np.where(tokens.padding[..., None, None], dtype(0), dy)
    dyraw = dy if z is None else dy * silu(z)  # the gradient before the gate
    yraw = np.zeros_like(x)
    dx, dB, dC = np.zeros_like(x), np.zeros_like(B), np.zeros_like(C)
    ddt, dA = np.zeros_like(dt), np.zeros_like(A)
    start = np.zeros((len(sequences), *x.shape[2:], B.shape[-1]), dtype)
    if initial_states is not None:
        start[:] = initial_states
    dinitial = np.zeros_like(start)
    for b, (row, begin, end) in enumerate(sequences):
        states = [start[b]]
        for t in range(begin, end):
            state, yraw[row, t] = _step(
                states[-1], x[row, t], tokens.dt[row, t], tokens.decay[row, t], B[row, t], C[row, t], D
            )
            states.append(state)
        w = np.zeros_like(start[b]) if dfinal_states is None else np.array(dfinal_states[b], dtype)
        for t in reversed(range(begin, end)):
            if dinterval_states is not None and (row, t) in places:
                w = w + np.asarray(dinterval_states[places[row, t]], dtype)
            before, after = states[t - begin], states[t - begin + 1]
            b_t, c_t = _per_head(B[row, t], nheads), _per_head(C[row, t], nheads)
            dt_t, decay = tokens.dt[row, t][:, None], tokens.decay[row, t]
            w = w + dyraw[row, t][:, :, None] * c_t[:, None, :]
            dC[row, t] = _per_group((after * dyraw[row, t][:, :, None]).sum(1), ngroups)
            dB[row, t] = _per_group(dt_t * (w * x[row, t][:, :, None]).sum(1), ngroups)
            wb = _sum_in_order(w * b_t[:, None, :])
            dx[row, t] = dt_t * wb
            dlog = (w * before).sum((1, 2)) * decay  # gradient of dt' A
            ddt[row, t] = (wb * x[row, t]).sum(1) + dlog * A
            dA += dlog * tokens.dt[row, t]
            w = w * decay[:, None, None]
        dinitial[b] = w
    grads = dict(dx=dx, dA=dA, dB=dB, dC=dC)
    grads["ddt"] = _through_dt(ddt, raw_dt, dt_bias, dt_softplus, dt_limit, tokens.padding, dtype)
    if D is not None:
        grads["dx"] = dx + dyraw * (D[:, None] if D.ndim == 1 else D)
        dD = (dyraw * x).sum((0, 1))
        grads["dD"] = dD.sum(1) if D.ndim == 1 else dD
    if z is not None:
        grads["dz"] = dy * yraw * silu_grad(z)
    if dt_bias is not None:
        grads["ddt_bias"] = grads["ddt"].sum((0, 1))
    if initial_states is not None:
        grads["dinitial_states"] = dinitial
    return grads


def _cast(dtype, *arrays):
    return [None if a is None else np.asarray(a, dtype) for a in arrays]


def _per_head(grouped, nheads):
    """(ngroups, n) as (nheads, n): head h reads group h // (nheads / ngroups)."""
    return np.repeat(grouped, nheads // grouped.shape[0], axis=0)


def _per_group(heads, ngroups):
    return heads.reshape(ngroups, -1, heads.shape[-1]).sum(1)


def _sum_in_order(products):
    """Over dstate, term after term, as the formula is written and a product accumulates; `sum` adds eight by eight."""
    return np.cumsum(products, axis=-1)[..., -1]


def _step(state, x, dt, decay, b, c, D):
    """One token for all heads: the state after it and y before the gate."""
    nheads = len(x)
    state = decay[:, None, None] * state + (dt[:, None] * x)[:, :, None] * _per_head(b, nheads)[:, None, :]
    y = _sum_in_order(state * _per_head(c, nheads)[:, None, :])
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D) * x
    return state, y


def _unclamped(dt, dt_bias, dt_softplus, dtype):
    dt = dt if dt_bias is None else dt + dt_bias
    return np.logaddexp(dtype(0), dt) if dt_softplus else dt


def _tokens(dt, A, dt_bias, dt_softplus, dt_limit, seq_idx, dtype):
    low, high = (dtype(limit) for limit in dt_limit)
    dt = np.clip(_unclamped(dt, dt_bias, dt_softplus, dtype), low, high)
    padding = np.zeros(dt.shape[:2], bool)
    starts = np.zeros(dt.shape[:2], bool)
    if seq_idx is not None:
        padding = np.asarray(seq_idx) < 0
        for row, numbers in enumerate(np.asarray(seq_idx)):
            last = None
            for t, number in enumerate(numbers):
                if number >= 0:
                    starts[row, t] = last is not None and number != last
                    last = number
    dt = np.where(padding[..., None], dtype(0), dt)
    return Tokens(dt, np.where(starts[..., None], dtype(0), np.exp(dt * A)), padding)


def _through_dt(ddt, dt, dt_bias, dt_softplus, dt_limit, padding, dtype):
    """Gradient of dt from that of dt': through the clamp and the softplus."""
    value = _unclamped(dt, dt_bias, dt_softplus, dtype)
    ddt = np.where((value >= dt_limit[0]) & (value <= dt_limit[1]) & ~padding[..., None], ddt, dtype(0))
    if not dt_softplus:
        return ddt
    biased = dt if dt_bias is None else dt + dt_bias
    return ddt * np.exp(-np.logaddexp(dtype(0), -biased))  # the sigmoid


def _sequences(x, cu_seqlens):
    """(row, first token, one past the last token) of every sequence."""
    if cu_seqlens is None:
        return [(row, 0, x.shape[1]) for row in range(x.shape[0])]
    return [(0, int(begin), int(end)) for begin, end in itertools.pairwise(cu_seqlens)]


def _interval_places(sequences, shape, cu_seqlens, state_interval, seq_offsets):
    """Where in interval_states the state after a token goes, by (row, token); and the leading shape of that array.

    A token has the position seq_offsets[b] + its index in the sequence; states are kept after positions p with
    (p + 1) % state_interval == 0. Dense: (batch, seqlen // interval + 1), from index 0 in every row.
    Packed: (total // interval + nseq,), sequence after sequence.
    """
    places = {}
    if not state_interval:
        return places, ()
    packed = 0
    for b, (row, begin, end) in enumerate(sequences):
        offset = 0 if seq_offsets is None else int(seq_offsets[b])
        ends = [t for t in range(begin, end) if (offset + t - begin + 1) % state_interval == 0]
        for j, t in enumerate(ends):
            places[row, t] = (b, j) if cu_seqlens is None else (packed + j,)
        packed += len(ends)
    if cu_seqlens is None:
        return places, (shape[0], shape[1] // state_interval + 1)
    return places, (shape[1] // state_interval + len(sequences),)
