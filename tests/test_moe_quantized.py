"""`moe_mlp` and `latent_moe` with experts in FP8 and NVFP4."""

import itertools

import numpy as np
import pytest
import torch

import hybrid_ops
from hybrid_ops.reference import gemm_nvfp4
from hybrid_ops.reference import moe as reference

from .budget import assert_within, round_to, to_numpy
from .moe_cases import LAYER, layer_orders, layer_problem, worst
from .scaled_gemm_cases import SCALINGS, to_reference
from .tensors import int32

IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
FORMATS = [*SCALINGS, "linear", "128x4", "packed"]
SIZES = dict(inner=32, hidden=48, latent=None, shared=None)  # NVFP4 wants multiples of 16


def quantized(weight, form):
    if form in SCALINGS:
        return hybrid_ops.fp8_quantize(weight, form)
    q = hybrid_ops.nvfp4_quantize(weight, scale_layout="linear" if form == "packed" else form)
    return hybrid_ops.nvfp4_prepack(q) if form == "packed" else q


def problem(dtype=torch.float32, **change):
    (x, gate, up, down), options = layer_problem(LAYER | SIZES | dict(dtype=dtype) | change)
    return x, gate, up.float(), down.float(), options


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("form", "weight_on"), zip(FORMATS, itertools.cycle(["output", "hidden"]), strict=False))
def test_is_made_of_products(impl, form, weight_on):
    """Bit for bit what the same ops return when they are called one after the other."""
    x, gate, up, down, _ = problem(torch.float16, activation="silu_gated")
    routing = hybrid_ops.moe_router(x, gate, 3)
    up, down = quantized(up, form), quantized(down, form)
    options = dict(activation="silu_gated", weight_on=weight_on, scaling_factor=2.5)
    out = hybrid_ops.moe_mlp(x, up, down, routing, **options, residual=x, impl=impl)

    def product(a, weight, **options):
        if form not in SCALINGS:
            return hybrid_ops.nvfp4_grouped_gemm(a, weight, routing.offs, **options, impl=impl)
        a = hybrid_ops.fp8_quantize(a, form if form in ("1x128", "mx") else "1x128" if form == "128x128" else "row")
        return hybrid_ops.fp8_grouped_gemm(a, weight, routing.offs, **options, out_dtype=x.dtype, impl=impl)

    on_hidden = weight_on == "hidden"
    scale = routing.sorted_weights if on_hidden else None
    hidden = product(x, up, gather=routing.token_index, activation="silu_gated", row_scale=scale)
    weights = None if on_hidden else routing.weights
    y = product(hidden, down)
    expected = hybrid_ops.moe_combine(y, routing.row_index, weights, scaling_factor=2.5, residual=x, impl=impl)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["linear", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["relu2", "silu_gated"])
def test_nvfp4_equals_the_layer_on_dequantized_weights(impl, form, dtype, activation):
    x, gate, *weights, _ = problem(dtype, activation=activation)
    stored = [hybrid_ops.nvfp4_quantize(w) for w in weights]
    exact = [torch.from_numpy(gemm_nvfp4.nvfp4_values(to_reference(q))) for q in stored]
    routing = hybrid_ops.moe_router(x, gate, 3)
    out = hybrid_ops.moe_mlp(x, *(quantized(w, form) for w in weights), routing, activation=activation, impl=impl)

    def layer(tensors, d):
        return reference.moe_mlp(
            *(to_numpy(t, d) for t in tensors),
            (to_numpy(routing.weights, d), routing.ids.numpy()),
            activation=activation,
            store=lambda result: round_to(result, dtype).astype(result.dtype),
            dtype=d,
        )

    ref = layer((x, *exact), np.float64)
    orders = layer_orders(LAYER | SIZES | dict(dtype=dtype), (x, x, *exact), {})
    base = worst([layer((x, up, down), np.float32) for (x, _, up, down), _ in orders], ref)
    assert_within("out", out, ref, base, dtype, axis=0)


@pytest.mark.parametrize("form", ["row", "128x128", "linear"])
def test_formats_are_near_the_unquantised_layer(form):
    """Independent of the products' own references: what quantising costs, and not more; a wrong scale would."""
    x, gate, up, down, options = problem(latent=32, shared=16, hidden=64)
    exact = hybrid_ops.latent_moe(x, gate, up, down, 3, **options)
    out = hybrid_ops.latent_moe(x, gate, quantized(up, form), quantized(down, form), 3, **options)
    error = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # E4M3 rounds by 2^-4 at most, 2.6 % in RMS, E2M1 by about 10 %; four roundings of either on the way, ReLU squares
    assert 0 < error < (0.4 if form == "linear" else 0.15)


@pytest.mark.parametrize("form", FORMATS)
def test_latent_moe(form):
    x, gate, up, down, options = problem(latent=32, shared=16, hidden=64)
    up, down = quantized(up, form), quantized(down, form)
    out, routing = hybrid_ops.latent_moe(x, gate, up, down, 3, **options, return_routing=True)
    latent, _ = hybrid_ops.latent_down_proj(x, options["fc1_weight"], gate)
    every = int32(len(x))
    hidden = hybrid_ops.grouped_gemm(x, options["shared_up_weight"][None], every, activation="relu2")
    shared = hybrid_ops.grouped_gemm(hidden, options["shared_down_weight"][None], every)
    r = hybrid_ops.moe_mlp(latent, up, down, routing)
    assert torch.equal(out, hybrid_ops.latent_up_proj(r, options["fc2_weight"], residual=shared))


def test_mixed_formats():
    x, gate, up, down, _ = problem()
    routing = hybrid_ops.moe_router(x, gate, 3)
    out = hybrid_ops.moe_mlp(x, quantized(up, "linear"), down, routing)
    wide = hybrid_ops.nvfp4_dequantize(quantized(up, "linear"), dtype=torch.float32)
    torch.testing.assert_close(out, hybrid_ops.moe_mlp(x, wide, down, routing))


def test_bad_weights():
    x, gate, up, down, _ = problem()
    routing = hybrid_ops.moe_router(x, gate, 3)
    q = quantized(up, "linear")
    for change, error, message in (
        (
            (x, q, quantized(down[:7], "linear")),
            ValueError,
            r"down_weight must have shape \(8, 48, \*\), got \(7, 48, 32\)",
        ),
        (
            (x, quantized(up[:, :16], "row"), down),
            ValueError,
            r"up_weight must have shape \(8, 32, 48\), got \(8, 16, 48\)",
        ),
        ((x, q._replace(scale=q.scale[:7]), down), ValueError, r"up_weight.scale must have shape \(8, 32, 3\), got"),
        ((x.clone().requires_grad_(), q, down), ValueError, "x must not require a gradient"),
        ((x.double(), q, quantized(down, "row")), TypeError, "x must have dtype float32 or .*, got float64"),
    ):
        with pytest.raises(error, match=message):
            hybrid_ops.moe_mlp(*change, routing)


def test_gradients_of_the_weights_of_the_routing():
    """What is not quantised is differentiable as ever."""
    x, gate, up, down, _ = problem()
    logits = (x @ gate.T).requires_grad_()
    out = hybrid_ops.moe_mlp(x, quantized(up, "linear"), quantized(down, "row"), hybrid_ops.moe_router(logits, None, 3))
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.abs().max() > 0


def test_torch_compile(compile_once):
    def layer(x, gate, up, down):
        routing = hybrid_ops.moe_router(x, gate, 2)
        return hybrid_ops.moe_mlp(x, hybrid_ops.nvfp4_quantize(up), hybrid_ops.fp8_quantize(down), routing)

    torch.manual_seed(0)
    weights = [torch.randn(*shape) / 4 for shape in ((4, 16), (4, 32, 16), (4, 16, 32))]
    compile_once(layer, "aot_eager", lambda n: (torch.randn(n, 16), *weights), grads=(False,))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_cuda_graph(form):
    x, gate, up, down, _ = problem(torch.bfloat16, tokens=50)
    x, gate, up, down = (t.cuda() for t in (x, gate, up, down))
    up, down = quantized(up, form), quantized(down, form)

    def layer():
        return hybrid_ops.latent_moe(x, gate, up, down, 3)

    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for _ in range(3):
        x.normal_()
        expected = layer()
        graph.replay()
        assert torch.equal(out, expected)
