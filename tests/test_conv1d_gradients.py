"""Gradients of causal_conv1d: by finite differences in float64, and against the NumPy reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops.reference import conv1d as reference

from .budget import assert_within, to_numpy
from .conv1d_cases import CPU_DTYPES, ENOUGH, PLAIN, Problem, cases, for_cuda


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("form", ["dense", "cu_seqlens", "seq_idx"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients(form, width, activation):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    options, batch, nseq = dict(activation=activation), 2, 2
    if form == "cu_seqlens":
        options["cu_seqlens"], batch, nseq = torch.tensor([0, 0, 1, 1, 6, 7, 7], dtype=torch.int32), 1, 6
    elif form == "seq_idx":
        rows = [[-1, 0, 0, -1, 0, 1, 1], [0, 1, -1, 1, 1, 1, -1]]
        options["seq_idx"] = torch.tensor(rows, dtype=torch.int32)
    x, weight, bias, initial = leaf(batch, 7, 3), leaf(3, width), leaf(3), leaf(nseq, 3, width - 1)

    def with_states(x, weight, bias, initial):
        return hybrid_ops.causal_conv1d(x, weight, bias, initial_states=initial, return_final_states=True, **options)

    assert torch.autograd.gradcheck(with_states, (x, weight, bias, initial))
    assert torch.autograd.gradcheck(lambda x, w: hybrid_ops.causal_conv1d(x, w, **options), (x, weight))


def check_backward(case, impl, device="cpu"):
    problem = Problem(case, device)
    named = dict(x=problem.x, weight=problem.weight, bias=problem.bias, initial_states=problem.initial_states)
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    y, final = hybrid_ops.causal_conv1d(**leaves, return_final_states=True, impl=impl, **problem.sequences)
    dy = (problem.randn(*y.shape) / problem.scale).to(y)  # the gradients of all channels' weights are alike in size
    dfinal = (problem.randn(*final.shape) / problem.scale[:, None]).to(final)
    torch.autograd.backward([y, final], [dy, dfinal])
    results = []
    for dtype in (np.float64, np.float32):
        tensors, options = problem.arrays(dtype)
        options["initial_states"] = to_numpy(problem.initial_states, dtype)
        results.append(reference.causal_conv1d_bwd(to_numpy(dy, dtype), to_numpy(dfinal, dtype), *tensors, **options))
    axes = dict(x=-1 if problem.tokens >= ENOUGH else None)  # the other gradients have too few values a channel
    for name, ref, base in zip(("x", "weight", "bias", "initial_states"), *results, strict=True):
        if name in leaves:
            grad = leaves[name].grad
            assert_within(f"d{name}", grad, ref, base, case["dtype"], axis=axes.get(name))


# sums over tokens may cancel: a few channels at least, so that a gradient's RMS is not the luck of one
@given(case=cases(CPU_DTYPES, dims=(8, 16)))
def test_conv1d_backward(case):
    check_backward(case, "torch")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(8, 300)))
def test_conv1d_backward_gpu(case):
    check_backward(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(8, 300), widths=(2, 4)))
def test_conv1d_backward_cuda_gpu(case):
    check_backward(for_cuda(case), "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "cu_seqlens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 264, 268])  # a part of a tile; one and a part; rows that are no whole vectors
def test_conv1d_backward_in_tiles_gpu(form, dtype, dim):
    """More tokens than a tile has, and sequences that begin and end anywhere in one."""
    case = PLAIN | dict(form=form, dtype=dtype, state_dtype=dtype, seqlen=531, lengths=[60, 0, 3, 250, 218], dim=dim)
    check_backward(for_cuda(case), "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channel_first", "expanded", "same_for_all_tokens", "odd"])
def test_conv1d_backward_of_any_dy_gpu(layout):
    """Gradients that arrive in strides that the CUDA kernel does not read."""
    for_cuda(PLAIN)
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, device="cuda").requires_grad_() for shape in ((2, 30, 8), (8, 4), (8,))]
    dy = {
        "channel_first": torch.randn(2, 8, 30, device="cuda").transpose(1, 2),
        "expanded": torch.randn(2, 30, 1, device="cuda").expand(2, 30, 8),
        "same_for_all_tokens": torch.randn(2, 1, 8, device="cuda").expand(2, 30, 8),
        "odd": torch.randn(2, 30, 9, device="cuda")[..., 1:],
    }[layout]
    results = []
    for impl in ("cuda", "torch"):
        y = hybrid_ops.causal_conv1d(*leaves, activation="silu", impl=impl)
        results.append(torch.autograd.grad(y, leaves, dy))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [[0, 2, 3], [1, 3, 99], [-4, 2, 4], [5, 9, 99], [0, 30, 4, 2]])
def test_backward_of_bad_boundaries_gpu(bounds):
    """Nothing outside x is touched, and tokens of no sequence, NaN or not, lead to nothing."""
    for_cuda(PLAIN)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    x, weight = torch.ones(1, 20, 8, device="cuda"), torch.ones(8, 3, device="cuda")
    first, end = max(bounds[0], 0), min(max(bounds), 20)
    if bounds == sorted(bounds):
        x[:, :first] = x[:, end:] = float("nan")
    results = []
    for impl in ("cuda", "torch"):
        dx, dweight = torch.full_like(x, float("nan")), torch.full_like(weight, float("nan"))
        torch.ops.hybrid_ops.conv1d_bwd(
            torch.ones_like(x), None, x, weight, None, None, None, cu_seqlens, dx, dweight, None, None, True, impl
        )
        results.append((dx, dweight))
    assert results[0][0].isfinite().all()
    assert results[0][1].isfinite().all()
    if bounds == sorted(bounds):
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_backward_past_2_to_31_gpu():
    """The last rows of a tensor of more than 2^31 elements: their dx is that of a small problem."""
    for_cuda(PLAIN)
    wide, tail = 18560, 64
    seqlen = 2**31 // wide + tail
    x, dy = (torch.empty(1, seqlen, wide, dtype=torch.bfloat16, device="cuda")[..., 8192:18432] for _ in range(2))
    for t in (x, dy):
        t.zero_()
        t[:, -2 * tail :] = torch.randn(2 * tail, x.shape[2], device="cuda")
    weight = torch.randn(x.shape[2], 4, device="cuda")
    got, expected = [], []
    for results, impl, start in ((got, "cuda", 0), (expected, "torch", seqlen - 2 * tail)):
        dx = torch.empty_like(x[:, start:])
        dweight = torch.empty_like(weight)
        torch.ops.hybrid_ops.conv1d_bwd(
            dy[:, start:], None, x[:, start:], weight, None, None, None, None, dx, dweight, None, None, False, impl
        )
        results += [dx[:, -2 * tail :], dweight]
    torch.testing.assert_close(got[0], expected[0], rtol=0.01, atol=1e-3)  # one ulp of bfloat16
    # sums of 128 products of about 0.6 in another order: 128 * 2^-24 * 80 = 6e-4 at most
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-3)


def test_gradients_of_what_is_asked_for():
    x, weight, bias = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(hybrid_ops.causal_conv1d(x, weight, bias).sum(), bias)
    torch.testing.assert_close(grad, torch.full((3,), 10.0))
    weight.requires_grad_()
    y, _ = hybrid_ops.causal_conv1d(x, weight, return_final_states=True)
    (grad,) = torch.autograd.grad(y.sum(), weight)  # nothing flows into the final states
    torch.testing.assert_close(grad[:, 3], x.sum((0, 1)))


def test_opcheck():
    x, weight, bias = torch.randn(2, 6, 4).transpose(1, 2), torch.randn(6, 4), torch.randn(6)
    initial, dx, cu_seqlens = torch.randn(2, 6, 3), torch.empty(2, 6, 4).transpose(1, 2), torch.tensor([0, 3, 4]).int()
    seq_idx = torch.tensor([[0, 0, 1, 1], [-1, 0, 0, 0]], dtype=torch.int32)
    results = dx, torch.empty(6, 4), torch.empty(6), torch.empty(2, 6, 3)
    op = torch.ops.hybrid_ops.conv1d_bwd.default
    torch.library.opcheck(op, (x, initial, x, weight, bias, initial, seq_idx, None, *results, True, "torch"))
    results = dx[:1], torch.empty(6, 4), None, None
    torch.library.opcheck(op, (x[:1], None, x[:1], weight, None, None, None, cu_seqlens, *results, False, "torch"))
