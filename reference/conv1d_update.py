"""Causal depthwise convolution while decoding: a few tokens of each sequence, the windows in a pool of slots.

    y[t, d] = act(bias[d] + sum_k weight[d, k] u[t - (width - 1) + k, d])

u is the stream of a sequence: the columns of its slot, oldest first, without the newest `rollback` ones, then x.
"""

import numpy as np

from .norm import silu


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    *,
    activation=None,
    slots=None,
    rollback=None,
    cu_seqlens=None,
    null_slot=-1,
    round_state=lambda columns: columns,
    dtype=np.float64,
):
    """Returns (y, the pool afterwards): the last state_len columns of every stream, zeros where it is shorter.

    x (batch, dim), (batch, T, dim) or (total, dim) with cu_seqlens; conv_state (nslots, dim, state_len), newest column
    last; weight (dim, width). A sequence whose slot is null_slot or outside the pool has y = 0 and changes nothing.
    """
    x, weight, pool = (np.asarray(a, dtype) for a in (x, weight, conv_state))
    y, pool = np.zeros_like(x), pool.copy()
    width, state_len = weight.shape[1], pool.shape[2]
    batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    for b in range(batch):
        tokens = b if cu_seqlens is None else slice(cu_seqlens[b], cu_seqlens[b + 1])
        slot = b if slots is None else int(slots[b])
        if slots is not None and (slot == null_slot or not 0 <= slot < len(pool)):
            continue
        new = np.atleast_2d(x[tokens])  # (T, dim)
        dropped = 0 if rollback is None else int(rollback[b])
        stream = np.concatenate([pool[slot].T[: state_len - dropped], new])
        result = np.zeros_like(new)
        for t in range(len(new)):
            window = stream[state_len - dropped + t - (width - 1) :][:width]  # (width, dim)
            result[t] = (window * weight.T).sum(0) + (0 if bias is None else np.asarray(bias, dtype))
        y[tokens] = (silu(result) if activation == "silu" else result).reshape(y[tokens].shape)
        padded = np.concatenate([np.zeros((state_len, x.shape[-1]), dtype), stream])
        pool[slot] = round_state(padded[len(padded) - state_len :].T)
    return y, pool
