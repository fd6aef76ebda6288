import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops.reference import moe_router as reference

from .budget import assert_within, to_numpy
from .moe_router_cases import (
    cases,
    check_choice,
    check_logits,
    check_permutation,
    check_router,
    check_router_of_logits,
    check_sort,
    problem,
    sort_cases,
)
from .tensors import int32

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter's bfloat16 arithmetic is wrong


@given(case=cases(CPU_DTYPES))
def test_router(case):
    check_router(case, "torch")


@given(case=cases(CPU_DTYPES))
def test_router_of_logits(case):
    check_router_of_logits(case, "torch")


@given(case=sort_cases())
def test_sort(case):
    check_sort(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES, max_tokens=12, hidden=(0, 1, 7, 24, 70, 600)))
def test_router_interpreter(case):
    check_router(case, "triton")


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES, max_tokens=12))
def test_router_of_logits_interpreter(case):
    check_router_of_logits(case, "triton")


@pytest.mark.interpreter
@settings(max_examples=40)
@given(case=sort_cases(max_tokens=40))
def test_sort_interpreter(case):
    check_sort(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", INTERPRETER_DTYPES)
def test_chunks_interpreter(dtype, monkeypatch):
    """A program that adds chunks of hidden up itself, and programs with one each, leave the same bits."""
    from hybrid_ops.triton_kernels import moe_router as kernels

    torch.manual_seed(0)
    x, weight = torch.randn(70, 1100).to(dtype), torch.randn(40, 1100).to(dtype)
    assert kernels.logits_config(70, 1100, 40, dtype != torch.float32).SPLITS == 3
    apart = hybrid_ops.moe_router(x, weight, 3, impl="triton")
    config = kernels.logits_config
    monkeypatch.setattr(kernels, "logits_config", lambda *problem: config(*problem)._replace(SPLITS=1))
    together = hybrid_ops.moe_router(x, weight, 3, impl="triton")
    check_logits(together.logits, x, weight)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(together, apart, strict=True))


GPU_SIZES = dict(max_tokens=70, hidden=(0, 1, 24, 70, 600, 1100), experts=(1, 2, 6, 36, 128, 130, 512))


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, **GPU_SIZES))
def test_router_gpu(case):
    check_router(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, **GPU_SIZES))
def test_router_of_logits_gpu(case):
    check_router_of_logits(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_tokens=30))
def test_router_torch_on_gpu(case):
    check_router(case, "torch", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=sort_cases(max_tokens=500, experts=(1, 3, 40, 200, 1024)))
def test_sort_gpu(case):
    check_sort(case, "triton", "cuda")


def check_ties(impl, device="cpu"):
    """Equal scores go to the lower expert, equal groups to the lower group, at any width."""
    logits = torch.tensor(
        [[0.0, 1.0, -0.0, 1.0, 0.0, 1.0], [2.0] * 6, [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0]], device=device
    )
    got = hybrid_ops.moe_router(logits, None, 4, impl=impl)
    assert got.ids.tolist() == [[1, 3, 5, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    got = hybrid_ops.moe_router(logits, None, 2, num_groups=3, topk_groups=2, impl=impl)
    assert got.ids.tolist() == [[1, 3], [0, 1], [0, 1]]
    wide = torch.zeros(2, 1024, device=device)
    wide[1, 1000] = 1
    got = hybrid_ops.moe_router(wide, None, 32, impl=impl)
    assert got.ids.tolist() == [list(range(32)), [1000, *range(31)]]


def check_not_a_number(impl, device="cpu"):
    """NaN is chosen last, inside the chosen groups, and weighs nothing; ids are distinct."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, -inf, nan, -9.0], [nan] * 4, [inf, nan, -inf, 0.0]], device=device)
    got = hybrid_ops.moe_router(logits, None, 4, impl=impl)
    assert got.ids.tolist() == [[3, 1, 0, 2], [0, 1, 2, 3], [0, 3, 2, 1]]
    torch.testing.assert_close(
        got.weights.cpu(), torch.tensor([[1.0, 0, 0, 0], [0] * 4, [2 / 3, 1 / 3, 0, 0]]), rtol=1e-6, atol=0
    )
    bias = torch.tensor([0.0, 0.0, 9.0, 9.0], device=device)
    got = hybrid_ops.moe_router(
        torch.tensor([[1.0, 1.0, 5.0, nan]], device=device), None, 2,
        correction_bias=bias, num_groups=2, topk_groups=1, impl=impl,
    )  # fmt: skip
    assert got.ids.tolist() == [[0, 1]]  # a group with a NaN has -inf
    got = hybrid_ops.moe_router(torch.full((1, 6), nan, device=device), None, 3, score="softmax", impl=impl)
    assert (got.ids.tolist(), got.weights.tolist()) == ([[0, 1, 2]], [[0.0] * 3])


def check_bad_ids(impl, device="cpu"):
    """Ids that the host cannot see are experts of elsewhere, and nothing is written outside."""
    ids = torch.tensor([[3, -1], [2**31 - 1, 1], [-(2**31), 4], [1, 0]], dtype=torch.int32, device=device)
    weights = torch.rand(4, 2, device=device)
    room = [torch.full((n + 2,), 77, dtype=torch.int32, device=device) for n in (4, 4, 8, 8)]
    counts, offs, token_index, row_index = (t[1:-1] for t in room)
    sorted_weights = torch.full((10,), 77.0, device=device)
    torch.ops.hybrid_ops.moe_sort_fwd(
        ids, weights, counts, offs, token_index, sorted_weights[1:-1], row_index.view(4, 2), 0, impl
    )
    assert counts.tolist() == [1, 2, 0, 1]
    assert offs.tolist() == [1, 3, 3, 4]
    assert token_index.tolist() == [3, 1, 3, 0, 0, 0, 0, 0]
    assert row_index.tolist() == [3, -1, -1, 1, -1, -1, 2, 0]
    expected = [weights[3, 1], weights[1, 1], weights[3, 0], weights[0, 0]]
    assert sorted_weights[1:-1].tolist() == [*(float(w) for w in expected), 0, 0, 0, 0]
    assert all((t[0], t[-1]) == (77, 77) for t in (*room, sorted_weights))


def check_many_blocks(impl, device="cpu"):
    """More choices than one block of the sort has, by a router that counts them and by the sort alone."""
    torch.manual_seed(0)
    logits, bias = torch.randn(150, 40, device=device), torch.linspace(0, 1, 40)
    options = dict(score="softmax", num_groups=5, topk_groups=2, renormalize=True, scaling_factor=2.5)
    got = hybrid_ops.moe_router(logits, None, 4, correction_bias=bias.to(device), impl=impl, **options)
    check_choice(got, bias, options)
    check_permutation(got, 40)
    again = hybrid_ops.moe_sort(got.ids, got.weights, 40, impl=impl)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got[3:], again[3:], strict=True))
    check_permutation(hybrid_ops.moe_sort(got.ids, got.weights, 40, expert_range=(11, 37), impl=impl), 40, (11, 37))


CHECKS = [check_ties, check_not_a_number, check_bad_ids, check_many_blocks]


@pytest.mark.parametrize("check", CHECKS)
def test_special(check):
    check("torch")


@pytest.mark.interpreter
@pytest.mark.parametrize("check", CHECKS)
def test_special_interpreter(check):
    check("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("check", CHECKS)
def test_special_gpu(check, impl):
    check(impl, "cuda")


def test_gradients():
    torch.manual_seed(0)
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (12, 7)))
    bias = torch.randn(12, dtype=torch.float64)
    logits = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    for options in (
        dict(),
        dict(num_groups=4, topk_groups=2, scaling_factor=2.5),
        dict(score="softmax"),
        dict(score="softmax", renormalize=False, correction_bias=bias),
        dict(renormalize=False, correction_bias=bias),
    ):

        def results(x, weight, options=options):
            routing = hybrid_ops.moe_router(x, weight, 4, **options)
            return routing.weights, routing.logits, routing.sorted_weights

        assert torch.autograd.gradcheck(results, (x, weight))
        assert torch.autograd.gradcheck(
            lambda x, results=results: results(x, None)[::2], (logits,)
        )  # the logits are x itself
    ids = torch.randint(0, 9, (6, 3), dtype=torch.int32)
    for expert_range in (None, (2, 5), (3, 3)):
        weights = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda w, expert_range=expert_range: hybrid_ops.moe_sort(ids, w, 9, expert_range=expert_range)[6],
            (weights,),
        )


def check_backward(case, impl, device="cpu"):
    """Whole tensors: where a token's weights sum to a constant its gradients may cancel to nothing but rounding."""
    case = case | dict(scale=1.0, topk=max(2, case["topk"]) if case["options"]["topk_groups"] > 1 else case["topk"])
    x, weight, bias = problem(case)
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["tokens"], case["topk"])
    dweights = torch.randn(*shape, generator=generator)
    dsorted, dlogits = dweights.flatten() * 2, torch.randn(case["tokens"], case["num_experts"], generator=generator)
    leaves = [t.to(device).detach().requires_grad_() for t in (x, weight)]
    got = hybrid_ops.moe_router(
        *leaves, case["topk"], correction_bias=None if bias is None else bias.to(device), impl=impl, **case["options"]
    )
    results = (got.weights, got.sorted_weights, got.logits)
    torch.autograd.backward(results, [t.to(device) for t in (dweights, dsorted, dlogits)])
    rows = got.row_index.cpu().long()
    options = {name: case["options"][name] for name in ("score", "renormalize", "scaling_factor")}
    ref, base = (
        reference.moe_router_bwd(
            to_numpy(dweights, d) + to_numpy(dsorted, d)[rows],
            *(to_numpy(t, d) for t in (dlogits, x, weight)),
            got.ids.cpu().numpy(),
            **options,
            dtype=d,
        )
        for d in (np.float64, np.float32)
    )
    assert_within("dx", leaves[0].grad, ref[0], base[0], case["dtype"], axis=None)
    assert_within("dweight", leaves[1].grad, ref[1], base[1], case["weight_dtype"], axis=None)


@given(case=cases(CPU_DTYPES, hidden=(8, 24, 70), experts=(12, 36)))
def test_backward(case):
    check_backward(case, "torch")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=cases(CPU_DTYPES, max_tokens=70, hidden=(24, 70, 600), experts=(12, 36, 130)))
def test_backward_gpu(case):
    check_backward(case, "triton", "cuda")


def test_no_gradient_of_the_bias_or_the_choice():
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 7), (12, 7), (12,)))
    got = hybrid_ops.moe_router(x, weight, 3, correction_bias=bias)
    assert [t.requires_grad for t in got] == [True, False, True, False, False, False, True, False]
    (got.weights.sum() + got.logits.sum()).backward()
    assert bias.grad is None
    got = hybrid_ops.moe_router(x.detach(), weight.detach(), 3, correction_bias=bias)
    assert not any(t.requires_grad for t in got)


def test_nan_has_no_gradient():
    logits = torch.tensor([[float("nan"), 1.0, 2.0]], requires_grad=True)
    hybrid_ops.moe_router(logits, None, 3, renormalize=False).weights.sum().backward()
    assert logits.grad[0, 0] == 0
    assert (logits.grad[0, 1:] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_token_depends_on_no_other_gpu(score, weight_dtype):
    """To the bit, although few tokens are multiplied by other programs than many."""
    torch.manual_seed(0)
    for hidden, num_experts, topk in ((2688, 128, 6), (4096, 512, 22)):
        x = torch.randn(20000, hidden, device="cuda", dtype=torch.bfloat16)
        weight = (torch.randn(num_experts, hidden, device="cuda") * 0.02).to(weight_dtype)
        whole = hybrid_ops.moe_router(x, weight, topk, score=score)
        for begin, end in ((0, 1), (5, 69), (100, 1100), (3, 8195)):
            part = hybrid_ops.moe_router(x[begin:end], weight, topk, score=score)
            for name in ("logits", "ids", "weights"):
                assert torch.equal(getattr(whole, name)[begin:end], getattr(part, name)), (name, begin, end)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    torch.manual_seed(0)
    hidden = 4096
    tokens = 2**31 // hidden + 40
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    x[-40:] = torch.randn(40, hidden, device="cuda")
    weight = torch.randn(16, hidden, dtype=torch.bfloat16, device="cuda")
    got, last = hybrid_ops.moe_router(x, weight, 2), hybrid_ops.moe_router(x[-40:], weight, 2)
    assert torch.equal(got.ids[-40:], last.ids)
    assert torch.equal(got.weights[-40:], last.weights)
    assert (got.ids[:-40] == torch.tensor([0, 1], device="cuda")).all()
    assert torch.equal(got.counts, got.ids.flatten().bincount(minlength=16).int())
    assert torch.equal(got.token_index[got.row_index[-40:].long()][:, 0].cpu(), torch.arange(tokens - 40, tokens).int())

    logits = torch.zeros(2**31 // 1024 + 40, 1024, device="cuda")
    logits[-1, 1023] = 1
    got = hybrid_ops.moe_router(logits, None, 1)
    assert (got.counts[0], got.counts[1023], int(got.ids[-1])) == (len(logits) - 1, 1, 1023)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [40, 3000])
def test_cuda_graph(tokens):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, device="cuda") for s in ((tokens, 96), (130, 96), (130,)))
    hybrid_ops.moe_router(x, weight, 5, correction_bias=bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = hybrid_ops.moe_router(x, weight, 5, correction_bias=bias)
        ranged = hybrid_ops.moe_sort(got.ids, got.weights, 130, expert_range=(30, 90))
    for _ in range(3):
        x.normal_()
        bias.normal_()
        graph.replay()
        expected = hybrid_ops.moe_router(x, weight, 5, correction_bias=bias)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
        check_permutation(got, 130)
        check_permutation(ranged, 130, (30, 90))


GOOD = dict(x=torch.randn(3, 8), weight=torch.randn(12, 8), topk=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.ones(2, 3, 8)), ValueError, r"x must have shape \(T, d\), got \(2, 3, 8\)"),
        (dict(x=torch.ones(3, 8).int()), TypeError, "x must have dtype float32 or .*, got int32"),
        (dict(weight=None, x=torch.ones(3, 8).bfloat16()), TypeError, "x must have dtype float32 or float64, got bfl"),
        (dict(weight=None, x=torch.ones(3, 1025)), ValueError, r"x .* E from 1 to 1024, got \(3, 1025\)"),
        (dict(weight=None, x=torch.ones(3)), ValueError, r"x must have shape \(T, E\), logits, .*, got \(3,\)"),
        (dict(weight=torch.ones(12, 7)), ValueError, r"weight must have shape \(\*, 8\), got \(12, 7\)"),
        (dict(weight=torch.ones(8)), ValueError, r"weight must have shape \(E, d\), got \(8,\)"),
        (dict(weight=torch.ones(0, 8)), ValueError, r"weight .* E from 1 to 1024, got \(0, 8\)"),
        (dict(weight=torch.ones(1025, 8)), ValueError, r"weight .* E from 1 to 1024, got \(1025, 8\)"),
        (dict(weight=torch.ones(12, 8, device="meta")), ValueError, "weight must be on cpu, got meta"),
        (dict(topk=0), ValueError, r"topk must be in \[1, 12\], got 0"),
        (dict(topk=13), ValueError, r"topk must be in \[1, 12\], got 13"),
        (dict(topk=33, weight=torch.ones(64, 8)), ValueError, r"topk must be in \[1, 32\], got 33"),
        (dict(topk=2.0), TypeError, "topk must be an int, got float"),
        (dict(correction_bias=torch.ones(8)), ValueError, r"correction_bias must have shape \(12,\), got \(8,\)"),
        (dict(score="relu"), ValueError, "score must be one of 'sigmoid', 'softmax', got 'relu'"),
        (dict(num_groups=5), ValueError, "num_groups must divide the number of experts, 12, got 5"),
        (dict(num_groups=0), ValueError, r"num_groups must be in \[1, 12\], got 0"),
        (dict(num_groups=4, topk_groups=5), ValueError, r"topk_groups must be in \[1, 4\], got 5"),
        (dict(num_groups=4, topk_groups=1, topk=4), ValueError, "topk must be at most 3, the experts of 1 of 4 groups"),
        (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
        (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.moe_router(**GOOD | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=[[0]]), TypeError, "ids must be a torch.Tensor, got list"),
        (dict(ids=int32(0, 1)), ValueError, r"ids must have shape \(T, k\), got \(2,\)"),
        (dict(ids=torch.tensor([[0, 1], [1, 2]])), TypeError, "ids must have dtype int32, got int64"),
        (dict(ids=torch.zeros(2, 33).int()), ValueError, r"ids .* k from 1 to 32, got \(2, 33\)"),
        (dict(ids=torch.zeros(2, 0).int()), ValueError, r"ids .* k from 1 to 32, got \(2, 0\)"),
        (dict(ids=int32(0, 9, 1, 2).view(2, 2)), ValueError, r"ids must be in \[0, 9\), got 9"),
        (dict(ids=int32(0, 9, -1, 2).view(2, 2)), ValueError, r"ids must be in \[0, 9\), got -1"),
        (dict(weights=torch.ones(2, 3)), ValueError, r"weights must have shape \(2, 2\), got \(2, 3\)"),
        (dict(weights=torch.ones(2, 2).half()), TypeError, "weights must have dtype float32 or float64, got float16"),
        (dict(num_experts=0), ValueError, r"num_experts must be in \[1, 1024\], got 0"),
        (dict(num_experts=1025), ValueError, r"num_experts must be in \[1, 1024\], got 1025"),
        (dict(expert_range=3), TypeError, r"expert_range must be None or \(begin, end\), got 3"),
        (dict(expert_range=(3, 10)), ValueError, r"expert_range must be \(begin, end\) within \(0, 9\), got \(3, 10\)"),
        (dict(expert_range=(5, 4)), ValueError, r"expert_range must be .*, got \(5, 4\)"),
        (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
        (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
    ],
)
def test_bad_input_of_sort(change, error, message):
    arguments = dict(ids=int32(0, 8, 1, 2).view(2, 2), weights=torch.ones(2, 2), num_experts=9) | change
    with pytest.raises(error, match=message):
        hybrid_ops.moe_sort(**arguments)


def test_too_many_rows():
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**26, 32)
    with pytest.raises(ValueError, match=r"tokens x choices must be less than 2\^31, got 67108864 x 32"):
        hybrid_ops.moe_sort(ids, torch.zeros(1, 1).expand(2**26, 32), 4)


def launch(dtype, weight_dtype, tokens, hidden, num_experts, topk, **options):
    """The router's launches, on CPU tensors, for `compiling_for`."""
    from hybrid_ops.triton_kernels import moe_router as kernels

    def index(*shape):
        return torch.empty(*shape, dtype=torch.int32)

    options = dict(score="sigmoid", num_groups=1, topk_groups=1, renormalize=True, scaling_factor=2.5) | options
    kernels.moe_router_fwd(
        torch.empty(tokens, hidden, dtype=dtype),
        torch.empty(num_experts, hidden, dtype=weight_dtype),
        torch.empty(num_experts),
        torch.empty(tokens, num_experts),
        torch.empty(tokens, topk),
        index(tokens, topk),
        *options.values(),
        index(num_experts),
        index(num_experts),
        index(tokens * topk),
        torch.empty(tokens * topk),
        index(tokens, topk),
    )


def launch_sort(tokens, num_experts, topk):
    from hybrid_ops.triton_kernels import moe_sort as kernels

    ids, experts, rows = (
        torch.empty(*s, dtype=torch.int32) for s in ((tokens, topk), (num_experts,), (tokens * topk,))
    )
    kernels.sort(ids, torch.empty(tokens, topk), 0, experts, experts, rows, torch.empty(tokens * topk), ids)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        launch(torch.bfloat16, torch.bfloat16, 8192, 2688, 128, 6)
        launch(torch.bfloat16, torch.bfloat16, 64, 4096, 512, 22)
        if sm in (90, 100):
            launch(torch.bfloat16, torch.bfloat16, 8192, 4096, 512, 22)
            launch(torch.bfloat16, torch.float32, 8192, 2688, 128, 6)
            launch(torch.float32, torch.float32, 64, 70, 1024, 32, score="softmax", num_groups=8, topk_groups=4)
            launch(torch.float16, torch.float16, 8192, 2688, 128, 6)
            launch_sort(8192, 1024, 32)
    check(compiled, sm)


def test_opcheck():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 16)[:, ::2], torch.randn(12, 8), torch.randn(12)
    logits, weights, ids = torch.empty(5, 12), torch.empty(5, 3), torch.empty(5, 3, dtype=torch.int32)
    permutation = (*(torch.empty(n, dtype=torch.int32) for n in (12, 12, 15)), torch.empty(15), torch.empty_like(ids))
    router, sort = torch.ops.hybrid_ops.moe_router_fwd.default, torch.ops.hybrid_ops.moe_sort_fwd.default
    choice = (weights, ids, *permutation, "sigmoid", 4, 2, True, 2.5, "torch")
    torch.library.opcheck(router, (x, weight, bias, logits, *choice))
    torch.library.opcheck(router, (torch.randn(5, 12), None, None, None, *choice))
    torch.library.opcheck(sort, (torch.randint(0, 12, (5, 3)).int(), torch.randn(5, 3), *permutation, 0, "torch"))


def compiled_router(x, weight, bias):
    routing = hybrid_ops.moe_router(x, weight, 3, correction_bias=bias, num_groups=4, topk_groups=2)
    ranged = hybrid_ops.moe_sort(routing.ids, routing.weights, 12, expert_range=(2, 7))
    rows = torch.arange(1, routing.sorted_weights.shape[0] + 1)
    return (
        (routing.sorted_weights * rows).sum() + (ranged.sorted_weights * rows).sum() + routing.logits.sum() + bias.sum()
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    compile_once(compiled_router, backend, lambda n: (torch.randn(n, 8), torch.randn(12, 8), torch.randn(12)))


def test_explain():
    assert hybrid_ops.explain("moe_router", device="cpu").impl == "torch"
    assert hybrid_ops.explain("moe_sort", device="cpu").impl == "torch"


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "moe_router.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    finder = doctest.DocTestFinder(recurse=False)
    for function in (hybrid_ops.moe_router, hybrid_ops.moe_sort):
        for example in finder.find(function, globs=names):
            results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 3
    assert all(r.attempted and not r.failed for r in results), results
