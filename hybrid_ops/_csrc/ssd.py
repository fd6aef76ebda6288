"""Launcher of csrc/ssd_sm90.cu, and what that kernel does not take."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from ..triton_kernels.ssd_states import first_interval, sources
from . import DTYPES

CHUNK = 64  # kChunk of csrc/ssd_sm90.cuh


class Config(NamedTuple):
    segment_chunks: int  # a sequence is cut into segments of so many chunks, which run side by side; 0: it is not
    parts: int  # of a segment, whose states are found side by side before


# microseconds, of an H100: of a block for a chunk; for a chunk's state alone, where a multiprocessor has one such block
# or two; and of a launch, and of two more for segments, beside their chunks
_CHUNK_US, _STATE_US, _TWO_STATES_US, _LAUNCH_US, _SEGMENTS_US = 0.96, 0.6, 0.9, 8.0, 12.0


@functools.cache
def config(
    nseq: int, total: int, nheads: int, headdim: int, dstate: int, batch_invariant: bool, num_sms: int
) -> Config:
    """For `total` tokens of `nseq` sequences: segments where there are too few blocks, one for each sequence's head,
    and where that saves more time than it takes to find the states that enter them."""
    if batch_invariant:
        return Config(segment_chunks=0, parts=1)
    blocks = nseq * nheads
    chunks = -(-total // (CHUNK * max(nseq, 1)))
    walkers = (2 if headdim > 64 else 1) * (2 if dstate > 128 else 1)  # see kWalkers of csrc/common/ssd_problem.cuh
    shared = 2 if walkers == 1 else 1  # blocks of a multiprocessor that find states

    def parts_of(segments: int) -> int:
        return max(1, min(4, shared * num_sms // (blocks * max(1, segments - 1))))

    def cost(segments: int) -> float:
        length, waves = -(-chunks // segments), -(-blocks * segments // num_sms)
        scan = waves * length * _CHUNK_US * walkers + _LAUNCH_US
        if segments == 1:
            return scan
        parts = parts_of(segments)
        finding = blocks * (segments - 1) * parts
        state = _STATE_US if finding <= num_sms else _TWO_STATES_US
        waves = -(-finding // (shared * num_sms))
        return scan + waves * -(-length // parts) * state * walkers + _SEGMENTS_US

    segments = min(range(1, 17), key=cost)
    if segments == 1:
        return Config(segment_chunks=0, parts=1)
    return Config(segment_chunks=-(-chunks // segments), parts=parts_of(segments))


def refusal(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    seq_idx: Tensor | None,
    small: tuple[Tensor | None, ...],
    y: Tensor,
    initial: Tensor | None,
    kept: tuple[Tensor | None, ...],
    state_interval: int,
) -> str | None:
    """Why this kernel cannot take the problem; None where it can. `small`: indices; `kept`: states that are written."""
    headdim, dstate = x.shape[3], B.shape[3]
    if x.dtype != torch.bfloat16:
        return f"the CUDA kernel is for bfloat16, not {x.dtype}"
    if z is not None and z.dtype != torch.bfloat16:
        return f"the CUDA kernel takes z in bfloat16, not {z.dtype}"
    if not 64 < dstate <= 256 or dstate % 8:
        return f"the CUDA kernel has dstate 72 to 256 in steps of 8, not {dstate}"
    widest = 128 if dstate <= 128 else 64
    if headdim > widest or headdim % 8:
        return f"the CUDA kernel has headdim up to {widest} in steps of 8 with dstate {dstate}, not {headdim}"
    if seq_idx is not None:
        return "the CUDA kernel has no seq_idx"
    if state_interval % CHUNK:
        return f"the CUDA kernel has chunks of {CHUNK} tokens, which do not divide state_interval={state_interval}"
    if any(t is not None and t.dtype != torch.float32 for t in kept):
        return "the CUDA kernel keeps states in float32"
    if x.numel() == 0 or x.shape[1] >= 2**31 - CHUNK:
        return f"the CUDA kernel has between 1 and 2^31 - {CHUNK} tokens, not {x.shape[1]}"
    for name, t in (("x", x), ("B", B), ("C", C), ("z", z), ("y", y)):
        if t is not None and not _boxes(t):
            return f"the CUDA kernel needs rows of {name} that begin at multiples of 16 bytes"
    if not A.is_contiguous() or any(t is not None and not t.is_contiguous() for t in small):
        return "the CUDA kernel needs contiguous A and indices"
    states = [t for t in (initial, *kept) if t is not None]
    if any(not (t[:1].is_contiguous() and t.stride(0) % 2 == 0) for t in states):
        return "the CUDA kernel needs contiguous states in each slot"
    if any(t.data_ptr() % 16 for t in states):
        return "the CUDA kernel needs states that begin at multiples of 16 bytes"
    return None


def _boxes(t: Tensor) -> bool:
    """Whether TMA takes it: unit stride, and 16 bytes under its address and every other stride that is ever taken."""
    strides = [t.stride(i) for i in range(3) if t.shape[i] > 1]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)


@_checks.remembered
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
    seq_idx: None,
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
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills y and the states, given the operator's arguments; for those of one signature."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    index = x.device.index
    num_sms = _device.num_sms(index)
    if chosen is None:
        chosen = config(nseq, batch * seqlen, nheads, headdim, dstate, batch_invariant, num_sms)
    places, length = nseq, chosen.segment_chunks
    if length and cu_seqlens is None:
        places = nseq * -(-(seqlen // CHUNK + 2) // length)  # a sequence may begin and end within a chunk
    elif length:
        places = seqlen // (CHUNK * length) + 2 * nseq
    states = sources(initial_states, final_states, interval_states, ssm_state, read_slots, write_slots, interval_slots)
    num_intervals = 0
    if interval_slots is not None:
        num_intervals = interval_slots.shape[1]
    elif interval_states is not None:
        num_intervals = interval_states.shape[-4]
    launch = extension.SsdScan(
        dtypes=tuple(DTYPES[(A if t is None else t).dtype] for t in (dt, dt_bias, D, *states)),
        sizes=(
            *(batch, seqlen, nheads, headdim, ngroups, dstate, nseq),
            *(0 if ssm_state is None else ssm_state.shape[0], num_intervals, state_interval),
        ),
        strides=(
            *((0, 0, 0) if t is None else t.stride()[:3] for t in (x, B, C, z, y, dt)),
            tuple(0 if t is None else t.stride(-4) for t in states),
        ),
        dt_bias_stride=0 if dt_bias is None else dt_bias.stride(0),
        D_strides=(0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0),
        dt_softplus=dt_softplus,
        dt_min=dt_min,
        dt_max=dt_max,
        null_slot=null_slot,
        config=(length, chosen.parts, places, num_sms),
    )
    floats = places * chosen.parts * nheads * (headdim * dstate + 1) if length else 0  # states of segments, and decays

    def run(*arguments: Any) -> None:
        *inputs, initial, _, cu_seqlens, offsets, read, write, interval_slots, y, final, interval, pool = arguments[:19]
        base = segments = None
        if interval is not None:
            interval.zero_()
            if cu_seqlens is not None:
                base = first_interval(cu_seqlens, offsets, state_interval)
        if pool is not None:
            initial, final, interval = sources(initial, final, interval, pool, read, write, interval_slots)
        if floats:
            segments = y.new_empty(floats, dtype=torch.float32)
        indices = (cu_seqlens, offsets, read, write, interval_slots)
        tensors = (*inputs, initial, *indices, y, final, interval, base, segments)
        launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))

    return run
