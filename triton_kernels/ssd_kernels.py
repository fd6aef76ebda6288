"""The three kernels of the chunked SSD scan; `ssd.py` launches them.

    K1 chunk_decay  dt' = clamp(softplus(dt + dt_bias)) and a = cumsum(dt' * A * log2 e) inside every chunk
    K2 state_walk   walks the chunks of a sequence with the float32 state in registers, leaving at each chunk's door the
                    state that enters it, in the dtype of x
    K3 chunk_scan   y = exp2(a) * C S + (C B^T * decay * dt') x + D x, gated by silu(z); C B^T once for several heads

Every sequence is cut into chunks of its own at absolute positions that are multiples of Q, so nothing depends on its
neighbours, and a cut of the sequence at such a position changes no bit. Dense rows are sequences of equal length.

Letters: Q tokens of a chunk, P headdim, N dstate, H heads, G groups. Chunks live in slots: row * slots_per_row + k for
dense input, cu_seqlens[s] // Q + 2 s + k for packed input, which is free of collisions without a prefix sum.
Exponents are differences of `a` in base 2, and b = a - log2(dt') brings dt' along: exp2(a_l - b_s) is the decay from s
to l times dt'_s. `a` and `b` grow with the chunk while their differences stay small, so where the input has more digits
than bfloat16 they are float64, and only the difference is rounded (for float32 input, the exponential).
"""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with 3e-7 of relative error also where exp(x) is small, where log(1 + exp(x)) has none left."""
    u = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + u
    return tl.where(x > 20.0, x, tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0))))


@triton.jit
def decay_of(exponent, dtype: tl.constexpr):
    """exp2 of a difference of `a` and `b`, as float32; `dtype` is that of x."""
    if dtype == tl.float32:
        return tl.exp2(exponent).to(tl.float32)
    else:
        return tl.exp2(exponent.to(tl.float32))


@triton.jit
def power_of_two(value):
    """The largest one that is not above a value > 0; 2^-100 for smaller ones."""
    value = tl.maximum(value, 7.888609052210118e-31)
    return (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def dot_over_states(
    a, b, a_ptr, a_mask, b_ptr, b_stride_n, b_mask, dstate: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):
    """a [M, N] @ b [N, P]; in float32 from where they lie in memory, 64 terms at a time, and then those sums: 256 terms
    one after the other lose too much. The bound on imprecise sums keeps `total` from becoming the accumulator.
    """
    if a.dtype == tl.float32 and BLOCK_N > 64:
        total = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
        for first in range(0, BLOCK_N, 64):
            n = first + tl.arange(0, 64)
            a_run = tl.load(a_ptr + n[None, :], a_mask & (n < dstate)[None, :], other=0.0)  # [M, 64]
            b_run = tl.load(b_ptr + n[:, None] * b_stride_n, b_mask & (n < dstate)[:, None], other=0.0)  # [64, P]
            total += tl.dot(a_run, b_run, input_precision=PRECISION, max_num_imprecise_acc=64)
        return total
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def sequence_bounds(s, cu_seqlens_ptr, seq_offsets_ptr, total, Q: tl.constexpr):
    """(first token, length, places of its first chunk that lie before it, first slot); `total` is a row's length."""
    lead = s * 0
    if seq_offsets_ptr is not None:
        lead = tl.load(seq_offsets_ptr + s) % Q
    if cu_seqlens_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s + 1), begin), total)
        return begin, end - begin, lead, begin // Q + 2 * s
    else:
        return s * 0, s * 0 + total, lead, s * (total // Q + 2)


@triton.jit
def chunk_bounds(slot, cu_seqlens_ptr, seq_offsets_ptr, total, nseq, Q: tl.constexpr):
    """(row, first place, first token, one past the last token) of the chunk in a slot; without tokens if it is empty.

    The first place lies before the first token where the sequence does not begin at a multiple of Q.
    """
    if cu_seqlens_ptr is not None:  # the last sequence whose first slot is not beyond this one
        low = slot * 0
        high = low + nseq
        while high - low > 1:
            middle = (low + high) // 2
            begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + middle), 0), total)
            if begin // Q + 2 * middle <= slot:
                low = middle
            else:
                high = middle
        s = low
        row = s * 0
    else:
        s = slot // (total // Q + 2)
        row = s
    begin, length, lead, first_slot = sequence_bounds(s, cu_seqlens_ptr, seq_offsets_ptr, total, Q)
    first = begin - lead + (slot - first_slot) * Q
    return row.to(tl.int64), first, tl.maximum(first, begin), tl.minimum(first + Q, begin + length)


# sizes that change from call to call are not specialised on: one compiled kernel for all of them
@triton.jit(do_not_specialize=["total", "nseq"])
def chunk_decay_kernel(
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    run_ptr,
    cu_seqlens_ptr,
    seq_offsets_ptr,
    ab_ptr,
    total,
    nheads,
    nseq,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    dt_bias_stride,
    dt_min,
    dt_max,
    DT_SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    head_blocks = tl.cdiv(nheads, BLOCK_H)
    slot = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    row, first, first_token, last = chunk_bounds(slot, cu_seqlens_ptr, seq_offsets_ptr, total, nseq, Q)

    i = tl.arange(0, Q)
    token = first + i
    inside = (token >= first_token) & (token < last)
    mask = inside[:, None] & (head < nheads)[None, :]
    offset = row * dt_stride_b + token.to(tl.int64)[:, None] * dt_stride_t + head[None, :] * dt_stride_h
    dt = tl.load(dt_ptr + offset, mask, other=0.0).to(tl.float32)  # [Q, heads]
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + head * dt_bias_stride, head < nheads, other=0.0).to(tl.float32)[None, :]
    if DT_SOFTPLUS:
        dt = softplus(dt)
    dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
    if run_ptr is not None:  # padding carries the complement of its run number; it changes no state
        run = tl.load(run_ptr + row * total + token, inside, other=-1)
        mask = mask & (run >= 0)[:, None]
    dt = tl.where(mask, dt, 0.0)
    A = tl.load(A_ptr + head, head < nheads, other=0.0).to(ab_ptr.dtype.element_ty) * 1.4426950408889634
    a = tl.cumsum(dt.to(ab_ptr.dtype.element_ty) * A[None, :], axis=0)
    out = (slot.to(tl.int64) * nheads + head[None, :]) * (2 * Q) + i[:, None]
    tl.store(ab_ptr + out, a, (head < nheads)[None, :])
    b = a - tl.log2(tl.maximum(dt, 1e-37).to(ab_ptr.dtype.element_ty))
    tl.store(ab_ptr + out + Q, tl.where(dt > 0.0, b, float("inf")), (head < nheads)[None, :])


@triton.jit(do_not_specialize=["total", "null_slot", "num_slots", "num_intervals"])
def state_walk_kernel(
    x_ptr,
    B_ptr,
    ab_ptr,
    run_ptr,
    cu_seqlens_ptr,
    seq_offsets_ptr,
    initial_ptr,
    final_ptr,
    interval_ptr,
    read_slots_ptr,
    write_slots_ptr,
    interval_slots_ptr,
    interval_base_ptr,
    entering_ptr,
    unit_ptr,
    total,
    null_slot,
    num_slots,
    num_intervals,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    B_stride_b,
    B_stride_t,
    B_stride_g,
    initial_stride,
    final_stride,
    interval_stride,
    nheads: tl.constexpr,
    heads_per_group: tl.constexpr,
    headdim: tl.constexpr,
    dstate: tl.constexpr,
    STATE_INTERVAL: tl.constexpr,
    EXACT_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n_tiles: tl.constexpr = tl.cdiv(dstate, BLOCK_N)
    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // n_tiles % nheads
    s = tl.program_id(0) // n_tiles // nheads
    p = tl.arange(0, BLOCK_P)
    i = tl.arange(0, Q)
    in_state = (n < dstate)[:, None] & (p < headdim)[None, :]
    place = head * headdim * dstate + p[None, :] * dstate + n[:, None]  # of a [P, N] state in its tensor
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    begin, length, lead, first_slot = sequence_bounds(s, cu_seqlens_ptr, seq_offsets_ptr, total, Q)
    row = s.to(tl.int64)
    if cu_seqlens_ptr is not None:
        row = row * 0
    token = begin - lead + i
    end = begin + length
    slot = first_slot.to(tl.int64) * nheads + head
    x_ptr += row * x_stride_b + head * x_stride_h + token.to(tl.int64)[:, None] * x_stride_t + p[None, :]
    B_ptr += row * B_stride_b + head // heads_per_group * B_stride_g
    B_ptr += token.to(tl.int64)[:, None] * B_stride_t + n[None, :]
    ab_ptr += slot * 2 * Q
    if unit_ptr is not None:
        unit_ptr += slot
    entering_ptr += slot * dstate * headdim + n[:, None] * headdim + p[None, :]

    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if initial_ptr is not None:
        source = s.to(tl.int64)
        readable = in_state
        if read_slots_ptr is not None:
            source = tl.load(read_slots_ptr + s).to(tl.int64)
            readable = in_state & (source != null_slot) & (source >= 0) & (source < num_slots)
        state = tl.load(initial_ptr + source * initial_stride + place, readable, other=0.0).to(tl.float32)

    run_in = s * 0
    for k in range(0, tl.cdiv(lead + length, Q)):
        if unit_ptr is not None:  # states have a wider range than float16: K3 gets them in units of their own
            unit = power_of_two(tl.max(tl.abs(state)))
            tl.store(unit_ptr, unit)
            tl.store(entering_ptr, (state / unit).to(dtype), in_state)
            unit_ptr += nheads
        else:
            tl.store(entering_ptr, state.to(dtype), in_state)
        inside = (token >= begin) & (token < end)
        a_last = tl.load(ab_ptr + Q - 1)
        keep = decay_of(a_last, dtype)
        if run_ptr is not None:  # only the last run of the chunk reaches its end; padding may hold anything
            run = tl.load(run_ptr + row * total + token, inside, other=-1)
            run_out = tl.load(run_ptr + row * total + tl.minimum(begin - lead + (k + 1) * Q, end) - 1)
            run_out = tl.where(run_out < 0, ~run_out, run_out)
            inside = inside & (run == run_out)
            keep = tl.where(run_in == run_out, keep, 0.0)
            run_in = run_out
        x = tl.load(x_ptr, inside[:, None] & (p < headdim)[None, :], other=0.0)  # [Q, P]
        B = tl.load(B_ptr, inside[:, None] & (n < dstate)[None, :], other=0.0).to(dtype)  # [Q, N]
        scale = decay_of(a_last - tl.load(ab_ptr + Q + i), dtype)  # [Q], dt' and decay to the end of the chunk
        unit = 1.0
        if unit_ptr is not None:
            unit = power_of_two(tl.max(scale))
            scale /= unit
        exact = x.to(tl.float32) * scale[:, None]
        scaled = exact.to(dtype)
        # the computed operand is the right one, which goes through shared memory: a left one would live in registers
        # that the pipelined loop may overwrite while wgmma still reads them
        state *= keep / unit
        state = tl.dot(tl.trans(B), scaled, state, input_precision=PRECISION)  # [N, Q] @ [Q, P] -> [N, P]
        if EXACT_OPERAND:  # a state that is rounded when it is stored may not be the sum of rounded products too
            rest = (exact - scaled.to(tl.float32)).to(dtype)
            state = tl.dot(tl.trans(B), rest, state, input_precision=PRECISION)
        state *= unit
        x_ptr += Q * x_stride_t
        B_ptr += Q * B_stride_t
        ab_ptr += nheads * 2 * Q
        entering_ptr += nheads * dstate * headdim
        token += Q

        if interval_ptr is not None:
            offset = s * 0
            if seq_offsets_ptr is not None:
                offset = tl.load(seq_offsets_ptr + s)
            position = offset + tl.minimum((k + 1) * Q - lead, length)
            if position % STATE_INTERVAL == 0:
                j = position // STATE_INTERVAL - offset // STATE_INTERVAL - 1
                if interval_slots_ptr is not None:
                    target = tl.load(interval_slots_ptr + s * num_intervals + j, j < num_intervals, other=-1)
                    writable = (target != null_slot) & (target >= 0) & (target < num_slots)
                elif interval_base_ptr is not None:  # packed: sequence after sequence
                    target = tl.load(interval_base_ptr + s) + j
                    writable = target < num_intervals
                else:
                    target = s * num_intervals + j
                    writable = j < num_intervals
                target_ptr = interval_ptr + target.to(tl.int64) * interval_stride + place
                tl.store(target_ptr, state.to(interval_ptr.dtype.element_ty), in_state & writable)

    if final_ptr is not None:
        target = s.to(tl.int64)
        writable = in_state
        if write_slots_ptr is not None:
            target = tl.load(write_slots_ptr + s).to(tl.int64)
            writable = in_state & (target != null_slot) & (target >= 0) & (target < num_slots)
        tl.store(final_ptr + target * final_stride + place, state.to(final_ptr.dtype.element_ty), writable)


@triton.jit
def scan_rows(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    ab_ptr,
    run_ptr,
    entering_ptr,
    unit_ptr,
    y_ptr,
    first,
    first_token,
    last,
    x_stride_t,
    x_stride_h,
    B_stride_t,
    C_stride_t,
    z_stride_t,
    z_stride_h,
    y_stride_t,
    y_stride_h,
    D_stride_h,
    D_stride_p,
    headdim: tl.constexpr,
    dstate: tl.constexpr,
    D_PER_FEATURE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    M_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Rows M_START : M_START + BLOCK_M of a chunk, for HEADS heads; all pointers stand at the first of them.

    A row sees the state that entered the chunk, the rows of the chunk before this block (where M_START > 0), and its
    own block. For the first two the decay splits at `anchor`, the end of what lies before the block, into a factor of
    the row and one of the key, neither above 1: one exponential a row instead of one a pair. What a token adds to its
    own y is not left to the matrix product, which would round its weight: after steep steps there is nothing else.
    """
    i = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token = first + M_START + i
    inside = (token >= first_token) & (token < last)
    seen = inside
    if run_ptr is not None:
        run = tl.load(run_ptr + token, inside, other=-1)
        own = tl.where(run < 0, ~run, run)
        seen = inside & (run >= 0)  # padding may hold anything
    in_p = (p < headdim)[None, :]
    in_n = (n < dstate)[None, :]
    token64 = token.to(tl.int64)[:, None]

    C_rows = C_ptr + token64 * C_stride_t  # [M, 1]
    C = tl.load(C_rows + n[None, :], inside[:, None] & in_n, other=0.0).to(dtype)  # [M, N]
    B = tl.load(B_ptr + token64 * B_stride_t + n[None, :], seen[:, None] & in_n, other=0.0).to(dtype)
    CB = dot_over_states(  # [M, N] @ [N, M] -> [M, M]
        C, tl.trans(B), C_rows, inside[:, None], B_ptr + tl.trans(token64) * B_stride_t, 1, seen[None, :],
        dstate, BLOCK_N, PRECISION,
    )  # fmt: skip
    CB_own = tl.sum(C.to(tl.float32) * B.to(tl.float32), axis=1)  # [M]
    earlier = i[:, None] > i[None, :]
    if run_ptr is not None:
        earlier = earlier & (own[:, None] == own[None, :])
        run_in = tl.load(run_ptr + first_token - 1, first_token > 0, other=0)
        run_in = tl.where(run_in < 0, ~run_in, run_in)
        from_state = own == run_in
    x_own = x_ptr + token64 * x_stride_t + p[None, :]
    y_own = y_ptr + token64 * y_stride_t + p[None, :]
    if M_START > 0:
        j = tl.arange(0, M_START)
        before = first + j
        was = (before >= first_token) & (before < last)
        if run_ptr is not None:
            run = tl.load(run_ptr + before, was, other=-1)
            was = was & (run >= 0)
        before64 = before.to(tl.int64)[:, None]
        B = tl.load(B_ptr + before64 * B_stride_t + n[None, :], was[:, None] & in_n, other=0.0).to(dtype)
        CB_before = dot_over_states(  # [M, N] @ [N, M_START] -> [M, M_START]
            C, tl.trans(B), C_rows, inside[:, None], B_ptr + tl.trans(before64) * B_stride_t, 1, was[None, :],
            dstate, BLOCK_N, PRECISION,
        )  # fmt: skip
        if run_ptr is not None:
            CB_before = tl.where(own[:, None] == run[None, :], CB_before, 0.0)
        x_before = x_ptr + before64 * x_stride_t + p[None, :]

    for head in range(HEADS):
        entering = entering_ptr + head * dstate * headdim + p[None, :]  # [1, P]
        state = tl.load(entering + n[:, None] * headdim, (n < dstate)[:, None] & in_p, other=0.0)  # [N, P]
        x = tl.load(x_own + head * x_stride_h, seen[:, None] & in_p, other=0.0)  # [M, P]
        a = tl.load(ab_ptr + head * 2 * Q + M_START + i)
        b = tl.load(ab_ptr + head * 2 * Q + Q + M_START + i)

        y = dot_over_states(  # [M, N] @ [N, P] -> [M, P]
            C, state, C_rows, inside[:, None], entering, headdim, in_p, dstate, BLOCK_N, PRECISION
        )
        if M_START > 0:
            anchor = tl.load(ab_ptr + head * 2 * Q + M_START - 1)
            reach = decay_of(anchor, dtype)
            if unit_ptr is not None:
                reach *= tl.load(unit_ptr + head)
            key = decay_of(anchor - tl.load(ab_ptr + head * 2 * Q + Q + j), dtype)
            x_seen = tl.load(x_before + head * x_stride_h, was[:, None] & in_p, other=0.0)  # [M_START, P]
            if run_ptr is not None:
                y = tl.where(from_state[:, None], y, 0.0)
            weights = (CB_before * key[None, :]).to(dtype)
            y = tl.dot(weights, x_seen, y * reach, input_precision=PRECISION)  # [M, M_START] @ [M_START, P] -> [M, P]
            y *= decay_of(a - anchor, dtype)[:, None]
        else:
            reach = decay_of(a, dtype)
            if unit_ptr is not None:
                reach *= tl.load(unit_ptr + head)
            if run_ptr is not None:
                reach = tl.where(from_state, reach, 0.0)
            y *= reach[:, None]
        decay = decay_of(tl.where(earlier, a[:, None] - b[None, :], float("-inf")), dtype)  # [M, M]
        weights = (CB * decay).to(dtype)  # a left operand in registers: no wgmma is left in flight behind its product
        y = tl.dot(weights, x, y, input_precision=PRECISION)  # [M, M] @ [M, P] -> [M, P]

        skip = CB_own * decay_of(a - b, dtype)  # [M]
        if D_ptr is not None:
            if D_PER_FEATURE:
                D = tl.load(D_ptr + head * D_stride_h + p * D_stride_p, p < headdim, other=0.0).to(tl.float32)
                y += D[None, :] * x.to(tl.float32)
            else:
                skip += tl.load(D_ptr + head * D_stride_h).to(tl.float32)
        y += skip[:, None] * x.to(tl.float32)
        if z_ptr is not None:
            z = tl.load(
                z_ptr + token64 * z_stride_t + head * z_stride_h + p[None, :], inside[:, None] & in_p, other=0.0
            )
            y *= z.to(tl.float32) * tl.sigmoid(z.to(tl.float32))
        if run_ptr is not None:
            y = tl.where(seen[:, None], y, 0.0)
        tl.store(y_own + head * y_stride_h, y.to(y_ptr.dtype.element_ty), inside[:, None] & in_p)


@triton.jit(do_not_specialize=["total", "nseq"])
def chunk_scan_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    ab_ptr,
    run_ptr,
    cu_seqlens_ptr,
    seq_offsets_ptr,
    entering_ptr,
    unit_ptr,
    y_ptr,
    total,
    nseq,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    B_stride_b,
    B_stride_t,
    B_stride_g,
    C_stride_b,
    C_stride_t,
    C_stride_g,
    z_stride_b,
    z_stride_t,
    z_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    D_stride_h,
    D_stride_p,
    nheads: tl.constexpr,
    heads_per_group: tl.constexpr,
    headdim: tl.constexpr,
    dstate: tl.constexpr,
    D_PER_FEATURE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head_blocks: tl.constexpr = nheads // HEADS
    m_blocks: tl.constexpr = Q // BLOCK_M
    tl.static_assert(m_blocks <= 2)
    m_block = tl.program_id(0) // head_blocks % m_blocks
    slot = tl.program_id(0) // head_blocks // m_blocks
    head = tl.program_id(0) % head_blocks * HEADS
    group = head // heads_per_group
    row, first, first_token, last = chunk_bounds(slot, cu_seqlens_ptr, seq_offsets_ptr, total, nseq, Q)
    if first + m_block * BLOCK_M >= last:
        return

    x_ptr += row * x_stride_b + head * x_stride_h
    B_ptr += row * B_stride_b + group * B_stride_g
    C_ptr += row * C_stride_b + group * C_stride_g
    y_ptr += row * y_stride_b + head * y_stride_h
    if D_ptr is not None:
        D_ptr += head * D_stride_h
    if z_ptr is not None:
        z_ptr += row * z_stride_b + head * z_stride_h
    if run_ptr is not None:
        run_ptr += row * total
    vector = slot.to(tl.int64) * nheads + head
    ab_ptr += vector * 2 * Q
    entering_ptr += vector * dstate * headdim
    if unit_ptr is not None:
        unit_ptr += vector
    # fmt: off
    if m_block == 0:
        scan_rows(
            x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, ab_ptr, run_ptr, entering_ptr, unit_ptr, y_ptr,
            first, first_token, last,
            x_stride_t, x_stride_h, B_stride_t, C_stride_t, z_stride_t, z_stride_h, y_stride_t, y_stride_h,
            D_stride_h, D_stride_p, headdim, dstate, D_PER_FEATURE, PRECISION, HEADS,
            Q, 0, BLOCK_M, BLOCK_N, BLOCK_P,
        )
    elif m_blocks > 1:
        scan_rows(
            x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, ab_ptr, run_ptr, entering_ptr, unit_ptr, y_ptr,
            first, first_token, last,
            x_stride_t, x_stride_h, B_stride_t, C_stride_t, z_stride_t, z_stride_h, y_stride_t, y_stride_h,
            D_stride_h, D_stride_p, headdim, dstate, D_PER_FEATURE, PRECISION, HEADS,
            Q, Q // 2, BLOCK_M, BLOCK_N, BLOCK_P,
        )
    # fmt: on
