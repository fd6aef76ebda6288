import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops import norm
from hybrid_ops._csrc import norm as csrc
from hybrid_ops.reference import norm as reference

from .budget import assert_within, round_to, to_numpy

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16


@st.composite
def cases(draw, dtypes, max_rows=8, max_groups=3, min_group_size=1, max_group_size=40):
    group_size, groups = draw(st.integers(min_group_size, max_group_size)), draw(st.integers(1, max_groups))
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.sampled_from([0, 1, 2])),
        seqlen=draw(st.sampled_from([0, 1, max_rows])),
        group_size=group_size,
        hidden=group_size * groups,
        strided=draw(st.booleans()),
        scale=draw(st.sampled_from([1e-2, 1.0, 1e2])),  # the residual stream ranges over four orders of magnitude
        weight_fp32=draw(st.booleans()),
    )


def for_cuda(case):
    """The nearest case that the CUDA kernels take."""
    if hybrid_ops._device.extension_missing() is not None:
        pytest.skip("the CUDA extension is not built")
    group_size = 128 + case["group_size"] // 8 * 8
    return case | dict(group_size=group_size, hidden=case["hidden"] // case["group_size"] * group_size, margin=8)


def randn(case, generator, *, scale=1.0):
    """(batch, seqlen, hidden), contiguous or a slice of a wider tensor as in_proj returns it."""
    width = case["hidden"] + (case.get("margin", 7) if case["strided"] else 0)
    wide = torch.randn(case["batch"], case["seqlen"], width, generator=generator) * scale
    return wide.to(case["dtype"])[..., width - case["hidden"] :]


def weight_of(case, generator):
    weight = 1 + torch.randn(case["hidden"], generator=generator)
    return weight if case["weight_fp32"] else weight.to(case["dtype"])


def check_rms_norm(case, residual, impl, device="cpu"):
    generator = torch.Generator().manual_seed(case["seed"])
    x, r, weight = randn(case, generator, scale=case["scale"]), randn(case, generator), weight_of(case, generator)
    if not residual:
        y = hybrid_ops.rms_norm(x.to(device), weight.to(device), impl=impl)
        ref, base = (reference.rms_norm(to_numpy(x, d), to_numpy(weight, d), dtype=d) for d in (np.float64, np.float32))
    else:
        y, h = hybrid_ops.rms_norm(x.to(device), weight.to(device), residual=r.to(device), impl=impl)
        (ref, ref_h), (base, _) = (
            reference.rms_norm(
                to_numpy(x, d),
                to_numpy(weight, d),
                residual=to_numpy(r, d),
                round_residual=lambda h: round_to(h, case["dtype"]),
                dtype=d,
            )
            for d in (np.float64, np.float32)
        )
        # a float32 sum may round to the other neighbour than the float64 one: one ulp of the stream
        np.testing.assert_allclose(to_numpy(h), ref_h, rtol=torch.finfo(case["dtype"]).eps, atol=0)
        ref, base = (reference.rms_norm(to_numpy(h, d), to_numpy(weight, d), dtype=d) for d in (np.float64, np.float32))
    assert_within("y", y, ref, base, case["dtype"], axis=-2)


def check_gated_rms_norm(case, gate, norm_before_gate, impl, device="cpu"):
    generator = torch.Generator().manual_seed(case["seed"])
    x, z, weight = randn(case, generator, scale=case["scale"]), randn(case, generator), weight_of(case, generator)
    z = z if gate else None
    options = dict(group_size=case["group_size"], norm_before_gate=norm_before_gate)
    y = hybrid_ops.gated_rms_norm(
        x.to(device), None if z is None else z.to(device), weight.to(device), impl=impl, **options
    )
    ref, base = (
        reference.gated_rms_norm(to_numpy(x, d), to_numpy(z, d), to_numpy(weight, d), dtype=d, **options)
        for d in (np.float64, np.float32)
    )
    assert_within("y", y, ref, base, case["dtype"], axis=-2)


@given(case=cases(CPU_DTYPES), residual=st.booleans())
def test_rms_norm(case, residual):
    check_rms_norm(case, residual, "torch")


@given(case=cases(CPU_DTYPES), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm(case, gate, norm_before_gate):
    check_gated_rms_norm(case, gate, norm_before_gate, "torch")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(INTERPRETER_DTYPES), residual=st.booleans())
def test_rms_norm_interpreter(case, residual):
    check_rms_norm(case, residual, "triton")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(INTERPRETER_DTYPES), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_interpreter(case, gate, norm_before_gate):
    check_gated_rms_norm(case, gate, norm_before_gate, "triton")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=cases(CPU_DTYPES, max_rows=300, max_group_size=1500), residual=st.booleans())
def test_rms_norm_gpu(case, residual):
    check_rms_norm(case, residual, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=cases(CPU_DTYPES, max_rows=300, max_group_size=1500), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_gpu(case, gate, norm_before_gate):
    check_gated_rms_norm(case, gate, norm_before_gate, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_rows=300, max_groups=1, max_group_size=4500), residual=st.booleans())
def test_rms_norm_cuda_gpu(case, residual):
    check_rms_norm(for_cuda(case), residual, "cuda", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_rows=300, max_group_size=4500), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_cuda_gpu(case, gate, norm_before_gate):
    check_gated_rms_norm(for_cuda(case), gate, norm_before_gate, "cuda", "cuda")


def test_gradients():
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, r, w = leaf(2, 3, 12), leaf(2, 3, 12), leaf(12)
    assert torch.autograd.gradcheck(hybrid_ops.rms_norm, (x, w))
    assert torch.autograd.gradcheck(lambda x, w, r: hybrid_ops.rms_norm(x, w, residual=r), (x, w, r))
    for before in (False, True):
        for z in (leaf(2, 3, 12), None):
            inputs = (x, w) if z is None else (x, w, z)
            assert torch.autograd.gradcheck(
                lambda x, w, z=None, before=before: hybrid_ops.gated_rms_norm(
                    x, z, w, group_size=4, norm_before_gate=before
                ),
                inputs,
            )


# a group of one feature has no gradient but rounding: dn - n * mean(dn * n) cancels
@given(case=cases(CPU_DTYPES, min_group_size=8), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_backward(case, gate, norm_before_gate):
    check_gated_backward(case, gate, norm_before_gate, "torch")


@given(case=cases(CPU_DTYPES, min_group_size=8), stream_fp32=st.booleans())
def test_rms_norm_backward(case, stream_fp32):
    check_residual_backward(case, stream_fp32, "torch")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(INTERPRETER_DTYPES, min_group_size=8), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_backward_interpreter(case, gate, norm_before_gate):
    check_gated_backward(case, gate, norm_before_gate, "triton")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(INTERPRETER_DTYPES, min_group_size=8), stream_fp32=st.booleans())
def test_rms_norm_backward_interpreter(case, stream_fp32):
    check_residual_backward(case, stream_fp32, "triton")


@pytest.mark.gpu
@settings(max_examples=13)
@given(
    case=cases(CPU_DTYPES, max_rows=300, min_group_size=8, max_group_size=1500),
    gate=st.booleans(),
    norm_before_gate=st.booleans(),
)
def test_gated_rms_norm_backward_gpu(case, gate, norm_before_gate):
    check_gated_backward(case, gate, norm_before_gate, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=13)
@given(case=cases(CPU_DTYPES, max_rows=300, min_group_size=8, max_group_size=1500), stream_fp32=st.booleans())
def test_rms_norm_backward_gpu(case, stream_fp32):
    check_residual_backward(case, stream_fp32, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_rows=300, max_group_size=4500), gate=st.booleans(), norm_before_gate=st.booleans())
def test_gated_rms_norm_backward_cuda_gpu(case, gate, norm_before_gate):
    check_gated_backward(for_cuda(case), gate, norm_before_gate, "cuda", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_rows=300, max_groups=1, max_group_size=4500), stream_fp32=st.booleans())
def test_rms_norm_backward_cuda_gpu(case, stream_fp32):
    check_residual_backward(for_cuda(case), stream_fp32, "cuda", "cuda")


def check_gated_backward(case, gate, norm_before_gate, impl, device="cpu"):
    generator = torch.Generator().manual_seed(case["seed"])
    x, z, dy = (randn(case, generator) for _ in range(3))
    weight = weight_of(case, generator)
    options = dict(group_size=case["group_size"], norm_before_gate=norm_before_gate)
    leaves = [t.to(device).detach().requires_grad_() for t in (x, z, weight)]
    y = hybrid_ops.gated_rms_norm(leaves[0], leaves[1] if gate else None, leaves[2], impl=impl, **options)
    y.backward(dy.to(device))
    ref, base = (
        reference.gated_rms_norm_bwd(
            to_numpy(dy, d), to_numpy(x, d), to_numpy(z, d) if gate else None, to_numpy(weight, d), dtype=d, **options
        )
        for d in (np.float64, np.float32)
    )
    assert_within("dx", leaves[0].grad, ref[0], base[0], case["dtype"], axis=None)
    assert_within("dweight", leaves[2].grad, ref[2], base[2], case["dtype"], axis=None)
    if gate:
        assert_within("dz", leaves[1].grad, ref[1], base[1], case["dtype"], axis=None)


def check_residual_backward(case, stream_fp32, impl, device="cpu"):
    """Both results have a gradient: that of h goes past the norm. The stream may be wider than x."""
    generator = torch.Generator().manual_seed(case["seed"])
    x, residual, dy, dh = (randn(case, generator) for _ in range(4))
    weight, stream = weight_of(case, generator), torch.float32 if stream_fp32 else case["dtype"]
    residual, dh = residual.to(stream), dh.to(stream)
    leaves = [t.to(device).detach().requires_grad_() for t in (x, weight, residual)]
    y, h = hybrid_ops.rms_norm(leaves[0], leaves[1], residual=leaves[2], impl=impl)
    torch.autograd.backward([y, h], [dy.to(device), dh.to(device)])
    (ref, _, ref_w), (base, _, base_w) = (
        reference.gated_rms_norm_bwd(to_numpy(dy, d), to_numpy(h, d), None, to_numpy(weight, d), dtype=d)
        for d in (np.float64, np.float32)
    )
    ref, base = ref + to_numpy(dh), base + to_numpy(dh, np.float32)
    assert_within("dx", leaves[0].grad, ref, base, case["dtype"], axis=None)
    assert_within("dresidual", leaves[2].grad, ref, base, stream, axis=None)
    assert_within("dweight", leaves[1].grad, ref_w, base_w, case["dtype"], axis=None)


def check_same_bits(impl, device="cpu"):
    torch.manual_seed(0)
    x, z, w, dy = (torch.randn(*shape, device=device) for shape in ((50, 384), (50, 384), (384,), (50, 384)))
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, z, w)]
        y = hybrid_ops.gated_rms_norm(*leaves, group_size=128, impl=impl)
        runs.append(torch.autograd.grad(y, leaves, dy))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_same_bits_gpu(impl):
    if impl == "cuda" and hybrid_ops._device.extension_missing() is not None:
        pytest.skip("the CUDA extension is not built")
    check_same_bits(impl, "cuda")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_every_group_has_a_team(itemsize, gated):
    """As many lanes as there are vectors, of what the kernels are compiled for; rows for every CTA; all on the GPU."""

    def check_team(vectors: int, warps: int, group_size: int) -> None:
        assert (warps - 1) * 32 * vectors < group_size * itemsize // 16 <= warps * 32 * vectors

    for group_size in range(128, csrc.most_features(itemsize) + 1, 16 // itemsize):
        for rows in (0, 1, 5, 8192):
            config = csrc.config(rows, group_size, itemsize, written=0)
            check_team(config.vectors, config.warps, group_size)
            assert 1 <= config.vectors <= 3
            assert config.warps * config.teams <= csrc.MAX_WARPS
            if group_size > csrc.most_bwd_features(itemsize, gated):
                continue
            backward = csrc.bwd_config(rows, 8, group_size, itemsize, gated, 132, written=0)
            check_team(backward.vectors, backward.warps, group_size)
            of_cta, of_sm = csrc._bwd_warps(backward.vectors, gated)
            assert backward.warps * backward.teams <= of_cta
            ctas = -(-backward.ctas * 8 // 132)  # of a multiprocessor
            assert (
                ctas <= csrc._MOST_BWD_CTAS and ctas * backward.warps * backward.teams <= of_sm
            ) or backward.ctas == 1
            assert backward.ctas == 1 or (backward.ctas - 1) * backward.teams < rows


def test_config():
    """Those that were measured to be fast."""
    shapes = {
        512: (1, 2, 4, True),
        1024: (1, 4, 2, True),
        1280: (1, 5, 2, True),
        4096: (1, 16, 1, True),
        2688: (1, 11, 1, True),
    }
    assert {s: csrc.config(8192, s, 2, written=2**27) for s in shapes} == shapes
    shapes = {512: (1, 2, 4, False), 1280: (1, 5, 2, False), 4096: (1, 16, 1, False)}
    assert {s: csrc.config(16, s, 2, written=2**17) for s in shapes} == shapes
    shapes = {
        (8, 512): (2, 1, 6, 33, True),
        (8, 1024): (2, 2, 3, 33, True),
        (8, 1280): (1, 5, 2, 33, True),
        (1, 4096): (2, 8, 1, 256, True),
        (1, 2688): (3, 4, 3, 131, True),
        (1, 4480): (3, 6, 2, 128, True),
    }
    assert {s: csrc.bwd_config(8192, *s, 2, s[0] > 1, 132, written=2**27) for s in shapes} == shapes
    assert not csrc.bwd_config(16, 8, 512, 2, True, 132, written=2**17).streaming


def test_rows_in_memory():
    x = torch.empty(4, 6, 32)
    assert [csrc.row_stride(t) for t in (x, x[0, 0], x[:, :1], x[..., :8])] == [32, 0, 192, 32]
    assert csrc.row_stride(x[0, :1].expand(5, 32)) == 0
    assert [csrc.row_stride(t) for t in (x.transpose(0, 1), x[:, :3], x.transpose(1, 2))] == [None] * 3
    assert csrc.is_rows(x)
    assert not any(map(csrc.is_rows, (x[..., 1:], torch.empty(4, 33)[:, :32])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(), None),
        (dict(dtype=torch.float64), "has no torch.float64"),
        (dict(stream=torch.float32), "takes z in torch.bfloat16, as x, not torch.float32"),
        (dict(stream=torch.float32, gated=False), None),
        (dict(stream=torch.float16, gated=False), "takes the residual in torch.float32 or torch.bfloat16, as x"),
        (dict(weight=torch.empty(256)), None),
        (dict(weight=torch.empty(256).half()), "takes weight in torch.bfloat16 or torch.float32, not torch.float16"),
        (dict(weight=torch.empty(512)[::2]), "needs a contiguous weight"),
        (dict(weight=torch.empty(257)[1:]), "begins at a multiple of 16 bytes"),
        (dict(group_size=64), "has groups of 128 to 12288 features, whole pieces of 16 bytes, not 64"),
        (dict(group_size=132), "whole pieces of 16 bytes, not 132"),
        (dict(x=torch.empty(3, 260).bfloat16()[:, :256]), "needs rows that begin at multiples of 16 bytes.* in x"),
    ],
)
def test_what_the_cuda_kernels_take(change, message):
    bfloat16 = dict(dtype=torch.bfloat16, stream=torch.bfloat16)
    arguments = (
        bfloat16 | dict(weight=torch.empty(256), group_size=256, gated=True) | dict(x=torch.empty(3, 256)) | change
    )
    refusal = csrc.refusal(**arguments)
    assert refusal is None if message is None else re.search(message, refusal)


def test_out_and_residual_dtype():
    x, w, out = torch.randn(3, 16).bfloat16(), torch.ones(16), torch.full((16, 3), float("nan")).bfloat16().T
    assert hybrid_ops.rms_norm(x, w, out=out) is out
    torch.testing.assert_close(out, hybrid_ops.rms_norm(x, w), rtol=0, atol=0)
    y, h = hybrid_ops.rms_norm(x, w, residual=torch.randn(3, 16))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.randn(3, 0)), ValueError, r"x must have shape \(..., hidden\) with hidden >= 1, got \(3, 0\)"),
        (dict(x=torch.ones(3, 8, dtype=torch.int32)), TypeError, "x must have dtype float32 or .*, got int32"),
        (dict(weight=torch.ones(7)), ValueError, r"weight must have shape \(8,\), got \(7,\)"),
        (dict(weight=torch.ones(8, device="meta")), ValueError, "weight must be on cpu, got meta"),
        (dict(residual=torch.ones(2, 8)), ValueError, r"residual must have shape \(3, 8\), got \(2, 8\)"),
        (dict(out=torch.ones(2, 8)), ValueError, r"out must have shape \(3, 8\), got \(2, 8\)"),
        (dict(out=torch.ones(3, 8).half()), TypeError, "out must have dtype float32, got float16"),
        (dict(impl="fast"), ValueError, "impl must be one of 'auto', 'cuda', 'triton', 'torch', got 'fast'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.randn(3, 8), weight=torch.ones(8)) | change
    with pytest.raises(error, match=message):
        hybrid_ops.rms_norm(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_bad_group_size():
    with pytest.raises(ValueError, match="group_size must divide the last dimension of x, 8, got 3"):
        hybrid_ops.gated_rms_norm(torch.randn(3, 8), None, torch.ones(8), group_size=3)


def test_named_implementation_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors"):
        hybrid_ops.rms_norm(torch.randn(3, 8), torch.ones(8), impl="triton")


def launch(dtype, hidden, group_size, gated):
    """Plain with a residual, or gated; tensors on the CPU, for `compiling_for`."""
    from hybrid_ops.triton_kernels import norm as kernels

    x, z, w = (torch.empty(4, hidden, dtype=dtype) for _ in range(3))
    residual, h = (None, None) if gated else (z, torch.empty_like(x))
    kernels.norm(x, z if gated else None, residual, w[0], torch.empty_like(x), h, 1e-5, group_size, False)


def launch_bwd(dtype, hidden, group_size, gated):
    from hybrid_ops.triton_kernels import norm_bwd as kernels

    dy, x, z, dx, dz, w = (torch.empty(4, hidden, dtype=dtype) for _ in range(6))
    z, dz, dh = (z, dz, None) if gated else (None, None, z)
    kernels.norm_bwd(dy, x, z, w[0], dh, dx, dz, None, torch.empty(hidden), 1e-5, group_size, False)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        for dtype in [torch.bfloat16] if sm not in (90, 100) else CPU_DTYPES:
            launch(dtype, 4096, 4096, False)
            launch(dtype, 7680, 960, True)
            launch_bwd(dtype, 4096, 4096, False)
            launch_bwd(dtype, 7680, 960, True)
    check(compiled, sm)


def test_opcheck():
    x, z, r, w = torch.randn(2, 5, 12).transpose(0, 1), torch.randn(5, 2, 12), torch.randn(5, 2, 12), torch.ones(12)
    y, h = torch.empty(5, 2, 12), torch.empty(5, 2, 12)
    op = torch.ops.hybrid_ops.norm_fwd.default
    torch.library.opcheck(op, (x, None, r, w, y, h, 1e-5, 12, False, "torch"))
    torch.library.opcheck(op, (x, z, None, w, y, None, 1e-5, 4, True, "torch"))
    dx, dz, dr, dw = torch.empty(5, 2, 12), torch.empty(5, 2, 12), torch.empty(5, 2, 12).double(), torch.empty(12)
    op = torch.ops.hybrid_ops.norm_bwd.default
    torch.library.opcheck(op, (r, x, z, w, None, dx, dz, None, dw, 1e-5, 4, True, "torch"))
    torch.library.opcheck(op, (r, x, None, w, z, dx, None, dr, dw, 1e-5, 12, False, "torch"))


def compiled_layer(x, z, r, w):
    y, h = hybrid_ops.rms_norm(x, w, residual=r)
    return hybrid_ops.gated_rms_norm(y, z, w, group_size=4) + h


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    compile_once(
        compiled_layer,
        backend,
        lambda n: (torch.randn(2, n, 12), torch.randn(2, n, 12), torch.randn(2, n, 12), torch.ones(12)),
    )


def test_backward_goes_to_its_launch(monkeypatch):
    """Which gets the operator's arguments, its tensors first and in their order."""
    launched = []
    monkeypatch.setattr(norm._checks, "eager_on_gpu", lambda x: True)
    monkeypatch.setattr(norm, "_bwd_choice", lambda *arguments: "cuda")
    monkeypatch.setattr(csrc._device, "num_sms", lambda index: 132)
    monkeypatch.setattr(csrc, "_launch", lambda *_: lambda tensors, index, stream: launched.append(tensors))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    dy, x, z, weight, dx, dz, dweight = (torch.randn(6, 1024) for _ in range(7))
    tensors = (dy, x, z, weight[0], None, dx, dz, None, dweight[0])
    norm._fill_gradients(*tensors, 1e-5, 512, False, "auto")
    assert all(a is b for a, b in zip(launched.pop()[:9], tensors, strict=True))
    # elements that are no neighbours: copied by the operator itself
    assert norm._bwd_run(dy[:, :1].expand(6, 1024), *tensors[1:], 1e-5, 512, False, "auto") is None
