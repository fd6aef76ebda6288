"""Causal convolution of new tokens in plain torch; float32 arithmetic (float64 for float64 inputs)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import compute_dtype


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    rollback: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    silu: bool,
    null_slot: int,
) -> None:
    """Fill y and move the columns of conv_state on. x (batch, T, dim), or (total, dim) with cu_seqlens."""
    device, dtype = x.device, compute_dtype(x)
    nslots, dim, state_len = conv_state.shape
    width = weight.shape[1]
    if cu_seqlens is None:
        batch, steps = x.shape[:2]
        lengths = torch.full((batch,), steps, device=device)
        tokens, inside = x, torch.ones(batch, steps, dtype=torch.bool, device=device)
    else:
        bounds = cu_seqlens.long().clamp(0, len(x))
        lengths = (bounds[1:] - bounds[:-1]).clamp(min=0)
        batch, steps = len(lengths), int(lengths.max()) if len(lengths) else 0
        step = torch.arange(steps, device=device)
        inside = step < lengths[:, None]
        rows = (bounds[:-1, None] + step).where(inside, 0)
        tokens = x[rows]
    slot = torch.arange(batch, device=device) if slots is None else slots.long()
    kept = (slot >= 0) & (slot < nslots)
    if slots is not None:
        kept &= slot != null_slot
    dropped = torch.zeros(batch, dtype=torch.long, device=device) if rollback is None else rollback.long()
    dropped = dropped.clamp(0, state_len - (width - 1))
    inside &= kept[:, None]
    if nslots == 0 or dim == 0 or state_len + steps == 0:
        y.zero_()
        return

    # [batch, dim, state_len + steps]: the old columns, then the new ones
    columns = torch.cat([conv_state[slot.where(kept, 0)].to(dtype), tokens.to(dtype).transpose(1, 2)], dim=2)
    if rollback is None and cu_seqlens is None:
        window, newest = columns[:, :, state_len - (width - 1) :], columns[:, :, steps:]
    else:
        old = (state_len - dropped)[:, None]

        def at(column: Tensor) -> Tensor:
            """Columns (batch, m) of the streams, zero before their beginning; tokens are `dropped` places further."""
            place = (column + torch.where(column >= old, dropped[:, None], 0)).clamp(0, columns.shape[2] - 1)
            return columns.gather(2, place[:, None].expand(-1, dim, -1)).where((column >= 0)[:, None], 0.0)

        window = at(old - (width - 1) + torch.arange(steps + width - 1, device=device))
        newest = at(old + lengths[:, None] - state_len + torch.arange(state_len, device=device))
    taps = weight.to(dtype)[:, :, None]
    result = window.new_zeros(batch, dim, steps)
    for k in range(width):
        result.addcmul_(taps[:, k], window[:, :, k : k + steps])
    if bias is not None:
        result += bias.to(dtype)[:, None]
    result = (F.silu(result) if silu else result).transpose(1, 2)
    conv_state[slot[kept]] = newest[kept].to(conv_state.dtype)
    if cu_seqlens is None:
        y.copy_(result.where(inside[..., None], 0.0))
    else:
        y.zero_()
        y[rows[inside]] = result[inside].to(y.dtype)
