"""Launcher of csrc/conv1d_sm90.cu, and what that kernel does not take."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _device
from . import DTYPES


class Config(NamedTuple):
    tokens_per_thread: int


_VECTOR = 4  # channels of a thread


def config(rows: int, seqlen: int, dim: int, num_sms: int) -> Config:
    """Runs as long as leaves every multiprocessor about 1024 threads, three or so generations of blocks.

    A run of n tokens reads width - 1 tokens of the run before it once more; short runs keep the GPU full to the end.
    """
    threads_per_token = rows * dim // _VECTOR
    run = seqlen * threads_per_token // (1024 * num_sms)
    return Config(tokens_per_thread=max(4, min(64, 1 << max(run, 1).bit_length() - 1)))


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
    strides = [t.stride(i) for t in (x, y) for i in (0, 1) if t.shape[i] > 1]
    if any(stride % _VECTOR for stride in strides) or (x.data_ptr() | y.data_ptr()) % nbytes:
        return f"the CUDA kernel needs rows that start at multiples of {nbytes} bytes"
    return None


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
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    index = x.device.index
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    some_states = history if history is not None else state
    weight = weight.contiguous()
    if weight.data_ptr() % 16:  # the kernel reads it in vectors
        weight = weight.clone()
    bias = None if bias is None else bias.contiguous()
    tensors = (x, weight, bias, history, y, state, cu_seqlens, read_slots, write_slots)
    extension.conv1d_fwd(
        tuple(0 if t is None else t.data_ptr() for t in tensors),
        tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias, some_states)),
        (
            batch,
            seqlen,
            dim,
            width,
            nseq,
            nseq if some_states is None else some_states.shape[0],
            width - 1 if some_states is None else some_states.shape[2],
        ),
        x.stride()[:2],
        y.stride()[:2],
        (0, 0, 0) if history is None else history.stride(),
        (0, 0, 0) if state is None else state.stride(),
        null_slot,
        silu,
        config(batch, seqlen, dim, _device.num_sms(index)).tokens_per_thread,
        index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
