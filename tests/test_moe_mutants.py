"""Wrong versions of latent_moe, by name, that the checks must reject."""

import pytest
import torch

import hybrid_ops

from .moe_cases import CPU_DTYPES, LAYER, check_layer, layer_of
from .tensors import int32

right = layer_of("torch")


def bias_used_in_the_weights(x, gate, up, down, topk, correction_bias, **options):
    """The weights are the biased scores of the same experts."""
    _, routing = right(x, gate, up, down, topk, correction_bias=correction_bias, **options)
    scores = routing.logits.sigmoid() + correction_bias
    weights = scores.gather(1, routing.ids.long())
    weights = weights / weights.sum(1, keepdim=True) * options["scaling_factor"]
    return with_routing(x, up, down, hybrid_ops.moe_sort(routing.ids, weights, len(up)), **options), routing


def with_routing(x, up, down, routing, fc1_weight, fc2_weight, shared_up_weight, shared_down_weight, **_):
    latent, _ = hybrid_ops.latent_down_proj(x, fc1_weight)
    every = int32(len(x))
    hidden = hybrid_ops.grouped_gemm(x, shared_up_weight[None], every, activation="relu2")
    shared = hybrid_ops.grouped_gemm(hidden, shared_down_weight[None], every)
    return hybrid_ops.latent_up_proj(hybrid_ops.moe_mlp(latent, up, down, routing), fc2_weight, residual=shared)


def one_expert_missing(x, gate, up, down, topk, **options):
    _, routing = right(x, gate, up, down, topk, **options)
    weights = routing.weights.clone()
    weights[3, 1] = 0
    return with_routing(x, up, down, hybrid_ops.moe_sort(routing.ids, weights, len(up)), **options), routing


def two_experts_swapped(x, gate, up, down, topk, **options):
    _, routing = right(x, gate, up, down, topk, **options)
    order, chosen = torch.arange(len(up)), routing.ids[0, :2].long()
    order[chosen] = chosen.flip(0)
    return right(x, gate, up[order], down, topk, **options)


def scaling_applied_twice(*args, scaling_factor, **options):
    return right(*args, scaling_factor=scaling_factor**2, **options)


def shared_expert_ignored(*args, shared_up_weight, shared_down_weight, **options):
    return right(*args, **options)


def shared_expert_scaled(*args, shared_down_weight, scaling_factor, **options):
    return right(*args, shared_down_weight=shared_down_weight * 2, scaling_factor=scaling_factor, **options)


def correction_bias_ignored(*args, correction_bias, **options):
    return right(*args, **options)


def last_token_missing(*args, **options):
    out, routing = right(*args, **options)
    out[-1] = 0
    return out, routing


def not_renormalized(*args, renormalize, **options):
    return right(*args, renormalize=False, **options)


MUTANTS = [
    bias_used_in_the_weights, one_expert_missing, two_experts_swapped, scaling_applied_twice, shared_expert_ignored,
    shared_expert_scaled, correction_bias_ignored, last_token_missing, not_renormalized,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_mutants_are_rejected(mutant, dtype):
    case = LAYER | dict(dtype=dtype)
    check_layer(case, right)
    with pytest.raises(AssertionError):
        check_layer(case, mutant)
