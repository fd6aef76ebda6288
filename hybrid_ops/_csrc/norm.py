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


class BwdConfig(NamedTuple):
    vectors: int
    warps: int
    teams: int
    ctas: int  # of a group of features
    stages: int  # rows on their way to a team through shared memory


MAX_WARPS = 8  # of a CTA: kMaxNormWarps
_MOST_VECTORS = 6
_FEWEST = 128  # features of a group: with fewer most lanes would be idle
_CTA_VECTORS = 512  # of a forward CTA: 8 KiB of each tensor
_WARPS_PER_SM = 32  # of the forward, at least
_BYTES_UNDER_WAY = 68 * 1024  # of the backward, on a multiprocessor
_BYTES_OF_TWO_ROWS = 168 * 1024  # at most, of its teams there: with more, registers hold fewer teams


def _team(vectors: int, fewest: int) -> tuple[int, int]:
    """Vectors of a lane, `fewest` or more where a group has so many, and warps: the fewest idle lanes."""
    first = min(fewest, -(-vectors // 32))
    shapes = [(n, -(-vectors // (32 * n))) for n in range(first, _MOST_VECTORS + 1)]
    return min((s for s in shapes if s[1] <= MAX_WARPS), key=lambda s: (s[0] * s[1], s[0]))


def config(rows: int, groups: int, group_size: int, itemsize: int, num_sms: int) -> Config:
    """A team for each group of each row; itemsize: of the widest tensor.

    While all are on the GPU at once a row's latency counts, and lanes have one vector if that is enough. Later loads
    under way count, and two.
    """
    group = group_size * itemsize // 16
    vectors, warps = _team(group, fewest=1)
    if rows * groups * warps > num_sms * _WARPS_PER_SM:
        vectors, warps = _team(group, fewest=2)
    return Config(vectors, warps, teams=max(1, min(MAX_WARPS // warps, -(-_CTA_VECTORS // group), rows)))


def bwd_config(rows: int, groups: int, group_size: int, itemsize: int, num_sms: int) -> BwdConfig:
    """As many teams as are on the GPU at once; all of them have the same number of rows, to one.

    Teams of few warps were fastest with 12 warps a multiprocessor, larger ones with 16.
    """
    group = group_size * itemsize // 16
    vectors, warps = _team(group, fewest=1)
    teams = max(1, min(4 // warps, rows))
    row_bytes = 3 * 16 * 32 * vectors * warps * teams  # of a CTA's teams, in three tensors
    per_sm = max(1, min((12 if warps < 4 else 16) // (warps * teams), _BYTES_OF_TWO_ROWS // (2 * row_bytes)))
    ctas = max(1, per_sm * num_sms // groups)
    rows_of_team = max(1, -(-rows // (ctas * teams)))
    return BwdConfig(
        vectors,
        warps,
        teams,
        ctas=max(1, -(-rows // (rows_of_team * teams))),
        stages=min(4, max(2, _BYTES_UNDER_WAY // (per_sm * row_bytes))),
    )


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


def _problem(like: Tensor, stream: torch.dtype, group_size: int) -> tuple[int, int, int, int, int]:
    """What a configuration is chosen by; `like` has the shape and dtype of x."""
    hidden = like.shape[-1]
    itemsize = max(like.element_size(), stream.itemsize)
    return like.numel() // hidden, hidden // group_size, group_size, itemsize, _device.num_sms(like.device.index)


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
    chosen = chosen or config(*_problem(x, stream, group_size))
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
    """What fills the gradients, given the operator's nine tensors, those of dy, x, z and dh in rows; as `norm`."""
    index = x.device.index
    chosen = chosen or bwd_config(*_problem(dx, x.dtype, group_size))
    launch = _launch(
        *("NormBwd", chosen, dx, x.dtype, weight, (dy, x, dh if z is None else z)),
        *(group_size, z is not None, norm_before_gate, eps),
    )
    partials = chosen.ctas * x.shape[-1]

    def run(*tensors: Tensor | None) -> None:
        sums = torch.empty(partials, dtype=torch.float32, device=tensors[0].device)  # type: ignore[union-attr]
        launch((*tensors, sums), index, torch._C._cuda_getCurrentRawStream(index))

    return run
