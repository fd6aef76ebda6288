"""Routing of tokens to experts in plain torch, forward and backward; float32 (float64 for float64 inputs)."""

import torch
from torch import Tensor

from .norm import compute_dtype


def moe_router_fwd(
    x: Tensor,
    weight: Tensor | None,
    correction_bias: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    score: str,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scaling_factor: float,
) -> None:
    """Fill weights and ids (T, k), and logits where there is a weight; without one x are the logits."""
    if weight is not None and logits is not None:
        logits.copy_(x.to(logits.dtype) @ weight.to(logits.dtype).T)
    else:
        logits = x
    s = scores(logits, score)
    sel = s if correction_bias is None else s + correction_bias.to(s.dtype)
    ids.copy_(_largest(_within_groups(sel, num_groups, topk_groups), ids.shape[1]))
    weights.copy_(_gate(s, ids, renormalize)[0] * scaling_factor)


def scores(logits: Tensor, score: str) -> Tensor:
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


def _gate(s: Tensor, ids: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The scores of the chosen experts over their total, and that total (1 where it is not divided by)."""
    chosen = s.gather(1, ids.long())
    chosen = chosen.where(~chosen.isnan(), 0.0)
    total = chosen.sum(-1, keepdim=True) + 1e-20 if renormalize else torch.ones_like(chosen[:, :1])
    return chosen / total, total


def _order(values: Tensor) -> Tensor:
    """Integers in the order of the floats: NaN below every number, above the least integer; -0 equals 0."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = (values + 0.0).view(integer)
    return torch.where(values.isnan(), limits.min + 1, bits ^ ((bits >> (limits.bits - 1)) & limits.max))


def _largest(order: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, largest first; of equals the lower column."""
    return order.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _within_groups(sel: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """`_order` of sel, and the least integer for experts outside the best groups."""
    order = _order(sel)
    if topk_groups == num_groups:
        return order
    groups = sel.where(~sel.isnan(), float("-inf")).unflatten(1, (num_groups, -1))  # [T, groups, experts]
    best = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _largest(_order(best), topk_groups), True)
    outside = ~chosen.repeat_interleave(groups.shape[2], dim=1)
    return order.masked_fill(outside, torch.iinfo(order.dtype).min)


def moe_sort(
    ids: Tensor,
    weights: Tensor,
    first_expert: int,
    counts: Tensor,
    offs: Tensor,
    token_index: Tensor,
    sorted_weights: Tensor,
    row_index: Tensor,
) -> None:
    """Fill the permutation of the experts from `first_expert` on, as many as `counts` has. Nothing is read on the host.

    An id outside them sorts behind all, in rows that say token 0 with weight 0.
    """
    num_experts, k = len(counts), ids.shape[1]
    expert = ids.flatten().long() - first_expert
    expert = expert.where((expert >= 0) & (expert < num_experts), num_experts)
    order = expert.sort(stable=True).indices
    total = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    total.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
    counts.copy_(total[:-1])
    offs.copy_(counts.cumsum(0))
    local = expert[order] < num_experts
    token_index.copy_((order // max(k, 1)).where(local, 0))
    sorted_weights.copy_(weights.flatten()[order].where(local, 0.0))
    rows = torch.arange(len(order), device=ids.device).where(local, -1)
    row_index.copy_(torch.empty_like(order).scatter_(0, order, rows).view(ids.shape))


def moe_sort_bwd(dsorted: Tensor, row_index: Tensor) -> Tensor:
    """The gradient of weights (T, k) from that of sorted_weights; 0 where the expert is not here."""
    if row_index.numel() == 0:
        return dsorted.new_zeros(row_index.shape)
    return dsorted[row_index.clamp(min=0).long()].where(row_index >= 0, 0.0)


def moe_router_bwd(
    dweights: Tensor,
    dlogits: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score: str,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """The gradient of the logits, from those of the weights and of the logits as a result.

    With w = s / S over the chosen, S their total: ds = (dw - sum(dw * w)) / S. Each expert is chosen once, so the
    scatter adds nothing up.
    """
    s = scores(logits, score)
    gate, total = _gate(s, ids, renormalize)
    dw = dweights * scaling_factor
    if renormalize:
        dw = (dw - (dw * gate).sum(-1, keepdim=True)) / total
    ds = torch.zeros_like(s).scatter_(1, ids.long(), dw)
    grad = s * (1 - s) * ds if score == "sigmoid" else s * (ds - (ds * s).sum(-1, keepdim=True))
    grad = grad.where(~s.isnan(), 0.0)  # the weight of a NaN is the constant 0
    return grad if dlogits is None else grad + dlogits


def moe_router_bwd_products(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight from that of the logits, in compute precision."""
    dtype = compute_dtype(x)
    return dlogits @ weight.to(dtype), dlogits.T @ x.to(dtype)
