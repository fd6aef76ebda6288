"""Combining the experts' results and the projections of LatentMoE in plain torch; float32 arithmetic (float64 for
float64 inputs)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .norm import compute_dtype


def moe_combine_fwd(
    y: Tensor, row_index: Tensor, weights: Tensor | None, residual: Tensor | None, out: Tensor, scaling_factor: float
) -> None:
    """out[t] = scaling_factor * sum_j weights[t, j] * y[row_index[t, j]] + residual[t], j ascending."""
    dtype = compute_dtype(y)
    total = y.new_zeros(out.shape, dtype=dtype)
    for j, (rows, here) in enumerate(_choices(row_index, y.shape[0])):
        mine = _take(y, rows, here).to(dtype)
        total += mine if weights is None else mine * weights[:, j, None].where(here[:, None], 0).to(dtype)
    total *= scaling_factor
    out.copy_(total if residual is None else total + residual.to(dtype))


def combine_weights_grad(dout: Tensor, y: Tensor, row_index: Tensor, dweights: Tensor, scaling_factor: float) -> None:
    """dweights[t, j] = scaling_factor * <dout[t], y[row_index[t, j]]>."""
    dtype = compute_dtype(y)
    dout = dout.to(dtype)
    for j, (rows, here) in enumerate(_choices(row_index, y.shape[0])):
        dweights[:, j] = (dout * _take(y, rows, here).to(dtype)).sum(1) * scaling_factor


def latent_proj_fwd(
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    logits: Tensor | None,
) -> None:
    """out = x weight^T + residual, logits = x gate_weight^T."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    product = wide @ weight.to(dtype).T
    out.copy_(product if residual is None else product + residual.to(dtype))
    if gate_weight is not None and logits is not None:
        logits.copy_(wide @ gate_weight.to(dtype).T)


def latent_proj_bwd(
    dout: Tensor | None,
    dlogits: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and gate_weight: those of `needs`, from the results that were used."""
    dtype = compute_dtype(x)
    used = [(d, w) for d, w in ((dout, weight), (dlogits, gate_weight)) if d is not None and w is not None]
    dx = None
    if needs[0] and used:
        dx = x.new_zeros(x.shape, dtype=dtype)
        for d, w in used:
            dx += d.to(dtype) @ w.to(dtype)
        dx = dx.to(x.dtype)
    wide = x.to(dtype)
    dweight = (dout.to(dtype).T @ wide).to(weight.dtype) if needs[1] and dout is not None else None
    dgate = None
    if gate_weight is not None and needs[2] and dlogits is not None:
        dgate = (dlogits.to(dtype).T @ wide).to(gate_weight.dtype)
    return dx, dweight, dgate


def _choices(row_index: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    """For each j the row of every token's j-th expert, and whether it is here."""
    here = (row_index >= 0) & (row_index < rows)
    return list(zip(row_index.where(here, 0).unbind(1), here.unbind(1), strict=True))


def _take(y: Tensor, rows: Tensor, here: Tensor) -> Tensor:
    if y.shape[0] == 0:
        return y.new_zeros(rows.shape[0], y.shape[1])
    return torch.where(here[:, None], y[rows], 0)
