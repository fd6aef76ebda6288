"""Launcher of csrc/ssd_update_sm90.cu, and what that kernel does not take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES

STATE_DTYPES = {**DTYPES, torch.float8_e4m3fn: 3, torch.int8: 4}

DSTATES = (64, 128, 256)


class Config(NamedTuple):  # where there is one token of each sequence
    warps: int  # of a CTA
    rows: int  # of a warp


def config(
    headdim: int, dstate: int, sequences_times_heads: int, num_sms: int, itemsize: int, stochastic: bool
) -> Config:
    """4 KB of states for a CTA, which was fastest; but where those of 8 bits or stochastic rounding bring arithmetic
    16 rows of a warp, which share what it does for a head.

    Another form, 4 rows, where a multiprocessor would get less than 16 warps, or most of a head's last CTA be idle.
    """
    tile = 2048 // dstate  # rows of which a lane has eight pieces
    if itemsize == 1 or stochastic:
        rows = 16
        warps = min((4, 5), key=lambda n: -headdim % (n * min(rows, tile)))  # 5: a head of 80
    else:
        warps, rows = 2, tile // itemsize
    idle = -headdim % (warps * min(rows, tile))
    filling = sequences_times_heads * headdim // rows >= 16 * num_sms
    return Config(warps, rows) if filling and idle < headdim / 4 else Config(warps=4, rows=4)


def refusal(x: Tensor, state: Tensor, others: tuple[Tensor | None, ...], batch: int) -> str | None:
    """Why this kernel cannot take the problem; None where it can."""
    for name, tensor, dtypes in (("x", x, DTYPES), ("state", state, STATE_DTYPES)):
        if tensor.dtype not in dtypes:
            return f"the CUDA kernel has no {tensor.dtype} for {name}"
    nslots, nheads, headdim, dstate = state.shape
    if dstate not in DSTATES:
        return f"the CUDA kernel has dstate {', '.join(map(str, DSTATES))}, not {dstate}"
    number = 16 // state.element_size()
    if state.stride(3) != 1 or any(stride % number for stride in state.stride()[:3]) or state.data_ptr() % 16:
        return "the CUDA kernel needs rows of the state that begin at multiples of 16 bytes"
    if max(batch, nheads) > 65535:
        return f"the CUDA kernel has grids of 65535 sequences by 65535 heads, not {batch} by {nheads}"
    sizes = (nslots, headdim, *x.shape)
    strides = (*state.stride()[1:], *(stride for t in (x, *others) if t is not None for stride in t.stride()))
    if max(*sizes, *strides) >= 2**31:
        return "the CUDA kernel has 32 bits for every stride but that of slots"
    return None


@_checks.remembered
def ssd_state_update(
    x: Tensor,
    state: Tensor,
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
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills y and stores states, given the operator's arguments; for those of one signature."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    nslots, nheads, headdim, dstate = state.shape
    packed = cu_seqlens is not None
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    one_each = not packed and x.dim() == 3
    each = write_slots is not None and write_slots.dim() == 2
    read_width = 1 if num_accepted is None or read_slots is None else read_slots.shape[1]
    write_width = 1 if write_slots is None or not each else write_slots.shape[1]

    def token_strides(strides: tuple[int, ...] | None) -> tuple[int, ...]:  # sequence, token, head, element
        if strides is None:
            return 0, 0, 0, 0
        first, *rest = strides
        whole = (0, first, *rest) if packed else (first, 0, *rest) if one_each else strides
        return (*whole, 0)[:4]

    def two(tensor: Tensor | None) -> tuple[int, ...]:
        return (0, 0) if tensor is None else (*tensor.stride(), 0)[:2]

    index = x.device.index
    num_sms = _device.num_sms(index)
    if chosen is None:
        chosen = config(headdim, dstate, batch * nheads, num_sms, state.element_size(), seed is not None)
    launch = extension.SsdUpdate(
        dtypes=tuple(STATE_DTYPES[(x if t is None else t).dtype] for t in (state, x, dt, D, z, dt_bias)),
        sizes=(
            *(batch, 1 if packed or one_each else x.shape[1], x.shape[0] if packed else 0),
            *(nslots, nheads, headdim, dstate, B.shape[-2], read_width, write_width),
        ),
        state_strides=state.stride()[:3],
        scale_strides=(0, 0, 0) if state_scale is None else state_scale.stride(),
        token_strides=tuple(
            token_strides(s)
            for s in (x.stride(), None if z is None else z.stride(), y.stride(), dt.stride(), B.stride(), C.stride())
        ),
        small_strides=(
            A.stride(0),
            0 if dt_bias is None else dt_bias.stride(0),
            *(*two(D), *two(read_slots), *two(write_slots)),
            0 if num_accepted is None else num_accepted.stride(0),
            0 if cu_seqlens is None else cu_seqlens.stride(0),
        ),
        null_slot=null_slot,
        dt_limit=(dt_min, dt_max),
        dt_softplus=dt_softplus,
        store_each=update_state and each,
        store_last=update_state and not each,
        config=chosen,
        num_sms=num_sms,
    )

    def run(*arguments: Any) -> None:
        if batch == 0:
            arguments[15].zero_()  # y, the last of the 16 tensors
            return
        launch(arguments, index, torch._C._cuda_getCurrentRawStream(index))

    return run
