import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import moe as reference

from .budget import assert_within, round_to, to_numpy
from .moe_cases import (
    BOTH,
    CPU_DTYPES,
    INTERPRETER_DTYPES,
    LAYER,
    arrays,
    check_combine,
    check_layer,
    combine_cases,
    combine_of,
    combine_problem,
    layer_cases,
    layer_of,
    layer_orders,
    layer_problem,
    worst,
)
from .moe_router_cases import check_logits
from .tensors import int32, to_device

IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


# --- moe_combine ---


@given(case=combine_cases(CPU_DTYPES))
def test_combine(case):
    check_combine(case, combine_of("torch"))


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=combine_cases(INTERPRETER_DTYPES))
def test_combine_interpreter(case):
    check_combine(case, combine_of("triton"))


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=combine_cases(CPU_DTYPES, tokens=(0, 1, 70), widths=(24, 1024, 2688)))
def test_combine_gpu(case):
    check_combine(case, combine_of("triton", "cuda"))


def check_combine_backward(case, impl, device="cpu"):
    (y, row_index, weights), options = combine_problem(case)
    residual = options.pop("residual", None)
    leaves = [None if t is None else to_device(t, device).detach().requires_grad_() for t in (y, weights, residual)]
    out = hybrid_ops.moe_combine(
        leaves[0],
        row_index.to(device),
        leaves[1],
        residual=leaves[2],
        **options,
        out_dtype=case["out_dtype"],
        impl=impl,
    )
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    given = [leaf for leaf in leaves if leaf is not None]
    dy, *rest = torch.autograd.grad(out, given, dout.to(device))
    (ref, ref_weights), (base, base_weights) = (
        reference.moe_combine_bwd(
            to_numpy(dout, d), to_numpy(y, d), row_index.numpy(), to_numpy(weights, d), **options, dtype=d
        )
        for d in BOTH
    )
    assert_within("dy", dy, ref, base, case["dtype"], axis=0)
    if residual is not None:
        assert torch.equal(rest[-1].cpu(), dout.to(residual.dtype))
    if weights is not None and case["dtype"] != torch.float32:
        # each is a sum of float32 products that may cancel: against one rounding of the products' dtype they are right
        assert_within("dweights", rest[0], ref_weights, base_weights, case["dtype"], axis=None)


@given(case=combine_cases(CPU_DTYPES))
def test_combine_backward(case):
    check_combine_backward(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=combine_cases(INTERPRETER_DTYPES))
def test_combine_backward_interpreter(case):
    check_combine_backward(case, "triton")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=combine_cases(CPU_DTYPES, tokens=(0, 1, 70), widths=(24, 1024, 2688)))
def test_combine_backward_gpu(case):
    check_combine_backward(case, "triton", "cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_combine_skips_rows_that_are_not_here(impl):
    """Also where their weight is no number; and a row may be wanted twice."""
    y = torch.arange(3.0)[:, None].expand(3, 24) + 1
    row_index = int32(-1, 2, 0, 0).view(2, 2)
    weights = torch.tensor([[float("nan"), 2.0], [1.0, 0.5]], requires_grad=True)
    leaf = y.clone().requires_grad_()
    out = hybrid_ops.moe_combine(leaf, row_index, weights.detach(), impl=impl)
    assert out[:, 0].tolist() == [6.0, 1.5]
    out.sum().backward()
    assert leaf.grad[:, 0].tolist() == [1.5, 0.0, 2.0]
    assert not hybrid_ops.moe_combine(y[:0], int32(-1, -1).view(1, 2), impl=impl).any()


# --- LatentMoE's projections ---


@st.composite
def projections(draw, dtypes, tokens=(0, 1, 9), sizes=(24, 40)):
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=draw(st.sampled_from(dtypes)),
        tokens=draw(st.sampled_from(tokens)),
        d=draw(st.sampled_from(sizes)),
        latent=draw(st.sampled_from(sizes)),
        experts=draw(st.sampled_from([None, *sizes])),
        gate_fp32=draw(st.booleans()),
        residual=draw(st.sampled_from([None, torch.float32, "same"])),
        residual_scale=draw(st.sampled_from([1e-2, 1.0, 1e2])),
        strided=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )


def check_projections(case, impl, device="cpu"):
    generator = torch.Generator().manual_seed(case["seed"])
    T, d, latent, dtype = case["tokens"], case["d"], case["latent"], case["dtype"]
    pad = 7 if case["strided"] else 0

    def randn(*shape):
        t = torch.randn(*reversed(shape) if case["transposed"] else shape, generator=generator).to(dtype)
        return t.T if case["transposed"] else t

    x, r = (torch.randn(T, n + pad, generator=generator).to(dtype)[:, pad:] for n in (d, latent))
    fc1, fc2 = randn(latent, d), randn(d, latent)
    gate = None if case["experts"] is None else randn(case["experts"], d)
    gate = gate.float() if gate is not None and case["gate_fp32"] else gate
    residual = None
    if case["residual"] is not None:
        residual = torch.randn(T, d, generator=generator) * case["residual_scale"]
        residual = residual.to(dtype if case["residual"] == "same" else case["residual"])
    on_device = [to_device(t, device) for t in (x, fc1, gate, r, fc2, residual)]
    got, logits = hybrid_ops.latent_down_proj(*on_device[:3], impl=impl)
    ref, base = (reference.latent_down_proj(to_numpy(x, t), to_numpy(fc1, t), dtype=t)[0] for t in BOTH)
    assert got.dtype == dtype
    assert_within("latent", got, ref, base, dtype, axis=0)
    assert (logits is None) == (gate is None)
    if logits is not None:
        check_logits(logits, x, gate)
    out = hybrid_ops.latent_up_proj(*on_device[3:5], residual=on_device[5], impl=impl)
    ref, base = (
        reference.latent_up_proj(to_numpy(r, t), to_numpy(fc2, t), residual=to_numpy(residual, t), dtype=t)
        for t in BOTH
    )
    assert out.dtype == dtype
    assert_within("out", out, ref, base, dtype, axis=0)


@given(case=projections(CPU_DTYPES))
def test_projections(case):
    check_projections(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=projections(INTERPRETER_DTYPES))
def test_projections_interpreter(case):
    check_projections(case, "triton")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=projections(CPU_DTYPES, tokens=(0, 1, 9, 150), sizes=(24, 192, 300)))
def test_projections_gpu(case):
    check_projections(case, "triton", "cuda")


# --- layers ---


@given(case=layer_cases(CPU_DTYPES))
def test_layer(case):
    check_layer(case, layer_of("torch"))


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=layer_cases(INTERPRETER_DTYPES))
def test_layer_interpreter(case):
    check_layer(case, layer_of("triton"))


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=layer_cases(CPU_DTYPES, tokens=(0, 1, 33, 200), widths=(64, 200)))
def test_layer_gpu(case):
    check_layer(case, layer_of("triton", "cuda"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", INTERPRETER_DTYPES)
@pytest.mark.parametrize("weight_on", ["output", "hidden"])
def test_moe_mlp(impl, dtype, weight_on):
    """With the experts of another rank missing, a factor and a residual."""
    (x, _, up, down), _ = layer_problem(LAYER | dict(dtype=dtype, latent=None, shared=None))
    torch.manual_seed(0)
    ids = torch.rand(12, 8).topk(3).indices.int()
    weights = torch.rand(12, 3)
    routing = hybrid_ops.moe_sort(ids, weights, 8, expert_range=(2, 7))
    residual = torch.randn(12, 40).to(dtype)
    options = dict(weight_on=weight_on, scaling_factor=2.5)
    out = hybrid_ops.moe_mlp(x, up[2:7], down[2:7], routing, residual=residual, **options, impl=impl)
    here = ((ids >= 2) & (ids < 7)).numpy()

    def layer(tensors, d):
        return reference.moe_mlp(
            *(to_numpy(t, d) for t in tensors),
            (to_numpy(weights, d) * here, ids.numpy()),
            residual=to_numpy(residual, d),
            store=lambda result: round_to(result, dtype).astype(result.dtype),
            dtype=d,
            **options,
        )

    ref = layer((x, up, down), np.float64)
    orders = layer_orders(LAYER | dict(dtype=dtype), (x, x, up, down), {})
    base = worst([layer((x, up, down), np.float32) for (x, _, up, down), _ in orders], ref)
    assert_within("out", out, ref, base, dtype, axis=0)


def leaf(*shape):
    return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()


def test_gradcheck_of_the_ops():
    torch.manual_seed(0)
    row_index = int32(3, 0, -1, 1, 2, 3).view(3, 2)

    def combine(y, w, r):
        return hybrid_ops.moe_combine(y, row_index, w, scaling_factor=2.5, residual=r)

    assert torch.autograd.gradcheck(combine, (leaf(4, 5), leaf(3, 2), leaf(3, 5)))
    assert torch.autograd.gradcheck(lambda y: hybrid_ops.moe_combine(y, row_index), (leaf(4, 5),))
    assert torch.autograd.gradcheck(hybrid_ops.latent_down_proj, (leaf(3, 5), leaf(2, 5), leaf(4, 5)))
    assert torch.autograd.gradcheck(lambda x, w: hybrid_ops.latent_down_proj(x, w)[0], (leaf(3, 5), leaf(2, 5)))
    assert torch.autograd.gradcheck(
        lambda r, w, s: hybrid_ops.latent_up_proj(r, w, residual=s), (leaf(3, 2), leaf(5, 2), leaf(3, 5))
    )


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(("activation", "halves"), [("relu2", 1), ("silu_gated", 2)])
def test_gradcheck_of_a_layer(latent, activation, halves):
    """Of all floating inputs; the choice of experts does not change within the small steps."""
    torch.manual_seed(0)
    T, d, inner, E = 3, 5, 4, 3
    size = 2 if latent else d
    names = ["shared_up_weight", "shared_down_weight", *(["fc1_weight", "fc2_weight"] if latent else [])]
    tensors = [
        leaf(T, d), leaf(E, d), leaf(E, halves * inner, size), leaf(E, size, inner), leaf(halves * 3, d), leaf(d, 3),
        *([leaf(size, d), leaf(d, size)] if latent else []),
    ]  # fmt: skip

    def run(x, gate, up, down, *others):
        options = dict(zip(names, others, strict=True), activation=activation, scaling_factor=2.5)
        out, routing = hybrid_ops.latent_moe(x, gate, up, down, 2, **options, return_routing=True)
        return out, routing.weights

    assert torch.autograd.gradcheck(run, tensors)


def test_gradcheck_of_weights_on_the_hidden():
    torch.manual_seed(0)

    def run(x, logits, up, down):
        routing = hybrid_ops.moe_router(logits, None, 2)
        return hybrid_ops.moe_mlp(x, up, down, routing, weight_on="hidden")

    assert torch.autograd.gradcheck(run, (leaf(3, 5), leaf(3, 4), leaf(4, 6, 5), leaf(4, 5, 6)))


# --- GPU ---


def nano(T, device="cuda", d=256, E=16, inner=320, latent=128):
    g = torch.Generator().manual_seed(0)

    def weight(*shape):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).bfloat16().to(device)

    tensors = dict(
        x=weight(T, d), gate_weight=weight(E, d), up_weight=weight(E, inner, latent),
        down_weight=weight(E, latent, inner), fc1_weight=weight(latent, d), fc2_weight=weight(d, latent),
        shared_up_weight=weight(inner, d), shared_down_weight=weight(d, inner),
    )  # fmt: skip
    return tensors | dict(topk=4, correction_bias=torch.randn(E, generator=g).to(device), scaling_factor=2.5)


@pytest.mark.gpu
def test_cuda_graph():
    arguments = nano(50)
    hybrid_ops.latent_moe(**arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hybrid_ops.latent_moe(**arguments)
    for _ in range(3):
        arguments["x"].normal_()
        arguments["correction_bias"].normal_()
        expected = hybrid_ops.latent_moe(**arguments)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_same_bits_from_run_to_run():
    arguments = nano(300)
    leaves = [t.requires_grad_() for t in arguments.values() if isinstance(t, torch.Tensor) and t.dim() > 1]

    def run():
        out = hybrid_ops.latent_moe(**arguments)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    first = run()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


@pytest.mark.gpu
def test_batch_invariance():
    arguments = nano(300)
    out = hybrid_ops.latent_moe(**arguments, batch_invariant=True)
    few = arguments | dict(x=arguments["x"][5:7])
    assert torch.equal(hybrid_ops.latent_moe(**few, batch_invariant=True), out[5:7])


@pytest.mark.gpu
def test_combine_beyond_2_to_the_31_elements():
    D = 4096
    y = torch.zeros(2**31 // D + 10, D, dtype=torch.bfloat16, device="cuda")
    y[-3:].normal_()
    row_index = torch.tensor([[len(y) - 1, len(y) - 3], [len(y) - 2, 2**31 - 1]], device="cuda").int()
    out = hybrid_ops.moe_combine(y, row_index)
    torch.testing.assert_close(out, torch.stack([(y[-1].float() + y[-3].float()).bfloat16(), y[-2]]), rtol=0, atol=0)


# --- the frame ---


def good_layer():
    (x, gate, up, down), options = layer_problem(LAYER | dict(dtype=torch.float32))
    return dict(x=x, gate_weight=gate, up_weight=up, down_weight=down, topk=3) | options


BAD_LAYER = [
    (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
    (dict(x=torch.ones(40)), ValueError, r"x must have shape \(T, d\), got \(40,\)"),
    (dict(gate_weight=torch.ones(8, 39)), ValueError, r"gate_weight must have shape \(\*, 40\), got \(8, 39\)"),
    (dict(gate_weight=torch.ones(7, 40)), ValueError, r"down_weight must have shape \(7, 24, \*\), got \(8, 24, 20\)"),
    (dict(up_weight=torch.ones(8, 21, 24)), ValueError, r"up_weight must have shape \(8, 20, 24\), got \(8, 21, 24\)"),
    (dict(up_weight=("packed",)), TypeError, "up_weight must be a torch.Tensor, got tuple"),
    (dict(down_weight=torch.ones(8, 24, 20).half()), TypeError, "down_weight must have dtype float32, got float16"),
    (dict(fc1_weight=None), ValueError, "fc1_weight and fc2_weight must both be given or both be None, got fc1_weight"),
    (dict(fc2_weight=torch.ones(40, 23)), ValueError, r"fc2_weight must have shape \(40, 24\), got \(40, 23\)"),
    (dict(shared_down_weight=None), ValueError, "shared_up_weight and shared_down_weight must both be given or"),
    (dict(shared_up_weight=torch.ones(15, 40)), ValueError, r"shared_up_weight must have shape \(16, 40\), got"),
    (dict(activation="gelu"), ValueError, "activation must be one of None, 'relu2', 'silu_gated', got 'gelu'"),
    (dict(topk=9), ValueError, r"topk must be in \[1, 8\], got 9"),
    (dict(correction_bias=torch.ones(7)), ValueError, r"correction_bias must have shape \(8,\), got \(7,\)"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LAYER)
def test_bad_layer(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.latent_moe(**good_layer() | change)


ROUTING = hybrid_ops.moe_sort(int32(0, 1, 1).view(3, 1), torch.ones(3, 1), 2)
BAD_MLP = [
    (dict(routing="routing"), TypeError, "routing must be a MoERouting, got str"),
    (dict(x=torch.ones(4, 8)), ValueError, "routing must be of the 4 tokens of x, got 3"),
    (dict(weight_on="input"), ValueError, "weight_on must be one of 'output', 'hidden', got 'input'"),
    (dict(down_weight=torch.ones(3, 8, 6)), ValueError, r"down_weight must have shape \(2, 8, \*\), got \(3, 8, 6\)"),
    (dict(residual=torch.ones(3, 7)), ValueError, r"residual must have shape \(3, 8\), got \(3, 7\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_MLP)
def test_bad_mlp(change, error, message):
    good = dict(x=torch.ones(3, 8), up_weight=torch.ones(2, 6, 8), down_weight=torch.ones(2, 8, 6), routing=ROUTING)
    with pytest.raises(error, match=message):
        hybrid_ops.moe_mlp(**good | change)


INDEX = int32(0, 1, -1, 2).view(2, 2)
BAD_COMBINE = [
    (dict(y="y"), TypeError, "y must be a torch.Tensor, got str"),
    (dict(row_index=INDEX.long()), TypeError, "row_index must have dtype int32, got int64"),
    (dict(row_index=INDEX + 1), ValueError, r"row_index must be in \[-1, 3\), got 3"),
    (dict(row_index=INDEX - 1), ValueError, r"row_index must be in \[-1, 3\), got -2"),
    (dict(weights=torch.ones(2, 3)), ValueError, r"weights must have shape \(2, 2\), got \(2, 3\)"),
    (dict(weights=torch.ones(2, 2).half()), TypeError, "weights must have dtype float32 or float64, got float16"),
    (dict(residual=torch.ones(3, 8)), ValueError, r"residual must have shape \(2, 8\), got \(3, 8\)"),
    (dict(out_dtype=torch.int8), ValueError, "out_dtype must be one of .* got torch.int8"),
    (dict(out=torch.ones(2, 7)), ValueError, r"out must have shape \(2, 8\), got \(2, 7\)"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_COMBINE)
def test_bad_combine(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.moe_combine(**dict(y=torch.ones(3, 8), row_index=INDEX) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.ones(3)), ValueError, r"x must have shape \(T, features\), got \(3,\)"),
        (dict(fc1_weight=torch.ones(4, 7)), ValueError, r"fc1_weight must have shape \(\*, 8\), got \(4, 7\)"),
        (dict(fc1_weight=torch.ones(4, 8).half()), TypeError, "fc1_weight must have dtype float32, got float16"),
        (dict(gate_weight=torch.ones(4, 7)), ValueError, r"gate_weight must have shape \(\*, 8\), got \(4, 7\)"),
        (dict(out=torch.ones(3, 5)), ValueError, r"out must have shape \(3, 4\), got \(3, 5\)"),
    ],
)
def test_bad_projection(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.latent_down_proj(**dict(x=torch.ones(3, 8), fc1_weight=torch.ones(4, 8)) | change)


def test_out():
    x, w, out = torch.randn(3, 8), torch.randn(4, 8), torch.empty(4, 3).T
    latent, logits = hybrid_ops.latent_down_proj(x, w, out=out)
    assert latent is out
    assert logits is None
    torch.testing.assert_close(out, x @ w.T)
    assert hybrid_ops.latent_up_proj(x, w, residual=out.clone(), out=out) is out
    torch.testing.assert_close(out, 2 * x @ w.T)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from hybrid_ops.triton_kernels import moe as kernels

    from .triton_targets import check, compiling_for

    def launch(dtype, gate_dtype, T=64, k=22, d=4096, latent=1024, E=512):
        """Nemotron 3 Super's layer; tensors on the CPU."""
        x, r, logits = torch.empty(T, d, dtype=dtype), torch.empty(T, latent, dtype=dtype), torch.empty(T, E)
        y, index = torch.empty(T * k, latent, dtype=dtype), torch.zeros(T, k, dtype=torch.int32)
        kernels.moe_combine(y, index, torch.empty(T, k), r, r, 5.0)
        kernels.combine_weights_grad(r, y, index, torch.empty(T, k), 5.0)
        fc1, gate = torch.empty(latent, d, dtype=dtype), torch.empty(E, d, dtype=gate_dtype)
        kernels.latent_proj(x, fc1, gate, None, r, logits)
        kernels.latent_proj(r, fc1.T, None, x, x, None)

    with compiling_for(sm, monkeypatch) as compiled:
        launch(torch.bfloat16, torch.bfloat16)
        if sm in (90, 100):
            launch(torch.bfloat16, torch.float32)
            launch(torch.float16, torch.float16)
            launch(torch.float32, torch.float32)
    check(compiled, sm)


def test_opcheck():
    y, row_index, weights, r = torch.randn(6, 8), int32(0, 5, -1, 2).view(2, 2), torch.rand(2, 2), torch.randn(2, 8)
    ops = torch.ops.hybrid_ops
    torch.library.opcheck(ops.moe_combine_fwd.default, (y, row_index, weights, r, torch.empty(2, 8), 2.5, "torch"))
    torch.library.opcheck(ops.moe_combine_fwd.default, (y, row_index, None, None, torch.empty(2, 8), 1.0, "torch"))
    gradient = ops.moe_combine_weights_grad.default
    torch.library.opcheck(gradient, (r, y, row_index, torch.empty(2, 2), 2.5, "torch"))
    proj = ops.latent_proj_fwd.default
    torch.library.opcheck(
        proj, (y, torch.randn(4, 8), torch.randn(3, 8), None, torch.empty(6, 4), torch.empty(6, 3), "torch")
    )
    torch.library.opcheck(proj, (y, torch.randn(4, 8), None, torch.ones(6, 4), torch.empty(6, 4), None, "torch"))


def test_torch_compile(compile_once):
    def layer(x, gate, up, down, fc1, fc2, shared_up, shared_down):
        return hybrid_ops.latent_moe(
            x, gate, up, down, 2, fc1_weight=fc1, fc2_weight=fc2, shared_up_weight=shared_up,
            shared_down_weight=shared_down, scaling_factor=2.5,
        )  # fmt: skip

    torch.manual_seed(0)
    shapes = [(4, 12), (4, 6, 8), (4, 8, 6), (8, 12), (12, 8), (7, 12), (12, 7)]  # no size is a length
    weights = [torch.randn(*shape) / 4 for shape in shapes]
    compile_once(layer, "aot_eager", lambda n: (torch.randn(n, 12), *weights))


OPS = ["moe_combine", "latent_down_proj", "latent_up_proj", "moe_mlp", "latent_moe"]


@pytest.mark.parametrize("op", OPS)
def test_explain(op):
    assert hybrid_ops.explain(op, device="cpu").impl == "torch"


def test_float64():
    (x, gate, up, down), options = layer_problem(LAYER | dict(dtype=torch.float64))
    options["correction_bias"] = options["correction_bias"].double()
    out, routing = hybrid_ops.latent_moe(x, gate, up, down, 3, **options, return_routing=True)
    ref = reference.latent_moe(
        *(to_numpy(t) for t in (x, gate, up, down)),
        3,
        **arrays(options, np.float64),
        routing=(to_numpy(routing.weights), routing.ids.numpy()),
    )
    # float64 in another order, through five products; float32 anywhere would be off by 1e-7
    np.testing.assert_allclose(to_numpy(out), ref, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("page", ["moe", "grouped_gemm"])
def test_documentation(page):
    """The page and the docstrings of its functions."""
    names = dict(hybrid_ops=hybrid_ops, torch=torch)
    path = Path(__file__).parent.parent / "docs" / f"{page}.md"
    results = [doctest.testfile(str(path), module_relative=False, globs=dict(names))]
    functions = ["grouped_gemm"] if page == "grouped_gemm" else OPS
    for name in functions:
        for example in doctest.DocTestFinder(recurse=False).find(getattr(hybrid_ops, name), name, globs=names):
            results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 1 + len(functions)
    assert all(result.attempted and not result.failed for result in results)
