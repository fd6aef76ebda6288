"""Launcher of csrc/conv1d_sm90.cu, and what that kernel does not take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES


class Config(NamedTuple):
    channels: int  # of a thread, a vector of 8 or 16 bytes; it has 64 bytes of tokens
    columns: int  # threads of a CTA beside each other; its other threads have other tokens


_MOST_TOKENS = 2**31 - 64  # of a row
_VECTOR = 4  # channels that rows are to be whole numbers of


def config(dim: int, itemsize: int, alignment: int, parameters_fp32: bool = False) -> Config:
    """Vectors of 16 bytes where rows start at multiples of `alignment` >= 16, and CTAs whose threads all have one.

    Weights and biases of float32 beside 16-bit inputs have registers only with vectors of 8.
    """
    wide = alignment >= 16 and dim * itemsize % 16 == 0 and (itemsize == 4 or not parameters_fp32)
    channels = 16 // itemsize if wide else _VECTOR
    return Config(channels, columns=32 if dim // channels % 64 else 64)


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, states: Tensor | None, seq_idx: Tensor | None
) -> str | None:
    """Why this kernel cannot take the problem; None where it can. `states` is any one of the states or the pool."""
    if x.dtype not in DTYPES:
        return f"the CUDA kernel has no {x.dtype}"
    if not 2 <= weight.shape[1] <= 4:
        return f"the CUDA kernel has widths 2 to 4, not {weight.shape[1]}"
    if seq_idx is not None:
        return "the CUDA kernel has no seq_idx"
    for name, other in (("weight", weight), ("bias", bias), ("states", states)):
        if other is not None and other.dtype not in (x.dtype, torch.float32):
            return f"the CUDA kernel takes {name} in {x.dtype} or torch.float32, not {other.dtype}"
    if x.shape[1] >= _MOST_TOKENS:
        return f"the CUDA kernel counts tokens in 32 bits, not {x.shape[1]}"
    nbytes = _VECTOR * x.element_size()
    if x.shape[2] % _VECTOR:
        return f"the CUDA kernel needs dim to be a multiple of {_VECTOR}, not {x.shape[2]}"
    if x.stride(2) != 1 or y.stride(2) != 1:
        return "the CUDA kernel is channel-last"
    if not (_in_vectors(x) and _in_vectors(y)):
        return f"the CUDA kernel needs rows that start at multiples of {nbytes} bytes"
    if max(x.stride(1), y.stride(1)) >= 2**32:
        return "the CUDA kernel has token strides of 32 bits"
    return None


def _in_vectors(x: Tensor) -> bool:
    """Whether each token's channels are a whole number of the vectors that a thread reads at once."""
    return alignment(x) >= _VECTOR * x.element_size()


def alignment(*tensors: Tensor) -> int:
    """The largest number of bytes up to 16, a power of two, at whose multiples all tokens' rows start."""
    bits = 16
    for t in tensors:
        bits |= t.data_ptr()
        for i in (0, 1):
            bits |= t.stride(i) * t.element_size() if t.shape[i] > 1 else 0
    return bits & -bits


def _aligned(parameter: Tensor) -> Tensor:
    """The parameter as the kernels read it, in vectors."""
    parameter = parameter.contiguous()
    return parameter.clone() if parameter.data_ptr() % 16 else parameter


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    history: Tensor | None,
    state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    null_slot: int,
    chosen: Config | None = None,
) -> None:
    """Fill y; start from `history` and fill `state`, a row per sequence or a pool with slots."""
    small = (cu_seqlens, read_slots, write_slots)
    cu_seqlens, read_slots, write_slots = (None if t is None else t.contiguous() for t in small)
    bias = None if bias is None else _aligned(bias)
    tensors = (x, _aligned(weight), bias, history, y, state, cu_seqlens, read_slots, write_slots)
    make_launch(*tensors, silu, null_slot, chosen)(tensors)


def is_dense(weight: Tensor, bias: Tensor | None, *small: Tensor | None) -> bool:
    """Whether `conv1d` would copy none of them."""
    parameters = (weight, bias)
    return all(t is None or _aligned(t) is t for t in parameters) and all(t is None or t.is_contiguous() for t in small)


@_checks.remembered
def make_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    y: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    silu: bool,
    null_slot: int,
    chosen: Config | None = None,
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """What runs the kernel on such tensors, given in a tuple and in this order."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (batch, seqlen, dim), width, index = x.shape, weight.shape[1], x.device.index
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else state
    nslots, _, state_len = (nseq, dim, width - 1) if some_states is None else some_states.shape
    parameters_fp32 = any(t is not None and t.dtype == torch.float32 for t in (weight, bias))
    launch = extension.Conv1d(
        dtypes=tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        sizes=(batch, seqlen, dim, width, nseq, nslots, state_len),
        x_strides=x.stride()[:2],
        y_strides=y.stride()[:2],
        initial_strides=(0, 0, 0) if history is None else history.stride(),
        final_strides=(0, 0, 0) if state is None else state.stride(),
        null_slot=null_slot,
        silu=silu,
        config=chosen or config(dim, x.element_size(), alignment(x, y), parameters_fp32),
    )
    return lambda tensors: launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))


def is_readable(dy: Tensor) -> bool:
    """Whether `conv1d_bwd` would not copy it."""
    return dy.stride(2) == 1 and _in_vectors(dy) and dy.stride(1) < 2**32


def conv1d_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dhistory: Tensor | None,
    silu: bool,
) -> None:
    """Fill the gradients, of which dweight and dbias are contiguous and each has the dtype of what it belongs to.

    The forward has taken the problem; a `dy` whose strides the kernel does not take is copied.
    """
    if not is_readable(dy):
        dy = dy.contiguous()
    bias = None if bias is None else _aligned(bias)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    tensors = (dy, x, _aligned(weight), bias, history, dfinal, dx, dweight, dbias, dhistory, cu_seqlens)
    make_bwd_launch(*tensors, silu)(tensors)


@_checks.remembered
def make_bwd_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    dfinal: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dhistory: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Callable[[tuple[Any, ...]], None]:
    """As `make_launch`, of the backward."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (batch, seqlen, dim), width, index = x.shape, weight.shape[1], x.device.index
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else dfinal
    one_row = cu_seqlens is None and batch * seqlen < _MOST_TOKENS
    one_row = one_row and all(t.stride(0) == seqlen * t.stride(1) for t in (dy, x, dx))
    rows = 1 if one_row else batch
    in_boxes = alignment(x, dy) >= 16 and dim * x.element_size() % 16 == 0
    in_boxes = in_boxes and all(t.shape[i] == 1 or t.stride(i) > 0 for t in (x, dy) for i in (0, 1))  # TMA has no 0
    launch = extension.Conv1dBwd(
        dtypes=tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        sizes=(batch, seqlen, dim, width, nseq, rows),
        strides=tuple(t.stride()[:2] for t in (dy, x, dx)),
        state_strides=tuple((0, 0, 0) if t is None else t.stride() for t in (history, dfinal, dhistory)),
        silu=silu,
        in_boxes=in_boxes,
    )
    return lambda tensors: launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))
