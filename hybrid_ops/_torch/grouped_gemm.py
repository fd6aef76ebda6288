"""Grouped matrix product in plain torch, forward and backward; float32 arithmetic (float64 for float64 inputs).

A product for each expert that has rows: where they end is read on the host, which on a GPU waits for it.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import compute_dtype, silu_grad

INVARIANT_ROWS = 16  # rows of a product that is to have the same bits whatever comes with them


class Experts(Protocol):
    """A tensor (E, N, K), or whatever makes an expert's matrix when it is wanted."""

    def __getitem__(self, e: int, /) -> Tensor: ...


def grouped_gemm_fwd(
    a: Tensor,
    b: Experts,
    offs: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
    preact: Tensor | None,
    activation: str | None,
    batch_invariant: bool,
) -> None:
    """Fill out and, where it is wanted, the pre-activation. Rows of no expert are 0."""
    dtype = compute_dtype(a)
    for filled in (out, preact):
        if filled is not None:
            filled.zero_()
    product = _invariant_product if batch_invariant else _product
    for e, mine in expert_rows(offs, out.shape[0]):
        h = product(_rows(a, gather, mine).to(dtype), b[e].to(dtype))
        if preact is not None:
            preact[mine] = h.to(preact.dtype)
        y = activate(h, activation)
        out[mine] = (y if row_scale is None else y * row_scale[mine].to(dtype)[:, None]).to(out.dtype)


def grouped_gemm_wgrad(dh: Tensor, a: Tensor, offs: Tensor, gather: Tensor | None, db: Tensor) -> None:
    """db[e] = dh[rows of e]^T a[rows of e], 0 for an expert without rows."""
    dtype = compute_dtype(a)
    db.zero_()
    for e, mine in expert_rows(offs, dh.shape[0]):
        db[e] = (dh[mine].to(dtype).T @ _rows(a, gather, mine).to(dtype)).to(db.dtype)


def preact_grad(
    dy: Tensor,
    preact: Tensor | None,
    row_scale: Tensor | None,
    dpreact: Tensor | None,
    dh: Tensor,
    dscale: Tensor | None,
    activation: str | None,
) -> None:
    """Fill dh, the gradient of the pre-activation, and dscale, that of row_scale, where it is wanted."""
    dtype = compute_dtype(dh)
    dy = dy.to(dtype)
    h = dy if preact is None else preact.to(dtype)
    if dscale is not None:
        dscale.copy_((activate(h, activation) * dy).sum(1))
    if row_scale is not None:
        dy = dy * row_scale.to(dtype)[:, None]
    if activation == "relu2":
        dy = dy * 2 * F.relu(h)
    elif activation == "silu_gated":
        gate, up = h.chunk(2, 1)
        dy = torch.cat([dy * up * silu_grad(gate), dy * F.silu(gate)], 1)
    dh.copy_(dy if dpreact is None else dy + dpreact.to(dtype))


def index_sum(values: Tensor, index: Tensor, weights: Tensor | None, out: Tensor, repeat: int, factor: float) -> None:
    """out[r] = factor * sum of weights[p] * values[p // repeat] over the places p with index[p] = r."""
    dtype = compute_dtype(values)
    rows = out.shape[0]
    total = values.new_zeros(rows + 1, out.shape[1], dtype=dtype)  # the last row takes what belongs to none
    places = torch.where((index >= 0) & (index < rows), index, rows)
    for j in range(repeat):
        mine = values.to(dtype)
        if weights is not None:
            mine = mine * weights[j::repeat].to(dtype)[:, None]
        total.index_add_(0, places[j::repeat], mine)
    out.copy_(total[:rows] * factor)


def expert_rows(offs: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for e, end in enumerate(offs.tolist()):
        end = min(end, rows)
        if end > start:
            yield e, slice(start, end)
            start = end


def activate(h: Tensor, activation: str | None) -> Tensor:
    if activation == "relu2":
        return F.relu(h).square()
    if activation == "silu_gated":
        gate, up = h.chunk(2, 1)
        return F.silu(gate) * up
    return h


def _rows(a: Tensor, gather: Tensor | None, mine: slice) -> Tensor:
    return a[mine] if gather is None else a[gather[mine].clamp(0, a.shape[0] - 1)]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.T


def _invariant_product(rows: Tensor, weight: Tensor) -> Tensor:
    """The same product in blocks of INVARIANT_ROWS, the last one filled up: a BLAS orders its sums by the number of
    rows."""
    count = rows.shape[0]
    blocks = F.pad(rows, (0, 0, 0, -count % INVARIANT_ROWS)).unflatten(0, (-1, INVARIANT_ROWS))
    return torch.bmm(blocks, weight.T.expand(blocks.shape[0], -1, -1)).flatten(0, 1)[:count]
