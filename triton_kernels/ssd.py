"""Forward of the chunked SSD scan (Mamba-2) in three launches: the decay inside chunks, the walk of the states from
chunk to chunk, the scan of each chunk. Kernels and letters: ssd_kernels.py.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, architecture, cdiv, dense, next_power_of_2, on_device, plan, traits
from .ssd_kernels import chunk_decay_kernel, chunk_scan_kernel, state_walk_kernel
from .ssd_states import first_interval, sources


class Config(NamedTuple):
    Q: int  # tokens of a chunk
    BLOCK_M: int  # tokens of one program of K3: Q or Q / 2
    BLOCK_N: int  # columns of the state that one program of K2 walks with
    HEADS: int  # heads of one program of K3, which share C, B and C B^T
    WALK_WARPS: int
    WALK_STAGES: int
    SCAN_WARPS: int
    SCAN_STAGES: int


@functools.cache
def config(
    headdim: int, dstate: int, heads_per_group: int, dtype: torch.dtype, state_interval: int, arch: int
) -> Config:
    """Chunks end where states are kept. sm_86, 89, 120 have too little shared memory for long chunks or two stages."""
    small = arch in (86, 89, 120)
    large_state = headdim > 64 or dstate > 128
    q = 32 if dtype == torch.float32 or (small and large_state) else 64 if small or dstate > 128 else 128
    if state_interval:
        q = min(q, state_interval & -state_interval)  # the largest power of two that divides it
    columns = next_power_of_2(max(dstate, 16))
    if dtype != torch.float16:  # whose states have one unit for all columns
        columns = min(128 if q == 128 else 64, columns)
    return Config(
        Q=q,
        BLOCK_M=min(q, 64),
        BLOCK_N=columns,
        HEADS=next(n for n in (16, 8, 4, 2, 1) if heads_per_group % n == 0),
        WALK_WARPS=8 if columns > 128 or (q == 128 and headdim > 64) else 4,
        WALK_STAGES=3,
        SCAN_WARPS=4,
        SCAN_STAGES=1 if small and large_state else 2,
    )


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
    """Fill y and the states. `ssm_state` is read through `read_slots` and written through the other two."""
    options = (dt_softplus, dt_min, dt_max, state_interval, null_slot)
    slots = (read_slots, write_slots, interval_slots)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, seq_offsets, *slots)
    results = (y, final_states, interval_states, ssm_state)
    p = plan(
        ("ssd_chunk_scan", options, traits(*tensors, *results)),
        lambda: make_plan(*tensors, *results, *options),
        x.device,
    )
    if p is None:  # strides that kernels do not take: one copy
        x, B, C, z = (t.contiguous() if _loose(t) else t for t in (x, B, C, z))
        small = (dense(t) for t in (A, initial_states, cu_seqlens, seq_offsets, *slots))
        A, initial_states, cu_seqlens, seq_offsets, *slots = small
        packed_y = y.new_empty(y.shape) if _loose(y) else y
        ssd_chunk_scan(
            *(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, seq_offsets, *slots, packed_y),
            *(final_states, interval_states, ssm_state, *options, batch_invariant),
        )
        if packed_y is not y:
            y.copy_(packed_y)
        return
    if interval_states is not None:
        interval_states.zero_()
    if p.slots == 0:
        return
    states = sources(initial_states, *results[1:], *slots)
    interval_base = None
    if interval_states is not None and cu_seqlens is not None:
        interval_base = first_interval(cu_seqlens, seq_offsets, state_interval)
    runs = None if seq_idx is None else run_numbers(seq_idx)
    ab = x.new_empty(p.ab_shape, dtype=p.ab_dtype)
    entering = x.new_empty(p.entering_shape)
    unit = x.new_empty(p.entering_shape[:2], dtype=torch.float32) if x.dtype == torch.float16 else None
    with on_device(x):
        p.decay(dt, A, dt_bias, runs, cu_seqlens, seq_offsets, ab)
        p.walk(
            *(x, B, ab, runs, cu_seqlens, seq_offsets, *states, *slots, interval_base, entering, unit),
        )
        if p.scan is not None:
            p.scan(x, B, C, D, z, ab, runs, cu_seqlens, seq_offsets, entering, unit, y)


class ScanPlan(NamedTuple):
    slots: int  # places for chunks
    ab_shape: tuple[int, ...]
    ab_dtype: torch.dtype
    entering_shape: tuple[int, ...]
    decay: Launch
    walk: Launch
    scan: Launch | None  # there is no y


def _loose(t: Tensor | None) -> bool:
    return t is not None and t.shape[3] > 1 and t.stride(3) != 1


def make_plan(
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
) -> ScanPlan | None:
    """None where some tensor has to be copied first."""
    small = (A, initial_states, cu_seqlens, seq_offsets, read_slots, write_slots, interval_slots)
    if any(map(_loose, (x, B, C, z, y))) or not all(t is None or t.is_contiguous() for t in small):
        return None
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    nseq = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    cfg = config(headdim, dstate, nheads // ngroups, x.dtype, state_interval, architecture(x))
    Q, HEADS = cfg.Q, cfg.HEADS
    slots = seqlen // Q + 2 * nseq if cu_seqlens is not None else batch * (seqlen // Q + 2)
    # a wgmma operand of 16 columns made Triton 3.6 read beyond its shared memory (headdim 8 on an H200)
    BLOCK_P = max(64, next_power_of_2(headdim))
    BLOCK_H = min(16, next_power_of_2(nheads))
    sizes = (nheads, nheads // ngroups, headdim, dstate)
    initial, final, interval = sources(
        initial_states, final_states, interval_states, ssm_state, read_slots, write_slots, interval_slots
    )
    state_strides = (0 if t is None else t.stride(-4) for t in (initial, final, interval))
    num_slots = 0 if ssm_state is None else ssm_state.shape[0]
    num_intervals = 0
    if interval_slots is not None:
        num_intervals = interval_slots.shape[1]
    elif interval_states is not None:
        num_intervals = interval_states.shape[-4]
    stored = [x] if x.dtype == torch.float16 else [t for t in (final, interval) if t is not None]
    exact_operand = x.element_size() == 2 and any(t.element_size() == 2 for t in stored)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    x_strides, B_strides = x.stride()[:3], B.stride()[:3]
    D_strides = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    decay = Launch(
        chunk_decay_kernel,
        slots * cdiv(nheads, BLOCK_H),
        (seqlen, nheads, nseq, *dt.stride(), 0 if dt_bias is None else dt_bias.stride(0), dt_min, dt_max)
        + (dt_softplus, Q, BLOCK_H),
        num_warps=4,
    )
    walk = Launch(
        state_walk_kernel,
        cdiv(dstate, cfg.BLOCK_N) * nheads * nseq,
        (seqlen, null_slot, num_slots, num_intervals, *x_strides, *B_strides, *state_strides)
        + (*sizes, state_interval, exact_operand, precision, Q, cfg.BLOCK_N, BLOCK_P),
        num_warps=cfg.WALK_WARPS,
        num_stages=cfg.WALK_STAGES,
    )
    scan = Launch(
        chunk_scan_kernel,
        slots * (Q // cfg.BLOCK_M) * (nheads // HEADS),
        (seqlen, nseq, *x_strides, *B_strides, *C.stride()[:3], *((0, 0, 0) if z is None else z.stride()[:3]))
        + (*y.stride()[:3], *D_strides, *sizes, D is not None and D.dim() == 2, precision, HEADS, Q, cfg.BLOCK_M)
        + (next_power_of_2(max(dstate, 16)), BLOCK_P),
        num_warps=cfg.SCAN_WARPS,
        num_stages=cfg.SCAN_STAGES,
    )
    return ScanPlan(
        slots,
        (slots, nheads, 2, Q),
        torch.float32 if x.dtype == torch.bfloat16 else torch.float64,
        (slots, nheads, dstate, headdim),
        *(decay, walk, scan if seqlen else None),
    )


def run_numbers(seq_idx: Tensor) -> Tensor:
    """(batch, seqlen) int32: how often the sequence has changed so far in the row; the complement of it at padding."""
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    real = torch.where(seq_idx >= 0, position, -1)
    last = torch.nn.functional.pad(real.cummax(1).values, (1, 0), value=-1)[:, :-1]  # last real token before this one
    previous = seq_idx.gather(1, last.clamp(min=0))
    changed = (seq_idx >= 0) & (last >= 0) & (seq_idx != previous)
    run = changed.cumsum(1, dtype=torch.int32)
    return torch.where(seq_idx >= 0, run, ~run)
