"""The scan of Mamba-2 in plain torch: the chunked algorithm, in batched matmuls.

Letters: R rows, K chunks of a row, Q tokens of a chunk, G groups, M heads of a group, H = G M heads, P headdim,
N dstate.
A chunk's own tokens meet in a Q x Q matrix; everything before them comes in through the state at its start.

Decays are exp of differences of a cumulative sum of dt' A. Those sums reach thousands where the differences that matter
are below one, so sum and difference are float64 and only exp is float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import compute_dtype

# Added to dt' A where seq_idx begins a new sequence: exp of it is 0, so nothing crosses, forward or backward.
_RESET = -1000.0


class Gather(NamedTuple):
    token: Tensor  # (K*Q,) token at each place
    empty: Tensor  # (K*Q,) places without a token
    place: Tensor  # (tokens,) place of each token
    seq: Tensor  # (K,) sequence of each chunk
    restart: Tensor  # (K,) whether the chunk is its sequence's first


class Chunks(NamedTuple):
    """Where tokens lie in chunks. Chunks are cut at multiples of Q, counted from a sequence's offset.

    Dense rows without offsets are padded and viewed; all other tokens are gathered into one row of chunks.
    """

    Q: int
    K: int
    packed: bool
    lengths: Tensor  # (nseq,) tokens
    offsets: Tensor  # (nseq,) position of the first token
    first: Tensor  # (nseq,) number of the first chunk; rows of K chunks are counted through
    counts: Tensor  # (nseq,) number of chunks
    gather: Gather | None


class Inputs(NamedTuple):
    """Chunked operands, in compute precision unless noted."""

    x: Tensor  # (R, K, Q, H, P), as given
    dt: Tensor  # (R, K, Q, H), dt' after bias, softplus, clamp; 0 where there is no token
    cum: Tensor  # (R, K, Q, H) float64, cumulative dt' A of the chunk
    B: Tensor  # (R*K*G, Q, N)
    C: Tensor  # (R*K*G, Q, N)


def chunk_of(headdim: int, dstate: int, state_interval: int) -> int:
    """Tokens of a chunk: work grows with Q, states kept with 1/Q; they balance where Q^2 is about P N."""
    size = 32 if headdim * dstate <= 2048 else 64
    return min(size, state_interval & -state_interval) if state_interval else size


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_offsets: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    interval_slots: Tensor | None,
    y: Tensor,
    final_states: Tensor | None,
    interval_states: Tensor | None,
    ssm_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_interval: int,
    null_slot: int,
    batch_invariant: bool,
) -> None:
    """Fill y and the states that are given. Always batch invariant: chunks do not know their neighbours."""
    with torch.autocast(x.device.type, enabled=False):
        chunks = cut(x, B.shape[3], cu_seqlens, seq_offsets, state_interval)
        start = initial_states if ssm_state is None else _read(ssm_state, read_slots, null_slot)
        states = (chunks.lengths.shape[0], *x.shape[2:], B.shape[3])
        start = x.new_zeros(states, dtype=compute_dtype(x)) if start is None else start.to(compute_dtype(x))
        ends = start.new_empty(0, *states[1:])
        if x.numel():
            steps = step_sizes(dt, dt_bias, seq_idx, dt_softplus, dt_min, dt_max, compute_dtype(x))
            inputs = chunk_inputs(chunks, x, steps, A, B, C, seq_idx)
            starts, ends = pass_states(chunks, inputs, start)
            direct = chunk_view(chunks, y) if y.dtype == compute_dtype(x) else None
            result = outputs(inputs, starts, direct)
            finish(y if direct is not None else from_chunks(chunks, result, *x.shape[:2]), x, D, z, seq_idx, y)
        if final_states is not None:
            final_states.copy_(_final(chunks, start, ends))
        if interval_states is not None:
            chunk, kept = interval_ends(chunks, state_interval, x.shape[1], interval_states.shape[:-3])
            interval_states.copy_(_take(ends, chunk, kept))
        if ssm_state is not None:
            if write_slots is not None:
                _write(ssm_state, write_slots, _final(chunks, start, ends), write_slots != null_slot)
            if interval_slots is not None:
                j = torch.arange(interval_slots.shape[1], device=x.device)
                chunk, kept = _interval_chunk(chunks, state_interval, slice(None), j)
                _write(ssm_state, interval_slots, _take(ends, chunk, kept), kept & (interval_slots != null_slot))


def cut(x: Tensor, dstate: int, cu_seqlens: Tensor | None, seq_offsets: Tensor | None, state_interval: int) -> Chunks:
    """Divide the tokens into chunks, without asking a GPU for a number."""
    batch, seqlen = x.shape[:2]
    device, total = x.device, batch * seqlen
    Q = chunk_of(x.shape[3], dstate, state_interval)
    if cu_seqlens is None and seq_offsets is None:
        K = -(-seqlen // Q)
        rows = torch.arange(batch, device=device)
        return Chunks(Q, K, False, torch.full_like(rows, seqlen), rows * 0, rows * K, torch.full_like(rows, K), None)
    bounds = (
        torch.arange(batch + 1, device=device) * seqlen
        if cu_seqlens is None
        else cu_seqlens.long().clamp(0, total).cummax(0).values
    )
    lengths = bounds.diff()
    offsets = torch.zeros_like(lengths) if seq_offsets is None else seq_offsets.long()
    head = offsets % Q  # tokens of the first chunk that earlier calls have read
    counts = torch.where(lengths > 0, -(-(head + lengths) // Q), 0)
    last = counts.cumsum(0)
    first = last - counts
    nseq = len(lengths)
    K = total // Q + 2 * nseq if device.type != "cpu" else int(counts.sum())
    if total == 0:
        return Chunks(Q, 0, cu_seqlens is not None, lengths, offsets, first, counts, None)

    chunk = torch.arange(K, device=device)
    seq = torch.searchsorted(last, chunk, right=True).clamp(max=nseq - 1)
    k = chunk - first[seq]
    index = k[:, None] * Q - head[seq, None] + torch.arange(Q, device=device)  # (K, Q), token of the sequence
    empty = (chunk >= last[-1])[:, None] | (index < 0) | (index >= lengths[seq, None])
    token = (bounds[seq, None] + index).clamp(0, total - 1)
    tokens = torch.arange(total, device=device)
    of = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True).clamp(max=nseq - 1)
    place = (first[of] * Q + head[of] + tokens - bounds[of]).clamp(0, K * Q - 1)
    gather = Gather(token.flatten(), empty.flatten(), place, seq, k == 0)
    return Chunks(Q, K, cu_seqlens is not None, lengths, offsets, first, counts, gather)


def into_chunks(chunks: Chunks, t: Tensor) -> Tensor:
    """(batch, seqlen, ...) as (R, K, Q, ...), zeros where there is no token; a view where it can be."""
    if chunks.gather is None:
        missing = chunks.K * chunks.Q - t.shape[1]
        padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
        return padded.unflatten(1, (chunks.K, chunks.Q))
    places = t.flatten(0, 1).index_select(0, chunks.gather.token)
    places.masked_fill_(chunks.gather.empty.view(-1, *(1,) * (places.dim() - 1)), 0)
    return places.view(1, chunks.K, chunks.Q, *t.shape[2:])


def from_chunks(chunks: Chunks, t: Tensor, batch: int, seqlen: int) -> Tensor:
    """(R, K, Q, ...) as (batch, seqlen, ...)."""
    if chunks.gather is None:
        return t.flatten(1, 2)[:, :seqlen]
    return t.flatten(0, 2).index_select(0, chunks.gather.place).unflatten(0, (batch, seqlen))


def chunk_view(chunks: Chunks, t: Tensor) -> Tensor | None:
    """(batch, seqlen, ...) as a view (R, K, Q, ...), to be written; None where there is none."""
    if chunks.gather is not None or t.shape[1] != chunks.K * chunks.Q:
        return None
    return t.unflatten(1, (chunks.K, chunks.Q))


def write_tokens(chunks: Chunks, t: Tensor, result: Tensor) -> None:
    """(R, K, Q, ...) into result, (batch, seqlen, ...)."""
    view = chunk_view(chunks, result)
    if view is not None:
        view.copy_(t)
    else:
        result.copy_(from_chunks(chunks, t, *result.shape[:2]))


def unclamped_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dt + dt_bias, and dt' before the clamp."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    # log1p(exp(dt)); from 40 on it equals dt in float64 too
    return dt, F.softplus(dt, threshold=40) if dt_softplus else dt


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    dtype: torch.dtype,
) -> Tensor:
    """dt', 0 at padding."""
    steps = unclamped_steps(dt, dt_bias, dt_softplus, dtype)[1].clamp(dt_min, dt_max)
    return steps if seq_idx is None else steps.masked_fill((seq_idx < 0)[..., None], 0)


def chunk_inputs(
    chunks: Chunks, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None
) -> Inputs:
    """Bring all operands into chunks; `dt` is dt'."""
    dtype = dt.dtype
    if seq_idx is not None:  # whatever lies in padding, NaN too, stays there
        padding = (seq_idx < 0)[..., None, None]
        x, B, C = (t.masked_fill(padding, 0) for t in (x, B, C))
    dt = into_chunks(chunks, dt)
    log_decay = dt.double() * A.double()
    if seq_idx is not None:
        log_decay = log_decay + _RESET * into_chunks(chunks, _begins(seq_idx))[..., None]
    return Inputs(
        into_chunks(chunks, x), dt, log_decay.cumsum(2), *(_matrices(into_chunks(chunks, t), dtype) for t in (B, C))
    )


def _begins(seq_idx: Tensor) -> Tensor:
    """1.0 at tokens whose number differs from that of the last token before them that is no padding."""
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    latest = torch.where(seq_idx >= 0, position, -1).cummax(1).values  # newest token that is no padding
    before = F.pad(latest, (1, -1), value=-1)
    number = seq_idx.gather(1, before.clamp(min=0))
    return ((before >= 0) & (seq_idx >= 0) & (seq_idx != number)).double()


def _matrices(t: Tensor, dtype: torch.dtype) -> Tensor:
    """B or C, (R, K, Q, G, N), as one matrix (Q, N) for each chunk and group."""
    return t.transpose(2, 3).to(dtype).reshape(-1, t.shape[2], t.shape[4])


def head_major(t: Tensor, scale: Tensor | None) -> Tensor:
    """t (R, K, Q, H, P) times scale (R, K, Q, H), as matrices (R*K*H, Q, P)."""
    R, K, Q, H, P = t.shape
    t = t.transpose(2, 3)
    if scale is None:
        return t.reshape(-1, Q, P)
    result = scale.new_empty(R, K, H, Q, P)
    torch.mul(t, scale.transpose(2, 3)[..., None], out=result)
    return result.view(-1, Q, P)


def group_major(t: Tensor, scale: Tensor, ngroups: int) -> Tensor:
    """t (R, K, Q, H, P) times scale (R, K, Q, H), as matrices (R*K*G, Q, M*P): B and C are shared in a group."""
    R, K, Q, H, P = t.shape
    result = scale.new_empty(R, K, ngroups, Q, H // ngroups, P)
    torch.mul(_by_group(t, ngroups), _by_group(scale[..., None], ngroups), out=result)
    return result.view(-1, Q, H // ngroups * P)


def _by_group(t: Tensor, ngroups: int) -> Tensor:
    """(R, K, Q, H, P) as (R, K, G, Q, M, P), a view."""
    return t.unflatten(3, (ngroups, -1)).transpose(2, 3)


def from_group_major(t: Tensor, shape: torch.Size) -> Tensor:
    """(R*K*G, Q, M*P) as a view (R, K, Q, G, M, P); `shape` is (R, K, Q, H, P)."""
    R, K, Q, H, P = shape
    ngroups = t.shape[0] // (R * K)
    return t.view(R, K, ngroups, Q, H // ngroups, P).transpose(2, 3)


def from_head_major(t: Tensor, shape: torch.Size, ngroups: int) -> Tensor:
    """(R*K*H, Q, P) as a view (R, K, Q, G, M, P)."""
    R, K, Q, H, P = shape
    return t.view(R, K, ngroups, H // ngroups, Q, P).permute(0, 1, 4, 2, 3, 5)


def ngroups_of(inputs: Inputs) -> int:
    R, K = inputs.x.shape[:2]
    return inputs.B.shape[0] // (R * K)


def decays(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """From the chunk's start to each token, from each token to the chunk's end (R, K, Q, H), across it (R, K, H)."""
    dtype, cum = inputs.dt.dtype, inputs.cum
    last = cum[:, :, -1:]
    return cum.to(dtype).exp(), (last - cum).to(dtype).exp(), last[:, :, 0].to(dtype).exp()


def decay_matrix(inputs: Inputs) -> Tensor:
    """exp of the decay from token j to token i, 0 for i < j: (R*K*G, M, Q, Q)."""
    cum = inputs.cum.transpose(2, 3).contiguous()
    difference = (cum[..., :, None] - cum[..., None, :]).to(inputs.dt.dtype)
    return difference.exp_().tril_().view(inputs.B.shape[0], -1, *difference.shape[3:])


def pass_states(chunks: Chunks, inputs: Inputs, start: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start and at the end of each chunk, both (R*K, H, P, N); `start` (nseq, H, P, N)."""
    (R, K), (H, P, N) = inputs.x.shape[:2], start.shape[1:]
    _, to_end, across = decays(inputs)
    weighted = group_major(inputs.x, inputs.dt * to_end, ngroups_of(inputs))
    ends = torch.bmm(weighted.mT, inputs.B).view(R, K, H, P, N)  # so far what each chunk adds
    across = across[..., None, None]
    gather = chunks.gather
    if gather is None:
        starts = torch.empty_like(ends)
        starts[:, 0] = start
    else:
        starts = start[gather.seq][None]  # right where a sequence begins, replaced elsewhere
    for k in range(K):
        if k > 0 and gather is None:
            starts[:, k] = ends[:, k - 1]
        elif k > 0 and gather is not None:
            starts[:, k] = torch.where(gather.restart[k], starts[:, k], ends[:, k - 1])
        ends[:, k].addcmul_(starts[:, k], across[:, k])
    return starts.view(R * K, H, P, N), ends.view(R * K, H, P, N)


def outputs(inputs: Inputs, starts: Tensor, y: Tensor | None = None) -> Tensor:
    """y before skip and gate, (R, K, Q, H, P): what the chunk's own tokens give, and what its first state gives."""
    shape, ngroups, Q = inputs.x.shape, ngroups_of(inputs), inputs.x.shape[2]
    own = decay_matrix(inputs).mul_(torch.bmm(inputs.C, inputs.B.mT)[:, None])
    within = from_head_major(torch.bmm(own.view(-1, Q, Q), head_major(inputs.x, inputs.dt)), shape, ngroups)
    before = from_group_major(read_state(inputs.C, starts), shape)
    from_start = decays(inputs)[0].unflatten(3, (ngroups, -1))[..., None]
    y = within.new_empty(shape) if y is None else y
    torch.addcmul(within, before, from_start, out=y.unflatten(3, (ngroups, -1)))
    return y


def read_state(C: Tensor, starts: Tensor) -> Tensor:
    """C_t times the state at the chunk's start, (R*K*G, Q, M*P), not decayed yet."""
    return torch.bmm(C, starts.view(C.shape[0], -1, starts.shape[3]).mT)


def finish(result: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, seq_idx: Tensor | None, y: Tensor) -> None:
    """Skip, gate, padding, all in place in result, which may be y; then the one cast."""
    add_skip_(result, x, D)
    if z is not None:
        result.mul_(F.silu(z.to(result.dtype)))
    if seq_idx is not None:
        result.masked_fill_((seq_idx < 0)[..., None, None], 0)
    if result is not y:
        y.copy_(result)


def add_skip_(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    if D is None:
        return y
    return y.addcmul_(x.to(y.dtype), (D[:, None] if D.dim() == 1 else D).to(y.dtype))


def _final(chunks: Chunks, start: Tensor, ends: Tensor) -> Tensor:
    """The state after each sequence's last token; of an empty one the state it started from."""
    if not len(ends):
        return start
    last = (chunks.first + chunks.counts - 1).clamp(min=0)
    return torch.where((chunks.counts > 0)[:, None, None, None], ends[last], start)


def interval_ends(chunks: Chunks, interval: int, seqlen: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """For each place in interval_states, `shape`: the chunk whose last state goes there, and whether there is one."""
    device = chunks.lengths.device
    if not chunks.packed:
        return _interval_chunk(chunks, interval, slice(None), torch.arange(shape[1], device=device))
    place = torch.arange(shape[0], device=device)
    if not len(chunks.lengths):
        return place, place < 0
    counts = interval_counts(chunks, interval)
    last = counts.cumsum(0)
    seq = torch.searchsorted(last, place, right=True).clamp(max=len(last) - 1)
    chunk, kept = _interval_chunk(chunks, interval, seq, place - (last - counts)[seq])
    return chunk, kept


def interval_counts(chunks: Chunks, interval: int) -> Tensor:
    """(nseq,) number of positions p in each sequence with (p + 1) % interval == 0."""
    return (chunks.offsets + chunks.lengths) // interval - chunks.offsets // interval


def _interval_chunk(chunks: Chunks, interval: int, seq: Tensor | slice, j: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the chunk that ends at the j-th kept position: of every sequence by every j, or of pairs."""
    first, offsets, lengths = (t[seq] for t in (chunks.first, chunks.offsets, chunks.lengths))
    if isinstance(seq, slice):
        first, offsets, lengths = first[:, None], offsets[:, None], lengths[:, None]
    end = (offsets // interval + 1 + j) * interval  # position after the kept one
    return first + end // chunks.Q - offsets // chunks.Q - 1, end - offsets <= lengths


def _take(states: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """states[index], zeros where it is not valid."""
    if not len(states):
        return states.new_zeros(*index.shape, *states.shape[1:])
    taken = states[index.clamp(0, len(states) - 1)]
    return taken.masked_fill_(~valid[..., None, None, None], 0)


def _read(pool: Tensor, slots: Tensor | None, null_slot: int) -> Tensor | None:
    if slots is None:
        return None
    return _take(pool, slots.long(), (slots != null_slot) & (slots >= 0) & (slots < len(pool)))


def _write(pool: Tensor, slots: Tensor, states: Tensor, valid: Tensor) -> None:
    valid = valid & (slots >= 0) & (slots < len(pool))
    pool[slots[valid].long()] = states[valid].to(pool.dtype)  # a mask as an index makes the host wait for a GPU
