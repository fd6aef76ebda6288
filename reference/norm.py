"""RMSNorm (Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", eq. 4) and its gated form (Mamba-2)."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def silu_grad(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def rms_norm(x, weight, *, eps=1e-5, residual=None, round_residual=lambda h: h, dtype=np.float64):
    """y = h / sqrt(mean(h^2) + eps) * weight with h = x + residual, rounded as the residual stream is stored.

    Returns y, or (y, h) with a residual.
    """
    h = np.asarray(x, dtype)
    if residual is not None:
        h = np.asarray(round_residual(h + np.asarray(residual, dtype)), dtype)
    y = _normalize(h, eps) * np.asarray(weight, dtype)
    return y if residual is None else (y, h)


def gated_rms_norm(x, z, weight, *, eps=1e-5, group_size=None, norm_before_gate=False, dtype=np.float64):
    """norm(x * silu(z)) * weight, or norm(x) * weight * silu(z); each group of `group_size` features by itself."""
    x, weight = np.asarray(x, dtype), np.asarray(weight, dtype)
    gate = np.ones_like(x) if z is None else silu(np.asarray(z, dtype))
    u = x if norm_before_gate else x * gate
    groups = _groups(u, group_size)
    y = _normalize(groups, eps).reshape(u.shape) * weight
    return y * gate if norm_before_gate else y


def gated_rms_norm_bwd(dy, x, z, weight, *, eps=1e-5, group_size=None, norm_before_gate=False, dtype=np.float64):
    """Gradients (dx, dz, dweight) of `gated_rms_norm`; dz is None where z is."""
    dy, x, weight = (np.asarray(t, dtype) for t in (dy, x, weight))
    gate = np.ones_like(x) if z is None else silu(np.asarray(z, dtype))
    u = x if norm_before_gate else x * gate
    groups = _groups(u, group_size)
    n = _normalize(groups, eps)
    dyg = dy * gate if norm_before_gate else dy
    dweight = (dyg * n.reshape(u.shape)).reshape(-1, u.shape[-1]).sum(0)
    dn = (dyg * weight).reshape(groups.shape)
    rstd = 1 / np.sqrt((groups**2).mean(-1, keepdims=True) + dtype(eps))
    du = (rstd * (dn - n * (dn * n).mean(-1, keepdims=True))).reshape(u.shape)
    if z is None:
        return du, None, dweight
    if norm_before_gate:
        return du, dy * n.reshape(u.shape) * weight * silu_grad(np.asarray(z, dtype)), dweight
    return du * gate, du * x * silu_grad(np.asarray(z, dtype)), dweight


def _groups(u, group_size):
    """(..., hidden) as (..., ngroups, group_size)."""
    size = group_size or u.shape[-1]
    return u.reshape(*u.shape[:-1], u.shape[-1] // size, size)


def _normalize(h, eps):
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + h.dtype.type(eps))
