"""fp8_quantize and fp8_dequantize: NumPy, torch and Triton give the same bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import quant_fp8 as reference

from .quant_cases import DTYPES, cases, check_exact, check_graph, float32, make, same_bytes, same_values
from .tensors import to_device

SCALINGS = ("tensor", "row", "1x128", "128x128", "mx")
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
EXAMPLES = dict(
    scaling=st.sampled_from(SCALINGS),
    dtype=st.sampled_from(list(FORMATS)),
    pow2=st.booleans(),
    orientation=st.sampled_from(["row", "column", "both"]),
)
SHAPES = dict(max_rows=140, block=1, max_blocks=300, leads=((), (2,), (0,), (2, 1)))


def check(case, scaling, dtype, pow2, orientation, impl, device="cpu"):
    x = make(case)
    on_device = to_device(x, device)
    got = hybrid_ops.fp8_quantize(on_device, scaling, dtype=dtype, pow2_scale=pow2, orientation=orientation, impl=impl)
    expected = reference.fp8_quantize(
        float32(x), scaling, target=FORMATS[dtype], pow2_scale=pow2, orientation=orientation
    )
    pairs = [(got, expected)] if orientation != "both" else zip(got, expected, strict=True)
    for q, (codes, scale) in pairs:
        assert q.scaling == scaling
        same_bytes("data", q.data, codes)
        same_bytes("scale", q.scale, scale)
        for to in DTYPES:
            y = hybrid_ops.fp8_dequantize(q, dtype=to, impl=impl)
            same_values("y", y, reference.fp8_dequantize(codes, scale, scaling, target=FORMATS[dtype]))


@given(case=cases(**SHAPES), **EXAMPLES)
def test_bytes(case, scaling, dtype, pow2, orientation):
    check(case, scaling, dtype, pow2, orientation, "torch")


def check_given(case, per_matrix, impl, device="cpu"):
    x = make(case)
    generator = torch.Generator().manual_seed(case["seed"])
    shape = x.shape[:-2] if per_matrix else ()
    scale = torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-44, 38, shape, generator=generator)
    scale = scale.clamp(min=2.0**-149)
    q = hybrid_ops.fp8_quantize(to_device(x, device), "tensor", scale=scale.to(device), impl=impl)
    codes, stored = reference.fp8_quantize(float32(x), "tensor", scale=scale.numpy())
    same_bytes("data", q.data, codes)
    same_bytes("scale", q.scale, stored)


@given(case=cases(**SHAPES), per_matrix=st.booleans())
def test_given_scale(case, per_matrix):
    check_given(case, per_matrix, "torch")


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_half_precision_value(scaling):
    """All 2^16 bfloat16 and float16 values, each in a row of its own."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
        q = hybrid_ops.fp8_quantize(x, scaling)
        codes, scale = reference.fp8_quantize(float32(x), scaling)
        same_bytes("data", q.data, codes)
        same_bytes("scale", q.scale, scale)


def test_layouts_of_scales():
    x = torch.randn(2, 130, 300)
    shapes = {s: tuple(hybrid_ops.fp8_quantize(x, s).scale.shape) for s in SCALINGS}
    assert shapes == {
        "tensor": (2,),
        "row": (2, 130, 1),
        "1x128": (2, 130, 3),
        "128x128": (2, 2, 3),
        "mx": (2, 130, 10),
    }
    scale = hybrid_ops.fp8_quantize(x, "1x128").scale
    assert scale.stride() == (3 * 132, 1, 132)
    assert (torch.as_strided(scale, (2, 132, 3), scale.stride())[:, 130:] == 1).all()
    assert hybrid_ops.fp8_quantize(x, "mx").scale.dtype == torch.uint8
    columns = hybrid_ops.fp8_quantize(x, "row", orientation="column")
    assert columns.data.shape == (2, 300, 130)
    assert columns.data.is_contiguous()


def test_special_values():
    """What the docs promise of zeros, infinities and NaN."""
    inf, nan = float("inf"), float("nan")
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        q = hybrid_ops.fp8_quantize(torch.tensor([[0.0, -0.0], [inf, 2.0], [nan, 2.0], [-inf, -nan]]), dtype=dtype)
        assert q.scale[:, 0].tolist() == [1.0, 1.0, pytest.approx(2 / largest), 1.0]
        assert q.data.view(torch.uint8)[0].tolist() == [0, 0x80]
        assert q.data.float()[1].tolist() == [largest, 2.0]
        assert q.data.view(torch.uint8)[2, 0] == 0x7F == q.data.view(torch.uint8)[3, 1]
        assert q.data.float()[2, 1] == largest
        assert q.data.float()[3, 0] == -largest


@given(case=cases(dtypes=(torch.float32,), **SHAPES), scaling=st.sampled_from(SCALINGS))
def test_error_of_a_round_trip(case, scaling):
    """Half a step of E4M3 below the largest value of the tile, whatever the scaling; independent of the reference."""
    case |= dict(kind="normal")
    x = make(case)
    y = hybrid_ops.fp8_dequantize(hybrid_ops.fp8_quantize(x, scaling), dtype=torch.float32)
    coarsest = 2.0**-4 * x.abs() + 2.0**-10 / 448 * 2 * (x.abs().amax() if x.numel() else 0)
    assert ((x - y).abs() <= coarsest * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_power_of_two_scales(scaling):
    q = hybrid_ops.fp8_quantize(torch.randn(3, 40, 260), scaling, pow2_scale=True)
    if scaling != "mx":
        assert (torch.frexp(q.scale)[0] == 0.5).all()
    assert q.data.float().abs().max() > 224  # no factor of two is lost


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.ones(3)), ValueError, r"x must have shape \(..., M, K\), got \(3,\)"),
        (dict(x=torch.ones(3, 8).double()), TypeError, "x must have dtype float32 or .*, got float64"),
        (dict(x=torch.ones(3, 8, requires_grad=True)), ValueError, "x must not require a gradient"),
        (dict(scaling="block"), ValueError, "scaling must be one of 'tensor', 'row', .*, got 'block'"),
        (dict(dtype=torch.float16), ValueError, "dtype must be one of torch.float8_e4m3fn, .*, got torch.float16"),
        (dict(orientation="up"), ValueError, "orientation must be one of 'row', 'column', 'both', got 'up'"),
        (dict(scale=torch.ones(())), ValueError, "scale must be None with scaling='row', got a tensor"),
        (dict(scaling="tensor", scale=torch.ones(2)), ValueError, r"scale must have shape \(\), got \(2,\)"),
        (dict(scaling="tensor", scale=torch.zeros(())), ValueError, "scale must be positive and finite, got 0.0"),
        (dict(scaling="tensor", scale=torch.ones(()).half()), TypeError, "scale must have dtype float32, got float16"),
        (dict(impl="fast"), ValueError, "impl must be one of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.randn(3, 8)) | change
    with pytest.raises(error, match=message):
        hybrid_ops.fp8_quantize(arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(data=torch.ones(3, 8)), TypeError, "data must have dtype float8_e4m3fn or float8_e5m2, got float32"),
        (dict(scale=torch.ones(3)), ValueError, r"scale must have shape \(3, 1\), got \(3,\)"),
        (dict(scaling="mx"), TypeError, "scale must have dtype uint8, got float32"),
        (dict(scaling="rows"), ValueError, "scaling must be one of"),
    ],
)
def test_bad_fp8_tensor(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.fp8_dequantize(hybrid_ops.fp8_quantize(torch.randn(3, 8))._replace(**change))


def test_bad_dequantize_dtype():
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, got torch.float64"):
        hybrid_ops.fp8_dequantize(hybrid_ops.fp8_quantize(torch.randn(3, 8)), dtype=torch.float64)


def test_opcheck():
    x = torch.randn(2, 5, 140).transpose(1, 2)
    for scaling, shape in (("tensor", (2, 1, 1)), ("1x128", (2, 1, 140)), ("row", (2, 140, 1))):
        data, scale = torch.empty(2, 140, 5, dtype=torch.uint8), torch.empty(shape)
        op = torch.ops.hybrid_ops.fp8_quantize.default
        torch.library.opcheck(op, (x, None, data, scale, "e4m3", scaling, False, "torch"))
    torch.library.opcheck(op, (x, torch.ones(2), data, None, "e5m2", "tensor", False, "torch"))
    q = hybrid_ops.fp8_quantize(torch.randn(2, 5, 140))
    op = torch.ops.hybrid_ops.fp8_dequantize.default
    torch.library.opcheck(op, (q.data.view(torch.uint8), q.scale, torch.empty(2, 5, 140), "e4m3", "row", "torch"))


def round_trip(x):
    q, t = hybrid_ops.fp8_quantize(x, "1x128", orientation="both")
    return hybrid_ops.fp8_dequantize(q, dtype=torch.float32) + hybrid_ops.fp8_dequantize(t, dtype=torch.float32).mT


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    compile_once(round_trip, backend, lambda n: (torch.randn(n, 12),), grads=(False,))


def test_named_implementation_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors"):
        hybrid_ops.fp8_quantize(torch.randn(3, 8), impl="triton")


def test_mutants_are_rejected():
    """The comparison that all of this stands on sees one code, one scale, and a swapped pair of rows."""
    x = torch.randn(4, 32)
    codes, scale = reference.fp8_quantize(x.numpy(), "row")
    flipped, nudged = codes.copy(), scale.copy()
    flipped[2, 3] ^= 1
    nudged[1] = np.nextafter(nudged[1], np.float32(1))
    for array, right in ((flipped, codes), (nudged, scale), (codes[::-1].copy(), codes)):
        with pytest.raises(AssertionError, match="differ"):
            same_bytes("mutant", torch.from_numpy(array), right)
    assert not np.array_equal(reference.fp8_quantize(x.numpy(), "row", pow2_scale=True)[0], codes)


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(**SHAPES), **EXAMPLES)
def test_bytes_interpreter(case, scaling, dtype, pow2, orientation):
    check(case, scaling, dtype, pow2, orientation, "triton")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(**SHAPES), per_matrix=st.booleans())
def test_given_scale_interpreter(case, per_matrix):
    check_given(case, per_matrix, "triton")


def check_long_rows(device):
    """Rows that a program reads twice, of x and of x^T."""
    case = dict(seed=0, dtype=torch.bfloat16, lead=(), M=2, K=16400, kind="classes", layout="dense")
    check(case, "row", torch.float8_e4m3fn, False, "row", "triton", device)
    check(case | dict(M=300, K=3), "row", torch.float8_e4m3fn, False, "column", "triton", device)


@pytest.mark.interpreter
def test_long_rows_interpreter():
    check_long_rows("cpu")


GPU_SHAPES = dict(max_rows=400, block=1, max_blocks=1500, leads=((), (2,), (0,), (2, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@settings(max_examples=33)
@given(case=cases(**GPU_SHAPES), **EXAMPLES)
def test_bytes_gpu(impl, case, scaling, dtype, pow2, orientation):
    check(case, scaling, dtype, pow2, orientation, impl, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@settings(max_examples=13)
@given(case=cases(**GPU_SHAPES), per_matrix=st.booleans())
def test_given_scale_gpu(impl, case, per_matrix):
    check_given(case, per_matrix, impl, "cuda")


@pytest.mark.gpu
def test_long_rows_gpu():
    check_long_rows("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_cuda_graph(scaling):
    x = torch.randn(300, 520, device="cuda", dtype=torch.bfloat16)
    check_graph(
        x,
        lambda: hybrid_ops.fp8_quantize(x, scaling)[:2],
        lambda q: hybrid_ops.fp8_dequantize(hybrid_ops.Fp8Tensor(*q, scaling)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_many_elements_gpu(scaling):
    """More than 2^31 elements: the last rows are as if they stood alone."""
    x = torch.zeros(2**15 + 128, 2**16, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-128:].normal_()
    q, alone = hybrid_ops.fp8_quantize(x, scaling), hybrid_ops.fp8_quantize(x[-128:].clone(), scaling)
    assert torch.equal(q.data[-128:].view(torch.uint8), alone.data.view(torch.uint8))
    if scaling != "tensor":
        assert torch.equal(q.scale[-len(alone.scale) :], alone.scale)
    tail = hybrid_ops.fp8_dequantize(q)[-128:]
    assert torch.equal(tail, hybrid_ops.fp8_dequantize(alone))


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from hybrid_ops.triton_kernels import quant_fp8 as kernels

    from .triton_targets import check as check_fits
    from .triton_targets import compiling_for

    x = torch.empty(2, 256, 4096, dtype=torch.bfloat16)
    data, y = torch.empty(2, 256, 4096, dtype=torch.uint8), torch.empty_like(x)
    with compiling_for(sm, monkeypatch) as compiled:
        for scaling in SCALINGS if sm in (90, 100) else ("tensor", "row", "1x128"):
            scale = torch.empty(2, 2, 32, dtype=torch.uint8 if scaling == "mx" else torch.float32)
            kernels.fp8_quantize(x, None, data, scale, "e4m3", scaling, False)
            if sm in (90, 100):
                kernels.fp8_quantize(x.mT, None, data.view(2, 4096, 256), scale, "e5m2", scaling, True)
                kernels.fp8_dequantize(data, scale, y, "e4m3", scaling)
    check_fits(compiled, sm)
    check_exact(compiled)
