"""Sums of rows by index: the backward of a gather, in a fixed order instead of atomic additions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, rows

BLOCK_D = 1024


@triton.jit
def index_sum_kernel(
    values_ptr,
    weights_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    features,
    repeat,
    values_stride,
    factor,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program sums one row of the result, or a part of it, over the places that the sorted index has for this row."""
    d_blocks = tl.cdiv(features, BLOCK_D)
    row = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        place = tl.load(order_ptr + i)
        value = tl.load(values_ptr + place // repeat * values_stride + d, d < features, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + place).to(tl.float32)
        total += value
    tl.store(out_ptr + row * features + d, (total * factor).to(out_ptr.dtype.element_ty), d < features)


def index_sum(values: Tensor, index: Tensor, weights: Tensor | None, out: Tensor, repeat: int, factor: float) -> None:
    """Fill the contiguous out[r] = factor * sum of weights[p] * values[p // repeat] over the p with index[p] = r."""
    if out.numel() == 0 or values.numel() == 0:
        out.zero_()
        return
    in_order, order = torch.sort(index, stable=True)
    wanted = torch.arange(out.shape[0] + 1, dtype=index.dtype, device=index.device)
    starts = torch.searchsorted(in_order, wanted)
    values = rows(values)
    grid = (out.shape[0] * triton.cdiv(out.shape[1], BLOCK_D),)
    with on_device(values):
        index_sum_kernel[grid](
            values,
            order if weights is None else weights.contiguous(),
            order,
            starts,
            out,
            out.shape[1],
            repeat,
            values.stride(0),
            factor,
            HAS_WEIGHTS=weights is not None,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )
