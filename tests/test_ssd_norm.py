"""`ssd_chunk_scan` with a norm behind it, in one kernel where that is built."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops._csrc import ssd as csrc
from hybrid_ops.reference import norm as norm_reference

from .budget import assert_within, round_to, to_numpy
from .ssd_cases import cases, problem, result_dtype, run_op, run_reference, run_torch
from .test_ssd import CUDA_CASES, INTERPRETER_CASES, configured

NORMED = dict(headdims=st.sampled_from([8, 40, 64, 72, 80]), heads_per_group=(1, 4, 16, 20))
NARROW = NORMED | dict(headdims=st.sampled_from([8, 40, 64]))


def weights(case, tensors, dtype=None):
    generator = torch.Generator().manual_seed(case["seed"])
    features = tensors["x"].shape[2] * tensors["x"].shape[3]
    weight = torch.randn(features, generator=generator) * 0.5 + 1
    return weight.to(dtype or (torch.float32 if case["small_fp32"] else case["dtype"]))


def normed(case, tensors, options, weight, eps, dtype, run=run_reference):
    """The references of the scan and of the norm. In float32, the baseline, with the rounding of y between them."""
    results = run(case, {name: t for name, t in tensors.items() if name != "z"}, options, dtype)
    dtype = np.float64 if dtype in (np.float64, torch.float64) else np.float32
    y = results["y"] if dtype == np.float64 else round_to(results["y"], case["dtype"]).astype(dtype)
    z = to_numpy(tensors["z"], dtype) if "z" in tensors else None
    features = y.shape[2] * y.shape[3]
    flat, gate = (None if t is None else t.reshape(*y.shape[:2], features) for t in (y, z))
    of_norm = dict(eps=eps, group_size=features // case["ngroups"], dtype=dtype)
    flat = norm_reference.gated_rms_norm(flat, gate, to_numpy(weight, dtype), **of_norm)
    return results | dict(y=flat.reshape(y.shape))


def check(case, impl, device="cpu", run=run_reference, weight_dtype=None, *, eps):
    """`eps` beside x of scale 1."""
    tensors, options = problem(case)
    weight, eps = weights(case, tensors, weight_dtype), eps * case["scale"] ** 2
    wide, narrow = (np.float64, np.float32) if run is run_reference else (torch.float64, torch.float32)
    ref, base = (normed(case, tensors, options, weight, eps, dtype, run) for dtype in (wide, narrow))
    got = run_op(case, tensors, options | dict(norm_weight=weight.to(device), norm_eps=eps), impl, device)
    if device == "cpu":  # states are made by the very code that test_ssd checks
        got = dict(y=got["y"])
    for name, value in got.items():
        how = dict(axis=-2, roundings=2) if name == "y" else dict(axis=-3)
        assert_within(name, value, ref[name], base[name], result_dtype(case, name), **how)


# Of a token whose y nearly cancels the norm makes as much as of any other, and so of its error, which is not that of
# the recurrence, unless eps is as large as usual squares of y.
@given(case=cases())
def test_ssd_norm(case):
    check(case, "torch", eps=10.0)


@given(case=cases(dtypes=[torch.float64], layouts=("dense", "packed"), state_dtypes=(torch.float32,), pools=False))
def test_ssd_norm_float64(case):
    """With a usual eps, where nothing that cancels shows."""
    tensors, options = problem(case)
    weight, eps = weights(case, tensors), 1e-5 * case["scale"] ** 2
    y = run_torch(case, tensors, options | dict(norm_weight=weight.double(), norm_eps=eps), torch.float64)["y"]
    ref = normed(case, tensors, options, weight, eps, np.float64)["y"]
    # sums are right to 1e-14, and what cancels in them is multiplied by up to 1e5
    np.testing.assert_allclose(y, ref, rtol=1e-6, atol=1e-6)


@pytest.mark.interpreter
@settings(max_examples=6)
@given(case=cases(**INTERPRETER_CASES))
def test_ssd_norm_interpreter(case):
    check(case, "triton", eps=10.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("chosen", "sizes"),
    [
        (None, NORMED),
        (csrc.Config(1, normed=True), NORMED),
        (csrc.Config(2, normed=True), NARROW),
        (csrc.Config(3, normed=True), NARROW),
    ],
)
@settings(max_examples=15)
@given(data=st.data())
def test_ssd_norm_cuda(chosen, sizes, data):
    """As it is chosen; and in the kernel, of whole sequences or of segments."""
    case = data.draw(cases(**CUDA_CASES | sizes)) | dict(z=True)
    assume(case["dtype"] == torch.bfloat16 and case["batch"] * sum(case["lengths"]) > 0)
    assume(case["layout"] == "packed" or case["lengths"][0] > 0)
    with configured(chosen):
        check(case, "auto", "cuda", weight_dtype=torch.bfloat16, eps=1.0)


@pytest.mark.gpu
@settings(max_examples=6)
@given(data=st.data())
def test_long_ssd_norm_cuda(data):
    lengths = dict(lengths=st.integers(1000, 3000), ngroups=(1, 8), intervals=(0, 256))
    case = data.draw(cases(**CUDA_CASES | NORMED | lengths)) | dict(z=True)
    assume(case["batch"] * len(case["lengths"]) > 0)
    check(case, "auto", "cuda", run_torch, torch.bfloat16, eps=1.0)


def inputs(device, seqlen=40, nheads=4, dtype=torch.bfloat16):
    """Of two groups; keyword arguments."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return dict(
        x=randn(2, seqlen, nheads, 64),
        dt=randn(2, seqlen, nheads).float().abs(),
        A=-torch.ones(nheads, device=device),
        B=randn(2, seqlen, 2, 128),
        C=randn(2, seqlen, 2, 128),
        z=randn(2, seqlen, nheads, 64),
        norm_weight=randn(64 * nheads),
    )


def test_gradients():
    """Those of the scan and of the norm behind it, in what only the norm reads too."""
    t = {name: value.requires_grad_() for name, value in inputs("cpu", dtype=torch.float32).items()}
    apart = {name: value.detach().clone().requires_grad_() for name, value in t.items()}
    hybrid_ops.ssd_chunk_scan(**t, norm_eps=1e-3).square().sum().backward()
    z, weight = apart.pop("z"), apart.pop("norm_weight")
    y = hybrid_ops.ssd_chunk_scan(**apart).flatten(2)
    hybrid_ops.gated_rms_norm(y, z.flatten(2), weight, eps=1e-3, group_size=128).square().sum().backward()
    for name, value in (apart | dict(z=z, norm_weight=weight)).items():
        torch.testing.assert_close(t[name].grad, value.grad, msg=name)


def test_out():
    t = inputs("cpu")
    out = torch.empty(2, 40, 4, 128, dtype=torch.bfloat16)[..., ::2]
    y, states = hybrid_ops.ssd_chunk_scan(**t, out=out, return_final_states=True)
    assert y is out
    assert states.shape == (2, 4, 64, 128)
    assert torch.equal(y, hybrid_ops.ssd_chunk_scan(**t))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(norm_weight=torch.ones(255)), ValueError, r"norm_weight must have shape \(256,\), got \(255,\)"),
        (dict(norm_weight=torch.ones(256, dtype=torch.int32)), TypeError, "norm_weight must have dtype .*, got int32"),
        (dict(norm_eps=torch.ones(())), TypeError, "norm_eps must be a number"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.ssd_chunk_scan(**inputs("cpu") | change)


def test_operator_refuses():
    """The operator itself, which has no norm behind it."""
    t = inputs("cpu")
    tensors = (
        t["x"],
        t["dt"],
        t["A"],
        t["B"],
        t["C"],
        None,
        t["z"],
        *[None] * 8,
        torch.empty_like(t["x"]),
        *[None] * 3,
    )
    with pytest.raises(ValueError, match="norm_weight must be None where no kernel norms y"):
        torch.ops.hybrid_ops.ssd_chunk_scan_fwd(
            *tensors, t["norm_weight"], False, 0.0, 1.0, 0, -1, False, 1e-5, "torch"
        )


def test_norm_configuration():
    """In the kernel where that is faster than the norm's own kernel behind it."""

    def config(*problem, norm=True):
        return csrc.config(*problem, 64, 128, False, 132, norm)

    assert config(1, 8192, 128, 8) == (1, 1, 1, True)  # Super
    assert config(1, 8192, 64, 8) == (2, 1, 1, True)  # Nemotron 3 Nano
    assert config(4, 8192, 128, 8) == (1, 1, 1, True)
    assert config(1, 8192, 128, 8, norm=False) == (1, 1, 1, False)
    assert config(1, 8192, 256, 1) == (1, 2, 1, False)  # the heads of a group do not run at once


def test_norm_refusal():
    t = inputs("cpu")
    z, weight = t["z"], t["norm_weight"]
    assert csrc.norm_refusal(64, 128, z, weight, False) is None
    assert "a gate" in csrc.norm_refusal(64, 128, None, weight, False)
    assert "weights in bfloat16" in csrc.norm_refusal(64, 128, z, weight.float(), False)
    assert "headdim up to 80" in csrc.norm_refusal(128, 128, z, weight, False)
    assert "depends on the batch" in csrc.norm_refusal(64, 128, z, weight, True)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 2])
def test_graph_cuda(segments):
    """What CTAs tell each other is cleared in every replay; the same bits each time."""
    t = inputs("cuda", seqlen=300)
    with configured(csrc.Config(segments, normed=True)):
        expected = hybrid_ops.ssd_chunk_scan(**t, impl="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hybrid_ops.ssd_chunk_scan(**t, impl="cuda")
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
        t["x"].mul_(2)
        graph.replay()
        assert not torch.equal(y, expected)
        assert torch.equal(y, hybrid_ops.ssd_chunk_scan(**t, impl="cuda"))


@pytest.mark.gpu
def test_nan_cuda():
    """A sum that is a NaN is no sum that is missing: it reaches the whole group of heads of its token, no further."""
    t = inputs("cuda", seqlen=300)
    t["z"][0, 100, 1, 5] = float("nan")
    with configured(csrc.Config(1, normed=True)):
        y = hybrid_ops.ssd_chunk_scan(**t, impl="cuda")
    assert y[0, 100, :2].isnan().all()
    assert y.isnan().sum() == 2 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [csrc.Config(1, normed=True), csrc.Config(2, normed=True)])
def test_many_groups_cuda(chosen):
    """More than run at once; packed sequences that begin and end anywhere."""
    lengths = (100, 1, 0, 63, 200, 129)
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(1, sum(lengths), *shape, generator=generator, device="cuda").bfloat16()

    x, z, B, C, dt = randn(96, 64), randn(96, 64), randn(12, 128), randn(12, 128), randn(96).abs()
    weight = randn(96 * 64)[0, 0]
    options = dict(cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda"), impl="cuda")
    scan = (x, dt, -torch.ones(96, device="cuda"), B, C)
    with configured(chosen):
        y = hybrid_ops.ssd_chunk_scan(*scan, z=z, norm_weight=weight, **options)
    apart = hybrid_ops.ssd_chunk_scan(*scan, **options).flatten(2)
    apart = hybrid_ops.gated_rms_norm(apart, z.flatten(2), weight, group_size=8 * 64)
    torch.testing.assert_close(y.flatten(2), apart, rtol=2e-2, atol=2e-2)  # both are rounded twice
