import doctest
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops import Fp8Tensor

from .scaled_gemm_cases import (
    DENSE,
    DTYPES,
    GROUPED,
    INTERPRETER_DTYPES,
    SCALINGS,
    cases,
    check,
    implementation,
    moved,
    quantized,
)
from .tensors import int32

IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
GROUPING = pytest.mark.parametrize("grouped", [False, True])


@given(case=cases(grouped=False, nvfp4=False))
def test_dense(case):
    check(case, implementation("torch"))


@given(case=cases(grouped=True, nvfp4=False))
def test_grouped(case):
    check(case, implementation("torch"))


# sums of the interpreter are float32, of exact products: results in float32 are held to that
@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(grouped=False, nvfp4=False, dtypes=INTERPRETER_DTYPES))
def test_dense_interpreter(case):
    check(case, implementation("triton"))


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(grouped=True, nvfp4=False, dtypes=INTERPRETER_DTYPES))
def test_grouped_interpreter(case):
    check(case, implementation("triton"))


@pytest.mark.interpreter
@pytest.mark.parametrize("a_kind", SCALINGS)
@pytest.mark.parametrize("b_kind", SCALINGS)
def test_every_pair_of_scalings_interpreter(a_kind, b_kind):
    case = DENSE | dict(a_kind=a_kind, b_kind=b_kind, out_dtype=torch.float32, K=144)
    check(case, implementation("triton"))


BIG = dict(sizes=(0, 1, 7, 40, 300), widths=(24, 232, 320), depths=(16, 48, 256, 1040))


@pytest.mark.gpu
@GROUPING
@pytest.mark.parametrize("fast_accum", [False, True])
def test_gpu(grouped, fast_accum):
    @settings(max_examples=20)
    @given(case=cases(grouped=grouped, nvfp4=False, **BIG))
    def run(case):
        # The tensor cores' own sums of FP8 products keep 14 bits on Hopper: fast_accum is held to bfloat16. Results in
        # float32 are sums of float16 products, which tensor cores do not round as float32 arithmetic does.
        wide = case["out_dtype"] == torch.float32
        budget = torch.float16 if wide else torch.bfloat16 if fast_accum else None
        if fast_accum:  # a squared sum would be off by twice as much
            case = case | dict(activation=None)
        check(case | dict(fast_accum=fast_accum), implementation("triton", "cuda"), budget)

    run()


# --- values at the edges ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 16), (3, 0, 16), (3, 2, 0), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_sizes(impl, M, N, K, scaling):
    a, b = (quantized(torch.ones(n, K), scaling, torch.float8_e4m3fn) for n in (M, N))
    y = hybrid_ops.fp8_gemm(a, b, bias=torch.ones(N), impl=impl)
    assert y.shape == (M, N)
    assert y.eq(1 + K).all()
    experts = a._replace(data=b.data[None], scale=b.scale[None])
    y = hybrid_ops.fp8_grouped_gemm(a, experts, int32(M), impl=impl)
    assert y.shape == (M, N)
    assert y.eq(K).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_experts_and_no_rows_of_a(impl):
    a, b = hybrid_ops.fp8_quantize(torch.ones(2, 16)), hybrid_ops.fp8_quantize(torch.ones(0, 3, 16))
    assert not hybrid_ops.fp8_grouped_gemm(a, b, int32(), impl=impl).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code(impl, dtype):
    """Each of the 256 codes, times one: its value; NaN and, in E5M2, infinity included."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16) * torch.eye(16)[0].byte()
    a = Fp8Tensor(codes.view(dtype), torch.ones(()), "tensor")
    b = Fp8Tensor(torch.full((3, 16), 1.0).to(dtype), torch.full((3, 1), 2.0), "row")
    y = hybrid_ops.fp8_gemm(a, b, out_dtype=torch.float32, impl=impl)
    expected = 2 * torch.arange(256, dtype=torch.uint8).view(dtype).float()[:, None].expand(256, 3)
    assert torch.equal(y.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_at_the_edges(impl):
    """Of float32 and of E8M0, whose 0 is the subnormal 2^-127 and 255 NaN."""
    ones = torch.ones(2, 64).to(torch.float8_e4m3fn)
    b = Fp8Tensor(ones, torch.full((2, 2), 127 + 40, dtype=torch.uint8), "mx")
    scale = torch.tensor([[0, 0], [255, 127]], dtype=torch.uint8)
    y = hybrid_ops.fp8_gemm(Fp8Tensor(ones, scale, "mx"), b, out_dtype=torch.float32, impl=impl)
    assert y[0].eq(2.0 ** (6 - 127 + 40)).all()
    assert y[1].isnan().all()
    tiny, huge = (Fp8Tensor(ones, torch.tensor(s), "tensor") for s in (2.0**-100, 2.0**100))
    assert hybrid_ops.fp8_gemm(tiny, huge, out_dtype=torch.float32, impl=impl).eq(64).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_indices_from_outside(impl, monkeypatch):
    """Where the host may not look: rows gathered from outside are 0, offs is clamped to the rows."""
    monkeypatch.setattr("hybrid_ops._checks.readable", lambda value: False)
    a = hybrid_ops.fp8_quantize(torch.ones(4, 32), "1x128")
    b = hybrid_ops.fp8_quantize(torch.ones(2, 3, 32))
    gather = int32(0, -1, 2**31 - 1, 3) if impl == "triton" else int32(0, 1, 2, 3)
    y = hybrid_ops.fp8_grouped_gemm(a, b, int32(2, 2**31 - 1), gather=gather, impl=impl)
    assert y[:, 0].tolist() == ([32, 0, 0, 32] if impl == "triton" else [32] * 4)
    hybrid_ops.fp8_grouped_gemm(a, b, int32(3, -5), gather=gather, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_out_scaling(impl):
    a, b = hybrid_ops.fp8_quantize(torch.randn(6, 64)), hybrid_ops.fp8_quantize(torch.randn(2, 140, 64))
    offs, dtype = int32(2, 5), torch.float16
    y = hybrid_ops.fp8_grouped_gemm(a, b, offs, activation="relu2", out_dtype=dtype, impl=impl)
    q = hybrid_ops.fp8_grouped_gemm(a, b, offs, activation="relu2", out_dtype=dtype, out_scaling="1x128", impl=impl)
    expected = hybrid_ops.fp8_quantize(y, "1x128")
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(q.scale, expected.scale)
    assert q.scaling == "1x128"


@pytest.mark.parametrize("impl", IMPLS)
def test_out(impl):
    a, b = hybrid_ops.fp8_quantize(torch.randn(3, 32)), hybrid_ops.fp8_quantize(torch.randn(5, 32))
    out = torch.empty(5, 3, dtype=torch.float16).T
    assert hybrid_ops.fp8_gemm(a, b, out_dtype=torch.float16, out=out, impl=impl) is out
    assert torch.equal(out, hybrid_ops.fp8_gemm(a, b, out_dtype=torch.float16, impl=impl))


# --- GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["row", "1x128", "mx"])
def test_cuda_graph(scaling):
    x = torch.randn(40, 256, device="cuda")
    b = hybrid_ops.fp8_quantize(torch.randn(4, 96, 256, device="cuda"), scaling)
    offs = torch.tensor([10, 20, 30, 100], dtype=torch.int32, device="cuda")
    gather = torch.randint(40, (100,), device="cuda").int()

    def layer():
        a = hybrid_ops.fp8_quantize(x, scaling)
        return hybrid_ops.fp8_grouped_gemm(a, b, offs, gather=gather, activation="relu2", out_scaling="1x128")[:2]

    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layer()
    for ends in ([0, 0, 0, 0], [100, 100, 100, 100], [1, 5, 60, 61]):
        x.normal_(), gather.random_(0, 40)
        offs.copy_(torch.tensor(ends))
        expected = layer()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(map(bits, results), map(bits, expected), strict=True))


def bits(t):
    return t.reshape(-1).contiguous().view(torch.uint8)  # torch 2.11 asks for unit stride even of one column


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_batch_invariance(scaling):
    a = hybrid_ops.fp8_quantize(torch.randn(512, 512, device="cuda"), scaling)
    b = hybrid_ops.fp8_quantize(torch.randn(192, 512, device="cuda"), scaling)
    y = hybrid_ops.fp8_gemm(a, b, batch_invariant=True)
    rows = {"tensor": (), "128x128": slice(1)}.get(scaling, slice(128))
    few = a._replace(data=a.data[:128], scale=a.scale[rows])
    assert torch.equal(hybrid_ops.fp8_gemm(few, b, batch_invariant=True), y[:128])


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements():
    K, N = 8192, 64
    rows = 2**31 // K + 70
    codes = torch.zeros(rows, K, dtype=torch.uint8, device="cuda")
    last = hybrid_ops.fp8_quantize(torch.randn(70, K, device="cuda"), "1x128")
    codes[-70:] = last.data.view(torch.uint8)
    scale = torch.ones(rows, K // 128, device="cuda")
    scale[-70:] = last.scale
    b = hybrid_ops.fp8_quantize(torch.randn(N, K, device="cuda"), "1x128")
    y = hybrid_ops.fp8_gemm(Fp8Tensor(codes.view(torch.float8_e4m3fn), scale, "1x128"), b, batch_invariant=True)
    assert not y[:-70].any()
    assert torch.equal(y[-70:], hybrid_ops.fp8_gemm(last, b, batch_invariant=True))


# --- wrong versions ---

right = implementation("torch")


def shifted(q):
    """The scales of the neighbour along K."""
    return q._replace(scale=q.scale.roll(1, -1))


def block_scale_shifted(case, a, b, offs, **options):
    return right(case, shifted(a), b, offs, **options)


def scales_of_b_forgotten(case, a, b, offs, **options):
    return right(case, a, b._replace(scale=torch.ones_like(b.scale)), offs, **options)


def two_experts_swapped(case, a, b, offs, **options):
    order = [2, 1, 0, 3]
    return right(case, a, b._replace(data=b.data[order], scale=b.scale[order]), offs, **options)


def two_experts_scales_swapped(case, a, b, offs, **options):
    return right(case, a, b._replace(scale=b.scale[[2, 1, 0, 3]]), offs, **options)


def formats_confused(case, a, b, offs, **options):
    return right(case, a._replace(data=a.data.view(torch.float8_e5m2)), b, offs, **options)


def bias_ignored(case, a, b, offs, bias, **options):
    return right(case, a, b, offs, **options)


def last_block_missing(case, a, b, offs, **options):
    codes = a.data.view(torch.uint8).clone()
    codes[:, 256:] = 0
    return right(case, a._replace(data=codes.view(a.data.dtype)), b, offs, **options)


MUTANTS = {
    block_scale_shifted: DENSE | dict(a_kind="1x128"),
    scales_of_b_forgotten: DENSE,
    two_experts_swapped: GROUPED,
    two_experts_scales_swapped: GROUPED | dict(b_kind="tensor"),
    formats_confused: DENSE,
    bias_ignored: DENSE,
    last_block_missing: DENSE,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mutants_are_rejected(mutant, dtype):
    case = MUTANTS[mutant] | dict(out_dtype=dtype)
    check(case, right)
    with pytest.raises(AssertionError):
        check(case, mutant)


# --- the frame ---

A, WEIGHT = hybrid_ops.fp8_quantize(torch.randn(5, 32)), hybrid_ops.fp8_quantize(torch.randn(3, 4, 32))
B = Fp8Tensor(WEIGHT.data[0], WEIGHT.scale[0], "row")

BAD = [
    (dict(a=torch.ones(5, 32)), TypeError, "a must be an Fp8Tensor, got Tensor"),
    (dict(a=A._replace(data=torch.ones(5, 32))), TypeError, "a.data must have dtype .*, got float32"),
    (dict(a=A._replace(data=A.data[0])), ValueError, r"a.data must have shape \(M, K\), got \(32,\)"),
    (dict(a=A._replace(scale=torch.ones(5, 2))), ValueError, r"a.scale must have shape \(5, 1\), got \(5, 2\)"),
    (dict(a=A._replace(scaling="mx")), TypeError, "a.scale must have dtype uint8, got float32"),
    (dict(a=A._replace(scaling="block")), ValueError, "a.scaling must be one of .*, got 'block'"),
    (dict(b=WEIGHT), ValueError, r"b.data must have shape \(N, K\), got \(3, 4, 32\)"),
    (dict(b=hybrid_ops.fp8_quantize(torch.ones(4, 48))), ValueError, "b must have K = 32, as a has, got 48"),
    (dict(b=moved(B, "meta")), ValueError, "b must be on cpu, got meta"),
    (dict(bias=torch.ones(5)), ValueError, r"bias must have shape \(4,\), got \(5,\)"),
    (dict(bias=torch.ones(4, requires_grad=True)), ValueError, "bias must not require a gradient"),
    (dict(out_dtype=torch.float64), ValueError, "out_dtype must be one of .*, got torch.float64"),
    (dict(out=torch.ones(5, 3)), ValueError, r"out must have shape \(5, 4\), got \(5, 3\)"),
    (dict(out=torch.ones(5, 4)), TypeError, "out must have dtype bfloat16, got float32"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.fp8_gemm(**dict(a=A, b=B) | change)


BAD_GROUPED = [
    (dict(b=B), ValueError, r"b.data must have shape \(E, N, K\), got \(4, 32\)"),
    (dict(offs=int32(1, 1)), ValueError, r"offs must have shape \(3,\), got \(2,\)"),
    (dict(offs=int32(2, 1, 4)), ValueError, "offs must not fall and not be negative, got 1 at expert 1"),
    (dict(offs=int32(1, 1, 6)), ValueError, "offs must end at the number of rows, 5, or before, got 6"),
    (dict(gather=int32(0, 1, 5, 2)), ValueError, r"gather must be in \[0, 5\), got 5"),
    (dict(row_scale=torch.ones(4)), ValueError, r"row_scale must have shape \(5,\), got \(4,\)"),
    (dict(activation="gelu"), ValueError, "activation must be one of None, 'relu2', 'silu_gated', got 'gelu'"),
    (dict(out_scaling="row"), ValueError, "out_scaling must be one of None, '1x128', got 'row'"),
    (dict(out_scaling="1x128", out=torch.ones(5, 4)), ValueError, "out must be None with out_scaling='1x128'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_GROUPED)
def test_bad_grouped_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.fp8_grouped_gemm(**dict(a=A, b=WEIGHT, offs=int32(1, 1, 4)) | change)


def test_nothing_is_written_on_error():
    out = torch.full((5, 4), 3.0).bfloat16()
    with pytest.raises(ValueError, match="offs must end"):
        hybrid_ops.fp8_grouped_gemm(A, WEIGHT, int32(1, 1, 9), out=out)
    assert out.eq(3).all()


def launch(a, b, rows, n, activation=None, out_dtype=torch.bfloat16):
    """Tensors on the CPU."""
    from hybrid_ops.triton_kernels import scaled_gemm as kernels

    offs, gather = torch.zeros(b[0].shape[0], dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    out = torch.empty(rows, n, dtype=out_dtype)
    kernels.scaled_gemm(*a, *b, offs, gather, None, None, out, activation, False, False)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    """Expert sizes of Nemotron 3 Nano."""
    from hybrid_ops.scaled_gemm import fp8_operand

    from .triton_targets import check as check_fits
    from .triton_targets import compiling_for

    def matrices(rows, a_kind, b_kind, a_dtype=torch.float8_e4m3fn):
        a = hybrid_ops.fp8_quantize(torch.zeros(rows, 2688), a_kind, dtype=a_dtype)
        b = hybrid_ops.fp8_quantize(torch.zeros(2, 1856, 2688), b_kind)
        return fp8_operand("a", a, 2), fp8_operand("b", b, 3)

    with compiling_for(sm, monkeypatch) as compiled:
        for rows in (8, 64, 1024):  # each height of tiles
            launch(*matrices(rows, "row", "tensor"), rows, 1856, "relu2")
        launch(*matrices(1024, "1x128", "128x128", torch.float8_e5m2), 1024, 1856, "relu2")
        large = compiled[2:]
        if sm in (90, 100):
            launch(*matrices(1024, "row", "row"), 1024, 928, "silu_gated")
            launch(*matrices(1024, "mx", "mx"), 1024, 1856)
            launch(*matrices(1024, "row", "row"), 1024, 1856, out_dtype=torch.float32)
    check_fits(compiled, sm)
    cores = {80: r"mma\.sync.*f16\.f16", 90: r"wgmma.*e[45]m[23]\.e4m3", 100: r"tcgen05\.mma.*kind::f8f6f4"}
    for kernel in large:  # FP8 as it is where the tensor cores take it, copied 16 bytes at a time
        assert re.search(cores.get(sm, r"mma\.sync.*e[45]m[23]\.e4m3"), kernel.asm["ptx"])
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]


def test_opcheck():
    """Without test_schema, which makes random inputs and cannot in FP8; the op passes it in the tests of NVFP4."""
    op = torch.ops.hybrid_ops.scaled_gemm_fwd.default
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    a, y = (A.data, None, A.scale[:, 0], "row"), torch.empty(5, 4)
    dense = (B.data[None], None, B.scale[None, :, 0], "row", None, None, torch.randn(4), None, y, None)
    torch.library.opcheck(op, (*a, *dense, True, True, "torch"), test_utils=utils)
    experts = (WEIGHT.data, None, WEIGHT.scale[..., 0], "row", int32(1, 1, 4), int32(0, 4, 1, 2, 2))
    arguments = (*a, *experts, None, torch.rand(5), y, "relu2", False, False, "torch")
    torch.library.opcheck(op, arguments, test_utils=utils)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def layer(x, w, up):
        dense = hybrid_ops.fp8_gemm(hybrid_ops.fp8_quantize(x), hybrid_ops.fp8_quantize(w), out_dtype=torch.float32)
        offs = torch.tensor([2, 2, 4], dtype=torch.int32)
        a = hybrid_ops.fp8_quantize(x, "1x128")
        grouped = hybrid_ops.fp8_grouped_gemm(
            a, hybrid_ops.fp8_quantize(up, "128x128"), offs, activation="relu2", out_dtype=torch.float32
        )
        return dense + grouped

    compile_once(
        layer, backend, lambda n: (torch.randn(n, 32), torch.randn(8, 32), torch.randn(3, 8, 32)), grads=(False,)
    )


@pytest.mark.parametrize("op", ["fp8_gemm", "fp8_grouped_gemm"])
@pytest.mark.parametrize("impl", IMPLS)
def test_explain(op, impl):
    choice = hybrid_ops.explain(op, device="cpu", impl=impl, scaling="mx")
    assert choice.impl == impl
    assert choice.config.get("BLOCK_K") == (32 if impl == "triton" else None)


def test_documentation():
    """The page and the docstrings of its functions."""
    names = dict(hybrid_ops=hybrid_ops, torch=torch)
    path = Path(__file__).parent.parent / "docs" / "gemm_fp8.md"
    results = [doctest.testfile(str(path), module_relative=False, globs=dict(names))]
    for name in ("fp8_gemm", "fp8_grouped_gemm"):
        for example in doctest.DocTestFinder(recurse=False).find(getattr(hybrid_ops, name), name, globs=names):
            results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 3
    assert all(result.attempted and not result.failed for result in results)
