import doctest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops import Nvfp4Tensor

from .scaled_gemm_cases import (
    DENSE,
    DTYPES,
    GROUPED,
    INTERPRETER_DTYPES,
    LAYOUTS,
    SCALINGS,
    cases,
    check,
    implementation,
    quantized,
)
from .tensors import int32

IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
GROUPING = pytest.mark.parametrize("grouped", [False, True])
PLAIN = dict(nvfp4=True, a_kind="plain", b_kind="linear")
W4A16, W4A8 = DENSE | PLAIN | dict(a_dtype=torch.bfloat16), DENSE | dict(nvfp4=True, b_kind="linear")
EXPERTS = GROUPED | PLAIN | dict(a_dtype=torch.bfloat16)


@given(case=cases(grouped=False, nvfp4=True))
def test_dense(case):
    check(case, implementation("torch"))


@given(case=cases(grouped=True, nvfp4=True))
def test_grouped(case):
    check(case, implementation("torch"))


# sums of the interpreter are float32, of exact products: results in float32 are held to that
@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(grouped=False, nvfp4=True, dtypes=INTERPRETER_DTYPES))
def test_dense_interpreter(case):
    check(case, implementation("triton"))


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(grouped=True, nvfp4=True, dtypes=INTERPRETER_DTYPES))
def test_grouped_interpreter(case):
    check(case, implementation("triton"))


@pytest.mark.interpreter
@pytest.mark.parametrize("a_kind", [*SCALINGS, *LAYOUTS])
@pytest.mark.parametrize("b_kind", [*LAYOUTS, "packed"])
def test_every_quantised_pair_interpreter(a_kind, b_kind):
    check(W4A8 | dict(a_kind=a_kind, b_kind=b_kind, out_dtype=torch.float32, K=144), implementation("triton"))


TILES = [("plain", 16, 32, 16, 1), ("row", 32, 16, 32, 2), ("1x128", 64, 64, 64, 1), ("128x4", 128, 32, 128, 8)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("a_kind", "blocks"), [(kind, blocks) for kind, *blocks in TILES])
def test_every_shape_of_tiles(a_kind, blocks, monkeypatch):
    """Heights that the sizes of these tests would not choose, and turns of one or two row tiles."""
    from hybrid_ops.triton_kernels import scaled_gemm as kernels

    chosen = kernels.Config(*blocks, num_warps=4, num_stages=1, programs_per_sm=1)
    monkeypatch.setattr(kernels, "config", lambda *problem: chosen)
    case = EXPERTS | dict(sizes=[0, 40, 1, 0, 33], K=144, gather=True, a_kind=a_kind, activation="silu_gated")
    dtype = torch.float16 if a_kind == "plain" else torch.float8_e4m3fn
    check(case | dict(a_dtype=dtype, out_dtype=torch.float16, b_kind="128x4"), implementation("triton"))


BIG = dict(sizes=(0, 1, 7, 40, 300), widths=(24, 232, 320), depths=(16, 48, 256, 1040))


@pytest.mark.gpu
@GROUPING
def test_gpu(grouped):
    @settings(max_examples=25)
    @given(case=cases(grouped=grouped, nvfp4=True, **BIG))
    def run(case):
        # float32 results of 16-bit products: tensor cores do not round their sums as float32 arithmetic does, so they
        # are held to the dtype of the products
        operands = case["a_dtype"] if case["a_kind"] == "plain" else torch.float16
        check(case, implementation("triton", "cuda"), operands if case["out_dtype"] == torch.float32 else None)

    run()


# --- values at the edges ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 16), (3, 0, 16), (3, 2, 0), (0, 0, 0), (1, 1, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes(impl, M, N, K, layout):
    b = quantized(torch.ones(N, K), layout, None)
    for kind in ("plain", "row", "linear"):
        a = quantized(torch.ones(M, K), kind, torch.float32 if kind == "plain" else torch.float8_e4m3fn)
        y = hybrid_ops.nvfp4_gemm(a, b, bias=torch.ones(N), impl=impl)
        assert y.shape == (M, N)
        assert y.eq(1 + K).all()
        experts = Nvfp4Tensor(b.data[None], b.scale[None], b.tensor_scale[None], layout)
        y = hybrid_ops.nvfp4_grouped_gemm(a, experts, int32(M), impl=impl)
        assert y.shape == (M, N)
        assert y.eq(K).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", INTERPRETER_DTYPES)
def test_every_code_and_block_scale(impl, dtype):
    """Each of the 16 codes times each of the 256 scales, by a row that is 1 in one place; NaN scales included."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 128).contiguous()  # a row has one byte
    scale = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat_interleave(16, 0)  # 16 scales a row
    b = Nvfp4Tensor(codes, scale.view(torch.float8_e4m3fn), torch.tensor(0.5), "linear")
    a = torch.zeros(32, 256, dtype=dtype)
    for i in range(32):  # the low and the high code of each block
        a[i, 16 * (i // 2) + i % 2] = 1
    y = hybrid_ops.nvfp4_gemm(a, b, out_dtype=torch.float32, impl=impl)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    both = torch.stack([values[codes[:, 0].long() & 15], values[codes[:, 0].long() >> 4]])  # [2, 256]
    wide = scale.view(torch.float8_e4m3fn).float()
    expected = torch.stack([both[i % 2] * wide[:, i // 2] * 0.5 for i in range(32)])
    nan = wide.isnan().any(1)  # a row of b with a scale of NaN is NaN everywhere
    assert y[:, nan].isnan().all()
    assert torch.equal(y[:, ~nan], expected[:, ~nan])


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_scales_enter_after_the_sum(impl):
    """Where code * scale * tensor scale would be subnormal or infinite, the result is not."""
    x = torch.ones(2, 64)
    tiny, huge = (hybrid_ops.nvfp4_quantize(x * s) for s in (2.0**-100, 2.0**100))
    torch.testing.assert_close(
        hybrid_ops.nvfp4_gemm(tiny, huge, out_dtype=torch.float32, impl=impl), torch.full((2, 2), 64.0)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    a = torch.ones(3, 32)
    a[1] = float("nan")
    y = hybrid_ops.nvfp4_gemm(a, hybrid_ops.nvfp4_quantize(torch.ones(24, 32)), impl=impl)
    assert y[0].eq(32).all()
    assert y[1].isnan().all()
    assert y[2].eq(32).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_indices_from_outside(impl, monkeypatch):
    """Where the host may not look: rows gathered from outside are 0, offs is clamped to the rows."""
    monkeypatch.setattr("hybrid_ops._checks.readable", lambda value: False)
    b = hybrid_ops.nvfp4_quantize(torch.ones(2, 3, 32), scale_layout="128x4")
    gather = int32(0, -1, 2**31 - 1, 3) if impl == "triton" else int32(0, 1, 2, 3)
    y = hybrid_ops.nvfp4_grouped_gemm(torch.ones(4, 32), b, int32(2, 2**31 - 1), gather=gather, impl=impl)
    assert y[:, 0].tolist() == ([32, 0, 0, 32] if impl == "triton" else [32] * 4)
    hybrid_ops.nvfp4_grouped_gemm(torch.ones(4, 32), b, int32(3, -5), gather=gather, impl=impl)


# --- packed weights ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 16), (130, 80), (2, 40, 48), (0, 3, 16), (2, 0, 16)])
def test_packing_round_trips(layout, shape):
    w = hybrid_ops.nvfp4_quantize(torch.randn(shape), scale_layout=layout)
    back = hybrid_ops.nvfp4_unpack(hybrid_ops.nvfp4_prepack(w))
    assert back.scale_layout == layout
    for mine, theirs in zip(back[:3], w[:3], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def test_bad_packing():
    w = hybrid_ops.nvfp4_quantize(torch.ones(3, 16))
    with pytest.raises(TypeError, match="w must be an Nvfp4Tensor, got Tensor"):
        hybrid_ops.nvfp4_prepack(torch.ones(3, 16))
    with pytest.raises(TypeError, match="p must be an Nvfp4Packed, got Nvfp4Tensor"):
        hybrid_ops.nvfp4_unpack(w)
    with pytest.raises(ValueError, match=r"w.scale must have shape \(3, 1\), got \(1, 1\)"):
        hybrid_ops.nvfp4_prepack(w._replace(scale=w.scale[:1]))


# --- GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "row", "linear"])
def test_cuda_graph(kind):
    x = torch.randn(40, 256, device="cuda").bfloat16()
    b = hybrid_ops.nvfp4_prepack(hybrid_ops.nvfp4_quantize(torch.randn(4, 96, 256, device="cuda")))
    offs = torch.tensor([10, 20, 30, 100], dtype=torch.int32, device="cuda")
    gather = torch.randint(40, (100,), device="cuda").int()

    def layer():
        quantise = dict(plain=lambda x: x, row=hybrid_ops.fp8_quantize, linear=hybrid_ops.nvfp4_quantize)
        return hybrid_ops.nvfp4_grouped_gemm(quantise[kind](x), b, offs, gather=gather, activation="relu2")

    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for ends in ([0, 0, 0, 0], [100, 100, 100, 100], [1, 5, 60, 61]):
        x.normal_(), gather.random_(0, 40)
        offs.copy_(torch.tensor(ends))
        expected = layer()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype):
    a, b = torch.randn(300, 512, device="cuda").to(dtype), hybrid_ops.nvfp4_quantize(torch.randn(192, 512).cuda())
    y = hybrid_ops.nvfp4_gemm(a, b, batch_invariant=True)
    assert torch.equal(hybrid_ops.nvfp4_gemm(a[5:7], b, batch_invariant=True), y[5:7])


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements():
    """The last expert of many, the last rows of a long a."""
    K, N, E = 4096, 512, 1024
    w = hybrid_ops.nvfp4_quantize(torch.randn(1, N, K, device="cuda"))
    data = torch.zeros(3 * E, N, K // 2, dtype=torch.uint8, device="cuda")[::3]  # 3 * 2^30 bytes from first to last
    data[-1] = w.data[0]
    scale = w.scale.view(torch.uint8).expand(E, -1, -1).view(torch.float8_e4m3fn)
    offs = torch.zeros(E, dtype=torch.int32, device="cuda")
    offs[-1] = 3
    x = torch.randn(3, K, device="cuda").bfloat16()
    few = hybrid_ops.nvfp4_gemm(
        x, Nvfp4Tensor(w.data[0], w.scale[0], w.tensor_scale[0], "linear"), batch_invariant=True
    )
    many = Nvfp4Tensor(data, scale, w.tensor_scale.expand(E), "linear")
    assert torch.equal(hybrid_ops.nvfp4_grouped_gemm(x, many, offs, batch_invariant=True), few)
    rows = 2**31 // K + 3
    a = torch.zeros(rows, K, dtype=torch.bfloat16, device="cuda")
    a[-3:] = x
    b = Nvfp4Tensor(w.data[0], w.scale[0], w.tensor_scale[0], "linear")
    y = hybrid_ops.nvfp4_gemm(a, b, batch_invariant=True)
    assert not y[:-3].any()
    assert torch.equal(y[-3:], few)


# --- wrong versions ---

right = implementation("torch")


def nibbles_swapped(case, a, b, offs, **options):
    return right(case, a, b._replace(data=b.data >> 4 | b.data << 4), offs, **options)


def nibbles_of_a_swapped(case, a, b, offs, **options):
    return right(case, a._replace(data=a.data >> 4 | a.data << 4), b, offs, **options)


def block_scale_shifted_by_one(case, a, b, offs, **options):
    scale = b.scale.view(torch.uint8).roll(1, -1).view(b.scale.dtype)
    return right(case, a, b._replace(scale=scale), offs, **options)


def tensor_scale_forgotten(case, a, b, offs, **options):
    return right(case, a, b._replace(tensor_scale=torch.ones_like(b.tensor_scale)), offs, **options)


def tensor_scale_of_a_forgotten(case, a, b, offs, **options):
    return right(case, a._replace(tensor_scale=torch.ones(())), b, offs, **options)


def two_experts_swapped(case, a, b, offs, **options):
    order = [2, 1, 0, 3]
    return right(case, a, Nvfp4Tensor(*(part[order] for part in b[:3]), b.scale_layout), offs, **options)


def two_tensor_scales_swapped(case, a, b, offs, **options):
    return right(case, a, b._replace(tensor_scale=b.tensor_scale[[2, 1, 0, 3]]), offs, **options)


def layouts_confused(case, a, b, offs, **options):
    scale = hybrid_ops.swizzle_scales(b.scale)[: b.scale.numel()].view(b.scale.shape)
    return right(case, a, b._replace(scale=scale), offs, **options)


def sign_of_codes_ignored(case, a, b, offs, **options):
    return right(case, a, b._replace(data=b.data & 0x77), offs, **options)


MUTANTS = {
    nibbles_swapped: W4A16,
    nibbles_of_a_swapped: W4A16 | dict(a_kind="linear"),
    block_scale_shifted_by_one: W4A16,
    tensor_scale_forgotten: W4A16,
    tensor_scale_of_a_forgotten: W4A16 | dict(a_kind="linear"),
    two_experts_swapped: EXPERTS,
    two_tensor_scales_swapped: EXPERTS,
    layouts_confused: W4A16,
    sign_of_codes_ignored: W4A16,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mutants_are_rejected(mutant, dtype):
    case = MUTANTS[mutant] | dict(out_dtype=dtype)
    check(case, right)
    with pytest.raises(AssertionError):
        check(case, mutant)


# --- the frame ---

A, WEIGHT = torch.randn(5, 32), hybrid_ops.nvfp4_quantize(torch.randn(3, 4, 32))
B = Nvfp4Tensor(WEIGHT.data[0], WEIGHT.scale[0], WEIGHT.tensor_scale[0], "linear")

BAD = [
    (dict(a="a"), TypeError, "a must be a torch.Tensor, an Fp8Tensor or an Nvfp4Tensor, got str"),
    (dict(a=A[0]), ValueError, r"a must have shape \(M, K\), got \(32,\)"),
    (dict(a=A.double()), TypeError, "a must have dtype float32 or .*, got float64"),
    (dict(a=torch.randn(5, 32, requires_grad=True)), ValueError, "a must not require a gradient"),
    (dict(a=torch.ones(5, 48)), ValueError, "b must have K = 48, as a has, got 32"),
    (dict(a=A.to("meta")), ValueError, "b must be on meta, got cpu"),
    (dict(b=torch.ones(4, 32)), TypeError, "b must be an Nvfp4Tensor or an Nvfp4Packed, got Tensor"),
    (dict(b=WEIGHT), ValueError, r"b.data must have shape \(N, K\), got \(3, 4, 16\)"),
    (dict(b=B._replace(data=B.data[:, :12])), ValueError, r"b.data must have K / 2 divisible by 8 .*, got \(4, 12\)"),
    (dict(b=B._replace(scale=B.scale[:, :1])), ValueError, r"b.scale must have shape \(4, 2\), got \(4, 1\)"),
    (dict(b=B._replace(scale_layout="128x4")), ValueError, r"b.scale must have shape \(512,\), got \(4, 2\)"),
    (dict(b=B._replace(tensor_scale=torch.ones(4))), ValueError, r"b.tensor_scale must have shape \(\), got \(4,\)"),
    (dict(bias=torch.ones(5)), ValueError, r"bias must have shape \(4,\), got \(5,\)"),
    (dict(out_dtype=torch.float64), ValueError, "out_dtype must be one of .*, got torch.float64"),
    (dict(out=torch.ones(5, 3)), ValueError, r"out must have shape \(5, 4\), got \(5, 3\)"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.nvfp4_gemm(**dict(a=A, b=B) | change)


BAD_GROUPED = [
    (dict(b=B), ValueError, r"b.data must have shape \(E, N, K\), got \(4, 16\)"),
    (dict(b=WEIGHT._replace(tensor_scale=torch.ones(()))), ValueError, r"b.tensor_scale must have shape \(3,\), got"),
    (dict(offs=int32(2, 1, 4)), ValueError, "offs must not fall and not be negative, got 1 at expert 1"),
    (dict(gather=int32(0, 1, 5, 2)), ValueError, r"gather must be in \[0, 5\), got 5"),
    (dict(row_scale=torch.ones(5).half()), TypeError, "row_scale must have dtype float32, got float16"),
    (dict(out=torch.ones(5, 4).half()), TypeError, "out must have dtype float32, got float16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_GROUPED)
def test_bad_grouped_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.nvfp4_grouped_gemm(**dict(a=A, b=WEIGHT, offs=int32(1, 1, 4)) | change)


def test_nothing_is_written_on_error():
    out = torch.full((5, 4), 3.0)
    with pytest.raises(ValueError, match="offs must end"):
        hybrid_ops.nvfp4_grouped_gemm(A, WEIGHT, int32(1, 1, 9), out=out)
    assert out.eq(3).all()


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    """Expert sizes of Nemotron 3 Nano; tensors on the CPU."""
    from hybrid_ops.scaled_gemm import Operand, fp8_operand, nvfp4_operand
    from hybrid_ops.triton_kernels import scaled_gemm as kernels

    from .triton_targets import check as check_fits
    from .triton_targets import compiling_for

    def launch(a, rows, layout="linear", activation="relu2", out_dtype=torch.bfloat16):
        n = 928 if activation == "silu_gated" else 1856
        scale = torch.empty(2, 1856, 168) if layout == "linear" else torch.empty(2, 1920 * 168)
        b = Operand(torch.empty(2, 1856, 1344).byte(), scale.byte(), torch.empty(2, 1), layout)
        offs, gather = torch.zeros(2, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        out = torch.empty(rows, n, dtype=out_dtype)
        kernels.scaled_gemm(*a, *b, offs, gather, None, None, out, activation, False, False)

    def plain(rows, dtype=torch.bfloat16):
        return Operand(torch.empty(rows, 2688, dtype=dtype), None, None, "plain")

    with compiling_for(sm, monkeypatch) as compiled:
        for rows in (8, 64, 1024):  # each height of tiles
            launch(plain(rows), rows)
        launch(plain(8, torch.float32), 8, out_dtype=torch.float32)
        in_float32 = compiled[-1:]
        if sm in (90, 100):
            zeros = torch.zeros(1024, 2688)
            launch(plain(1024), 1024, "128x4", "silu_gated")
            launch(fp8_operand("a", hybrid_ops.fp8_quantize(zeros), 2), 1024)
            launch(nvfp4_operand("a", hybrid_ops.nvfp4_quantize(zeros), 2), 1024)
            launch(plain(1024, torch.float32), 1024, out_dtype=torch.float32)
            in_float32.append(compiled[-1])
    check_fits(compiled, sm)
    for kernel in in_float32:  # not in TF32, which keeps 11 bits
        assert "tf32" not in kernel.asm["ptx"]
    if sm in (90, 100):  # the tensor cores' own instruction, on what was decoded in registers
        assert ("wgmma.mma_async" if sm == 90 else "tcgen05.mma") in compiled[2].asm["ptx"]


def test_opcheck():
    op, y = torch.ops.hybrid_ops.scaled_gemm_fwd.default, torch.empty(5, 4)
    dense = (B.data[None], B.scale.view(torch.uint8)[None], B.tensor_scale.view(1, 1), "linear", None, None)
    torch.library.opcheck(op, (A, None, None, "plain", *dense, torch.randn(4), None, y, None, False, True, "torch"))
    experts = (WEIGHT.data, WEIGHT.scale.view(torch.uint8), WEIGHT.tensor_scale[:, None], "linear", int32(1, 1, 4))
    rest = (int32(0, 4, 1, 2, 2), None, torch.rand(5), y, "relu2", False, False, "torch")
    torch.library.opcheck(op, (A, None, None, "plain", *experts, *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def layer(x, w, experts):
        dense = hybrid_ops.nvfp4_gemm(x, hybrid_ops.nvfp4_quantize(w))
        offs = torch.tensor([2, 2, 4], dtype=torch.int32)
        packed = hybrid_ops.nvfp4_prepack(hybrid_ops.nvfp4_quantize(experts, scale_layout="128x4"))
        return dense + hybrid_ops.nvfp4_grouped_gemm(x, packed, offs, activation="relu2")

    compile_once(
        layer, backend, lambda n: (torch.randn(n, 32), torch.randn(8, 32), torch.randn(3, 8, 32)), grads=(False,)
    )


OPS = ["nvfp4_gemm", "nvfp4_grouped_gemm"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_explain(op, impl):
    choice = hybrid_ops.explain(op, device="cpu", impl=impl, scaling="mx")
    assert choice.impl == impl
    assert choice.config.get("BLOCK_K") == (32 if impl == "triton" else None)


def test_documentation():
    """The page and the docstrings of its functions."""
    names = dict(hybrid_ops=hybrid_ops, torch=torch)
    path = Path(__file__).parent.parent / "docs" / "gemm_nvfp4.md"
    results = [doctest.testfile(str(path), module_relative=False, globs=dict(names))]
    for name in (*OPS, "nvfp4_prepack", "nvfp4_unpack"):
        for example in doctest.DocTestFinder(recurse=False).find(getattr(hybrid_ops, name), name, globs=names):
            results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 5
    assert all(result.attempted and not result.failed for result in results)
