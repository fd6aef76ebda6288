"""Mixture-of-experts layers, plain and latent: out = fc2(sum_e w_e E_e(fc1 x)) + shared(x).

LatentMoE: NVIDIA 2025, "Nemotron 3" white paper, section 2.2. The router and the shared expert see all of x; the routed
experts see fc1 x, which is shorter, so that fc1 and fc2 run once a token and what travels to the experts is short.
"""

import numpy as np

from .grouped_gemm import activate, grouped_gemm
from .moe_router import moe_router
from .products import product


def moe_combine(y, row_index, weights=None, *, scaling_factor=1.0, residual=None, dtype=np.float64):
    """out[t] = scaling_factor * sum_j weights[t, j] y[row_index[t, j]] + residual[t], j ascending; -1 is skipped."""
    y, row_index = np.asarray(y, dtype), np.asarray(row_index)
    out = np.zeros((len(row_index), y.shape[1]), dtype)
    for t, rows in enumerate(row_index):
        for j, row in enumerate(rows):
            if row >= 0:
                out[t] += y[row] if weights is None else dtype(weights[t, j]) * y[row]
    out *= dtype(scaling_factor)
    return out if residual is None else out + np.asarray(residual, dtype)


def moe_combine_bwd(dout, y, row_index, weights=None, *, scaling_factor=1.0, dtype=np.float64):
    """Gradients (dy, dweights); that of the residual is dout."""
    dout, y, row_index = np.asarray(dout, dtype), np.asarray(y, dtype), np.asarray(row_index)
    dy, dweights = np.zeros_like(y), np.zeros(row_index.shape, dtype)
    for t, rows in enumerate(row_index):
        for j, row in enumerate(rows):
            if row >= 0:
                dy[row] += dout[t] * dtype(scaling_factor) * (1 if weights is None else dtype(weights[t, j]))
                dweights[t, j] = dtype(scaling_factor) * (y[row] * dout[t]).sum()
    return dy, dweights


def latent_down_proj(x, fc1_weight, gate_weight=None, *, dtype=np.float64):
    """(latent = fc1 x, the router's logits = gate x or None)."""
    x = np.asarray(x, dtype)
    logits = None if gate_weight is None else product(x, np.asarray(gate_weight, dtype).T)
    return product(x, np.asarray(fc1_weight, dtype).T), logits


def latent_up_proj(r, fc2_weight, *, residual=None, dtype=np.float64):
    """fc2 r + residual."""
    out = product(np.asarray(r, dtype), np.asarray(fc2_weight, dtype).T)
    return out if residual is None else out + np.asarray(residual, dtype)


def moe_mlp(
    x,
    up_weight,
    down_weight,
    routing,
    *,
    activation="relu2",
    weight_on="output",
    scaling_factor=1.0,
    residual=None,
    store=lambda result: result,
    dtype=np.float64,
):
    """The routed experts alone: token after token, its experts in the order of the routing's columns.

    `routing` begins with weights (T, k) and ids (T, k). The weight multiplies what an expert returns, or with
    weight_on="hidden" (Megatron's order) what goes into its second matrix: the same in exact arithmetic. `store`
    rounds what is kept between two products as the layer keeps it.
    """
    x, up, down = (np.asarray(t, dtype) for t in (x, up_weight, down_weight))
    out = np.zeros((len(x), down.shape[1]), dtype)
    for t, (weights, ids) in enumerate(zip(*routing[:2], strict=True)):
        for e, w in zip(ids, weights, strict=True):
            hidden = activate(product(up[e], x[t])[None], activation)[0]
            before, after = (dtype(w), 1) if weight_on == "hidden" else (1, dtype(w))
            out[t] += after * store(product(down[e], store(hidden * before)))
    out *= dtype(scaling_factor)
    return out if residual is None else out + np.asarray(residual, dtype)


def latent_moe(
    x,
    gate_weight,
    up_weight,
    down_weight,
    topk,
    *,
    fc1_weight=None,
    fc2_weight=None,
    shared_up_weight=None,
    shared_down_weight=None,
    activation="relu2",
    correction_bias=None,
    score="sigmoid",
    num_groups=1,
    topk_groups=1,
    renormalize=True,
    scaling_factor=1.0,
    routing=None,
    store=lambda result: result,
    dtype=np.float64,
):
    """The whole layer; fc1 = fc2 = None is the plain mixture.

    A `routing` that is given takes the router's place; `store` as in `moe_mlp`.
    """
    x = np.asarray(x, dtype)
    if routing is None:
        routing = moe_router(
            x,
            gate_weight,
            topk,
            correction_bias=correction_bias,
            score=score,
            num_groups=num_groups,
            topk_groups=topk_groups,
            renormalize=renormalize,
            scaling_factor=scaling_factor,
            dtype=dtype,
        )
    latent = x if fc1_weight is None else store(latent_down_proj(x, fc1_weight, dtype=dtype)[0])
    out = moe_mlp(latent, up_weight, down_weight, routing, activation=activation, store=store, dtype=dtype)
    if fc2_weight is not None:
        out = latent_up_proj(store(out), fc2_weight, dtype=dtype)
    if shared_up_weight is not None:
        every = [len(x)]
        hidden, _ = grouped_gemm(x, np.asarray(shared_up_weight)[None], every, activation=activation, dtype=dtype)
        out = out + store(product(store(hidden), np.asarray(shared_down_weight, dtype).T))
    return out
