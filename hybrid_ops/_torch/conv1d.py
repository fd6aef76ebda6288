"""Causal depthwise convolution in plain torch, forward and backward; float32 arithmetic (float64 for float64 inputs).

All forms (dense, cu_seqlens, seq_idx) become one: a matrix whose rows are the inputs, the tokens of a sequence side by
side and its history right before them. There a window is `width` neighbouring rows, a final state is the last rows of
its sequence (reaching into the history by itself when the sequence is short), and nothing needs a mask but the
sequences inside a `seq_idx` row, which have no history of their own. No value is read on the host.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import compute_dtype, silu_grad


class Order(NamedTuple):
    """A `seq_idx` row sorted into its tokens, in order, and then its padding; `rank` is a place in this order."""

    token: Tensor  # (batch, seqlen) int32: the token at a rank
    start: Tensor  # (batch, seqlen) int32: the rank at which the sequence of this rank starts
    num_tokens: Tensor  # (batch,) int32: tokens that are not padding
    rank: Tensor  # (batch, seqlen) int64: the rank of a token


class Rows(NamedTuple):
    """Where the vectors of a problem lie in the matrix."""

    total: int
    token: Tensor  # (batch * seqlen,) int64
    history: Tensor  # (B, state_len) int64, oldest first
    final: Tensor  # (B, state_len) int64, oldest first
    live: Tensor | None = None  # (batch * seqlen, 1) bool: not padding
    live_final: Tensor | None = None  # (B, state_len, 1) bool: belongs to the last sequence of its row
    oldest: Tensor | None = None  # (total,) int64: the first row that the window of this row may see


def order_of(seq_idx: Tensor) -> Order:
    batch, seqlen = seq_idx.shape
    live = seq_idx >= 0
    place = torch.arange(seqlen, device=seq_idx.device)
    seen = live.cumsum(1)  # tokens up to and including this one
    num_tokens = live.sum(1)
    rank = torch.where(live, seen - 1, num_tokens[:, None] + place - seen)
    token = torch.empty_like(rank).scatter_(1, rank, place.expand(batch, seqlen))
    index = seq_idx.gather(1, token)
    first = torch.ones_like(live)
    first[:, 1:] = index[:, 1:] != index[:, :-1]
    start = torch.where(first, place, 0).cummax(1).values if seqlen else token
    return Order(token.int(), start.int(), num_tokens.int(), rank)


def rows_of(
    batch: int, seqlen: int, state_len: int, device: torch.device, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> Rows:
    token = torch.arange(seqlen, device=device)
    column = torch.arange(state_len, device=device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long().clamp(0, seqlen).cummax(0).values  # what a device cannot check cannot hurt either
        nseq = bounds.numel() - 1
        sequence = (torch.searchsorted(bounds, token, right=True) - 1).clamp(max=nseq - 1)
        state = torch.arange(nseq, device=device) * state_len
        return Rows(
            total=seqlen + nseq * state_len,
            token=token + (sequence + 1) * state_len,
            history=(bounds[:-1] + state)[:, None] + column,
            final=(bounds[1:] + state)[:, None] + column,
            live=((token >= bounds[0]) & (token < bounds[-1]))[:, None],
        )
    size = state_len + seqlen
    base = torch.arange(batch, device=device)[:, None] * size
    history = base + column
    if seq_idx is None:
        return Rows(batch * size, (base + state_len + token).flatten(), history, base + seqlen + column)
    order = order_of(seq_idx)
    num_tokens = order.num_tokens.long()[:, None]
    start = torch.where(order.start == 0, 0, order.start + state_len)  # the first sequence sees the history
    last = start.gather(1, (num_tokens - 1).clamp(min=0)) if seqlen else torch.zeros_like(num_tokens)
    return Rows(
        total=batch * size,
        token=(base + state_len + order.rank).flatten(),
        history=history,
        final=base + num_tokens + column,
        live=(seq_idx >= 0).flatten()[:, None],
        live_final=(num_tokens + column >= last)[:, :, None],
        oldest=F.pad(base + start, (state_len, 0)).flatten(),
    )


def conv1d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, rows: Rows, silu: bool
) -> tuple[Tensor, Tensor]:
    """y (batch, seqlen, dim) and the final states (B, dim, state_len), both in compute precision."""
    dtype = compute_dtype(x)
    matrix = _matrix(x, history, rows, weight.shape[1], dtype)
    y = _window_sums(matrix, weight.to(dtype), bias, rows)[rows.token]
    y = _zero_unless(rows.live, F.silu(y) if silu else y).view(x.shape)
    final = _zero_unless(rows.live_final, matrix[weight.shape[1] - 1 :][rows.final])
    return y, final.transpose(1, 2)


def conv1d_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    rows: Rows,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias, dhistory) in compute precision.

    With s the window sums: ds = dy * silu'(s), du_p = sum_j w_j ds_{p + (width - 1) - j}, dw_j = sum_t ds_t u_{t - ..}.
    """
    dtype, width, dim = compute_dtype(x), weight.shape[1], x.shape[2]
    w = weight.to(dtype)
    matrix = _matrix(x, history, rows, width, dtype)
    dsum = _zero_unless(rows.live, dy.to(dtype).reshape(-1, dim))
    if silu:
        sums = _window_sums(matrix, w, bias, rows)[rows.token]
        dsum = _zero_unless(rows.live, dsum * silu_grad(sums))
    dsums = matrix.new_zeros(rows.total, dim).index_copy_(0, rows.token, dsum)
    dmatrix = torch.zeros_like(matrix)
    dweight = []
    for j in range(width):
        seen = _zero_unless(_seen(rows, width - 1 - j), dsums)
        dmatrix[j : j + rows.total] += seen * w[:, j]
        dweight.append((seen * matrix[j : j + rows.total]).sum(0))
    du = dmatrix[width - 1 :]
    if dfinal is not None:
        dfinal_rows = _zero_unless(rows.live_final, dfinal.to(dtype).transpose(1, 2))
        du = du.index_add(0, rows.final.flatten(), dfinal_rows.reshape(-1, dim))
    dx = _zero_unless(rows.live, du[rows.token]).view(x.shape)
    return dx, torch.stack(dweight, 1), dsum.sum(0), du[rows.history].transpose(1, 2)


def read_slots(pool: Tensor, slots: Tensor, null_slot: int) -> Tensor:
    """States (B, dim, state_len) of a pool; zeros for null and out-of-range slots."""
    if pool.shape[0] == 0:
        return pool.new_zeros(slots.shape[0], *pool.shape[1:])
    valid = _valid(pool, slots, null_slot)
    return torch.where(valid[:, None, None], pool[torch.where(valid, slots, 0)], 0)


def write_slots(pool: Tensor, slots: Tensor, null_slot: int, states: Tensor) -> None:
    """Write states (B, dim, state_len) to slots of a pool, except to null and out-of-range ones."""
    if slots.numel() == 0 or pool.shape[0] == 0:
        return
    # Dropping the invalid rows would need their number on the host: they repeat the first valid row's write instead,
    # or, where there is none, write back what slot 0 holds.
    valid = _valid(pool, slots, null_slot)
    first = valid.int().argmax(0, keepdim=True)  # a scalar index would be read on the host
    target = torch.where(valid, slots, slots[first])
    target = torch.where(valid.any(), target, 0).long()
    states = torch.where(valid[:, None, None], states.to(pool.dtype), states[first].to(pool.dtype))
    pool.index_copy_(0, target, torch.where(valid.any(), states, pool[:1]))


def _valid(pool: Tensor, slots: Tensor, null_slot: int) -> Tensor:
    return (slots != null_slot) & (slots >= 0) & (slots < pool.shape[0])


def _matrix(x: Tensor, history: Tensor | None, rows: Rows, width: int, dtype: torch.dtype) -> Tensor:
    """(width - 1 + rows.total, dim): row p of the numbering in `rows` is row width - 1 + p, so every window exists."""
    dim = x.shape[2]
    matrix = x.new_zeros(width - 1 + rows.total, dim, dtype=dtype)
    body = matrix[width - 1 :]
    body.index_copy_(0, rows.token, _zero_unless(rows.live, x.to(dtype).reshape(-1, dim)))
    if history is not None:
        body.index_copy_(0, rows.history.flatten(), history.to(dtype).transpose(1, 2).reshape(-1, dim))
    return matrix


def _window_sums(matrix: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """(rows.total, dim): bias + sum_j weight[:, j] * the row width - 1 - j before."""
    width = weight.shape[1]
    sums = matrix.new_zeros(rows.total, matrix.shape[1])
    for j in range(width):
        sums.addcmul_(_zero_unless(_seen(rows, width - 1 - j), matrix[j : j + rows.total]), weight[:, j])
    return sums if bias is None else sums.add_(bias.to(matrix.dtype))


def _seen(rows: Rows, distance: int) -> Tensor | None:
    """(total, 1): whether a row's window may see the row `distance` before; None where it always may."""
    if rows.oldest is None or distance == 0:
        return None
    return (torch.arange(rows.total, device=rows.oldest.device) - distance >= rows.oldest)[:, None]


def _zero_unless(condition: Tensor | None, values: Tensor) -> Tensor:
    """Zero, not a product with zero: what is hidden may be NaN."""
    return values if condition is None else torch.where(condition, values, 0)
