"""RMSNorm in plain torch, forward and backward; float32 arithmetic (float64 for float64 inputs)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_fwd(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> None:
    """Fill y, and h = x + residual where there is a residual."""
    dtype = compute_dtype(x)
    u = x.to(dtype)
    if residual is not None and h is not None:
        h.copy_(u + residual.to(dtype))
        u = h.to(dtype)
    if z is not None and not norm_before_gate:
        u = u * F.silu(z.to(dtype))
    normed = _normalize(u, eps, group_size)[0] * weight.to(dtype)
    if z is not None and norm_before_gate:
        normed = normed * F.silu(z.to(dtype))
    y.copy_(normed)


def norm_bwd(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients (dx, dz, dweight) in compute precision; with n = u * rstd: du = rstd * (dn - n * mean(dn * n))."""
    dtype = compute_dtype(x)
    dy, x, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    u = x if gate is None or norm_before_gate else x * gate
    n, rstd = _normalize(u, eps, group_size)
    dyg = dy * gate if gate is not None and norm_before_gate else dy
    dweight = (dyg * n).flatten(0, -2).sum(0)
    dn = (dyg * w).unflatten(-1, (-1, group_size))
    n_groups = n.unflatten(-1, (-1, group_size))
    du = (rstd * (dn - n_groups * (dn * n_groups).mean(-1, keepdim=True))).flatten(-2)
    if z is None or gate is None:
        return du, None, dweight
    dgate = silu_grad(z.to(dtype))
    if norm_before_gate:
        return du, dy * n * w * dgate, dweight
    return du * gate, du * x * dgate, dweight


def silu_grad(v: Tensor) -> Tensor:
    """s (1 + v (1 - s)), s = sigmoid(v). Of 1 - s little is left in float32 where v is large; sigmoid(-v) is exact."""
    return torch.sigmoid(v) * (1 + v * torch.sigmoid(-v))


def _normalize(u: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    groups = u.unflatten(-1, (-1, group_size))
    rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return (groups * rstd).flatten(-2), rstd
