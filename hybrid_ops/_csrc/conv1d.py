"""Launcher of csrc/conv1d_sm90.cu, and what that kernel does not take."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES


class Config(NamedTuple):
    tokens_per_thread: int


_VECTOR = 4  # channels of a thread
_STEP = 4  # tokens that a thread has under way: kLoads
# by bytes of an element, what a multiprocessor holds at once: kMinBlocks blocks of kConvThreads
_THREADS_PER_SM = {2: 7 * 128, 4: 5 * 128}
_BWD_THREADS_PER_SM = {2: 4 * 128, 4: 3 * 128}


def config(rows: int, seqlen: int, dim: int, num_sms: int, itemsize: int) -> Config:
    """A run of n tokens reads width - 1 tokens of the run before it once more."""
    return _config(rows, seqlen, dim, _THREADS_PER_SM[itemsize] * num_sms, shortest=_STEP)


def bwd_config(rows: int, seqlen: int, dim: int, num_sms: int, itemsize: int) -> Config:
    """Each run reads width - 1 tokens before and behind it once more, and leaves sums that are to be added."""
    return _config(rows, seqlen, dim, _BWD_THREADS_PER_SM[itemsize] * num_sms, shortest=4 * _STEP)


def _config(rows: int, seqlen: int, dim: int, threads: int, shortest: int) -> Config:
    """Runs so long that all are on the GPU at once, and begin and end together, for it holds so many `threads`.

    Where that would leave more than an eighth of it idle, as few generations as do not, up to four.
    """
    columns = max(1, rows * dim // _VECTOR)
    for generations in range(1, 5):
        runs = generations * threads // columns
        if 8 * runs * columns >= 7 * generations * threads:
            break
    tokens = -(-seqlen // max(1, runs))
    return Config(tokens_per_thread=max(shortest, -(-tokens // _STEP) * _STEP))


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
    if x.shape[1] >= 2**31 - 64:
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
    strides = [x.stride(i) for i in (0, 1) if x.shape[i] > 1]
    return x.data_ptr() % (_VECTOR * x.element_size()) == 0 and all(stride % _VECTOR == 0 for stride in strides)


def _weight_in_vectors(weight: Tensor) -> Tensor:
    weight = weight.contiguous()
    return weight.clone() if weight.data_ptr() % 16 else weight


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
) -> None:
    """Fill y; start from `history` and fill `state`, a row per sequence or a pool with slots."""
    small = (bias, cu_seqlens, read_slots, write_slots)
    bias, cu_seqlens, read_slots, write_slots = (None if t is None else t.contiguous() for t in small)
    tensors = (x, _weight_in_vectors(weight), bias, history, y, state, cu_seqlens, read_slots, write_slots)
    make_launch(*tensors, silu, null_slot)(tensors)


def is_dense(weight: Tensor, *small: Tensor | None) -> bool:
    """Whether `conv1d` would copy none of them."""
    return _weight_in_vectors(weight) is weight and all(t is None or t.is_contiguous() for t in small)


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
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """What runs the kernel on such tensors, given in a tuple and in this order."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (batch, seqlen, dim), width, index = x.shape, weight.shape[1], x.device.index
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else state
    nslots, _, state_len = (nseq, dim, width - 1) if some_states is None else some_states.shape
    launch = extension.Conv1d(
        dtypes=tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        sizes=(batch, seqlen, dim, width, nseq, nslots, state_len),
        x_strides=x.stride()[:2],
        y_strides=y.stride()[:2],
        initial_strides=(0, 0, 0) if history is None else history.stride(),
        final_strides=(0, 0, 0) if state is None else state.stride(),
        null_slot=null_slot,
        silu=silu,
        tokens_per_thread=config(batch, seqlen, dim, _device.num_sms(index), x.element_size()).tokens_per_thread,
    )
    return lambda tensors: launch(tensors, index, torch._C._cuda_getCurrentRawStream(index))


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
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    index = x.device.index
    if dy.stride(2) != 1 or not _in_vectors(dy) or dy.stride(1) >= 2**32:
        dy = dy.contiguous()
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else dfinal
    tokens = bwd_config(batch, seqlen, dim, _device.num_sms(index), x.element_size()).tokens_per_thread
    partials = x.new_empty((width + 1) * batch * -(-seqlen // tokens) * dim, dtype=torch.float32)
    bias, cu_seqlens = (None if t is None else t.contiguous() for t in (bias, cu_seqlens))
    tensors = (
        dy,
        x,
        _weight_in_vectors(weight),
        bias,
        history,
        dfinal,
        dx,
        dweight,
        dbias,
        dhistory,
        partials,
        cu_seqlens,
    )
    extension.conv1d_bwd(
        tuple(0 if t is None else t.data_ptr() for t in tensors),
        tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        (batch, seqlen, dim, width, nseq),
        tuple(t.stride()[:2] for t in (dy, x, dx)),
        tuple((0, 0, 0) if t is None else t.stride() for t in (history, dfinal, dhistory)),
        silu,
        tokens,
        index,
        torch._C._cuda_getCurrentRawStream(index),
    )
