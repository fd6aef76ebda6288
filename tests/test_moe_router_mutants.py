"""Wrong routers, by name, that the checks of `moe_router_cases` must reject."""

import pytest
import torch

import hybrid_ops

from .moe_router_cases import check_choice, check_logits, check_permutation

OPTIONS = dict(score="sigmoid", num_groups=6, topk_groups=3, renormalize=True, scaling_factor=2.5)
TOPK = 5


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((40, 64), (24, 64), (24,)))
    return (x / 8).to(dtype), weight, bias * 0.3


def right(x, weight, bias, **change):
    return hybrid_ops.moe_router(x, weight, TOPK, correction_bias=bias, **OPTIONS | change)


def other_weights(routing, weights):
    """The routing with other weights, sorted as they should be."""
    return hybrid_ops.moe_sort(routing.ids, weights, 24)._replace(logits=routing.logits)


def bias_in_the_weights(x, weight, bias):
    routing = right(x, weight, bias)
    chosen = (routing.logits.sigmoid() + bias).gather(1, routing.ids.long())
    return other_weights(routing, chosen / chosen.sum(-1, keepdim=True) * 2.5)


def scaling_twice(x, weight, bias):
    return right(x, weight, bias, scaling_factor=2.5**2)


def not_renormalised(x, weight, bias):
    return right(x, weight, bias, renormalize=False)


def renormalised_over_all_experts(x, weight, bias):
    routing = right(x, weight, bias, renormalize=False)
    return other_weights(routing, routing.weights / routing.logits.sigmoid().sum(-1, keepdim=True))


def softmax_for_sigmoid(x, weight, bias):
    return right(x, weight, bias, score="softmax")


def weights_of_two_experts_swapped(x, weight, bias):
    routing = right(x, weight, bias)
    return other_weights(routing, routing.weights[:, [1, 0, 2, 3, 4]].contiguous())


def bias_ignored(x, weight, bias):
    return right(x, weight, None)


def groups_ignored(x, weight, bias):
    return right(x, weight, bias, num_groups=1, topk_groups=1)


def groups_by_their_best_expert(x, weight, bias):
    """Not by the sum of their best two."""
    s = hybrid_ops.moe_router(x, weight, TOPK).logits.sigmoid() + bias
    best = s.unflatten(1, (6, 4)).amax(-1)
    outside = best < best.topk(3).values[:, -1:]
    inside = s.masked_fill(outside.repeat_interleave(4, 1), float("-inf"))
    ids = inside.topk(TOPK).indices.int()
    chosen = right(x, weight, bias).logits.sigmoid().gather(1, ids.long())
    weights = chosen / chosen.sum(-1, keepdim=True) * 2.5
    return hybrid_ops.moe_sort(ids, weights, 24)._replace(logits=right(x, weight, bias).logits)


def last_choice_is_the_next_best(x, weight, bias):
    routing = hybrid_ops.moe_router(x, weight, TOPK + 1, correction_bias=bias, **OPTIONS)
    ids = routing.ids[:, [0, 1, 2, 3, 5]].contiguous()
    chosen = routing.logits.sigmoid().gather(1, ids.long())
    weights = chosen / chosen.sum(-1, keepdim=True) * 2.5
    return hybrid_ops.moe_sort(ids, weights, 24)._replace(logits=routing.logits)


def logits_rounded_to_bfloat16(x, weight, bias):
    routing = right(x, weight, bias)
    return right(routing.logits.bfloat16().float(), None, bias)


def products_of_tf32(x, weight, bias):
    return right(x, ((weight.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32), bias)


def rows_of_an_expert_reversed(x, weight, bias):
    routing = right(x, weight, bias)
    begin, end = 0, int(routing.offs[0])
    rows = torch.arange(len(routing.token_index))
    rows[begin:end] = rows[begin:end].flip(0)
    return routing._replace(
        token_index=routing.token_index[rows],
        sorted_weights=routing.sorted_weights[rows],
        row_index=rows[routing.row_index.long()].int(),
    )


def last_row_missing(x, weight, bias):
    routing = right(x, weight, bias)
    routing.sorted_weights[-1] = 0
    return routing


MUTANTS = [
    bias_in_the_weights,
    scaling_twice,
    not_renormalised,
    renormalised_over_all_experts,
    softmax_for_sigmoid,
    weights_of_two_experts_swapped,
    bias_ignored,
    groups_ignored,
    groups_by_their_best_expert,
    last_choice_is_the_next_best,
    logits_rounded_to_bfloat16,
    products_of_tf32,
    rows_of_an_expert_reversed,
    last_row_missing,
]


def verify(routing, x, weight, bias):
    check_logits(routing.logits, x, weight)
    check_choice(routing, bias, OPTIONS)
    check_permutation(routing, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_one_passes(dtype):
    x, weight, bias = problem(dtype)
    verify(right(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_rejected(mutant, dtype):
    x, weight, bias = problem(dtype)
    routing = mutant(x, weight, bias)
    with pytest.raises(AssertionError):
        verify(routing, x, weight, bias)
