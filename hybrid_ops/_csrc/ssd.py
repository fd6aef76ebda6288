"""Launcher of csrc/ssd_sm90.cu, and what that kernel does not take."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from ..triton_kernels.ssd_states import first_interval, sources
from . import DTYPES

CHUNK = 64  # kChunk of csrc/ssd_sm90.cuh


class Config(NamedTuple):
    segments: int  # of a sequence, which run side by side
    heads: int = 1  # that a CTA walks side by side: 2 where those of a group come in pairs, and segments is 1
    turns: int = 1  # CTAs that all walk a sequence, and make y of its chunks in turn: 2, where segments and heads are 1
    normed: bool = False  # y by the kernel itself; else, where a norm is asked for, by another kernel behind it


# microseconds, of an H100, of a chunk of one head: of its y, of its state alone, and where two CTAs take turns; by how
# many warpgroups walk a state, and of how many columns each; and of a chunk of two heads side by side
_CHUNK_US = {"headdim 64": (0.96, 0.52, 0.75), "headdim 128": (1.3, 0.88, 0.93), "dstate 256": (1.7, 0.8, 1.31)}
_PAIR_US = 1.6
# of a chunk of one head whose y is gated and normed, of an H200; of clearing what CTAs tell each other for that; of the
# norm's own kernel, beside its bytes
_NORMED_US = {"headdim 64": 1.36, "headdim 128": 2.18}
_CLEAR_US, _NORM_US, _NORM_BYTES_A_US = 2.5, 2.0, 4.0e6
# of a launch; of CTAs that tell each other their states, and of each of these states
_LAUNCH_US, _EXCHANGE_US, _STATE_US = 8.0, 3.0, 0.55


@functools.cache
def config(
    nseq: int,
    total: int,
    nheads: int,
    ngroups: int,
    headdim: int,
    dstate: int,
    batch_invariant: bool,
    num_sms: int,
    norm: bool = False,
) -> Config:
    """For `total` tokens of `nseq` sequences: where there are too few sequences' heads for all multiprocessors, two
    CTAs that take turns, or, where that saves more time than it takes to find the states that enter them, segments;
    pairs of heads where there are so many that even of these each multiprocessor has its share.

    norm: y is to be gated and normed, which this kernel can do itself; where not, another one behind it."""
    kind = "dstate 256" if dstate > 128 else "headdim 128" if headdim > 64 else "headdim 64"
    chunk, state, turn = _CHUNK_US[kind]
    chunks = -(-total // (CHUNK * max(nseq, 1)))

    def cost(config: Config) -> float:
        segments, heads, turns, normed = config
        together = nheads // ngroups if normed else 1
        at_once = num_sms // (segments * turns) // together * together
        if at_once == 0:
            return math.inf
        length, rounds = -(-chunks // segments), -(-nseq * (nheads // heads) // at_once)
        launches, of_y = _LAUNCH_US, chunk
        if normed:
            launches, of_y = _LAUNCH_US + _CLEAR_US, _NORMED_US[kind]
        elif norm:
            launches += _NORM_US + 6 * total * nheads * headdim / _NORM_BYTES_A_US
        if segments == 1:
            return rounds * length * (_PAIR_US if heads > 1 else turn if turns > 1 else of_y) + launches
        found = -(-length // 2) if segments == 2 else length  # see pieces_before of csrc/common/ssd_problem.cuh
        exchange = _EXCHANGE_US + _STATE_US * (segments - 1)
        return rounds * (length * of_y + found * state + exchange) + launches

    choices = [Config(1)]
    if num_sms >= 2:
        choices.append(Config(1, turns=2))
    if not batch_invariant:  # what has other sums
        choices += [Config(segments) for segments in range(2, min(16, num_sms) + 1)]
        if headdim <= 64 and dstate <= 128 and nheads // ngroups % 2 == 0:
            choices.append(Config(1, heads=2))
    if norm:
        choices.append(Config(1, normed=True))
        if headdim <= 64:
            choices += [Config(segments, normed=True) for segments in range(2, min(16, num_sms) + 1)]
    return min(choices, key=cost)


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
    for name, t, alignment in (("x", x, 16), ("B", B, 16), ("C", C, 16), ("z", z, 4), ("y", y, 16)):
        if t is not None and not _begins_at_multiples(t, alignment):
            return f"the CUDA kernel needs rows of {name} that begin at multiples of {alignment} bytes"
    if not A.is_contiguous() or any(t is not None and not t.is_contiguous() for t in small):
        return "the CUDA kernel needs contiguous A and indices"
    states = [t for t in (initial, *kept) if t is not None]
    if any(not (t[:1].is_contiguous() and t.stride(0) % 2 == 0) for t in states):
        return "the CUDA kernel needs contiguous states in each slot"
    if any(t.data_ptr() % 16 for t in states):
        return "the CUDA kernel needs states that begin at multiples of 16 bytes"
    return None


def norm_refusal(headdim: int, dstate: int, z: Tensor | None, norm_weight: Tensor, batch_invariant: bool) -> str | None:
    """Why this kernel cannot norm the y of a problem that it can take."""
    if z is None or z.dtype != torch.bfloat16 or not _begins_at_multiples(z, 4):
        return "the CUDA kernel norms y with a gate in bfloat16 whose rows begin at multiples of 4 bytes"
    if norm_weight.dtype != torch.bfloat16 or not norm_weight.is_contiguous() or norm_weight.data_ptr() % 4:
        return "the CUDA kernel norms y with contiguous weights in bfloat16"
    if headdim > 80 or dstate > 128:
        return f"the CUDA kernel norms y with headdim up to 80 and dstate up to 128, not {headdim} and {dstate}"
    if batch_invariant:
        return "the CUDA kernel norms y where that is faster, which depends on the batch"
    return None


def _begins_at_multiples(t: Tensor, nbytes: int) -> bool:
    """Of so many bytes: the address and every stride that is ever taken, but of neighbours. TMA takes those of 16."""
    strides = [t.stride(i) * t.element_size() for i in range(3) if t.shape[i] > 1]
    return t.stride(3) == 1 and t.data_ptr() % nbytes == 0 and all(stride % nbytes == 0 for stride in strides)


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
    norm_weight: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_interval: int,
    null_slot: int,
    batch_invariant: bool,
    norm_eps: float,
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
        norm = norm_weight is not None
        chosen = config(nseq, batch * seqlen, nheads, ngroups, headdim, dstate, batch_invariant, num_sms, norm)
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
        plain_z=z is not None and not _begins_at_multiples(z, 16),
        segments=chosen.segments,
        heads=chosen.heads,
        turns=chosen.turns,
        num_sms=num_sms,
        normed=chosen.normed,
        norm_eps=norm_eps,
    )

    def run(*arguments: Any) -> None:
        *inputs, initial, _, cu_seqlens, offsets, read, write, interval_slots = arguments[:15]
        y, final, interval, pool, norm_weight = arguments[15:20]
        base = None
        if interval is not None:
            interval.zero_()
            if cu_seqlens is not None:
                base = first_interval(cu_seqlens, offsets, state_interval)
        if pool is not None:
            initial, final, interval = sources(initial, final, interval, pool, read, write, interval_slots)
        indices = (cu_seqlens, offsets, read, write, interval_slots)
        tensors = (*inputs, initial, *indices, y, final, interval, base, norm_weight)
        launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))

    return run
