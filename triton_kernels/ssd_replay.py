"""The SSD recurrence while decoding, of states that stay as they are while a ring keeps the newest tokens.

A program takes a block of rows of one head of one sequence. It reads that part of the state, the ring's tokens and the
new ones; with what the tokens still weigh, y_t is a sum over them and over the state. Where the ring is full the state
takes its tokens in. Programs of one sequence need no order: see csrc/ssd_replay_sm90.cuh.

Letters: P rows of a program, N dstate, J capacity and T new tokens, each padded to a power of two.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, dense, next_power_of_2, on_device, plan, traits
from .ssd_update import step_size, store_state


class Config(NamedTuple):
    BLOCK_P: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def config(headdim: int, dstate: int, itemsize: int, sequences_times_heads: int) -> Config:
    """Every program reads all of the ring's B: large tiles, but while there are few programs."""
    block_n = next_power_of_2(max(dstate, 16))
    elements, num_warps = (1024, 2) if sequences_times_heads <= 512 else (4096, 4)
    block_p = min(max(elements // block_n, 1), next_power_of_2(headdim))
    return Config(BLOCK_P=block_p, BLOCK_N=block_n, num_warps=num_warps)


# these change from call to call: one kernel for all values
@triton.jit(do_not_specialize=["T", "nslots", "null_slot"])
def ssd_replay_kernel(
    state_ptr,
    cache_x_ptr,
    cache_B_ptr,
    cache_dt_ptr,
    ring_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    slots_ptr,
    rollback_ptr,
    write_slots_ptr,
    seed_ptr,
    y_ptr,
    T,
    nslots,
    nheads,
    headdim,
    dstate,
    heads_per_group,
    places,
    null_slot,
    dt_min,
    dt_max,
    state_slot_stride,
    state_head_stride,
    state_p_stride,
    state_n_stride,
    cache_x_slot_stride,
    cache_x_head_stride,
    cache_x_place_stride,
    cache_x_p_stride,
    cache_B_slot_stride,
    cache_B_group_stride,
    cache_B_place_stride,
    cache_B_n_stride,
    cache_dt_slot_stride,
    cache_dt_head_stride,
    cache_dt_place_stride,
    ring_stride,
    x_seq_stride,
    x_token_stride,
    x_head_stride,
    x_p_stride,
    z_seq_stride,
    z_token_stride,
    z_head_stride,
    z_p_stride,
    y_seq_stride,
    y_token_stride,
    y_head_stride,
    y_p_stride,
    dt_seq_stride,
    dt_token_stride,
    dt_head_stride,
    B_seq_stride,
    B_token_stride,
    B_group_stride,
    B_n_stride,
    C_seq_stride,
    C_token_stride,
    C_group_stride,
    C_n_stride,
    D_head_stride,
    D_p_stride,
    CAPACITY: tl.constexpr,
    MATERIALIZE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ROLLBACK: tl.constexpr,
    HAS_WRITE_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_P_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = (tl.program_id(0) // NUM_P_BLOCKS).to(tl.int64)
    p_block = tl.program_id(0) % NUM_P_BLOCKS
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    p = p_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    n = tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    j = tl.arange(0, BLOCK_J)  # [J]
    mask_p, mask_n = p < headdim, n < dstate
    mask = mask_p[:, None] & mask_n[None, :]

    slot, kept = b, b < nslots
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        kept = (slot >= 0) & (slot < nslots) & (slot != null_slot)
    slot = tl.where(kept, slot, 0)
    ring_ptr += slot * ring_stride
    state_ptr += head * state_head_stride + p[:, None] * state_p_stride + n[None, :] * state_n_stride
    S = tl.load(state_ptr + slot * state_slot_stride, mask & kept, other=0.0).to(tl.float32)  # [P, N]

    # who reads the ring's number announces itself; the last one knows that all have read, and moves it on
    if HAS_WRITE_SLOTS:
        number = tl.load(ring_ptr)
    else:
        number = tl.atomic_add(ring_ptr, 65536, mask=kept, sem="relaxed")
    start = (number & 255) % places
    length = tl.minimum(number >> 8 & 255, CAPACITY)
    if HAS_ROLLBACK:
        length = tl.maximum(length - tl.maximum(tl.load(rollback_ptr + b), 0), 0)
    length = tl.where(kept, length, 0)
    flush = kept & (length + T > CAPACITY)
    if MATERIALIZE:
        flush = kept
    if not HAS_WRITE_SLOTS:
        last = number >> 16 == nheads * NUM_P_BLOCKS - 1
        moved = tl.where(flush, (start + length) % places + 256 * T, start + 256 * (length + T))
        if MATERIALIZE:
            moved = moved * 0
        tl.store(ring_ptr, moved, kept & last)

    cache_x_ptr += slot * cache_x_slot_stride + head * cache_x_head_stride + p * cache_x_p_stride  # [P]
    cache_B_ptr += slot * cache_B_slot_stride + group * cache_B_group_stride + n * cache_B_n_stride  # [N]
    cache_dt_ptr += slot * cache_dt_slot_stride + head * cache_dt_head_stride
    A = tl.load(A_ptr + head)
    there, place = j < length, ((start + j) % places).to(tl.int64)
    dt_old = tl.load(cache_dt_ptr + place * cache_dt_place_stride, there, other=0.0)  # [J]
    newer = j[None, :] > j[:, None]
    sums = tl.sum(tl.where(newer, dt_old[None, :], 0.0), axis=1)
    w_old = dt_old * tl.exp(A * sums)  # [J], what the old tokens weigh; of y later, with the decays since
    decay = tl.exp(A * tl.sum(dt_old, axis=0))  # of the state
    w_flush, decay_flush = w_old, decay

    if not MATERIALIZE:
        t_new = tl.arange(0, BLOCK_T)  # [T]
        mask_t = kept & (t_new < T)
        x_ptr += b * x_seq_stride + head * x_head_stride + p * x_p_stride
        y_ptr += b * y_seq_stride + head * y_head_stride + p * y_p_stride
        if HAS_Z:
            z_ptr += b * z_seq_stride + head * z_head_stride + p * z_p_stride
        dt_ptr += b * dt_seq_stride + head * dt_head_stride
        B_ptr += b * B_seq_stride + group * B_group_stride + n * B_n_stride
        C_ptr += b * C_seq_stride + group * C_group_stride + n * C_n_stride
        mask_x, mask_B = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
        x_raw = tl.load(x_ptr[None, :] + t_new[:, None] * x_token_stride, mask_x, other=0.0)  # [T, P]
        B_raw = tl.load(B_ptr[None, :] + t_new[:, None] * B_token_stride, mask_B, other=0.0)  # [T, N]
        x_old = tl.load(
            cache_x_ptr[None, :] + place[:, None] * cache_x_place_stride, there[:, None] & mask_p[None, :], other=0.0
        ).to(tl.float32)  # [J, P]
        B_old = tl.load(
            cache_B_ptr[None, :] + place[:, None] * cache_B_place_stride, there[:, None] & mask_n[None, :], other=0.0
        ).to(tl.float32)  # [J, N]
        x_new, B_new = x_raw.to(tl.float32), B_raw.to(tl.float32)
        dt_bias = 0.0
        if HAS_DT_BIAS:
            dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
        dt_new = tl.load(dt_ptr + t_new * dt_token_stride, mask_t, other=0.0).to(tl.float32) + dt_bias  # [T]
        dt_new = step_size(dt_new, dt_min, dt_max, DT_SOFTPLUS)
        if HAS_D:
            D = tl.load(D_ptr + head * D_head_stride + p * D_p_stride, mask_p, other=0.0).to(tl.float32)  # [P]

        # to places that hold no token which this call reads
        to = ((start + length + t_new) % places).to(tl.int64)
        tl.store(cache_x_ptr[None, :] + to[:, None] * cache_x_place_stride, x_raw, mask_x)
        first = p_block == 0
        tl.store(cache_dt_ptr + to * cache_dt_place_stride, dt_new, mask_t & first)
        first_of_group = first & (head % heads_per_group == 0)
        tl.store(cache_B_ptr[None, :] + to[:, None] * cache_B_place_stride, B_raw, mask_B & first_of_group)
        tl.debug_barrier()  # y may be x

        w_new = dt_new * 0.0
        for t in range(T):
            now = t_new == t
            dt = tl.sum(tl.where(now, dt_new, 0.0), axis=0)
            step = tl.exp(A * dt)
            decay *= step
            w_old *= step
            w_new = tl.where(now, dt, w_new * step)
            C = tl.load(C_ptr + t * C_token_stride, mask_n, other=0.0).to(tl.float32)  # [N]
            y = decay * tl.sum(S * C[None, :], axis=1)  # [P]
            y += tl.sum((w_old * tl.sum(B_old * C[None, :], axis=1))[:, None] * x_old, axis=0)
            y += tl.sum((w_new * tl.sum(B_new * C[None, :], axis=1))[:, None] * x_new, axis=0)
            if HAS_D:
                y += D * tl.sum(tl.where(now[:, None], x_new, 0.0), axis=0)
            if HAS_Z:
                z = tl.load(z_ptr + t * z_token_stride, mask_p, other=0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            y = tl.where(kept, y, 0.0)
            tl.store(y_ptr + t * y_token_stride, y.to(y_ptr.dtype.element_ty), mask_p)

    target, wanted = slot, flush
    if HAS_WRITE_SLOTS:
        target = tl.load(write_slots_ptr + b).to(tl.int64)
        wanted = kept & (target >= 0) & (target < nslots) & (target != null_slot)
    if wanted:
        S *= decay_flush
        for i in range(length):
            at = ((start + i) % places).to(tl.int64)
            x = tl.load(cache_x_ptr + at * cache_x_place_stride, mask_p, other=0.0).to(tl.float32)
            B = tl.load(cache_B_ptr + at * cache_B_place_stride, mask_n, other=0.0).to(tl.float32)
            S += (tl.sum(tl.where(j == i, w_flush, 0.0), axis=0) * x)[:, None] * B[None, :]
        seed = tl.zeros([], tl.int64)
        if STOCHASTIC:
            seed = tl.load(seed_ptr)
        store_state(
            state_ptr, state_ptr, S, target, head, p, 0, seed, mask, state_slot_stride, 0,
            nheads, headdim, dstate, STOCHASTIC, ALIGNED, None,
        )  # fmt: skip


def ssd_replay_update(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    capacity: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    null_slot: int,
) -> None:
    """Fill y, append to the cache, write states where it is full. Tokens are (batch, T, ..)."""
    _launch(
        (state, cache_x, cache_B, cache_dt, ring, x, dt, dense(A), B, C, D, z, dense(dt_bias)),
        (dense(slots), dense(rollback), None, seed, y),
        (x.shape[0], capacity, dt_softplus, dt_min, dt_max, null_slot),
    )


def ssd_replay_materialize(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    A: Tensor,
    slots: Tensor | None,
    rollback: Tensor | None,
    write_slots: Tensor | None,
    seed: Tensor | None,
    capacity: int,
    null_slot: int,
) -> None:
    """States through the tokens of their cache, in place or in write_slots."""
    batch = state.shape[0] if slots is None else slots.shape[0]
    _launch(
        (state, cache_x, cache_B, cache_dt, ring, None, None, dense(A), None, None, None, None, None),
        (dense(slots), dense(rollback), dense(write_slots), seed, None),
        (batch, capacity, False, 0.0, 0.0, null_slot),
    )


def _launch(
    tensors: tuple[Tensor | None, ...],
    others: tuple[Tensor | None, ...],
    options: tuple[int, int, bool, float, float, int],
) -> None:
    state = tensors[0]
    assert state is not None
    if options[0] == 0:
        return
    key = ("ssd_replay", options, traits(*tensors, *others))
    with on_device(state):
        plan(key, lambda: make_launch(*tensors, *others, *options), state.device)(*tensors, *others)


def make_launch(
    state: Tensor,
    cache_x: Tensor,
    cache_B: Tensor,
    cache_dt: Tensor,
    ring: Tensor,
    x: Tensor | None,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    write_slots: Tensor | None,
    seed: Tensor | None,
    y: Tensor | None,
    batch: int,
    capacity: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    null_slot: int,
) -> Launch:
    nslots, nheads, headdim, dstate = state.shape
    ngroups, places = cache_B.shape[1:3]
    steps = 0 if x is None else x.shape[1]
    block_p, block_n, num_warps = config(headdim, dstate, state.element_size(), batch * nheads)
    num_p_blocks = cdiv(headdim, block_p)

    def strides(tensor: Tensor | None, dims: int = 4) -> tuple[int, ...]:
        return (0,) * dims if tensor is None else tensor.stride()

    scalars = (
        *(steps, nslots, nheads, headdim, dstate, nheads // ngroups, places, null_slot, dt_min, dt_max),
        *(*state.stride(), *cache_x.stride(), *cache_B.stride(), *cache_dt.stride(), ring.stride(0)),
        *(*strides(x), *strides(z), *strides(y), *strides(dt, 3), *strides(B), *strides(C)),
        *(0 if D is None else D.stride(0), D.stride(1) if D is not None and D.dim() == 2 else 0),
    )
    return Launch(
        ssd_replay_kernel,
        (batch * num_p_blocks, nheads),
        scalars,
        CAPACITY=capacity,
        MATERIALIZE=x is None,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_DT_BIAS=dt_bias is not None,
        DT_SOFTPLUS=dt_softplus,
        HAS_SLOTS=slots is not None,
        HAS_ROLLBACK=rollback is not None,
        HAS_WRITE_SLOTS=write_slots is not None,
        STOCHASTIC=seed is not None,
        ALIGNED=dstate % 8 == 0,
        NUM_P_BLOCKS=num_p_blocks,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        BLOCK_J=next_power_of_2(max(capacity, 2)),
        BLOCK_T=next_power_of_2(max(steps, 1)),
        num_warps=num_warps,
    )
