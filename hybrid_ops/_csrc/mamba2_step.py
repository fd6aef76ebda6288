"""Launcher of csrc/mamba2_step_sm90.cu, and what that kernel does not take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES
from .ssd_update import DSTATES

MAX_WARPS = 8  # two CTAs of 128 registers a thread share a multiprocessor
CHANNELS = 4  # that a thread convolves
FILLED = 0.9  # of the multiprocessors' places for CTAs: nearly even
MAX_ROWS = 2048  # of a CTA: its features are in shared memory
HEADDIM = 8  # or a multiple: whole tiles, and no more heads than threads


class Config(NamedTuple):
    cluster: int  # CTAs that share a group of the norm, each with consecutive features
    warps: int  # of a CTA
    crowded: bool  # not all CTAs begin at once


def tile(dstate: int) -> int:
    """Features that a warp takes at once: StepLayout of the kernel."""
    return 4 if dstate == 256 else 8


def config(
    batch: int, nheads: int, headdim: int, dstate: int, group_size: int, rows_per_group: int, num_sms: int
) -> Config | None:
    """The largest cluster, of 8 at most, whose CTAs have whole tiles, of heads of one group of B and C; None: no such.

    With more than one sequence, of CTAs of 128 features where there are such: each convolves B and C anew. But of two,
    with at most 512 features each, where these give every multiprocessor one CTA, or two: all are there at once then.
    A CTA has a warp for each tile and a thread for every four channels that it convolves, where there are as many.
    """
    rows_of_tile = tile(dstate)
    if group_size % rows_per_group or headdim % HEADDIM:
        return None

    def fits(cluster: int) -> bool:
        rows = group_size // cluster
        whole = group_size % cluster == 0 and rows % rows_of_tile == 0 and rows_per_group % rows == 0
        return whole and (rows % headdim == 0 or headdim % rows == 0) and rows <= MAX_ROWS

    clusters = [cluster for cluster in (8, 4, 2, 1) if fits(cluster)]
    if not clusters:
        return None
    cluster = next((c for c in clusters if batch == 1 or group_size // c >= 128), clusters[0])
    halves = 2 * batch * nheads * headdim // group_size  # CTAs of clusters of two
    if any(FILLED < halves / (n * num_sms) <= 1 for n in (1, 2)) and 2 in clusters and group_size // 2 <= 512:
        cluster = 2
    rows = group_size // cluster
    tiles, threads = rows // rows_of_tile, (2 * dstate + rows) // CHANNELS
    warps = max(-(-tiles // -(-tiles // MAX_WARPS)), min(-(-threads // 32), MAX_WARPS))
    return Config(cluster, warps, crowded=batch * nheads * headdim // rows > 2 * num_sms)


def rows_per_group(zxbcdt: Tensor, state: Tensor) -> int:
    """Features whose heads share B and C."""
    _, nheads, headdim, dstate = state.shape
    ngroups = (zxbcdt.shape[1] - 2 * nheads * headdim - nheads) // (2 * dstate)
    return nheads * headdim // ngroups


def refusal(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    slots: Tensor | None,
    y: Tensor,
    group_size: int,
) -> str | None:
    """Why this kernel cannot take the problem; None where it can."""
    others = (conv_bias, A, D, dt_bias, norm_weight, slots)
    for name, tensor in (("zxbcdt", zxbcdt), ("state", state), ("conv_state", conv_state)):
        if tensor.dtype not in DTYPES:
            return f"the CUDA kernel has no {tensor.dtype} for {name}"
    _, nheads, headdim, dstate = state.shape
    if dstate not in DSTATES:
        return f"the CUDA kernel has dstate {', '.join(map(str, DSTATES))}, not {dstate}"
    number = 16 // state.element_size()
    if state.stride(3) != 1 or any(stride % number for stride in state.stride()[:3]):
        return "the CUDA kernel needs rows of the state that begin at multiples of 16 bytes"
    width = conv_weight.shape[1]
    if not 2 <= width <= 4 or conv_state.shape[2] != width - 1 or not conv_weight.is_contiguous():
        return f"the CUDA kernel has contiguous widths 2 to 4 and width - 1 columns, not {width}, {conv_state.shape[2]}"
    if zxbcdt.stride(1) != 1 or y.stride(1) != 1:
        return "the CUDA kernel needs neighbours in rows of zxbcdt and y"
    if state.data_ptr() % 16 or conv_weight.data_ptr() % 16:
        return "the CUDA kernel needs state and conv_weight to begin at multiples of 16 bytes"
    if config(1, nheads, headdim, dstate, group_size, rows_per_group(zxbcdt, state), 1) is None:
        return (
            "the CUDA kernel needs norm groups of whole groups of B and C, in up to 8 equal parts of whole heads of "
            f"{HEADDIM} n features; not {group_size} of headdim {headdim}"
        )
    strides = (*conv_state.stride()[1:], *state.stride()[1:], *(s for t in others if t is not None for s in t.stride()))
    if max(zxbcdt.shape[0], y.shape[1]) > 65535 or max(*strides, *conv_state.shape, *zxbcdt.shape) >= 2**31:
        return (
            "the CUDA kernel counts sequences, and features, up to 65535, and has 32 bits for strides but those of "
            "rows and slots"
        )
    return None


@_checks.remembered
def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    slots: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    null_slot: int,
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills y and moves both pools on, given the operator's arguments; for those of one signature."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (nslots, nheads, headdim, dstate), batch, index = state.shape, zxbcdt.shape[0], zxbcdt.device.index
    rows, num_sms = rows_per_group(zxbcdt, state), _device.num_sms(index)
    if chosen is None:
        chosen = config(batch, nheads, headdim, dstate, group_size, rows, num_sms)
    tensors = (zxbcdt, conv_state, state, conv_weight, conv_bias, D, dt_bias, norm_weight)
    launch = extension.Mamba2Step(
        dtypes=tuple(DTYPES[(zxbcdt if t is None else t).dtype] for t in tensors),
        sizes=(batch, nslots, nheads, headdim, dstate, *conv_weight.shape, group_size, rows),
        row_strides=(zxbcdt.stride(0), y.stride(0)),
        conv_strides=conv_state.stride(),
        state_strides=state.stride()[:3],
        small_strides=(
            *(0 if conv_bias is None else conv_bias.stride(0), A.stride(0)),
            *((0, 0) if D is None else (*D.stride(), 0)[:2]),
            *(0 if t is None else t.stride(0) for t in (dt_bias, norm_weight, slots)),
        ),
        null_slot=null_slot,
        dt_limit=(dt_min, dt_max),
        eps=eps,
        dt_softplus=dt_softplus,
        norm_before_gate=norm_before_gate,
        config=chosen,
    )

    def run(*arguments: Any) -> None:
        """The operator's twelve tensors, .."""
        if batch:
            launch(arguments, index, torch._C._cuda_getCurrentRawStream(index))

    return run
