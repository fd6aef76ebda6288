"""Routing of tokens to experts (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2; Nemotron 3).

    logits[t, e] = sum_d x[t, d] weight[e, d]
    s = sigmoid(logits), or softmax over e
    ids[t] = the topk largest of s + correction_bias, largest first, among the best groups of experts
    weights[t, j] = s[t, ids[t, j]], over their sum + 1e-20 where renormalised, times scaling_factor

Which experts are chosen is decided in float32, as the models do; every value is computed in `dtype`.
"""

import numpy as np

from .products import product


def moe_router(
    x,
    weight,
    topk,
    *,
    correction_bias=None,
    score="sigmoid",
    num_groups=1,
    topk_groups=1,
    renormalize=True,
    scaling_factor=1.0,
    dtype=np.float64,
):
    """Returns (weights, ids, logits, counts, offs, token_index, sorted_weights, row_index).

    x (T, d) and weight (E, d), or weight None and x the logits (T, E).
    """
    logits = np.asarray(x, dtype) if weight is None else product(np.asarray(x, dtype), np.asarray(weight, dtype).T)
    ids = select(logits, topk, correction_bias, score, num_groups, topk_groups)
    weights = gate_weights(logits, ids, score, renormalize, scaling_factor)
    return weights, ids, logits, *_permutation(ids, weights, 0, logits.shape[1])


def moe_sort(ids, weights, num_experts, *, expert_range=None, dtype=np.float64):
    """Returns what `moe_router` does, without logits (None), for the experts in the range."""
    weights = np.asarray(weights, dtype)
    return weights, ids, None, *_permutation(ids, weights, *(expert_range or (0, num_experts)))


def scores(logits, score):
    """Sigmoid of each logit, or softmax over the experts, without overflow."""
    if score == "sigmoid":
        small = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1, small) / (1 + small)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def select(logits, topk, correction_bias=None, score="sigmoid", num_groups=1, topk_groups=1):
    """ids (T, topk) int32. Ties go to the lower index; NaN comes after every number."""
    sel = selection_scores(logits, correction_bias, score)
    ids = np.zeros((len(sel), topk), np.int32)
    for t, row in enumerate(sel):
        group_of = np.arange(len(row)) // (len(row) // num_groups)
        chosen = largest(group_scores(row, num_groups), topk_groups)
        inside = [e for e in range(len(row)) if group_of[e] in chosen]
        ids[t] = [inside[i] for i in largest(row[inside], topk)]
    return ids


def selection_scores(logits, correction_bias=None, score="sigmoid"):
    """s + correction_bias in float32: s is rounded once, then their sum."""
    with np.errstate(invalid="ignore"):
        s = scores(np.asarray(logits, np.float64), score).astype(np.float32)
        return s if correction_bias is None else s + np.asarray(correction_bias, np.float32)


def group_scores(sel, num_groups):
    """(num_groups,): the sum of each group's two largest, NaN counting as -inf; a group of one has no second."""
    groups = np.where(np.isnan(sel), -np.inf, sel).astype(np.float32).reshape(num_groups, -1)
    with np.errstate(invalid="ignore"):
        return np.sort(groups, 1)[:, -2:].sum(1)


def largest(values, k):
    """The indices of the k largest, largest first."""
    return sorted(range(len(values)), key=lambda i: (np.isnan(values[i]), -np.nan_to_num(values[i], nan=0.0), i))[:k]


def gate_weights(logits, ids, score="sigmoid", renormalize=True, scaling_factor=1.0):
    """weights (T, k) from the scores alone, in the dtype of the logits; the score of a NaN is 0."""
    one = logits.dtype.type(1)
    with np.errstate(invalid="ignore"):
        s = np.nan_to_num(np.take_along_axis(scores(logits, score), ids.astype(np.int64), 1))
    if renormalize:
        s = s / (s.sum(-1, keepdims=True) + one * 1e-20)
    return s * (one * scaling_factor)


def _permutation(ids, weights, begin, end):
    """counts, offs (end - begin,); token_index, sorted_weights (T * k,), 0 from offs[-1] on; row_index (T, k) or -1."""
    counts = np.zeros(end - begin, np.int32)
    token_index, sorted_weights = np.zeros(ids.size, np.int32), np.zeros(ids.size, weights.dtype)
    row_index = np.full(ids.shape, -1, np.int32)
    row = 0
    for e in range(begin, end):
        for t, j in np.argwhere(ids == e):
            token_index[row], sorted_weights[row], row_index[t, j] = t, weights[t, j], row
            counts[e - begin] += 1
            row += 1
    return counts, np.cumsum(counts, dtype=np.int32), token_index, sorted_weights, row_index


def moe_router_bwd(
    dweights, dlogits, x, weight, ids, *, score="sigmoid", renormalize=True, scaling_factor=1.0, dtype=np.float64
):
    """Gradients (dx, dweight) from those of the weights (T, k) and of the logits (T, E); dweight None where weight is.

    The choice is constant. With S = sum_j s_j + 1e-20: dw_j / ds_i = scaling_factor (1[i = j] - s_j / S) / S.
    """
    x, dweights, dlogits = (np.asarray(a, dtype) for a in (x, dweights, dlogits))
    logits = x if weight is None else product(x, np.asarray(weight, dtype).T)
    s = scores(logits, score)
    dlogits = dlogits.copy()
    for t, chosen in enumerate(ids):
        ds = np.zeros_like(s[t])
        dw = dweights[t] * dtype(scaling_factor)
        if renormalize:
            total = s[t, chosen].sum() + dtype(1e-20)
            dw = (dw - (dw * s[t, chosen]).sum() / total) / total
        ds[chosen] = dw
        dlogits[t] += s[t] * (1 - s[t]) * ds if score == "sigmoid" else s[t] * (ds - (ds * s[t]).sum())
    if weight is None:
        return dlogits, None
    return product(dlogits, np.asarray(weight, dtype)), product(dlogits.T, x)
