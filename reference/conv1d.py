"""Causal depthwise convolution with a short window, as in Mamba (Gu and Dao, 2023, "Mamba", section 3.4).

    y_t = act(bias + sum_j weight[:, j] * u_{t - (width - 1) + j}),   u = the sequence behind its history

A sequence is a list of tokens of one row. Its history, and the state that it leaves, are its last inputs, oldest first.
"""

import numpy as np

from .norm import silu, silu_grad


def sequences(batch, seqlen, seq_idx=None, cu_seqlens=None):
    """List of (row, tokens, initial, final): the states it starts from and leaves, by number, or None.

    `cu_seqlens` (nseq + 1,) cuts the only row; `seq_idx` (batch, seqlen) cuts a row wherever its index changes from one
    token to the next, tokens of negative index (padding) left out of every sequence.
    """
    if cu_seqlens is not None:
        return [(0, range(cu_seqlens[s], cu_seqlens[s + 1]), s, s) for s in range(len(cu_seqlens) - 1)]
    if seq_idx is None:
        return [(b, range(seqlen), b, b) for b in range(batch)]
    found = []
    for b in range(batch):
        runs, previous = [[]], None
        for t in range(seqlen):
            if seq_idx[b][t] < 0:
                continue
            if previous is not None and seq_idx[b][t] != previous:
                runs.append([])
            runs[-1].append(t)
            previous = seq_idx[b][t]
        last = len(runs) - 1
        found += [(b, run, b if i == 0 else None, b if i == last else None) for i, run in enumerate(runs)]
    return found


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    state_len=None,
    dtype=np.float64,
):
    """x (batch, seqlen, dim), weight (dim, width) -> y, final_states (B, dim, state_len); B = batch, or nseq if packed.

    initial_states (B, dim, state_len), None for zeros; state_len >= width - 1, None for width - 1.
    """
    x, weight = np.asarray(x, dtype), np.asarray(weight, dtype)
    initial_states = _states(x, weight, initial_states, cu_seqlens, state_len, dtype)
    y, final_states = np.zeros_like(x), np.zeros_like(initial_states)
    for row, tokens, initial, final in sequences(*x.shape[:2], seq_idx, cu_seqlens):
        u = _with_history(x, row, tokens, initial, initial_states)
        for i, t in enumerate(tokens):
            pre = _window_sum(u, i, weight, bias, initial_states.shape[-1])
            y[row, t] = silu(pre) if activation == "silu" else pre
        if final is not None:
            final_states[final] = u[len(tokens) :].T
    return y, final_states


def causal_conv1d_bwd(
    dy,
    dfinal_states,
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dtype=np.float64,
):
    """Gradients (dx, dweight, dbias, dinitial_states) of `causal_conv1d`; dfinal_states None for zeros."""
    x, weight, dy = np.asarray(x, dtype), np.asarray(weight, dtype), np.asarray(dy, dtype)
    initial_states = _states(x, weight, initial_states, cu_seqlens, None, dtype)
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(weight[:, 0])
    dinitial_states = np.zeros_like(initial_states)
    width, state_len = weight.shape[1], initial_states.shape[-1]
    for row, tokens, initial, final in sequences(*x.shape[:2], seq_idx, cu_seqlens):
        u = _with_history(x, row, tokens, initial, initial_states)
        du = np.zeros_like(u)
        for i, t in enumerate(tokens):
            dpre = dy[row, t]
            if activation == "silu":
                dpre = dpre * silu_grad(_window_sum(u, i, weight, bias, state_len))
            for j in range(width):
                position = state_len + i - (width - 1) + j
                du[position] += dpre * weight[:, j]
                dweight[:, j] += dpre * u[position]
            dbias += dpre
        if final is not None and dfinal_states is not None:
            du[len(tokens) :] += np.asarray(dfinal_states, dtype)[final].T
        for i, t in enumerate(tokens):
            dx[row, t] = du[state_len + i]
        if initial is not None:
            dinitial_states[initial] = du[:state_len].T
    return dx, dweight, dbias, dinitial_states


def causal_conv1d_pool(x, weight, bias=None, *, conv_state, read_slots=None, write_slots=None, null_slot=-1, **options):
    """The same with states in slots of a pool (nslots, dim, state_len): returns y and the pool afterwards.

    A slot holds the newest state_len inputs, so each call moves its older columns left by the number of its tokens.
    Without read_slots a sequence starts from zeros; a slot that is null_slot or outside reads zeros and is not written.
    """
    pool = np.array(conv_state, options.get("dtype", np.float64))
    valid = [s for s in range(len(pool)) if s != null_slot]
    nseq = len(x) if options.get("cu_seqlens") is None else len(options["cu_seqlens"]) - 1
    initial_states = np.zeros((nseq, *pool.shape[1:]), pool.dtype)
    for s in range(nseq):
        if read_slots is not None and read_slots[s] in valid:
            initial_states[s] = pool[read_slots[s]]
    y, final_states = causal_conv1d(x, weight, bias, initial_states=initial_states, state_len=pool.shape[2], **options)
    for s in range(nseq):
        if write_slots is not None and write_slots[s] in valid:
            pool[write_slots[s]] = final_states[s]
    return y, pool


def _states(x, weight, initial_states, cu_seqlens, state_len, dtype):
    if initial_states is not None:
        return np.asarray(initial_states, dtype)
    nseq = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return np.zeros((nseq, x.shape[2], weight.shape[1] - 1 if state_len is None else state_len), dtype)


def _with_history(x, row, tokens, initial, initial_states):
    """(state_len + tokens, dim): the inputs of one sequence behind its history."""
    history = (
        np.zeros_like(initial_states, shape=initial_states.shape[1:]) if initial is None else initial_states[initial]
    )
    return np.concatenate([history.T, x[row, list(tokens)].reshape(len(tokens), x.shape[2])])


def _window_sum(u, i, weight, bias, state_len):
    """bias + sum_j weight[:, j] * u_{i - (width - 1) + j} for token i of a sequence."""
    width = weight.shape[1]
    total = np.zeros_like(weight[:, 0]) if bias is None else np.asarray(bias, weight.dtype)
    for j in range(width):
        total = total + weight[:, j] * u[state_len + i - (width - 1) + j]
    return total
