"""Grouped matrix product: the rows of a, sorted by expert, each times the matrix of its own expert.

    h[i] = b[e] a[gather[i]]   for offs[e - 1] <= i < offs[e],   y[i] = activation(h[i]) * row_scale[i]

Squared ReLU: So et al. 2021, "Primer"; the gated form: Shazeer 2020, "GLU Variants Improve Transformer".
"""

import numpy as np

from .norm import silu, silu_grad
from .products import product


def grouped_gemm(a, b, offs, *, gather=None, activation=None, row_scale=None, dtype=np.float64):
    """Returns (y (R, N), the pre-activation h (R, N), or (R, 2N) where gated). Rows from offs[-1] on are 0.

    a (M, K), b (E, N, K) or gated (E, 2N, K), offs (E,) the end of each expert's rows.
    """
    a, b = np.asarray(a, dtype), np.asarray(b, dtype)
    rows = a if gather is None else a[np.asarray(gather)]
    h = np.zeros((len(rows), b.shape[1]), dtype)
    for e, mine in enumerate(expert_rows(offs)):
        h[mine] = product(rows[mine], b[e].T)
    y = activate(h, activation)
    return y if row_scale is None else y * np.asarray(row_scale, dtype)[:, None], h


def grouped_gemm_bwd(
    dy,
    a,
    b,
    offs,
    *,
    gather=None,
    activation=None,
    row_scale=None,
    dh=None,
    store=lambda h: h,
    dtype=np.float64,
):
    """Gradients (da, db, drow_scale) from dy and, where the pre-activation was used too, from dh.

    `store` rounds what is kept between two products, the pre-activation and its gradient, as the operator keeps it.
    """
    dy, a, b = (np.asarray(t, dtype) for t in (dy, a, b))
    gather = np.arange(len(a)) if gather is None else np.asarray(gather)
    h = np.asarray(store(grouped_gemm(a, b, offs, gather=gather, dtype=dtype)[1]), dtype)
    scale = np.ones(len(gather), dtype) if row_scale is None else np.asarray(row_scale, dtype)
    total = activate_grad(dy * scale[:, None], h, activation)
    if dh is not None:
        total = total + np.asarray(dh, dtype)
    total = np.asarray(store(total), dtype)
    da, db = np.zeros_like(a), np.zeros_like(b)
    for e, mine in enumerate(expert_rows(offs)):
        np.add.at(da, gather[mine], product(total[mine], b[e]))
        db[e] = product(total[mine].T, a[gather[mine]])
    return da, db, (activate(h, activation) * dy).sum(1)


def expert_rows(offs):
    """The slice of rows of each expert."""
    ends = [int(end) for end in offs]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def activate(h, activation):
    if activation == "relu2":
        return np.maximum(h, 0) ** 2
    if activation == "silu_gated":  # the gate's columns come first
        gate, up = np.split(h, 2, axis=1)
        return silu(gate) * up
    return h


def activate_grad(dy, h, activation):
    """The gradient of the pre-activation h."""
    if activation == "relu2":
        return dy * 2 * np.maximum(h, 0)
    if activation == "silu_gated":
        gate, up = np.split(h, 2, axis=1)
        return np.concatenate([dy * up * silu_grad(gate), dy * silu(gate)], axis=1)
    return dy
