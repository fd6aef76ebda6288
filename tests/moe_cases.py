"""Random problems for the ops of mixture-of-experts layers, and the checks that every implementation passes."""

import random

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import grouped_gemm as grouped_reference
from hybrid_ops.reference import moe as reference
from hybrid_ops.reference import moe_router as router_reference
from hybrid_ops.reference.products import product

from .budget import assert_within, round_to, to_numpy
from .tensors import to_device

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16
ACTIVATIONS = [None, "relu2", "silu_gated"]
BOTH = (np.float64, np.float32)  # arithmetic of the reference and of the baseline


@st.composite
def grouped_cases(
    draw, dtypes, sizes=(0, 0, 1, 2, 7, 18), widths=(24, 33, 40), depths=(1, 8, 20, 33), max_experts=4, enough=0
):
    # one draw seeds the rest, so that choices do not repeat from example to example. Rows have 24 columns or more: the
    # error of a row is measured against its largest values, and squared ReLU leaves half of them
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    sizes = [choose(sizes) for _ in range(choose(range(1, max_experts + 1)))]
    if 0 < sum(sizes) < enough:
        sizes.append(enough)
    return dict(
        seed=choose(range(2**31)),
        dtype=choose(dtypes),
        sizes=sizes,
        tail=choose([0, 3]),  # rows of no expert
        N=choose(widths),
        K=choose(depths),
        activation=choose(ACTIVATIONS),
        gather=choose([False, True]),
        row_scale=choose([False, True]),
        return_preact=choose([False, True]),
        out_dtype=choose([None, None, torch.float32]),
        scale=choose([1e-2, 1.0, 2.0]),  # float16 ends at 65504, and ReLU squares
        strided=choose([False, True]),
        b_layout=choose(["contiguous", "transposed", "slice"]),
        out=choose([None, "fresh", "transposed"]),
        batch_invariant=choose([False, True]),
    )


PLAIN = dict(
    seed=0, sizes=[5, 0, 9, 4], tail=3, N=24, K=16, activation=None, gather=False, row_scale=True, return_preact=True,
    out_dtype=None, scale=1.0, strided=False, b_layout="contiguous", out=None, batch_invariant=False,
)  # fmt: skip


def grouped_problem(case):
    """(a, b, offs), options; on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype, N, K, E = case["dtype"], case["N"], case["K"], len(case["sizes"])
    offs = torch.tensor(case["sizes"]).cumsum(0).int()
    rows = sum(case["sizes"]) + case["tail"]
    rows_of_a = max(rows // 3, 1) if case["gather"] else rows
    pad = 5 if case["strided"] else 0
    a = (torch.randn(rows_of_a, K + pad, generator=generator) * case["scale"]).to(dtype)[:, pad:]
    width = 2 * N if case["activation"] == "silu_gated" else N
    shape = dict(contiguous=(E, width, K), transposed=(E, K, width), slice=(E, width + 3, K + 5))[case["b_layout"]]
    b = torch.randn(*shape, generator=generator).to(dtype)
    b = dict(contiguous=b, transposed=b.transpose(1, 2), slice=b[:, 3 : width + 3, 5 : K + 5])[case["b_layout"]]
    options = dict(activation=case["activation"])
    if case["gather"]:
        gather = torch.randint(rows_of_a, (rows,), generator=generator).int()
        gather[int(offs[-1]) :] = 10**9  # never read
        options["gather"] = gather
    if case["row_scale"]:
        options["row_scale"] = torch.rand(rows, generator=generator)
    return (a, b, offs), options


def implementation(impl, device="cpu"):
    """grouped_gemm of CPU tensors, run on a device."""

    def run(a, b, offs, **options):
        tensors = {name: to_device(value, device) for name, value in options.items()}
        returned = hybrid_ops.grouped_gemm(*(to_device(t, device) for t in (a, b, offs)), **tensors, impl=impl)
        return tuple(t.cpu() for t in returned) if isinstance(returned, tuple) else returned.cpu()

    return run


def check_grouped(case, run):
    tensors, options = grouped_problem(case)
    result_dtype = case["out_dtype"] or case["dtype"]
    rows = sum(case["sizes"]) + case["tail"]
    more = dict(batch_invariant=case["batch_invariant"], out_dtype=case["out_dtype"])
    if case["out"] is not None:
        out = torch.full((rows, case["N"]), float("nan"), dtype=result_dtype)
        more["out"] = out if case["out"] == "fresh" else out.T.contiguous().T
    returned = run(*tensors, **options, **more, return_preact=case["return_preact"])
    y, h = returned if case["return_preact"] else (returned, None)
    assert y.dtype == result_dtype
    ref, ref_h = reference_of_grouped(tensors, options, np.float64)
    a, b, offs = tensors
    orders = orders_of_k(case, 16 if case["dtype"] == torch.float32 else 1)
    runs = [reference_of_grouped((a[:, k], b[:, :, k], offs), options, np.float32) for k in orders]
    base, base_h = (worst(run, exact) for run, exact in zip(zip(*runs, strict=True), (ref, ref_h), strict=True))
    assert_within("y", y, ref, base, case["dtype"], axis=0)
    assert not y[int(tensors[2][-1]) :].any()
    if h is not None:
        assert h.dtype == result_dtype
        assert_within("h", h, ref_h, base_h, case["dtype"], axis=0)
        assert not h[int(tensors[2][-1]) :].any()


def orders_of_k(case, count):
    """Permutations of the columns of a, for float32 baselines that differ in the order of the sum over K alone.

    Few values decide the largest error of a row, so that one float32 run may be nearly exact by luck: several measure
    what such a run is worth. And what is rounded to 16 bits on the way may be so close to a tie that it is rounded down
    after one order of summation and up after another.
    """
    generator = torch.Generator().manual_seed(case["seed"])
    return [torch.randperm(case["K"], generator=generator) for _ in range(count)]


def worst(runs, exact):
    """Value by value the run with the largest error."""
    runs = np.stack(runs)
    return np.take_along_axis(runs, np.abs(runs - exact).argmax(0)[None], 0)[0]


def arrays(options, dtype):
    return {
        name: to_numpy(value, dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def reference_of_grouped(tensors, options, dtype, bwd=False, **more):
    a, b, offs = tensors
    options = arrays(options, dtype)
    if "gather" in options:  # what is never read is anything
        options["gather"] = options["gather"].clamp(0, max(len(a) - 1, 0)).numpy()
    if bwd:
        dy, dh = (to_numpy(t, dtype) for t in (more["dy"], more["dh"]))
        return grouped_reference.grouped_gemm_bwd(
            dy,
            to_numpy(a, dtype),
            to_numpy(b, dtype),
            offs.tolist(),
            dh=dh,
            dtype=dtype,
            store=more["store"],
            **options,
        )
    return grouped_reference.grouped_gemm(to_numpy(a, dtype), to_numpy(b, dtype), offs.tolist(), dtype=dtype, **options)


def check_grouped_backward(case, impl, device="cpu"):
    (a, b, offs), options = grouped_problem(case)
    row_scale = options.pop("row_scale", None)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    leaves = [None if t is None else to_device(t, device).detach().requires_grad_() for t in (a, b, row_scale)]
    moved = {name: to_device(value, device) for name, value in options.items()}
    y, h = hybrid_ops.grouped_gemm(
        leaves[0], leaves[1], offs.to(device), row_scale=leaves[2], **moved, return_preact=True,
        batch_invariant=case["batch_invariant"], impl=impl,
    )  # fmt: skip
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    dh = torch.randn(h.shape, generator=generator).to(h.dtype) if case["return_preact"] else None
    total = (y * dy.to(device)).sum() if dh is None else (y * dy.to(device)).sum() + (h * dh.to(device)).sum()
    grads = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    if row_scale is not None:
        options["row_scale"] = row_scale

    def store(preact):
        return round_to(preact, case["dtype"])

    more = dict(bwd=True, dy=dy, dh=dh, store=store)
    ref = reference_of_grouped((a, b, offs), options, np.float64, **more)
    runs = []
    for k in orders_of_k(case, 16):
        da, db, dscale = reference_of_grouped((a[:, k], b[:, :, k], offs), options, np.float32, **more)
        back = k.argsort().numpy()
        runs.append((da[:, back], db[:, :, back], dscale))
    for name, got, exact, *honest in zip(("da", "db", "drow_scale"), grads, ref, *runs, strict=False):
        # a sum of a few float32 products may cancel: a row or matrix is no measure of that, the tensor is
        per = None if case["dtype"] == torch.float32 or name == "drow_scale" else 0
        assert_within(name, got, exact, worst(honest, exact), case["dtype"], axis=per)


@st.composite
def layer_cases(draw, dtypes, tokens=(0, 1, 5, 12), widths=(24, 40)):
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    num_groups = choose([1, 1, 2])
    return dict(
        seed=choose(range(2**31)),
        dtype=choose(dtypes),
        tokens=choose(tokens),
        hidden=choose(widths),
        latent=choose([None, 24]),
        experts=choose([6, 8]),  # a group has at least topk
        inner=choose([8, 20, 33]),
        shared=choose([None, 16]),
        topk=choose([1, 2, 3]),
        num_groups=num_groups,
        topk_groups=choose(range(1, num_groups + 1)) if num_groups > 1 else 1,
        score=choose(["sigmoid", "softmax"]),
        renormalize=choose([False, True]),
        correction_bias=choose([False, True]),
        scaling_factor=choose([1.0, 2.5]),
        activation=choose(["relu2", "silu_gated"]),
        gate_dtype=choose([None, torch.float32]),
        strided=choose([False, True]),
        batch_invariant=choose([False, True]),
    )


LAYER = dict(
    seed=0, tokens=12, hidden=40, latent=24, experts=8, inner=20, shared=16, topk=3, num_groups=1, topk_groups=1,
    score="sigmoid", renormalize=True, correction_bias=True, scaling_factor=2.5, activation="relu2", gate_dtype=None,
    strided=False, batch_invariant=False,
)  # fmt: skip


def layer_problem(case):
    """(x, gate_weight, up_weight, down_weight) and options of latent_moe, on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype, d, E, inner = case["dtype"], case["hidden"], case["experts"], case["inner"]
    latent = case["latent"] or d
    halves = 2 if case["activation"] == "silu_gated" else 1

    def weight(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    pad = 7 if case["strided"] else 0
    x = torch.randn(case["tokens"], d + pad, generator=generator).to(dtype)[:, pad:]
    gate = weight(E, d).to(case["gate_dtype"] or dtype)
    options = {name: case[name] for name in ROUTER_OPTIONS} | dict(activation=case["activation"])
    if case["correction_bias"]:
        options["correction_bias"] = torch.randn(E, generator=generator)
    if case["latent"]:
        options |= dict(fc1_weight=weight(latent, d), fc2_weight=weight(d, latent))
    if case["shared"]:
        options |= dict(
            shared_up_weight=weight(halves * case["shared"], d), shared_down_weight=weight(d, case["shared"])
        )
    return (x, gate, weight(E, halves * inner, latent), weight(E, latent, inner)), options


ROUTER_OPTIONS = ("score", "num_groups", "topk_groups", "renormalize", "scaling_factor")


def layer_of(impl, device="cpu"):
    """latent_moe of CPU tensors, run on a device; returns (out, routing) on the CPU."""

    def run(*tensors, **options):
        moved = {name: to_device(value, device) for name, value in options.items()}
        out, routing = hybrid_ops.latent_moe(
            *(to_device(t, device) for t in tensors), **moved, return_routing=True, impl=impl
        )
        return out.cpu(), hybrid_ops.MoERouting(*(None if t is None else t.cpu() for t in routing))

    return run


def layer_orders(case, tensors, options):
    """The problem with x's features, the latent and the inner ones in several orders, as `orders_of_k`."""
    x, gate, up, down = tensors
    generator = torch.Generator().manual_seed(case["seed"])
    halves = up.shape[1] // down.shape[2]
    for _ in range(16):
        k, latent, inner = (
            torch.randperm(size, generator=generator) for size in (x.shape[1], down.shape[1], down.shape[2])
        )
        both = torch.cat([inner + i * len(inner) for i in range(halves)])
        reordered = dict(options)
        if "fc1_weight" in options:
            reordered["fc1_weight"] = options["fc1_weight"][latent][:, k]
            reordered["fc2_weight"] = options["fc2_weight"][:, latent]
        else:
            latent = k  # the experts read x itself, and write what stays in its order
        if "shared_up_weight" in options:
            reordered["shared_up_weight"] = options["shared_up_weight"][:, k]
        down_written = down[:, latent] if "fc1_weight" in options else down
        yield (x[:, k], gate[:, k], up[:, both][:, :, latent], down_written[:, :, inner]), reordered


def check_layer(case, run):
    """The budget is that of a layer that, as ours, keeps what is between two products in 16 bits: the baseline does."""
    tensors, options = layer_problem(case)
    out, routing = run(*tensors, case["topk"], **options, batch_invariant=case["batch_invariant"])
    assert out.dtype == case["dtype"]
    router = {name: case[name] for name in ("score", "renormalize", "scaling_factor")}

    def layer(tensors, options, dtype, store):
        logits = product(to_numpy(tensors[0], dtype), to_numpy(tensors[1], dtype).T)
        return reference.latent_moe(
            *(to_numpy(t, dtype) for t in tensors),
            case["topk"],
            **{n: v for n, v in arrays(options, dtype).items() if n not in ROUTER_OPTIONS},
            routing=(router_reference.gate_weights(logits, routing.ids.numpy(), **router), routing.ids.numpy()),
            store=store,
            dtype=dtype,
        )

    def rounded(result):
        return round_to(result, case["dtype"]).astype(result.dtype)

    ref = layer(tensors, options, np.float64, lambda result: result)
    base = worst([layer(*orders, np.float32, rounded) for orders in layer_orders(case, tensors, options)], ref)
    check_choice(case, options, routing)
    assert_within("out", out, ref, base, case["dtype"], axis=0)


def check_choice(case, options, routing):
    """The experts are the reference's for the logits that the router had, where the choice is not a tie of rounding."""
    bias = options.get("correction_bias")
    groups = case["num_groups"], case["topk_groups"]
    logits = routing.logits.numpy()
    sel = router_reference.selection_scores(logits, None if bias is None else bias.numpy(), case["score"])
    expected = router_reference.select(
        logits, case["topk"], None if bias is None else bias.numpy(), case["score"], *groups
    )
    for mine, theirs, row in zip(routing.ids.numpy(), expected, sel, strict=True):
        # scores within 4 ulp of each other are a tie: exp may round either way
        np.testing.assert_allclose(row[mine], row[theirs], rtol=0, atol=4 * np.spacing(np.abs(row).max()))


@st.composite
def combine_cases(draw, dtypes, tokens=(0, 1, 6), widths=(24, 40, 300)):
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    return dict(
        seed=choose(range(2**31)),
        dtype=choose(dtypes),
        tokens=choose(tokens),
        topk=choose([1, 2, 6, 22]),
        D=choose(widths),
        weights=choose([False, True]),
        remote=choose([0.0, 0.5, 1.0]),  # the share of experts that are not here
        residual=choose([None, torch.float32, "same"]),
        residual_scale=choose([1e-2, 1.0, 1e2]),  # the stream ranges over four orders of magnitude
        scaling_factor=choose([1.0, 2.5]),
        out_dtype=choose([None, torch.float32]),
        strided=choose([False, True]),
        out=choose([None, "fresh", "transposed"]),
    )


def combine_problem(case):
    """(y, row_index, weights or None), options; on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    tokens, topk, D, dtype = case["tokens"], case["topk"], case["D"], case["dtype"]
    pad = 5 if case["strided"] else 0
    y = torch.randn(tokens * topk, D + pad, generator=generator).to(dtype)[:, pad:]
    row_index = torch.randperm(tokens * topk, generator=generator).int().view(tokens, topk)
    row_index[torch.rand(tokens, topk, generator=generator) < case["remote"]] = -1
    weights = torch.rand(tokens, topk, generator=generator) if case["weights"] else None
    options = dict(scaling_factor=case["scaling_factor"])
    if case["residual"] is not None:
        residual = torch.randn(tokens, D, generator=generator) * case["residual_scale"]
        options["residual"] = residual.to(dtype if case["residual"] == "same" else case["residual"])
    return (y, row_index, weights), options


def combine_of(impl, device="cpu"):
    def run(*tensors, **options):
        moved = {name: to_device(value, device) for name, value in options.items()}
        return hybrid_ops.moe_combine(*(to_device(t, device) for t in tensors), **moved, impl=impl).cpu()

    return run


def check_combine(case, run):
    (y, row_index, weights), options = combine_problem(case)
    result_dtype = case["out_dtype"] or case["dtype"]
    more = dict(out_dtype=case["out_dtype"])
    if case["out"] is not None:
        out = torch.full((case["tokens"], case["D"]), float("nan"), dtype=result_dtype)
        more["out"] = out if case["out"] == "fresh" else out.T.contiguous().T
    out = run(y, row_index, weights, **options, **more)
    assert out.dtype == result_dtype
    ref, base = (
        reference.moe_combine(to_numpy(y, d), row_index.numpy(), to_numpy(weights, d), **arrays(options, d), dtype=d)
        for d in BOTH
    )
    assert_within("out", out, ref, base, case["dtype"], axis=0)
