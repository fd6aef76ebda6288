"""Launchers of csrc/conv1d_sm90.cu and csrc/conv1d_bwd_sm90.cu, and what those kernels do not take."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES


class Config(NamedTuple):
    tokens_per_thread: int
    stages: int = 0  # of the kernel that goes by way of shared memory, each of 4 tokens; 0: the other one
    ctas: int = 0  # of that kernel


_VECTOR = 4  # channels of a thread
_STEP = 4  # tokens that a thread has under way: kLoads
# by bytes of an element, what a multiprocessor holds at once: kMinBlocks blocks of kConvThreads
_THREADS_PER_SM = {2: 7 * 128, 4: 5 * 128}
_BWD_THREADS_PER_SM = {2: 4 * 128, 4: 3 * 128}
# by way of shared memory; CTAs of a multiprocessor, of 4 warps
_RING = Config(tokens_per_thread=12, stages=6, ctas=2)
_BWD_RING = Config(tokens_per_thread=20, stages=6, ctas=2)
_WARP_BYTES = 512  # of a token: kConvRowBytes
_FEWEST_TOKENS = 96  # of a warp: with fewer x and y may lie in L2, and the warps do not end together


def config(rows: int, seqlen: int, dim: int, num_sms: int, itemsize: int, in_pieces: bool) -> Config:
    """By way of shared memory where there is much to do, and rows are whole pieces of 16 bytes (`in_pieces`).

    Else runs of n tokens, each of which reads width - 1 tokens of the run before it once more.
    """
    if in_pieces and _is_much(rows * seqlen, dim, num_sms, itemsize):
        return _RING._replace(ctas=_RING.ctas * num_sms)
    return _config(rows, seqlen, dim, _THREADS_PER_SM[itemsize] * num_sms, shortest=_STEP)


def bwd_config(rows: int, seqlen: int, dim: int, num_sms: int, itemsize: int, in_pieces: bool) -> Config:
    """As `config`; each run reads width - 1 tokens before and behind it once more, and leaves sums to be added."""
    if in_pieces and _is_much(rows * seqlen, dim, num_sms, itemsize):
        return _BWD_RING._replace(ctas=_BWD_RING.ctas * num_sms)
    return _config(rows, seqlen, dim, _BWD_THREADS_PER_SM[itemsize] * num_sms, shortest=4 * _STEP)


def walkers(ctas: int, dim: int, itemsize: int) -> int:
    """Warps of so many CTAs that have the same channels: ConvWalker."""
    return 4 * ctas // max(1, -(-dim * itemsize // _WARP_BYTES))


def _is_much(tokens: int, dim: int, num_sms: int, itemsize: int) -> bool:
    """Of 8 warps or more for each column of channels few are left over."""
    of_column = walkers(_RING.ctas * num_sms, dim, itemsize)
    return of_column >= 8 and tokens >= _FEWEST_TOKENS * of_column


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
    if not (_in_vectors(x, nbytes) and _in_vectors(y, nbytes)):
        return f"the CUDA kernel needs rows that start at multiples of {nbytes} bytes"
    if max(x.stride(1), y.stride(1)) >= 2**32:
        return "the CUDA kernel has token strides of 32 bits"
    return None


def _in_vectors(x: Tensor, nbytes: int) -> bool:
    """Whether each token's channels begin at a multiple of so many bytes, what is read at once."""
    strides = [x.stride(i) * x.element_size() for i in (0, 1) if x.shape[i] > 1]
    return x.data_ptr() % nbytes == 0 and all(stride % nbytes == 0 for stride in strides)


def _in_pieces(*tensors: Tensor) -> bool:
    """Whether each token's channels are whole pieces of 16 bytes, which is what a ring takes."""
    return all(_in_vectors(t, 16) and t.shape[2] * t.element_size() % 16 == 0 for t in tensors)


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
    chosen: Config | None = None,
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """What runs the kernel on such tensors, given in a tuple and in this order."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (batch, seqlen, dim), width, index = x.shape, weight.shape[1], x.device.index
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else state
    nslots, _, state_len = (nseq, dim, width - 1) if some_states is None else some_states.shape
    if chosen is None:
        chosen = config(batch, seqlen, dim, _device.num_sms(index), x.element_size(), _in_pieces(x, y))
    launch = extension.Conv1d(
        dtypes=tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        sizes=(batch, seqlen, dim, width, nseq, nslots, state_len),
        x_strides=x.stride()[:2],
        y_strides=y.stride()[:2],
        initial_strides=(0, 0, 0) if history is None else history.stride(),
        final_strides=(0, 0, 0) if state is None else state.stride(),
        null_slot=null_slot,
        silu=silu,
        config=chosen,
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
    chosen: Config | None = None,
) -> None:
    """Fill the gradients, of which dweight and dbias are contiguous and each has the dtype of what it belongs to.

    The forward has taken the problem; a `dy` whose strides the kernel does not take is copied.
    """
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    index = x.device.index
    if dy.stride(2) != 1 or not _in_vectors(dy, _VECTOR * dy.element_size()) or dy.stride(1) >= 2**32:
        dy = dy.contiguous()
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else dfinal
    if chosen is None:
        chosen = bwd_config(batch, seqlen, dim, _device.num_sms(index), x.element_size(), _in_pieces(dy, x, dx))
    num_partials = batch * -(-seqlen // chosen.tokens_per_thread)
    if chosen.stages:
        num_partials = walkers(chosen.ctas, dim, x.element_size())
    partials = x.new_empty((width + 1) * num_partials * dim, dtype=torch.float32)
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
        chosen,
        num_partials,
        index,
        torch._C._cuda_getCurrentRawStream(index),
    )
