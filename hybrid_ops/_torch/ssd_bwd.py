"""The adjoint of the chunked scan in `ssd.py`, by hand; the same letters.

Everything but the inputs is computed again. The gradient of dt' A is a sum over all pairs (later token, earlier token)
that its decay lies between; it is taken as such a sum, of terms of their own size, never as a difference of two long
cumulative sums, whose rounding would exceed it where decays are steep.

Gradients go backward in time, and far terms are the small ones; so whatever belongs to the reading token i of a chunk
(dy, C and their products, suffix `_rev`) lies in reversed order: sums then add small terms before large ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import silu_grad
from .ssd import (
    Chunks,
    Inputs,
    add_skip_,
    chunk_inputs,
    chunk_view,
    compute_dtype,
    cut,
    decays,
    from_chunks,
    from_group_major,
    from_head_major,
    group_major,
    head_major,
    interval_counts,
    into_chunks,
    ngroups_of,
    outputs,
    pass_states,
    read_state,
    step_sizes,
    unclamped_steps,
    write_tokens,
)


def ssd_chunk_scan_bwd(
    dy: Tensor,
    dfinal_states: Tensor | None,
    dinterval_states: Tensor | None,
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
    dx: Tensor,
    ddt: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddt_bias: Tensor | None,
    dinitial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_interval: int,
) -> None:
    """Fill the gradients. The same bits in every run: no sum is left to the order of threads."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x)
        chunks = cut(x, B.shape[3], cu_seqlens, seq_offsets, state_interval)
        nseq, state = chunks.lengths.shape[0], (*x.shape[2:], B.shape[3])
        dfinal = x.new_zeros(nseq, *state, dtype=dtype) if dfinal_states is None else dfinal_states.to(dtype)
        if not x.numel():
            for gradient in (dx, ddt, dA, dB, dC, dD, dz, ddt_bias):
                if gradient is not None:
                    gradient.zero_()
            if dinitial_states is not None:
                dinitial_states.copy_(dfinal)
            return
        start = x.new_zeros(nseq, *state, dtype=dtype) if initial_states is None else initial_states.to(dtype)
        steps = step_sizes(dt, dt_bias, seq_idx, dt_softplus, dt_min, dt_max, dtype)
        inputs = chunk_inputs(chunks, x, steps, A, B, C, seq_idx)
        starts, _ = pass_states(chunks, inputs, start)

        dy = dy.to(dtype)
        if seq_idx is not None:
            padding = (seq_idx < 0)[..., None, None]
            dy, x = dy.masked_fill(padding, 0), x.masked_fill(padding, 0)
            z = None if z is None else z.masked_fill(padding, 0)
        dungated = dy
        if z is not None and dz is not None:
            gate = z.to(dtype)
            ungated = add_skip_(from_chunks(chunks, outputs(inputs, starts), *x.shape[:2]), x, D)
            dz.copy_(ungated.mul_(dy).mul_(silu_grad(gate)))
            dungated = dy * F.silu(gate)
        if D is not None and dD is not None:
            product = (dungated * x).sum((0, 1))
            dD.copy_(product if D.dim() == 2 else product.sum(1))

        # the chunk's own tokens
        dy_chunks = into_chunks(chunks, dungated)
        dy_rev, C_rev = dy_chunks.flip(2), inputs.C.flip(1)
        dxd_within, dlog_within, dB_groups, dC_rev = _within(inputs, dy_rev, C_rev)

        # the state at the chunk's start, read by y
        ngroups = ngroups_of(inputs)
        R, K, Q, H, P = inputs.x.shape
        split = (R, K, ngroups, Q, H // ngroups, P)
        from_start, to_end, across = decays(inputs)
        dy_decayed = group_major(dy_rev, from_start.flip(2), ngroups)
        _add_products(dC_rev, dy_decayed, starts.view(R * K * ngroups, -1, state[2]))
        dstarts = torch.bmm(dy_decayed.mT, C_rev).view(R, K, *state)
        dlog_read_rev = _by_token((read_state(C_rev, starts).mul_(dy_decayed)).view(split).sum(-1))

        # the state at the chunk's end, of which later chunks make use
        dends = _pass_back(chunks, dfinal, dinterval_states, dstarts, across, state_interval)
        if dinitial_states is not None:
            first = chunks.first.clamp(max=R * K - 1)
            early = torch.addcmul(
                dstarts.flatten(0, 1)[first],
                dends.flatten(0, 1)[first],
                across.flatten(0, 1)[first][..., None, None],
            )
            dinitial_states.copy_(torch.where((chunks.counts > 0)[:, None, None, None], early, dfinal))
        dlog_across = (dends * starts.view_as(dends)).sum((-2, -1)).mul_(across)
        dends = dends.view(R * K * ngroups, -1, state[2])
        x_decayed = group_major(inputs.x, inputs.dt * to_end, ngroups)
        _add_products(dB_groups, x_decayed, dends)
        dx_write = torch.bmm(inputs.B, dends.mT)
        dlog_write = _by_token((x_decayed.mul_(dx_write)).view(split).sum(-1))

        direct = chunk_view(chunks, dx) if dx.dtype == dtype else None
        dxd = dx_write.new_empty(inputs.x.shape) if direct is None else direct  # gradient of dt' x
        torch.addcmul(
            from_head_major(dxd_within, inputs.x.shape, ngroups),
            from_group_major(dx_write, inputs.x.shape),
            to_end.unflatten(3, (ngroups, -1))[..., None],
            out=dxd.unflatten(3, (ngroups, -1)),
        )
        # a token's decay carries what later tokens read of the first state, and what earlier ones write to the last
        dlog = dlog_within + dlog_across[:, :, None]
        dlog += dlog_read_rev.cumsum(2).flip(2)
        dlog[:, :, 1:] += dlog_write.cumsum(2)[:, :, :-1]
        dA.copy_((dlog.double() * inputs.dt).sum((0, 1, 2)))
        dsteps = torch.addcmul((dxd * inputs.x).sum(-1), dlog, A.to(dtype))
        _through_steps(
            from_chunks(chunks, dsteps, *x.shape[:2]), dt, dt_bias, seq_idx, dt_softplus, dt_min, dt_max, ddt, ddt_bias
        )

        dxd.mul_(inputs.dt[..., None])
        if D is not None:
            dxd.addcmul_(dy_chunks, (D[:, None] if D.dim() == 1 else D).to(dtype))
        if direct is None:
            write_tokens(chunks, dxd, dx)
        for groups, gradient in ((dB_groups, dB), (dC_rev.flip(1), dC)):
            write_tokens(chunks, groups.view(R, K, ngroups, Q, -1).transpose(2, 3), gradient)


def _within(inputs: Inputs, dy_rev: Tensor, C_rev: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of y_i = sum_j decay_ij (C_i B_j) dt'_j x_j in a chunk: gradients of dt' x (R*K*H, Q, P), dt' A, B and C_rev."""
    R, K, Q, H, _ = inputs.x.shape
    ones = torch.ones(Q, Q, dtype=torch.bool, device=C_rev.device)
    future = ones.triu(1).flip(0)  # j after i, which is reversed
    cum = inputs.cum.transpose(2, 3).contiguous()
    decay = (cum.flip(3)[..., :, None] - cum[..., None, :]).to(C_rev.dtype)
    decay = decay.masked_fill_(future, -torch.inf).exp_().view(C_rev.shape[0], -1, Q, Q)  # (R*K*G, M, Q, Q)
    products = torch.bmm(C_rev, inputs.B.mT)[:, None]
    dy_heads, x_heads = head_major(dy_rev, None), head_major(inputs.x, inputs.dt)
    terms = torch.bmm(dy_heads, x_heads.mT).view_as(decay).mul_(decay)
    dproducts = terms.sum(1)
    dC_rev, dB = torch.bmm(dproducts, inputs.B), torch.bmm(dproducts.mT, C_rev)
    dxd = torch.bmm(decay.mul_(products).view(-1, Q, Q).mT, dy_heads)
    # dt' A of token t lies in all decays from j < t to i >= t
    terms.mul_(products)
    upto = torch.mm(terms.view(-1, Q), ones.triu(1).to(terms.dtype)).view(R, K, H, Q, Q)
    dlog = upto.masked_fill_(future, 0).sum(3)
    return dxd, dlog.transpose(2, 3), dB, dC_rev


def _add_products(result: Tensor, left: Tensor, right: Tensor) -> None:
    """result += left @ right, over all features of all heads of a group.

    The error of a float32 sum grows with its length and with what it starts from, so the sum is taken in pieces, and
    not by baddbmm, which would start it from the result.
    """
    for piece in range(0, left.shape[2], 64):
        result += torch.bmm(left[:, :, piece : piece + 64], right[:, piece : piece + 64])


def _by_token(t: Tensor) -> Tensor:
    """(R, K, G, Q, M) as (R, K, Q, H)."""
    return t.transpose(2, 3).flatten(3)


def _pass_back(
    chunks: Chunks, dfinal: Tensor, dintervals: Tensor | None, dstarts: Tensor, across: Tensor, interval: int
) -> Tensor:
    """Gradients of the states at the ends of chunks, (R, K, H, P, N), from those at their starts and of results."""
    R, K = dstarts.shape[:2]
    dends = torch.zeros_like(dstarts)
    gather = chunks.gather
    if gather is None:
        dends[:, -1] = dfinal
    else:
        last = torch.arange(K, device=dfinal.device) == (chunks.first + chunks.counts - 1)[gather.seq]
        dends[0] = dfinal[gather.seq].masked_fill_(~last[:, None, None, None], 0)
    if dintervals is not None:
        place, kept = _interval_of_chunk(chunks, R * K, interval, dintervals)
        taken = dintervals.reshape(-1, *dstarts.shape[2:])[place].to(dends.dtype)
        dends += taken.masked_fill_(~kept[:, None, None, None], 0).view_as(dends)
    across = across[..., None, None]
    for k in range(K - 1, 0, -1):
        if gather is None:
            dends[:, k - 1].add_(dstarts[:, k]).addcmul_(dends[:, k], across[:, k])
        else:
            earlier = torch.addcmul(dstarts[:, k], dends[:, k], across[:, k])
            dends[:, k - 1] += earlier.masked_fill_(gather.restart[k], 0)
    return dends


def _interval_of_chunk(chunks: Chunks, count: int, interval: int, intervals: Tensor) -> tuple[Tensor, Tensor]:
    """For each chunk the place in interval_states of its last state, counted through, and whether it has one."""
    chunk = torch.arange(count, device=intervals.device)
    seq = chunk // chunks.K if chunks.gather is None else chunks.gather.seq
    k, offset = chunk - chunks.first[seq], chunks.offsets[seq]
    end = (offset // chunks.Q + k + 1) * chunks.Q
    kept = (k < chunks.counts[seq]) & (end % interval == 0) & (end - offset <= chunks.lengths[seq])
    counts = interval_counts(chunks, interval)
    base = (
        counts.cumsum(0) - counts
        if chunks.packed
        else torch.arange(len(counts), device=seq.device) * (intervals.shape[1])
    )
    place = base[seq] + end // interval - offset // interval - 1
    return place.clamp(0, intervals.shape[:-3].numel() - 1), kept


def _through_steps(
    dsteps: Tensor,
    dt: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    ddt: Tensor,
    ddt_bias: Tensor | None,
) -> None:
    """From the gradient of dt' to that of dt: none where it was clamped or padding."""
    biased, value = unclamped_steps(dt, dt_bias, dt_softplus, dsteps.dtype)
    blocked = (value < dt_min) | (value > dt_max)
    if seq_idx is not None:
        blocked |= (seq_idx < 0)[..., None]
    dsteps = dsteps.masked_fill(blocked, 0)
    if dt_softplus:
        dsteps = dsteps * torch.sigmoid(biased)
    ddt.copy_(dsteps)
    if ddt_bias is not None:
        ddt_bias.copy_(dsteps.sum((0, 1)))
