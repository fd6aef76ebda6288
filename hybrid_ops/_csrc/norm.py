"""Launchers of csrc/norm_sm90.cu and csrc/norm_bwd_sm90.cu, and what those kernels do not take."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES


class Config(NamedTuple):
    vectors: int  # of 16 bytes of the widest tensor, of a lane
    warps: int  # of a team, which has a group of a row
    teams: int  # of a CTA
    streaming: bool  # what is written leaves L2 first


class BwdConfig(NamedTuple):
    vectors: int
    warps: int  # of a team
    teams: int  # of a CTA
    ctas: int  # of a group of features
    streaming: bool  # as above


MAX_WARPS = 16  # of a CTA: kMaxNormWarps
_MOST_VECTORS = 3  # of the forward
_FEWEST = 128  # features of a group: with fewer most lanes would be idle
_CTA_VECTORS = 256  # of a forward CTA: 4 KiB of each tensor; with fewer, starting CTAs takes longer than their work
_MOST_BWD_CTAS = 3  # of a multiprocessor: four did not run at a time, perhaps for their barriers
_L2_BYTES = 50 * 2**20


def config(rows: int, group_size: int, itemsize: int, written: int) -> Config:
    """A team for each group of each row, with the fewest idle lanes, and of those the fewest vectors of a lane.

    itemsize: of the widest tensor. written: bytes.
    """
    group = group_size * itemsize // 16
    shapes = [(n, -(-group // (32 * n))) for n in range(1, _MOST_VECTORS + 1)]
    vectors, warps = min((s for s in shapes if s[1] <= MAX_WARPS), key=lambda s: (s[0] * s[1], s[0]))
    teams = max(1, min(MAX_WARPS // warps, -(-_CTA_VECTORS // group), rows))
    return Config(vectors, warps, teams, _is_streaming(written))


def _is_streaming(written: int) -> bool:
    """More bytes than half of L2 are not there any more when the next kernel reads them, so they may as well leave it
    first, which is up to 3% faster; fewer are."""
    return written > _L2_BYTES // 2


def _most_bwd_vectors(itemsize: int, gated: bool) -> int:
    """kMostNormBwdVectors."""
    return 6 if itemsize == 4 else 3 if gated else 4


def _bwd_warps(vectors: int, gated: bool) -> tuple[int, int]:
    """Of a CTA at most, kNormBwdWarps, and of a multiprocessor, so many of kNormBwdCtas."""
    most_of_cta = ((10, 2), (12, 1)) if gated else ((10, 2), (8, 2), (12, 1))
    warps, ctas = most_of_cta[vectors - 1] if vectors <= len(most_of_cta) else (8, 1)
    return warps, warps * ctas


def bwd_config(
    rows: int, groups: int, group_size: int, itemsize: int, gated: bool, num_sms: int, written: int
) -> BwdConfig:
    """The shape of a team with which a multiprocessor has most bytes under way; as many teams as there is room for, in
    the fewest CTAs that leave none out.

    Of what was measured nothing else decided: with 24 KiB of a row's tensors under way at a time a kernel reached 0.85
    of a copy, with 30 0.89, with 36 0.92. Of equal shapes the one with the fewest idle lanes. All CTAs have the same
    number of rows, to one of each team.
    """
    group = group_size * itemsize // 16

    def under_way(shape: tuple[int, int]) -> tuple[int, int, int]:
        vectors, warps = shape
        return _bwd_warps(vectors, gated)[1] // warps * group, -vectors * warps, -vectors

    shapes = [(n, -(-group // (32 * n))) for n in range(1, _most_bwd_vectors(itemsize, gated) + 1)]
    vectors, warps = max((s for s in shapes if s[1] <= _bwd_warps(s[0], gated)[0]), key=under_way)
    of_cta, of_sm = (most // warps for most in _bwd_warps(vectors, gated))
    grids = [(min(of_cta, of_sm // n), max(1, n * num_sms // groups)) for n in range(1, min(of_sm, _MOST_BWD_CTAS) + 1)]
    teams, ctas = max(grids, key=math.prod)
    teams = max(1, min(teams, -(-rows // ctas)))
    rows_of_team = max(1, -(-rows // (ctas * teams)))
    ctas = -(-rows // (rows_of_team * teams))
    return BwdConfig(vectors, warps, teams, max(1, ctas), _is_streaming(written))


def most_features(itemsize: int) -> int:
    """Of a group, by the size of an element of the widest tensor."""
    return MAX_WARPS * 32 * _MOST_VECTORS * 16 // itemsize


def most_bwd_features(itemsize: int, gated: bool) -> int:
    vectors = range(1, _most_bwd_vectors(itemsize, gated) + 1)
    return max(n * _bwd_warps(n, gated)[0] for n in vectors) * 32 * 16 // itemsize


def refusal(
    dtype: torch.dtype,
    stream: torch.dtype,
    weight: Tensor,
    group_size: int,
    gated: bool,
    backward: bool = False,
    **tensors: Tensor | None,
) -> str | None:
    """Why these kernels cannot take the problem; None where they can.

    dtype: of x and y; stream: of z or the residual. `tensors`: all that have rows.
    """
    for each in (dtype, stream, weight.dtype):
        if each not in DTYPES:
            return f"the CUDA kernel has no {each}"
    if stream != dtype and (gated or stream != torch.float32):
        kind = "z in" if gated else "the residual in torch.float32 or"
        return f"the CUDA kernel takes {kind} {dtype}, as x, not {stream}"
    if weight.dtype not in (dtype, torch.float32):
        return f"the CUDA kernel takes weight in {dtype} or torch.float32, not {weight.dtype}"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return "the CUDA kernel needs a contiguous weight that begins at a multiple of 16 bytes"
    itemsize = max(dtype.itemsize, stream.itemsize)
    most = most_bwd_features(itemsize, gated) if backward else most_features(itemsize)
    if group_size * dtype.itemsize % 16 or not _FEWEST <= group_size <= most:
        return f"the CUDA kernel has groups of {_FEWEST} to {most} features, whole pieces of 16 bytes, not {group_size}"
    for name, tensor in tensors.items():
        if tensor is not None and not is_rows(tensor):
            return f"the CUDA kernel needs rows that begin at multiples of 16 bytes, of neighbours, not so in {name}"
        if tensor is not None and tensor.numel() >= 2**31 * tensor.shape[-1]:
            return "the CUDA kernel counts rows in 32 bits"
    return None


def is_rows(tensor: Tensor) -> bool:
    stride = row_stride(tensor)
    return stride is not None and stride * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def in_rows(tensor: Tensor) -> Tensor:
    return tensor if is_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def row_stride(tensor: Tensor) -> int | None:
    """Elements from a row to the next; None where rows are not so far apart each, or their elements no neighbours."""
    if tensor.numel() == 0:
        return 0
    *outer, last = zip(tensor.shape, tensor.stride(), strict=True)
    if last[1] != 1 and last[0] > 1:
        return None
    found, span = None, 0
    for size, stride in reversed(outer):
        if size == 1:
            continue
        if found is None:
            found = stride
        elif stride != span:
            return None
        span = size * stride
    return found or 0


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _launch(
    kind: str,
    chosen: Config | BwdConfig,
    like: Tensor,
    stream: torch.dtype,
    weight: Tensor,
    rows: tuple[Tensor | None, ...],
    group_size: int,
    gated: bool,
    norm_before_gate: bool,
    eps: float,
) -> Any:
    """The extension's object; `like` has the shape and dtype of x, `rows` have strides."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    hidden = like.shape[-1]
    return getattr(extension, kind)(
        dtypes=(DTYPES[like.dtype], DTYPES[stream], DTYPES[weight.dtype]),
        sizes=(like.numel() // hidden, hidden, group_size),
        strides=tuple(0 if t is None else row_stride(t) for t in rows),
        gated=gated,
        norm_before_gate=norm_before_gate,
        eps=eps,
        config=chosen,
    )


@_checks.remembered
def norm(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills y and h, given the operator's arguments; for those of one signature."""
    second = residual if z is None else z
    index, stream = x.device.index, x.dtype if second is None else second.dtype
    if chosen is None:
        itemsize = max(x.element_size(), stream.itemsize)
        chosen = config(x.numel() // x.shape[-1], group_size, itemsize, _num_bytes(y, h))
    launch = _launch(
        *("Norm", chosen, x, stream, weight, (x, second, y, h)),
        *(group_size, z is not None, norm_before_gate, eps),
    )
    if x.numel() == 0:
        return lambda *_: None
    return lambda *arguments: launch(arguments, index, torch._C._cuda_getCurrentRawStream(index))


@_checks.remembered
def norm_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    dh: Tensor | None,
    dx: Tensor,
    dz: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    chosen: BwdConfig | None = None,
) -> Callable[..., None]:
    """What fills the gradients, given the operator's arguments, of which dy, x, z and dh have rows; as `norm`."""
    index = x.device.index
    if chosen is None:
        hidden, itemsize = x.shape[-1], max(dx.element_size(), x.element_size())
        problem = (x.numel() // hidden, hidden // group_size, group_size, itemsize, z is not None)
        chosen = bwd_config(*problem, _device.num_sms(index), _num_bytes(dx, dz, dresidual))
    launch = _launch(
        *("NormBwd", chosen, dx, x.dtype, weight, (dy, x, dh if z is None else z)),
        *(group_size, z is not None, norm_before_gate, eps),
    )
    return lambda *arguments: launch(arguments, index, torch._C._cuda_getCurrentRawStream(index))
