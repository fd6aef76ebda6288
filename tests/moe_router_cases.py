"""Random problems of the router and of the sort, and what their results are held to."""

import random

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import moe_router as reference
from hybrid_ops.reference.products import product

from .budget import assert_within, to_numpy
from .tensors import to_device

TINY = float(np.finfo(np.float32).tiny)  # scores below it may be flushed to zero


@st.composite
def cases(draw, dtypes, max_tokens=9, hidden=(0, 1, 7, 24, 70), experts=(1, 2, 6, 12, 36, 130)):
    # one draw seeds the rest: drawn one by one, choices repeat from example to example
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    num_experts = choose(experts)
    num_groups = choose([1, *(n for n in range(1, min(num_experts, 40) + 1) if num_experts % n == 0)])
    topk_groups = choose(range(1, num_groups + 1))
    return dict(
        seed=choose(range(2**31)),
        dtype=choose(dtypes),
        weight_dtype=choose(dtypes),
        tokens=choose([0, 1, 2, 9, max_tokens, max_tokens]),
        hidden=choose(hidden),
        num_experts=num_experts,
        topk=choose(range(1, min(32, topk_groups * (num_experts // num_groups)) + 1)),
        bias=choose([None, 0.1, 3.0]),
        strided=choose([False, True]),
        logits=choose(["wide", "narrow", "equals", "special"]),  # where they come in place of x
        scale=choose([1e-2, 1.0, 20.0]),
        options=dict(
            score=choose(["sigmoid", "softmax"]),
            num_groups=num_groups,
            topk_groups=topk_groups,
            renormalize=choose([False, True]),
            scaling_factor=choose([1.0, 2.5]),
        ),
    )


def problem(case):
    """x, weight and correction_bias, on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    spare = 5 if case["strided"] else 0
    x = torch.randn(case["tokens"], case["hidden"] + spare, generator=generator) * case["scale"]
    weight = (
        torch.randn(case["hidden"] + spare, case["num_experts"], generator=generator) / max(1, case["hidden"]) ** 0.5
    )
    weight = weight.T if case["strided"] else weight.T.contiguous()
    return (
        x.to(case["dtype"])[:, spare:],
        weight.to(case["weight_dtype"])[:, spare:],
        bias_of(case, generator),
    )


def bias_of(case, generator):
    return None if case["bias"] is None else torch.randn(case["num_experts"], generator=generator) * case["bias"]


def logits_of(case):
    """Logits (T, E) and correction_bias, on the CPU: up to +-80, or within a few ulp, or often equal, or not finite."""
    generator = torch.Generator().manual_seed(case["seed"])
    spare = 5 if case["strided"] else 0
    shape = (case["tokens"], case["num_experts"] + spare)
    logits = torch.randn(*shape, generator=generator)
    if case["logits"] == "wide":
        logits = (logits * 30).clamp(-80, 80)
    elif case["logits"] == "narrow":
        logits = 1 + logits * 1e-7
    elif case["logits"] == "equals":
        logits = logits.round()
    else:
        values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 500.0, -500.0])
        some = torch.rand(*shape, generator=generator) < 0.4
        logits = torch.where(some, values[torch.randint(0, 7, shape, generator=generator)], logits)
    return logits[:, spare:], bias_of(case, generator)


def oracle_options(options):
    return {name: options[name] for name in ("score", "num_groups", "topk_groups")}


def check_router(case, impl, device="cpu"):
    x, weight, bias = problem(case)
    got = hybrid_ops.moe_router(
        *(to_device(t, device) for t in (x, weight)),
        case["topk"],
        correction_bias=to_device(bias, device),
        impl=impl,
        **case["options"],
    )
    check_logits(got.logits, x, weight)
    check_choice(got, bias, case["options"])
    check_permutation(got, case["num_experts"])


def check_router_of_logits(case, impl, device="cpu"):
    logits, bias = logits_of(case)
    arguments = (to_device(logits, device), None, case["topk"])
    got = hybrid_ops.moe_router(*arguments, correction_bias=to_device(bias, device), impl=impl, **case["options"])
    assert got.logits is arguments[0]
    check_choice(got, bias, case["options"])
    check_permutation(got, case["num_experts"])


def check_logits(logits, x, weight):
    """Exact products summed in float32, whatever the dtypes: hidden additions, each rounded or truncated, of terms that
    are at most three TF32 products, 8 * 2^-23 from exact. And the budget of x's dtype, for each token."""
    assert logits.dtype == torch.float32
    ref, base = (product(to_numpy(x, d), to_numpy(weight, d).T) for d in (np.float64, np.float32))
    bound = (x.shape[1] + 8) * 2.0**-23 * (np.abs(to_numpy(x)) @ np.abs(to_numpy(weight)).T)
    assert (np.abs(to_numpy(logits) - ref) <= bound).all()
    if weight.shape[0] >= 8:  # of fewer, all may happen to cancel
        assert_within("logits", logits, ref, base, x.dtype, axis=0)


def check_choice(got, bias, options):
    """ids and weights, from the logits that the implementation itself computed."""
    assert (got.ids.dtype, got.weights.dtype) == (torch.int32, torch.float32)
    ids = got.ids.cpu().numpy()
    assert_chosen(ids, to_numpy(got.logits), None if bias is None else bias.numpy(), **oracle_options(options))
    ref, base = (
        reference.gate_weights(
            to_numpy(got.logits, d), ids, options["score"], options["renormalize"], options["scaling_factor"]
        )
        for d in (np.float64, np.float32)
    )
    with np.errstate(invalid="ignore"):
        chosen = np.take_along_axis(reference.scores(to_numpy(got.logits), options["score"]), ids.astype(np.int64), 1)
    flushed = (chosen < TINY).all(1)
    assert got.weights.isfinite().all()
    assert_within("weights", got.weights.cpu()[~flushed], ref[~flushed], base[~flushed], torch.float32, axis=0)


def assert_chosen(ids, logits, bias, score, num_groups, topk_groups):
    """At each place an expert whose score is the reference's there, within 4 ulp: across wider gaps, the same one."""
    with np.errstate(invalid="ignore"):
        plain = reference.selection_scores(logits, None, score)
    sel = reference.selection_scores(logits, bias, score)
    for t, chosen in enumerate(ids):
        with np.errstate(invalid="ignore"):
            size = np.fmax(np.abs(plain[t]), np.abs(sel[t]))
            ulp = np.where(size < TINY, TINY / 4, np.nan_to_num(np.spacing(size)).astype(np.float64))
        group_of = np.arange(len(sel[t])) // (len(sel[t]) // num_groups)
        groups = _groups_of(set(group_of[chosen]), sel[t], ulp, num_groups, topk_groups)
        inside = np.flatnonzero(np.isin(group_of, list(groups)))
        expected = inside[reference.largest(sel[t, inside], len(chosen))]
        assert len(set(chosen)) == len(chosen), (t, chosen)
        for mine, theirs in zip(chosen, expected, strict=True):
            slack = 4 * max(ulp[mine], ulp[theirs])
            assert mine == theirs or (mine in inside and abs(sel[t, mine] - sel[t, theirs]) <= slack), (
                t,
                chosen,
                expected,
            )


def _groups_of(used, sel, ulp, num_groups, topk_groups):
    """The groups that must have been chosen for experts of the groups `used` to come out.

    Of those whose sums are within 8 ulp of the last chosen one, any may have been: first `used` ones, then those whose
    largest expert is smallest, so that they ask for no expert of theirs among the chosen.
    """
    sums, experts = reference.group_scores(sel, num_groups), sel.reshape(num_groups, -1)
    best = reference.largest(sums, topk_groups)
    last, slack = best[-1], 8 * ulp.reshape(num_groups, -1).max(1)
    near = [
        g for g in range(num_groups) if sums[g] == sums[last] or abs(sums[g] - sums[last]) <= max(slack[g], slack[last])
    ]
    sure = set(best) - set(near)
    near.sort(key=lambda g: (g not in used, np.fmax.reduce(experts[g], initial=-np.inf)))
    return sure | set(near[: topk_groups - len(sure)])


def check_permutation(got, num_experts, expert_range=None):
    """Exactly the reference's, of the ids and weights that came out."""
    ids = got.ids.cpu().numpy()
    expected = reference.moe_sort(ids, to_numpy(got.weights), num_experts, expert_range=expert_range)
    for name, mine, theirs in list(zip(got._fields, got, expected, strict=True))[3:]:
        assert mine.dtype == (got.weights.dtype if name == "sorted_weights" else torch.int32)
        np.testing.assert_array_equal(to_numpy(mine), theirs, err_msg=name)


@st.composite
def sort_cases(draw, max_tokens=60, experts=(1, 3, 40, 200)):
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    num_experts = choose(experts)
    begin, end = sorted(choose(range(num_experts + 1)) for _ in range(2))
    return dict(
        seed=choose(range(2**31)),
        tokens=choose([0, 1, 10, max_tokens, max_tokens]),
        topk=choose([1, 2, 6, 22, 32]),
        num_experts=num_experts,
        expert_range=choose([None, (0, num_experts), (begin, end)]),
        loads=choose(["even", "skewed", "one"]),
        strided=choose([False, True]),
    )


def sort_problem(case):
    """ids, with repetitions, and weights, on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["topk"], case["tokens"]) if case["strided"] else (case["tokens"], case["topk"])
    part = torch.rand(*shape, generator=generator) ** {"even": 1, "skewed": 6, "one": 1000}[case["loads"]]
    ids = (part * case["num_experts"]).int()
    weights = torch.randn(*shape, generator=generator)
    return (ids.T, weights.T) if case["strided"] else (ids, weights)


def check_sort(case, impl, device="cpu"):
    ids, weights = (to_device(t, device) for t in sort_problem(case))
    got = hybrid_ops.moe_sort(ids, weights, case["num_experts"], expert_range=case["expert_range"], impl=impl)
    assert got.ids is ids
    assert got.weights is weights
    assert got.logits is None
    check_permutation(got, case["num_experts"], case["expert_range"])
