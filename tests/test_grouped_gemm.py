import pytest
import torch
from hypothesis import given, settings

import hybrid_ops

from .budget import assert_within, to_numpy
from .moe_cases import (
    CPU_DTYPES,
    INTERPRETER_DTYPES,
    PLAIN,
    check_grouped,
    check_grouped_backward,
    grouped_cases,
    grouped_problem,
    implementation,
)
from .tensors import int32


@given(case=grouped_cases(CPU_DTYPES))
def test_grouped_gemm(case):
    check_grouped(case, implementation("torch"))


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=grouped_cases(INTERPRETER_DTYPES))
def test_grouped_gemm_interpreter(case):
    check_grouped(case, implementation("triton"))


@pytest.mark.gpu
@settings(max_examples=20)
@given(
    case=grouped_cases(
        CPU_DTYPES, sizes=(0, 1, 7, 40, 300), widths=(24, 232, 320), depths=(1, 33, 64, 192), max_experts=9
    )
)
def test_grouped_gemm_gpu(case):
    check_grouped(case, implementation("triton", "cuda"))


# enough columns and rows that a gradient measures errors
@given(case=grouped_cases(CPU_DTYPES, sizes=(0, 1, 18, 30), depths=(24, 40), enough=18))
def test_backward(case):
    check_grouped_backward(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=grouped_cases(INTERPRETER_DTYPES, sizes=(0, 1, 18, 30), depths=(24, 40), max_experts=3, enough=18))
def test_backward_interpreter(case):
    check_grouped_backward(case, "triton")


@pytest.mark.gpu
@settings(max_examples=13)
@given(
    case=grouped_cases(
        CPU_DTYPES, sizes=(0, 1, 7, 40, 300), widths=(24, 232), depths=(33, 192), max_experts=9, enough=18
    )
)
def test_backward_gpu(case):
    check_grouped_backward(case, "triton", "cuda")


def test_gradcheck():
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    offs, gather = int32(2, 2, 5), int32(3, 0, 3, 1, 0, 2)
    for activation, width in ((None, 4), ("relu2", 4), ("silu_gated", 6)):
        for index, rows in ((None, 6), (gather, 4)):

            def run(a, b, s, activation=activation, index=index):
                return hybrid_ops.grouped_gemm(
                    a, b, offs, gather=index, activation=activation, row_scale=s, return_preact=True
                )

            assert torch.autograd.gradcheck(run, (leaf(rows, 3), leaf(3, width, 3), leaf(6)))


# --- values at the edges ---


@pytest.mark.parametrize(
    ("rows", "experts", "n", "k"), [(0, 2, 3, 4), (3, 2, 0, 4), (3, 2, 3, 0), (3, 0, 3, 4), (0, 0, 0, 0)]
)
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_sizes_of_zero(rows, experts, n, k, impl):
    a, b, offs = torch.randn(rows, k), torch.randn(experts, n, k), torch.full((experts,), rows, dtype=torch.int32)
    y = hybrid_ops.grouped_gemm(a, b, offs, impl=impl)
    assert y.shape == (rows, n)
    assert (experts and k) or not y.any()
    leaves = a.requires_grad_(), b.requires_grad_()
    for got, leaf in zip(
        torch.autograd.grad(hybrid_ops.grouped_gemm(*leaves, offs, impl=impl).sum(), leaves), leaves, strict=True
    ):
        assert got.shape == leaf.shape
        assert not got.isnan().any()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_one_row_one_column(impl):
    a, b = torch.tensor([[3.0]], requires_grad=True), torch.tensor([[[2.0]]], requires_grad=True)
    y = hybrid_ops.grouped_gemm(a, b, int32(1), activation="relu2", impl=impl)
    assert y.item() == 36
    y.backward()
    assert (a.grad.item(), b.grad.item()) == (24, 36)  # 2 * 6 * 2 and 2 * 6 * 3
    gate_and_up = hybrid_ops.grouped_gemm(
        a, torch.tensor([[[0.0], [2.0]]]), int32(1), activation="silu_gated", impl=impl
    )
    assert gate_and_up.item() == 0


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_nan_and_infinity_stay_in_their_rows(impl):
    a = torch.ones(4, 8)
    a[1], a[2] = float("nan"), float("inf")
    b = torch.ones(2, 24, 8)
    y = hybrid_ops.grouped_gemm(a, b, int32(2, 4), activation="relu2", impl=impl)
    assert y[0].eq(64).all()
    assert y[3].eq(64).all()
    assert y[1].isnan().all()
    assert y[2].eq(float("inf")).all()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_expert_without_rows_has_a_gradient_of_zero(impl):
    a, b = torch.randn(5, 8, requires_grad=True), torch.randn(3, 24, 8, requires_grad=True)
    hybrid_ops.grouped_gemm(a, b, int32(2, 2, 4), impl=impl).sum().backward()
    assert b.grad[0].all()
    assert not b.grad[1].any()
    assert a.grad[:4].all()
    assert not a.grad[4].any()  # a row of no expert


def check_batch_invariance(impl, device, K, N, count):
    """A row alone and among others has the same bits, wherever it stands."""
    torch.manual_seed(0)
    a, b = torch.randn(count, K, device=device), torch.randn(2, N, K, device=device)
    options = dict(activation="relu2", batch_invariant=True, impl=impl)
    offs = torch.tensor([count // 3, count], dtype=torch.int32, device=device)
    y = hybrid_ops.grouped_gemm(a, b, offs, **options)
    for i in (0, count // 3 - 1, count // 3, count - 1):
        expert = int(i >= count // 3)
        alone = torch.tensor([1 - expert, 1], dtype=torch.int32, device=device)
        assert torch.equal(hybrid_ops.grouped_gemm(a[i : i + 1], b, alone, **options)[0], y[i])


def test_batch_invariance():
    check_batch_invariance("torch", "cpu", 200, 100, 131)


@pytest.mark.gpu
def test_batch_invariance_gpu():
    check_batch_invariance("triton", "cuda", 520, 1000, 3000)


@pytest.mark.gpu
def test_same_bits_from_run_to_run():
    torch.manual_seed(0)
    a, b = torch.randn(900, 256, device="cuda").bfloat16(), torch.randn(7, 320, 256, device="cuda").bfloat16()
    gather = torch.randint(900, (4000,), device="cuda").int()
    offs = torch.tensor([0, 700, 701, 1500, 1500, 3900, 4000], dtype=torch.int32, device="cuda")
    leaves = a.requires_grad_(), b.requires_grad_()

    def run():
        y = hybrid_ops.grouped_gemm(*leaves, offs, gather=gather, activation="relu2")
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)

    first = run()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


BAD_OFFS = ([10**6, -7, 3, 2**31 - 1], [-1, -1, -1, -1], [50, 20, 60, 10], [0, -(2**31), 70, 0], [20, 0, 0, 0])


def check_indices_from_outside(bad, gathered, device):
    """Values that the host does not read: the kernel stays in its own tensors, whose neighbours are NaN."""
    from hybrid_ops.triton_kernels import grouped_gemm as kernels
    from hybrid_ops.triton_kernels import grouped_gemm_bwd as backward

    def between(*shape):
        memory = torch.full((3, *shape), float("nan"), device=device, dtype=torch.float16)
        return memory, memory[1].fill_(1)

    (_, a), (_, b), (outs, out), (gradients, db) = (
        between(64, 64),
        between(4, 64, 64),
        between(64, 64),
        between(4, 64, 64),
    )
    gather = torch.tensor([-5, 64, 2**31 - 1, -(2**31)] * 16, device=device).int() if gathered else None
    offs = torch.tensor(bad, dtype=torch.int32, device=device)
    kernels.grouped_gemm(a, b, offs, gather, None, out, None, None, False)
    backward.grouped_gemm_wgrad(a, a, offs, gather, db)
    for memory in (outs, gradients):
        assert memory[[0, 2]].isnan().all()
        assert not memory[1].isnan().any()
    allowed = torch.tensor([0.0, 1.0] if gathered else [0.0, 1.0, 64.0], device=device).half()  # 1: not written
    assert torch.isin(out, allowed).all()
    sources = torch.tensor([3, 0, -1, 2**31 - 1, 4, -(2**31)] * 10 + [0] * 4, device=device).int()
    sums, total = between(4, 64)
    backward.index_sum(a, sources, None, total, 1, 1.0)
    assert sums[[0, 2]].isnan().all()
    assert total[:, 0].tolist() == [14.0, 0.0, 0.0, 10.0]


@pytest.mark.interpreter
@pytest.mark.parametrize("bad", BAD_OFFS)
@pytest.mark.parametrize("gathered", [False, True])
def test_indices_from_outside_interpreter(bad, gathered):
    check_indices_from_outside(bad, gathered, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD_OFFS)
@pytest.mark.parametrize("gathered", [False, True])
def test_indices_from_outside_gpu(bad, gathered):
    check_indices_from_outside(bad, gathered, "cuda")


def assert_products(got, a, b, sizes):
    """`got` are the rows of `a`, so many for each matrix of `b`, times its transpose."""
    ref, base = (
        torch.cat([rows.to(dtype) @ w.to(dtype).T for rows, w in zip(a.split(sizes), b, strict=True)])
        for dtype in (torch.float64, torch.float32)
    )
    assert_within("y", got, to_numpy(ref), to_numpy(base), a.dtype, axis=0)


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements():
    """The last rows of a long a, the last expert of many, the last rows of a long result."""
    K, N = 4096, 64
    rows = 2**31 // K + 70
    a = torch.zeros(rows, K, dtype=torch.bfloat16, device="cuda")
    a[-70:].normal_()
    b = torch.randn(2, N, K, device="cuda").bfloat16()
    offs = torch.tensor([rows - 40, rows], dtype=torch.int32, device="cuda")
    assert_products(hybrid_ops.grouped_gemm(a, b, offs)[-70:], a[-70:], b, [30, 40])
    wide = torch.randn(2, K, N, device="cuda").bfloat16()
    long = hybrid_ops.grouped_gemm(a[:, :N], wide, offs)
    assert not long[: rows - 70].any()
    assert_products(long[-70:], a[-70:, :N], wide, [30, 40])
    del long, a
    many = torch.zeros(1024, 2**31 // (1024 * K) + 8, K, dtype=torch.bfloat16, device="cuda")
    many[-1].normal_()
    x = torch.randn(3, K, device="cuda").bfloat16()
    offs = torch.zeros(len(many), dtype=torch.int32, device="cuda")
    offs[-1] = 3
    assert_products(hybrid_ops.grouped_gemm(x, many, offs), x, many[-1:], [3])


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    a, b = torch.randn(40, 64, device="cuda").bfloat16(), torch.randn(4, 96, 64, device="cuda").bfloat16()
    offs = torch.tensor([10, 20, 30, 100], dtype=torch.int32, device="cuda")
    gather = torch.randint(40, (100,), device="cuda").int()
    options = dict(gather=gather, activation="relu2")
    hybrid_ops.grouped_gemm(a, b, offs, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_ops.grouped_gemm(a, b, offs, **options)
    for ends in ([0, 0, 0, 0], [100, 100, 100, 100], [1, 5, 60, 61]):
        a.normal_(), gather.random_(0, 40)
        offs.copy_(torch.tensor(ends))
        expected = hybrid_ops.grouped_gemm(a, b, offs, **options)
        graph.replay()
        assert torch.equal(y, expected)


# --- wrong versions ---

right = implementation("torch")


def two_experts_swapped(a, b, offs, **options):
    return right(a, b[[2, 1, 0, 3]], offs, **options)


def last_rows_of_an_expert_missing(a, b, offs, **options):
    y, h = right(a, b, offs, **options)
    y[offs[2] - 1] = 0
    return y, h


def neighbours_rows_after_an_expert_without(a, b, offs, **options):
    return right(a, b[[0, 0, 1, 2]], offs, **options)


def activation_ignored(*args, activation, **options):
    return right(*args, activation=None, **options)


def gate_and_up_swapped(a, b, offs, **options):
    return right(a, b.roll(b.shape[1] // 2, 1), offs, **options)


def scale_before_the_activation(a, b, offs, row_scale, gather=None, **options):
    rows = a if gather is None else a[gather.clamp(0, len(a) - 1)]
    return right((rows.float() * row_scale[:, None]).to(a.dtype), b, offs, **options)


def scale_ignored(*args, row_scale, **options):
    return right(*args, **options)


def gather_ignored(a, b, offs, gather, **options):
    return right(a, b, offs, gather=torch.arange(len(gather)).int() % len(a), **options)


def one_column_of_k_missing(a, b, offs, **options):
    return right(torch.cat([a[:, :-1], torch.zeros_like(a[:, :1])], 1), b, offs, **options)


def rows_of_none_left_alone(*args, **options):
    y, h = right(*args, **options)
    y[args[2][-1] :] = 1
    return y, h


MUTANTS = {
    two_experts_swapped: {},
    last_rows_of_an_expert_missing: {},
    neighbours_rows_after_an_expert_without: {},
    activation_ignored: dict(activation="relu2"),
    gate_and_up_swapped: dict(activation="silu_gated"),
    scale_before_the_activation: dict(activation="relu2"),
    scale_ignored: {},
    gather_ignored: dict(gather=True),
    one_column_of_k_missing: {},
    rows_of_none_left_alone: {},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_mutants_are_rejected(mutant, dtype):
    case = PLAIN | MUTANTS[mutant] | dict(dtype=dtype)
    check_grouped(case, right)
    with pytest.raises(AssertionError):
        check_grouped(case, mutant)


# --- the frame ---


def good():
    return dict(a=torch.randn(5, 8), b=torch.randn(3, 4, 8), offs=int32(1, 1, 4))


BAD = [
    (dict(a="a"), TypeError, "a must be a torch.Tensor, got str"),
    (dict(a=torch.ones(5)), ValueError, r"a must have shape \(rows, K\), got \(5,\)"),
    (dict(a=torch.ones(5, 8).int()), TypeError, "a must have dtype .* got int32"),
    (dict(b=torch.ones(3, 4, 7)), ValueError, r"b must have shape \(\*, \*, 8\), got \(3, 4, 7\)"),
    (dict(b=torch.ones(3, 4, 8).half()), TypeError, "b must have dtype float32, got float16"),
    (dict(b=torch.ones(3, 4, 8, device="meta")), ValueError, "b must be on cpu, got meta"),
    (dict(b=torch.ones(1025, 4, 8)), ValueError, "b must have at most 1024 experts, got 1025"),
    (dict(b=torch.ones(3, 5, 8), activation="silu_gated"), ValueError, r"b must have shape \(E, 2 N, K\) with .*5"),
    (dict(activation="gelu"), ValueError, "activation must be one of None, 'relu2', 'silu_gated', got 'gelu'"),
    (dict(offs=int32(1, 4)), ValueError, r"offs must have shape \(3,\), got \(2,\)"),
    (dict(offs=torch.tensor([1, 1, 4])), TypeError, "offs must have dtype int32, got int64"),
    (dict(offs=int32(2, 1, 4)), ValueError, "offs must not fall and not be negative, got 1 at expert 1"),
    (dict(offs=int32(-1, 1, 4)), ValueError, "offs must not fall and not be negative, got -1 at expert 0"),
    (dict(offs=int32(1, 1, 6)), ValueError, "offs must end at the number of rows, 5, or before, got 6"),
    (dict(gather=torch.tensor([1, 1, 4])), TypeError, "gather must have dtype int32, got int64"),
    (dict(gather=int32(0, 1, 5, 2)), ValueError, r"gather must be in \[0, 5\), got 5"),
    (dict(gather=int32(0, -1, 4, 2)), ValueError, r"gather must be in \[0, 5\), got -1"),
    (dict(row_scale=torch.ones(4)), ValueError, r"row_scale must have shape \(5,\), got \(4,\)"),
    (dict(row_scale=torch.ones(5).half()), TypeError, "row_scale must have dtype float32, got float16"),
    (dict(out_dtype=torch.int32), ValueError, "out_dtype must be one of .* got torch.int32"),
    (dict(out=torch.ones(5, 3)), ValueError, r"out must have shape \(5, 4\), got \(5, 3\)"),
    (dict(out=torch.ones(5, 4).half()), TypeError, "out must have dtype float32, got float16"),
    (dict(out=torch.ones(5, 4), b=torch.ones(3, 4, 8, requires_grad=True)), ValueError, "out must be None where"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.grouped_gemm(**good() | change)


def test_nothing_is_written_on_error():
    out = torch.full((5, 4), 3.0)
    with pytest.raises(ValueError, match="offs must end"):
        hybrid_ops.grouped_gemm(**good() | dict(offs=int32(1, 1, 9)), out=out)
    assert out.eq(3).all()


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from hybrid_ops.triton_kernels import grouped_gemm as kernels
    from hybrid_ops.triton_kernels import grouped_gemm_bwd as backward

    from .triton_targets import check, compiling_for

    def launch(dtype, rows, activation=None, transposed=False, gathered=False, wgrad=False, n=1856):
        """Nemotron 3 Nano's expert, of which 4; tensors on the CPU."""
        k, experts = 2688, 4
        a = torch.empty(rows, k, dtype=dtype)
        offs, gather = torch.zeros(experts, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        gather = gather if gathered else None
        out = torch.empty(rows, n, dtype=dtype)
        if wgrad:
            backward.grouped_gemm_wgrad(out, a, offs, gather, torch.empty(experts, n, k, dtype=dtype))
            return
        b = torch.empty(experts, k, 2 * n if activation == "silu_gated" else n, dtype=dtype).transpose(1, 2)
        b = b if transposed else b.contiguous()
        kernels.grouped_gemm(a, b, offs, gather, None, out, None, activation, False)

    with compiling_for(sm, monkeypatch) as compiled:
        for rows in (8, 64, 200, 1024):  # each height of tiles
            launch(torch.bfloat16, rows, activation="relu2", gathered=True)
        launch(torch.bfloat16, 1024, activation="silu_gated", gathered=True)
        launch(torch.bfloat16, 1024, transposed=True)
        launch(torch.bfloat16, 1024, transposed=True, n=2048)  # without masks
        launch(torch.bfloat16, 1024, gathered=True, wgrad=True)
        wide = list(compiled)
        one = torch.empty(1, 1, 1).bfloat16()
        kernels.grouped_gemm(one[0], one, torch.zeros(1).int(), None, None, one[0], None, None, False)
        values, index = torch.empty(6, 64).bfloat16(), torch.zeros(6, dtype=torch.int32)
        backward.index_sum(values, index, None, torch.empty(4, 64).bfloat16(), 1, 1.0)
        for activation, width in (("relu2", 64), ("silu_gated", 128), (None, 64)):
            h, scale = torch.empty(6, width).bfloat16(), torch.empty(6)
            backward.preact_grad(values, h, scale, h, torch.empty_like(h), torch.empty(6), activation)
        if sm in (90, 100):
            launch(torch.float16, 1024, transposed=True)
            launch(torch.float32, 1024, activation="relu2", gathered=True)
            launch(torch.float32, 1024, wgrad=True)
    check(compiled, sm)
    for kernel in wide:  # what runs in the loop is copied 16 bytes at a time
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
        assert "ld.global.b16" not in kernel.asm["ptx"]
    if sm == 90:  # the tensor cores' own instruction, and nothing kept in local memory
        large = [k for k in compiled if "wgmma.mma_async.sync.aligned.m64n256k16" in k.asm["ptx"]]
        assert len(large) >= 4


def test_opcheck():
    a, b, offs = torch.randn(6, 12), torch.randn(3, 8, 12), int32(2, 2, 5)
    gather, scale = int32(0, 5, 2, 2, 1, 0), torch.rand(6)
    ops = torch.ops.hybrid_ops
    y, h = torch.empty(6, 8), torch.empty(6, 8)
    forward = ops.grouped_gemm_fwd.default
    torch.library.opcheck(forward, (a, b, offs, gather, scale, y, h, "relu2", False, "torch"))
    torch.library.opcheck(forward, (a, b, offs, None, None, y, None, None, True, "torch"))
    torch.library.opcheck(ops.grouped_gemm_wgrad.default, (y, a, offs, gather, torch.empty(3, 8, 12), "torch"))
    gradient = ops.grouped_gemm_preact_grad.default
    torch.library.opcheck(gradient, (y, h, scale, h, torch.empty(6, 8), torch.empty(6), "relu2", "torch"))
    torch.library.opcheck(gradient, (y, None, scale, None, torch.empty(6, 8), None, None, "torch"))
    weights = torch.rand(6)
    torch.library.opcheck(ops.index_sum.default, (a[:3], gather, weights, torch.empty(6, 12), 2, 2.5, "torch"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def layer(a, b, scale):
        offs = torch.tensor([2, 2, 4], dtype=torch.int32)
        h = hybrid_ops.grouped_gemm(a, b, offs, activation="relu2", row_scale=scale)
        return hybrid_ops.grouped_gemm(h, b.transpose(1, 2), offs) + a

    compile_once(layer, backend, lambda n: (torch.randn(n, 12), torch.randn(3, 8, 12), torch.rand(n)))


def test_explain():
    choice = hybrid_ops.explain("grouped_gemm", device="cpu")
    assert choice.impl == "torch"


def test_float64():
    case = PLAIN | dict(dtype=torch.float64, row_scale=False, return_preact=False)
    (a, b, offs), options = grouped_problem(case)
    y = hybrid_ops.grouped_gemm(a, b, offs, **options)
    assert y.dtype == torch.float64
    expected = torch.cat([a[:5] @ b[0].T, a[5:14] @ b[2].T, a[14:18] @ b[3].T, torch.zeros(3, 24).double()])
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)  # float64, in another order; float32 is off by 1e-7


CONFIGS = [  # heights of tiles that the sizes of these tests would not choose, and turns of one or two row tiles
    (16, 32, 16, 1), (32, 16, 32, 2), (64, 64, 32, 1), (128, 32, 64, 8),
]  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("blocks", CONFIGS)
@pytest.mark.parametrize("activation", ["relu2", "silu_gated"])
def test_every_shape_of_tiles(blocks, activation):
    from hybrid_ops.triton_kernels import grouped_gemm as kernels

    case = PLAIN | dict(dtype=torch.float16, sizes=[0, 40, 1, 0, 33, 34], N=40, K=20, activation=activation)
    case |= dict(gather=True, b_layout="transposed")

    def run(a, b, offs, *, return_preact, out_dtype, batch_invariant, gather, row_scale, activation):
        rows, width = len(gather), b.shape[1]
        y, h = torch.full((rows, case["N"]), float("nan")).half(), torch.full((rows, width), float("nan")).half()
        chosen = kernels.Config(*blocks, num_warps=4, num_stages=1, programs_per_sm=1)
        kernels.grouped_gemm(a, b, offs, gather, row_scale, y, h, activation, False, chosen)
        return y, h

    check_grouped(case, run)


def test_config_is_wide_enough_and_fits():
    """Of one token to very many, for each model's expert: no tile is wider than it may be, none empty."""
    from hybrid_ops.triton_kernels import grouped_gemm as kernels

    for experts, n, k in ((128, 1856, 2688), (512, 2688, 1024), (1, 3712, 2688), (1, 1, 1)):
        for rows in (1, 6, 64, 384, 6144, 49152, 10**6):
            for arch in (80, 89, 90, 100, 120):
                c = kernels.config(rows, experts, n, k, 2, False, arch, False)
                assert 16 <= c.BLOCK_M <= 128
                assert 32 <= c.BLOCK_N <= 256
                invariant = kernels.config(rows, experts, n, k, 2, False, arch, True)
                assert invariant == kernels.config(1, experts, n, k, 2, False, arch, True)
    assert kernels.config(64, 1, 3712, 2688, 2, False, 90, False).BLOCK_N == 32  # 116 tiles of one expert
