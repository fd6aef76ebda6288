"""Causal depthwise convolution over whole sequences: one launch reads x once, writes y and the states that remain.

Letters: L tokens and D channels of a tile, E tokens of a sequence's edge (its first width - 1), S columns of a state.
Arithmetic is float32; every result is cast once.

Two kinds of program share the launch. A *tile* reads its tokens once per tap, shifted (the first tap comes from memory,
the others from L1), and knows no history: it leaves the first width - 1 tokens of a sequence that has one to the
sequence's *edge* program. That one computes them and then writes the final state: being the only reader of a slot and
its only writer, it may update a pool in place.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, dense, launch, next_power_of_2, on_device


class Config(NamedTuple):
    BLOCK_L: int
    BLOCK_D: int
    num_warps: int


@functools.cache
def config(itemsize: int, channel_last: bool) -> Config:
    """256 bytes along the dimension of stride 1, so that a warp's loads are whole lines; 32 elements a thread."""
    line = 256 // itemsize
    return Config(32, line, 4) if channel_last else Config(line, 32, 4)


@triton.jit
def silu(v, dtype: tl.constexpr):
    """v / (1 + exp(-v)). `tl.exp` rounds the product with log2 e, which at v = -20 costs ten units in the last place of
    float32. Where the result has that many digits, exp(-v) = 2^n exp(r): n log 2, in two parts, is taken off exactly.
    """
    if dtype == tl.float32:
        u = tl.minimum(tl.maximum(-v, -100.0), 100.0)
        n = tl.floor(u * 1.4426950408889634 + 0.5)
        r = (u - n * 0.693145751953125) - n * 1.4286068203094173e-06
        return v / (1.0 + tl.exp(r) * tl.exp2(n))
    else:
        return v * tl.sigmoid(v)


@triton.jit
def sequence_of(cu_seqlens_ptr, num_seqs, token, search_steps, BLOCK_L: tl.constexpr):
    """The last sequence that starts at or before each token: -1 before the first, num_seqs behind the last."""
    low = tl.zeros([BLOCK_L], tl.int32)  # boundaries 0..low-1 are <= token
    high = tl.zeros([BLOCK_L], tl.int32) + num_seqs + 1
    for _ in range(search_steps):
        searching = low < high
        middle = (low + high) // 2
        behind = tl.load(cu_seqlens_ptr + middle, searching, other=0) <= token
        low = tl.where(searching & behind, middle + 1, low)
        high = tl.where(searching & (behind == 0), middle, high)
    return low - 1


@triton.jit
def conv1d_tile(
    tile,
    channel,
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    cu_seqlens_ptr,
    token_ptr,
    start_ptr,
    num_tokens_ptr,
    seqlen,
    dim,
    num_seqs,
    search_steps,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_l,
    y_stride_d,
    weight_stride_d,
    weight_stride_j,
    HAS_HISTORY: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row_tiles = tl.cdiv(seqlen, BLOCK_L)
    row = (tile // row_tiles).to(tl.int64)
    rank = (tile % row_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)  # [L], place in the row, padding last
    live = rank < seqlen
    x_ptr += row * x_stride_b
    y_ptr += row * y_stride_b

    # the rank at which each token's sequence starts: [L], or 0
    if cu_seqlens_ptr is not None:
        sequence = sequence_of(cu_seqlens_ptr, num_seqs, rank, search_steps, BLOCK_L)
        inside = live & (sequence >= 0) & (sequence < num_seqs)
        start = tl.maximum(tl.load(cu_seqlens_ptr + sequence, inside, other=0), 0)
        edge = rank - start < WIDTH - 1
    elif token_ptr is not None:
        token_ptr += row * seqlen
        inside = rank < tl.load(num_tokens_ptr + row)
        start = tl.load(start_ptr + row * seqlen + rank, inside, other=0)
        edge = (start == 0) & (rank < WIDTH - 1)
    else:
        inside = live
        start = 0
        edge = rank < WIDTH - 1

    in_dim = channel < dim  # [D]
    column = channel.to(tl.int64)
    acc = tl.zeros([BLOCK_L, channel.shape[0]], tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, in_dim, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(WIDTH):
        source = rank - (WIDTH - 1 - j)
        seen = inside & (source >= start)
        if token_ptr is not None:
            source = tl.load(token_ptr + source, seen, other=0)
        u = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * x_stride_l + column[None, :] * x_stride_d,
            seen[:, None] & in_dim[None, :],
            other=0.0,
        )  # [L, D]
        w = tl.load(weight_ptr + column * weight_stride_d + j * weight_stride_j, in_dim, other=0.0)  # [D]
        acc += u.to(tl.float32) * w.to(tl.float32)[None, :]
    if SILU:
        acc = silu(acc, y_ptr.dtype.element_ty)

    mine = live
    if HAS_HISTORY:
        mine = live & ((edge == 0) | (inside == 0))
    place = rank
    if token_ptr is not None:
        place = tl.load(token_ptr + rank, live, other=0)
    if cu_seqlens_ptr is not None or token_ptr is not None:
        acc = tl.where(inside[:, None], acc, 0.0)
    tl.store(
        y_ptr + place.to(tl.int64)[:, None] * y_stride_l + column[None, :] * y_stride_d,
        acc.to(y_ptr.dtype.element_ty),
        mine[:, None] & in_dim[None, :],
    )


@triton.jit
def conv1d_edge(
    sequence,
    channel,
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    history_ptr,
    state_ptr,
    read_slots_ptr,
    write_slots_ptr,
    cu_seqlens_ptr,
    token_ptr,
    start_ptr,
    num_tokens_ptr,
    seqlen,
    dim,
    num_slots,
    null_slot,
    state_len,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_l,
    y_stride_d,
    weight_stride_d,
    weight_stride_j,
    history_stride_n,
    history_stride_d,
    history_stride_s,
    state_stride_n,
    state_stride_d,
    state_stride_s,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # tokens begin..end-1 of a row are those whose history or final state this is; of them, the last sequence of the
    # row starts at last, which is begin unless there is a seq_idx
    row = sequence.to(tl.int64)
    begin = 0
    end = seqlen
    if cu_seqlens_ptr is not None:
        row = row * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), seqlen)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), begin), seqlen)
    last = begin
    if token_ptr is not None:
        token_ptr += row * seqlen
        start_ptr += row * seqlen
        end = tl.load(num_tokens_ptr + row)
        last = tl.load(start_ptr + end - 1, end > 0, other=0)
    x_ptr += row * x_stride_b
    y_ptr += row * y_stride_b

    in_dim = channel[None, :] < dim  # [1, D]
    column = channel.to(tl.int64)[None, :]
    has_history = False
    if history_ptr is not None:
        slot = sequence
        has_history = True
        if read_slots_ptr is not None:
            slot = tl.load(read_slots_ptr + sequence)
            has_history = (slot != null_slot) & (slot >= 0) & (slot < num_slots)
        history_ptr += slot.to(tl.int64) * history_stride_n + column * history_stride_d  # [1, D]

        # y of the first tokens of a sequence that has a history
        i = tl.arange(0, BLOCK_E)[:, None]  # [E, 1]
        rank = begin + i
        edge = (i < WIDTH - 1) & (rank < end)
        place = rank
        if token_ptr is not None:
            edge = edge & (tl.load(start_ptr + rank, edge, other=1) == 0)
            place = tl.load(token_ptr + rank, edge, other=0)
        acc = tl.zeros([BLOCK_E, channel.shape[0]], tl.float32)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel[None, :], in_dim, other=0.0).to(tl.float32)
        for j in tl.static_range(WIDTH):
            back = i - (WIDTH - 1 - j)  # counted from begin: negative in the history
            source = begin + back
            if token_ptr is not None:
                source = tl.load(token_ptr + source, edge & (back >= 0), other=0)
            u = tl.load(
                x_ptr + source.to(tl.int64) * x_stride_l + column * x_stride_d,
                edge & (back >= 0) & in_dim,
                other=0.0,
            ).to(tl.float32)
            u += tl.load(
                history_ptr + (state_len + back) * history_stride_s,
                edge & (back < 0) & has_history & in_dim,
                other=0.0,
            ).to(tl.float32)
            w = tl.load(weight_ptr + column * weight_stride_d + j * weight_stride_j, in_dim, other=0.0)
            acc += u * w.to(tl.float32)
        if SILU:
            acc = silu(acc, y_ptr.dtype.element_ty)
        tl.store(
            y_ptr + place.to(tl.int64) * y_stride_l + column * y_stride_d,
            acc.to(y_ptr.dtype.element_ty),
            edge & in_dim,
        )

    if state_ptr is not None:
        # the last state_len inputs up to end
        s = tl.arange(0, BLOCK_S)[:, None]  # [S, 1]
        back = end - begin - state_len + s  # counted from begin
        in_state = s < state_len
        own = in_state & (back >= last - begin)
        source = begin + back
        if token_ptr is not None:
            source = tl.load(token_ptr + source, own, other=0)
        state = tl.load(x_ptr + source.to(tl.int64) * x_stride_l + column * x_stride_d, own & in_dim, other=0.0).to(
            tl.float32
        )
        if history_ptr is not None:
            reaches = in_state & (back < 0) & (last == begin)
            state += tl.load(
                history_ptr + (state_len + back) * history_stride_s, reaches & has_history & in_dim, other=0.0
            ).to(tl.float32)
            tl.debug_barrier()  # every thread has read the slot before any overwrites it
        slot = sequence
        writes = True
        if write_slots_ptr is not None:
            slot = tl.load(write_slots_ptr + sequence)
            writes = (slot != null_slot) & (slot >= 0) & (slot < num_slots)
        tl.store(
            state_ptr + slot.to(tl.int64) * state_stride_n + column * state_stride_d + s * state_stride_s,
            state.to(state_ptr.dtype.element_ty),
            in_state & writes & in_dim,
        )


@triton.jit(do_not_specialize=["num_tiles", "num_edges", "num_seqs", "search_steps", "num_slots", "null_slot"])
def conv1d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    history_ptr,
    state_ptr,
    read_slots_ptr,
    write_slots_ptr,
    cu_seqlens_ptr,
    token_ptr,
    start_ptr,
    num_tokens_ptr,
    num_tiles,
    num_edges,
    seqlen,
    dim,
    num_seqs,
    search_steps,
    num_slots,
    null_slot,
    state_len,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_l,
    y_stride_d,
    weight_stride_d,
    weight_stride_j,
    history_stride_n,
    history_stride_d,
    history_stride_s,
    state_stride_n,
    state_stride_d,
    state_stride_s,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    CHANNEL_LAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # neighbouring programs are neighbours in memory
    num_rows = num_edges + num_tiles
    if CHANNEL_LAST:
        channel_blocks = tl.cdiv(dim, BLOCK_D)
        block = tl.program_id(0) % channel_blocks
        program = tl.program_id(0) // channel_blocks
    else:
        block = tl.program_id(0) // num_rows
        program = tl.program_id(0) % num_rows
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    if history_ptr is not None or state_ptr is not None:
        if program < num_edges:
            conv1d_edge(
                program,
                channel,
                x_ptr,
                weight_ptr,
                bias_ptr,
                y_ptr,
                history_ptr,
                state_ptr,
                read_slots_ptr,
                write_slots_ptr,
                cu_seqlens_ptr,
                token_ptr,
                start_ptr,
                num_tokens_ptr,
                seqlen,
                dim,
                num_slots,
                null_slot,
                state_len,
                x_stride_b,
                x_stride_l,
                x_stride_d,
                y_stride_b,
                y_stride_l,
                y_stride_d,
                weight_stride_d,
                weight_stride_j,
                history_stride_n,
                history_stride_d,
                history_stride_s,
                state_stride_n,
                state_stride_d,
                state_stride_s,
                WIDTH,
                SILU,
                BLOCK_E,
                BLOCK_S,
            )
            return
    conv1d_tile(
        program - num_edges,
        channel,
        x_ptr,
        weight_ptr,
        bias_ptr,
        y_ptr,
        cu_seqlens_ptr,
        token_ptr,
        start_ptr,
        num_tokens_ptr,
        seqlen,
        dim,
        num_seqs,
        search_steps,
        x_stride_b,
        x_stride_l,
        x_stride_d,
        y_stride_b,
        y_stride_l,
        y_stride_d,
        weight_stride_d,
        weight_stride_j,
        history_ptr is not None,
        WIDTH,
        SILU,
        BLOCK_L,
    )


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    history: Tensor | None,
    state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor] | None,
    silu: bool,
    null_slot: int,
) -> None:
    """Fill y and state. history, state: a row per sequence, or, with slots, one pool (nslots, dim, state_len).

    `order`, for rows that hold sequences and padding, ranks the tokens of a row, padding last: the token at each rank
    and the rank at which its sequence starts, both (batch, seqlen) int32, and the number of tokens, (batch,) int32.
    """
    batch, seqlen, dim = x.shape
    num_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = state if history is None else history
    state_len = 0 if states is None else states.shape[2]
    if state_len == 0:
        history = state = None
    block_l, block_d, num_warps = config(x.element_size(), x.stride(2) == 1)
    num_tiles = batch * cdiv(seqlen, block_l)
    num_edges = 0 if history is None and state is None else num_seqs
    grid = (num_tiles + num_edges) * cdiv(dim, block_d)
    if grid == 0:
        return
    small = (dense(t) for t in (read_slots, write_slots, cu_seqlens))
    tensors = (x, weight, dense(bias), y, history, state, *small, *((None, None, None) if order is None else order))
    no_strides = (0, 0, 0)
    scalars = (
        num_tiles,
        num_edges,
        seqlen,
        dim,
        num_seqs,
        (num_seqs + 1).bit_length(),
        0 if states is None else states.shape[0],
        null_slot,
        state_len,
        *x.stride(),
        *y.stride(),
        *weight.stride(),
        *(no_strides if history is None else history.stride()),
        *(no_strides if state is None else state.stride()),
    )
    with on_device(x):
        launch(
            conv1d_kernel,
            grid,
            tensors,
            scalars,
            WIDTH=weight.shape[1],
            SILU=silu,
            CHANNEL_LAST=x.stride(2) == 1,
            BLOCK_L=block_l,
            BLOCK_D=block_d,
            BLOCK_E=next_power_of_2(max(weight.shape[1] - 1, 1)),
            BLOCK_S=next_power_of_2(max(state_len, 1)),
            num_warps=num_warps,
        )
