"""Launchers of csrc/norm_sm90.cu and csrc/norm_bwd_sm90.cu, and what those kernels do not take."""

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
    ctas: int  # of a group of features
    stages: int  # rows on their way to a team through shared memory; 0: they come through registers


MAX_WARPS = 8  # of a CTA: kMaxNormWarps
_MOST_VECTORS = 6
_FEWEST = 128  # features of a group: with fewer most lanes would be idle


def team(vectors: int, most: int) -> tuple[int, int]:
    """Vectors of a lane and warps for a group of so many: the fewest idle lanes, then the fewest warps.

    A lane has more than `most` only where that takes too many warps.
    """
    shapes = [(n, -(-vectors // (32 * n))) for n in range(1, _MOST_VECTORS + 1)]
    return min((s for s in shapes if s[1] <= MAX_WARPS), key=lambda s: (s[0] > most, s[0] * s[1], s[1]))


def config(rows: int, groups: int, group_size: int, itemsize: int, num_sms: int) -> Config:
    """A team for each group of each row; itemsize: of the widest tensor."""
    vectors, warps = team(group_size * itemsize // 16, 4)
    teams = max(1, min(4 // warps, rows))
    return Config(vectors=vectors, warps=warps, teams=teams, ctas=max(1, -(-rows // teams)), stages=0)


def bwd_config(rows: int, groups: int, group_size: int, itemsize: int, num_sms: int) -> Config:
    """As many teams as are on the GPU at once; all of them have the same number of rows, to one."""
    vectors, warps = team(group_size * itemsize // 16, 5)
    teams = max(1, min(4 // warps, rows))
    ctas = max(1, 14 // (warps * teams) * num_sms // groups)
    rows_of_team = max(1, -(-rows // (ctas * teams)))
    return Config(vectors=vectors, warps=warps, teams=teams, ctas=max(1, -(-rows // (rows_of_team * teams))), stages=2)


def most_features(itemsize: int) -> int:
    """Of a group, by the size of an element of the widest tensor."""
    return MAX_WARPS * 32 * _MOST_VECTORS * 16 // itemsize


def refusal(
    dtype: torch.dtype, stream: torch.dtype, weight: Tensor, group_size: int, gated: bool, **tensors: Tensor | None
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
    most = most_features(max(dtype.itemsize, stream.itemsize))
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


def _launch(
    kind: str,
    config_of: Callable[..., Config],
    chosen: Config | None,
    like: Tensor,
    stream: torch.dtype,
    weight: Tensor,
    rows: tuple[Tensor | None, ...],
    group_size: int,
    gated: bool,
    norm_before_gate: bool,
    eps: float,
) -> tuple[Any, Config]:
    """The extension's object, and its configuration; `like` has the shape and dtype of x, `rows` have strides."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    hidden = like.shape[-1]
    num_rows, itemsize = like.numel() // hidden, max(like.element_size(), stream.itemsize)
    if chosen is None:
        chosen = config_of(num_rows, hidden // group_size, group_size, itemsize, _device.num_sms(like.device.index))
    launch = getattr(extension, kind)(
        dtypes=(DTYPES[like.dtype], DTYPES[stream], DTYPES[weight.dtype]),
        sizes=(num_rows, hidden, group_size),
        strides=tuple(0 if t is None else row_stride(t) for t in rows),
        gated=gated,
        norm_before_gate=norm_before_gate,
        eps=eps,
        config=chosen,
    )
    return launch, chosen


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
    launch, _ = _launch(
        *("Norm", config, chosen, x, stream, weight, (x, second, y, h)),
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
    chosen: Config | None = None,
) -> Callable[..., None]:
    """What fills the gradients, given the operator's nine tensors, those of dy, x, z and dh in rows; as `norm`."""
    index = x.device.index
    launch, chosen = _launch(
        *("NormBwd", bwd_config, chosen, dx, x.dtype, weight, (dy, x, dh if z is None else z)),
        *(group_size, z is not None, norm_before_gate, eps),
    )
    partials = chosen.ctas * x.shape[-1]

    def run(*tensors: Tensor | None) -> None:
        sums = torch.empty(partials, dtype=torch.float32, device=tensors[0].device)  # type: ignore[union-attr]
        launch((*tensors, sums), index, torch._C._cuda_getCurrentRawStream(index))

    return run
