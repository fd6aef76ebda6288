"""`selective_state_update` as mamba_ssm and vLLM have it: step, bias and decay of every channel, not of every head."""

from typing import Any

import torch
from torch import Tensor

from ..ssd_update import ssd_state_update
from ._arguments import check_shape


@torch.no_grad()
def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """y in x's shape. Without a dimension of heads, as in Mamba-1, there is one.

    Mamba-2 expands what a head has to its channels, and this undoes it. Where dt, dt_bias or A differ from channel to
    channel, each channel is a head of one feature.
    """
    shape = x.shape
    state, A = _with_heads(state, 4), _with_heads(A, 3, at=0)
    x, dt, B, C = (_with_heads(t, 3) for t in (x, dt, B, C))
    z, out = (None if t is None else _with_heads(t, 3) for t in (z, out))
    D, dt_bias = (None if t is None else _with_heads(t, 2, at=0) for t in (D, dt_bias))
    nslots, nheads, headdim, dstate = state.shape
    check_shape("x", x, (len(x), nheads, headdim))
    check_shape("dt", dt, tuple(x.shape))
    check_shape("A", A, (nheads, headdim, dstate))
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            check_shape(name, value, (nheads, headdim))
    if not _expanded(A):
        raise ValueError(
            "A must be expanded along dstate (stride 0), so that a channel has one decay, as in Mamba-2 and in "
            f"hybrid_ops.ssd_state_update, which takes (nheads,); got shape {tuple(A.shape)}, strides {A.stride()}"
        )
    A = A[..., 0]
    if not (_expanded(dt) and _expanded(A) and (dt_bias is None or _expanded(dt_bias))):
        channels = nheads * headdim
        state = state.view(nslots, channels, 1, dstate)
        x, dt, A = x.reshape(-1, channels, 1), dt.reshape(-1, channels, 1), A.reshape(channels, 1)
        D, dt_bias = (None if t is None else t.reshape(channels, 1) for t in (D, dt_bias))
        z = None if z is None else z.reshape(-1, channels, 1)
        out = None if out is None else out.view(-1, channels, 1)
    dt, A = dt[..., 0], A[:, 0].to(torch.promote_types(x.dtype, torch.float32))
    dt_bias = None if dt_bias is None else dt_bias[:, 0]
    return ssd_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, out=out, **options).view(shape)


def _with_heads(t: Tensor, dims: int, at: int = 1) -> Tensor:
    return t if t.dim() == dims else t.unsqueeze(at)


def _expanded(t: Tensor) -> bool:
    """Whether all elements along the last dimension are one and the same in memory."""
    return t.stride(-1) == 0 or t.shape[-1] == 1
