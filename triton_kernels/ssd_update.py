"""The SSD recurrence while decoding: a few tokens of each sequence, with the states in a pool of slots.

A program takes a block of rows of one head of one sequence. It reads that part of the state, walks the tokens with it
in float32 registers, and stores it after the last token or after each. No program reads what another writes.

Letters: P rows of a program, N dstate padded to a power of two.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import minifloat
from .launch import Launch, cdiv, dense, next_power_of_2, on_device, plan, traits
from .quant_fp8 import multiplier, reciprocal
from .ssd_kernels import softplus


class Config(NamedTuple):
    BLOCK_P: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def config(headdim: int, dstate: int, itemsize: int, sequences_times_heads: int) -> Config:
    """The state is the traffic. 2 KiB of it for each warp keep enough loads in flight; a 16-bit state gets larger
    tiles once there are enough programs to fill the machine."""
    block_n = next_power_of_2(max(dstate, 16))
    elements, num_warps = 512, 1
    if itemsize == 2 and sequences_times_heads > 32:
        elements, num_warps = (1024, 2) if sequences_times_heads <= 2048 else (4096, 4)
    block_p = min(max(elements // block_n, 1), next_power_of_2(headdim))
    return Config(BLOCK_P=block_p, BLOCK_N=block_n, num_warps=num_warps)


@triton.jit
def random_bits(seed, row, dstate, t, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """[P, N] of 16 random bits for the elements row[:, None] + n (row-major in the whole pool) after token t.

    Element i takes from the Philox block (i // 8, t) the word (i % 8) // 2, its low half where i is even. Where rows
    begin at multiples of 8 (ALIGNED) a block is computed once for its 8 elements.
    """
    if ALIGNED:
        block = row[:, None] // 8 + tl.arange(0, BLOCK_N // 8)[None, :]  # [P, N / 8]
    else:
        i = row[:, None] + tl.arange(0, BLOCK_N)[None, :]
        block = i // 8  # [P, N]
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, (low * 0 + t).to(tl.uint32), low * 0)
    if ALIGNED:
        even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
        odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
        bits = tl.interleave(even, odd)
    else:
        word = i % 8 // 2
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        bits = tl.where(i % 2 == 0, bits & 0xFFFF, bits >> 16)
    return bits


@triton.jit
def round_stochastic(v, bits, dtype: tl.constexpr):
    """float32 v to float16 or bfloat16: |v| goes to floor(|v| + bits * 2^-16 * step) on the grid, saturating.

    In integers: `fixed` is the target's bit pattern of |v| with 16 more bits behind the point, so the sum's carry
    rounds, over a change of exponent too. NaN stays NaN, and zero keeps its sign.
    """
    pattern = v.to(tl.int32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if dtype == tl.float16:
        # below 2^-14 the grid is even, steps of 2^-24: |v| 2^40 has 16 bits behind the point
        subnormal = (tl.minimum(tl.abs(v), 2.0**-14) * 2.0**40).to(tl.int32)
        normal = (tl.minimum(magnitude, 0x477FE000) - 0x38000000) << 3  # 65504 at most; other exponent bias
        fixed = tl.where(magnitude < 0x38800000, subnormal, normal)
        largest: tl.constexpr = 0x7BFF
        nan: tl.constexpr = 0x7E00
    else:
        tl.static_assert(dtype == tl.bfloat16, "the target must be float16 or bfloat16")
        fixed = tl.minimum(magnitude, 0x7F7F0000)
        largest: tl.constexpr = 0x7F7F
        nan: tl.constexpr = 0x7FC0
    rounded = tl.minimum((fixed + bits.to(tl.int32)) >> 16, largest)
    rounded = tl.where(magnitude > 0x7F800000, nan, rounded) | (pattern >> 16 & 0x8000)
    return rounded.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def decode(code, target: tl.constexpr):
    """float32 of codes, uint8: "e4m3", or "int8" in two's complement."""
    if target == "int8":
        return ((code.to(tl.int32) ^ 128) - 128).to(tl.float32)
    return minifloat.decode(code.to(tl.int32), target)


@triton.jit
def quantize_rows(S, target: tl.constexpr):
    """(codes [P, N], uint8, and scale [P]) as `quantize_rows` of hybrid_ops/_torch/ssd_update.py."""
    amax = minifloat.amax_bits(S, 1).to(tl.float32, bitcast=True)
    if target == "int8":
        s = multiplier(amax, 127.0, False)
        v = S * s[:, None]
        v = tl.where(v != v, 0.0, tl.minimum(tl.maximum(v, -127.0), 127.0))
        codes = (v + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23 + v has v, to nearest even, in its last bits
        any_nan = tl.max((S != S).to(tl.int32), axis=1) > 0
        return codes.to(tl.uint8), tl.where(any_nan, float("nan"), reciprocal(s))
    s = multiplier(amax, 448.0, False)
    return minifloat.encode(S * s[:, None], target).to(tl.uint8), reciprocal(s)


@triton.jit
def store_state(
    state_ptr,  # [P, N], of slot 0
    scale_ptr,  # [P]
    S,
    slot,
    head,
    p,
    t,
    seed,
    mask,
    slot_stride,
    scale_slot_stride,
    nheads,
    headdim,
    dstate,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    if SCALED is not None:
        S, scale = quantize_rows(S, SCALED)
        tl.store(scale_ptr + slot * scale_slot_stride, scale, tl.max(mask.to(tl.int32), axis=1) > 0)
    if STOCHASTIC:
        row = ((slot * nheads + head) * headdim + p) * dstate  # [P]
        S = round_stochastic(S, random_bits(seed, row, dstate, t, S.shape[1], ALIGNED), dtype)
    tl.store(state_ptr + slot * slot_stride, S.to(dtype), mask)


@triton.jit
def step_size(dt, dt_min, dt_max, DT_SOFTPLUS: tl.constexpr):
    """dt of the recurrence; `dt` has its bias."""
    if DT_SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(dt < dt_min, dt_min, dt)  # comparisons leave NaN as it is
    return tl.where(dt > dt_max, dt_max, dt)


# these change from call to call: one kernel for all values
@triton.jit(do_not_specialize=["T", "total", "nslots", "read_width", "write_width", "null_slot"])
def ssd_update_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    read_slots_ptr,
    write_slots_ptr,
    num_accepted_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    state_scale_ptr,
    y_ptr,
    T,
    total,
    nslots,
    nheads,
    headdim,
    dstate,
    heads_per_group,
    read_width,
    write_width,
    null_slot,
    dt_min,
    dt_max,
    state_slot_stride,
    state_head_stride,
    state_p_stride,
    state_n_stride,
    scale_slot_stride,
    scale_head_stride,
    scale_p_stride,
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
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    HAS_READ_SLOTS: tl.constexpr,
    HAS_WRITE_SLOTS: tl.constexpr,
    HAS_NUM_ACCEPTED: tl.constexpr,
    PACKED: tl.constexpr,
    STORE_EACH: tl.constexpr,
    STORE_LAST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    NUM_P_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = (tl.program_id(0) // NUM_P_BLOCKS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    p = (tl.program_id(0) % NUM_P_BLOCKS).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    n = tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    mask_p, mask_n = p < headdim, n < dstate
    mask = mask_p[:, None] & mask_n[None, :]

    first, length, rows = b * 0, T, T
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), first), total)
        length = end - first
        last_sequence = b == tl.num_programs(0) // NUM_P_BLOCKS - 1
        rows = tl.where(last_sequence, total - first, length)  # rows behind the last sequence are 0
    x_ptr += b * x_seq_stride + first * x_token_stride + head * x_head_stride + p * x_p_stride
    if HAS_Z:
        z_ptr += b * z_seq_stride + first * z_token_stride + head * z_head_stride + p * z_p_stride
    y_ptr += b * y_seq_stride + first * y_token_stride + head * y_head_stride + p * y_p_stride
    dt_ptr += b * dt_seq_stride + first * dt_token_stride + head * dt_head_stride
    B_ptr += b * B_seq_stride + first * B_token_stride + group * B_group_stride + n * B_n_stride
    C_ptr += b * C_seq_stride + first * C_token_stride + group * C_group_stride + n * C_n_stride
    state_ptr += head * state_head_stride + p[:, None] * state_p_stride + n[None, :] * state_n_stride

    slot, kept = b, b < nslots
    if HAS_READ_SLOTS:
        column, found = 0, True
        if HAS_NUM_ACCEPTED:
            column = tl.load(num_accepted_ptr + b) - 1
            found = (column >= 0) & (column < read_width)
        slot = tl.load(read_slots_ptr + b * read_width + column, found, other=-1).to(tl.int64)
        kept = (slot >= 0) & (slot < nslots) & (slot != null_slot)
    scale_ptr = state_scale_ptr
    if SCALED is not None:
        scale_ptr += head * scale_head_stride + p * scale_p_stride
        scale = tl.load(scale_ptr + slot * scale_slot_stride, mask_p & kept, other=0.0)  # [P]
        S = decode(tl.load(state_ptr + slot * state_slot_stride, mask & kept, other=0), SCALED) * scale[:, None]
        S = tl.where(mask, S, 0.0)  # where a scale is not finite, what is not there is
    else:
        S = tl.load(state_ptr + slot * state_slot_stride, mask & kept, other=0.0).to(tl.float32)  # [P, N]

    A = tl.load(A_ptr + head)
    dt_bias = 0.0
    if HAS_DT_BIAS:
        dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + head * D_head_stride + p * D_p_stride, mask_p, other=0.0).to(tl.float32)  # [P]
    seed = tl.zeros([], tl.int64)
    if STOCHASTIC:
        seed = tl.load(seed_ptr)

    steps = tl.where(kept, length, 0)
    for t in range(steps):
        x = tl.load(x_ptr, mask_p, other=0.0).to(tl.float32)  # [P]
        B = tl.load(B_ptr, mask_n, other=0.0).to(tl.float32)  # [N]
        C = tl.load(C_ptr, mask_n, other=0.0).to(tl.float32)  # [N]
        dt = step_size(tl.load(dt_ptr).to(tl.float32) + dt_bias, dt_min, dt_max, DT_SOFTPLUS)
        S = S * tl.exp(dt * A) + (dt * x)[:, None] * B[None, :]
        y = tl.sum(S * C[None, :], axis=1)
        if HAS_D:
            y += D * x
        if HAS_Z:
            z = tl.load(z_ptr, mask_p, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
            z_ptr += z_token_stride
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask_p)
        if STORE_EACH:
            place = tl.load(write_slots_ptr + b * write_width + t, t < write_width, other=-1).to(tl.int64)
            wanted = (place >= 0) & (place < nslots) & (place != null_slot)
            store_state(
                state_ptr, scale_ptr, S, place, head, p, t, seed, mask & wanted, state_slot_stride, scale_slot_stride,
                nheads, headdim, dstate, STOCHASTIC, ALIGNED, SCALED,
            )  # fmt: skip
        x_ptr += x_token_stride
        y_ptr += y_token_stride
        dt_ptr += dt_token_stride
        B_ptr += B_token_stride
        C_ptr += C_token_stride
    if STORE_LAST:
        place, wanted = slot, kept
        if HAS_WRITE_SLOTS:
            place = tl.load(write_slots_ptr + b).to(tl.int64)
            wanted = kept & (place >= 0) & (place < nslots) & (place != null_slot)
        t = tl.maximum(steps - 1, 0)
        store_state(
            state_ptr, scale_ptr, S, place, head, p, t, seed, mask & wanted, state_slot_stride, scale_slot_stride,
            nheads, headdim, dstate, STOCHASTIC, ALIGNED, SCALED,
        )  # fmt: skip
    for _ in range(steps, rows):
        tl.store(y_ptr, tl.zeros([BLOCK_P], y_ptr.dtype.element_ty), mask_p)
        y_ptr += y_token_stride


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    state_scale: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    update_state: bool,
    null_slot: int,
) -> None:
    """Fill y, store states. Tokens are (batch, ..), (batch, T, ..), or (total, ..) with cu_seqlens; rounding by `seed`,
    if any."""
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if batch == 0:
        y.zero_()
        return
    index = (dense(t) for t in (read_slots, write_slots, num_accepted, cu_seqlens))
    target = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}.get(state.dtype)
    if target is not None:
        state = state.view(torch.uint8)
    tensors = (state, x, dt, dense(A), B, C, D, z, dense(dt_bias), *index, seed, state_scale, y)
    options = (dt_softplus, dt_min, dt_max, update_state, null_slot, target)
    key = ("ssd_state_update", options, traits(*tensors))
    with on_device(x):
        plan(key, lambda: make_launch(*tensors, *options), x.device)(*tensors)


def make_launch(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    state_scale: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    update_state: bool,
    null_slot: int,
    target: str | None,
) -> Launch:
    nslots, nheads, headdim, dstate = state.shape
    packed = cu_seqlens is not None
    one_each = not packed and x.dim() == 3
    batch = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    block_p, block_n, num_warps = config(headdim, dstate, state.element_size(), batch * nheads)
    num_p_blocks = cdiv(headdim, block_p)
    each = write_slots is not None and write_slots.dim() == 2

    def strides(tensor):  # sequence, token, ..
        first, *rest = tensor.stride()
        return (0, first, *rest) if packed else (first, 0, *rest) if one_each else (first, *rest)

    scalars = (
        0 if packed else 1 if one_each else x.shape[1],
        x.shape[0] if packed else 0,
        nslots,
        nheads,
        headdim,
        dstate,
        nheads // B.shape[-2],
        read_slots.shape[1] if num_accepted is not None else 1,
        write_slots.shape[1] if each else 1,
        null_slot,
        dt_min,
        dt_max,
        *state.stride(),
        *((0, 0, 0) if state_scale is None else state_scale.stride()),
        *strides(x),
        *((0, 0, 0, 0) if z is None else strides(z)),
        *strides(y),
        *strides(dt),
        *strides(B),
        *strides(C),
        0 if D is None else D.stride(0),
        D.stride(1) if D is not None and D.dim() == 2 else 0,
    )
    return Launch(
        ssd_update_kernel,
        (batch * num_p_blocks, nheads),
        scalars,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_DT_BIAS=dt_bias is not None,
        DT_SOFTPLUS=dt_softplus,
        HAS_READ_SLOTS=read_slots is not None,
        HAS_WRITE_SLOTS=write_slots is not None,
        HAS_NUM_ACCEPTED=num_accepted is not None,
        PACKED=packed,
        STORE_EACH=update_state and each,
        STORE_LAST=update_state and not each,
        STOCHASTIC=seed is not None,
        ALIGNED=dstate % 8 == 0,
        SCALED=target,
        NUM_P_BLOCKS=num_p_blocks,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
