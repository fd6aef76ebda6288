"""Launcher of csrc/conv1d_update_sm90.cu, and what that kernel does not take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _device
from . import DTYPES

_VECTOR = 4  # kUpdateChannels


def refusal(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
) -> str | None:
    """Why this kernel cannot take the problem; None where it can."""
    if x.dim() != 2 or rollback is not None or cu_seqlens is not None:
        return "the CUDA kernel takes one token of each sequence: x (batch, dim), no rollback, no cu_seqlens"
    if x.dtype not in DTYPES or conv_state.dtype != x.dtype:
        return (
            f"the CUDA kernel takes x and conv_state of one dtype of 32 or 16 bits, not {x.dtype}, {conv_state.dtype}"
        )
    (batch, dim), (_, _, state_len) = x.shape, conv_state.shape
    if not 2 <= weight.shape[1] <= 4 or state_len != weight.shape[1] - 1:
        return f"the CUDA kernel has widths 2 to 4 and width - 1 columns, not {weight.shape[1]} and {state_len}"
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "the CUDA kernel takes contiguous weights"
    slot, channel, column = conv_state.stride()
    if (channel, column) != (state_len, 1) and (channel != 1 or (state_len > 1 and column % _VECTOR)):
        return "the CUDA kernel needs the columns of each channel, or the channels of each column, side by side"
    rows = (x.stride(0), y.stride(0), slot)
    if dim % _VECTOR or x.stride(1) != 1 or y.stride(1) != 1 or any(row % _VECTOR for row in rows):
        return f"the CUDA kernel needs rows of x, y and conv_state of, and at, multiples of {_VECTOR} elements"
    if any(t.data_ptr() % 16 for t in (x, conv_state, weight, y)):
        return "the CUDA kernel needs x, conv_state, weight and y to begin at multiples of 16 bytes"
    if batch > 65535 or max(x.stride(0), y.stride(0), column, conv_state.shape[0], 4 * dim) >= 2**31:
        return "the CUDA kernel counts sequences up to 65535, and all but slots in 32 bits"
    return None


@_checks.remembered
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    y: Tensor,
    silu: bool,
    null_slot: int,
) -> Callable[..., None]:
    """What fills y and moves conv_state on, given the operator's arguments; for those of one signature."""
    extension = _device.cuda_extension()
    assert extension is not None  # `choose` has seen it
    (batch, dim), (nslots, _, state_len), index = x.shape, conv_state.shape, x.device.index
    # with one column, that is channels side by side too
    column = 1 if conv_state.stride()[1:] == (state_len, 1) else conv_state.stride(2)
    launch = extension.Conv1dUpdate(
        dtypes=tuple(DTYPES[(x if t is None else t).dtype] for t in (x, weight, bias)),
        sizes=(batch, dim, weight.shape[1], nslots),
        strides=(conv_state.stride(0), column, x.stride(0), y.stride(0), 0 if slots is None else slots.stride(0)),
        null_slot=null_slot,
        silu=silu,
    )

    def run(*arguments: Any) -> None:
        """x, conv_state, weight, bias, slots, rollback, cu_seqlens, y, .."""
        x, conv_state, weight, bias, slots, _, _, y = arguments[:8]
        if y.numel():
            launch((x, conv_state, weight, bias, slots, y), index, torch._C._cuda_getCurrentRawStream(index))

    return run
