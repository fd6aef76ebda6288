import doctest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import hybrid_ops

from .conv1d_cases import (
    CPU_DTYPES,
    INTERPRETER_DTYPES,
    PLAIN,
    Problem,
    cases,
    check_conv1d,
    check_pool,
    for_cuda,
    implementation,
)


@given(case=cases(CPU_DTYPES))
def test_conv1d(case):
    check_conv1d(case, implementation("torch"))


@given(case=cases(CPU_DTYPES))
def test_conv1d_pool(case):
    check_pool(case, implementation("torch"))


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES))
def test_conv1d_interpreter(case):
    check_conv1d(case, implementation("triton"))


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES))
def test_conv1d_pool_interpreter(case):
    check_pool(case, implementation("triton"))


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(1, 300)))
def test_conv1d_gpu(case):
    check_conv1d(case, implementation("triton"), "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(1, 300)))
def test_conv1d_pool_gpu(case):
    check_pool(case, implementation("triton"), "cuda")


@pytest.mark.gpu
@settings(max_examples=10)
@given(case=cases(CPU_DTYPES, dims=(1, 64), widths=(2, 4)))
def test_conv1d_auto_gpu(case):
    """Whatever `auto` picks: dim a multiple of 4 is what the CUDA kernel takes."""
    case = case | dict(dim=8 * (1 + case["dim"] // 8))
    check_conv1d(case, implementation("auto"), "cuda")
    check_pool(case, implementation("auto"), "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(1, 300), widths=(2, 4)))
def test_conv1d_cuda_gpu(case):
    check_conv1d(for_cuda(case), implementation("cuda"), "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, max_seqlen=150, dims=(1, 300), widths=(2, 4)))
def test_conv1d_pool_cuda_gpu(case):
    check_pool(for_cuda(case), implementation("cuda"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen", [1, 17, 5000])
def test_conv1d_cuda_same_bits_gpu(seqlen):
    """Wherever tiles begin: packed and by itself, a sequence has the same bits."""
    for_cuda(PLAIN)
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3 * seqlen, 64).to("cuda", torch.bfloat16), torch.randn(64, 4).to("cuda")
    bounds = torch.tensor([0, seqlen, seqlen, 3 * seqlen], dtype=torch.int32, device="cuda")
    packed = hybrid_ops.causal_conv1d(x, weight, activation="silu", cu_seqlens=bounds, impl="cuda")
    for piece in (slice(0, seqlen), slice(seqlen, 3 * seqlen)):
        alone = hybrid_ops.causal_conv1d(x[:, piece], weight, activation="silu", impl="cuda")
        assert torch.equal(packed[:, piece], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("nseq", [31, 32, 1024, 5000])
def test_conv1d_cuda_of_many_sequences_gpu(nseq):
    """Boundaries are found 32 at a time; empty sequences, and a tail that belongs to none."""
    for_cuda(PLAIN)
    torch.manual_seed(0)
    seqlen = 2 * nseq + 7
    x, weight = torch.randn(1, seqlen, 16), torch.randn(16, 4)
    bounds = torch.randint(0, seqlen - 3, (nseq + 1,)).sort()[0].int()
    x[:, : bounds[0]] = x[:, bounds[-1] :] = float("nan")
    x, weight, bounds = (t.to("cuda") for t in (x, weight, bounds))
    dy, results = torch.randn_like(x), []
    for impl in ("cuda", "torch"):
        y = hybrid_ops.causal_conv1d(x, weight, cu_seqlens=bounds, impl=impl)
        dx, dweight = torch.full_like(x, float("nan")), torch.full_like(weight, float("nan"))
        gradients = (dx, dweight, None, None)
        torch.ops.hybrid_ops.conv1d_bwd(dy, None, x, weight, None, None, None, bounds, *gradients, False, impl)
        results.append((y, dx, dweight))
    for got, expected in zip(*results, strict=True):  # both in float32; dweight's sums have up to seqlen products
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_conv1d_cuda_of_many_rows_gpu():
    """More tiles than a grid has in one dimension."""
    for_cuda(PLAIN)
    x = torch.randn(70001, 5, 8, device="cuda")
    weight = torch.randn(8, 4, device="cuda")
    results = []
    for impl in ("cuda", "torch"):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = hybrid_ops.causal_conv1d(*leaves, impl=impl)
        results.append((y, *torch.autograd.grad(y, leaves, x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)  # sums of 350 000 products of about 1


@pytest.mark.gpu
def test_conv1d_cuda_past_2_to_31_gpu():
    """Row times stride in 64 bits: the last rows of a tensor of more than 2^31 elements."""
    for_cuda(PLAIN)
    wide, tail = 18560, 64
    seqlen = 2**31 // wide + tail
    x = torch.empty(1, seqlen, wide, dtype=torch.bfloat16, device="cuda")[..., 8192:18432]
    x[:, -2 * tail :] = torch.randn(2 * tail, x.shape[2], device="cuda")
    weight = torch.randn(x.shape[2], 4, device="cuda")
    y = hybrid_ops.causal_conv1d(x, weight, impl="cuda")
    expected = hybrid_ops.causal_conv1d(x[:, -2 * tail :], weight, impl="torch")
    torch.testing.assert_close(y[:, -tail:], expected[:, -tail:], rtol=0.01, atol=1e-3)  # one ulp of bfloat16


@pytest.mark.gpu
def test_bad_values_cuda_gpu():
    for_cuda(PLAIN)
    check_bad_values("cuda", "cuda")


# --- properties that need no reference


def check_pieces(impl, cuts, device="cpu"):
    """A prompt read at once or in pieces, through one pool: the same bits."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 12).to(device, torch.float16)
    weight, bias = torch.randn(12, 4).to(x), torch.randn(12).to(x)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)

    def read(pieces):
        pool = torch.zeros(3, 12, 5).to(x)
        y = [
            hybrid_ops.causal_conv1d(
                piece, weight, bias, activation="silu", conv_state=pool, read_slots=slots, write_slots=slots, impl=impl
            )
            for piece in x.split(pieces, 1)
        ]
        return torch.cat(y, 1), pool

    whole, pool = read([40])
    assert torch.equal(whole, hybrid_ops.causal_conv1d(x, weight, bias, activation="silu", impl=impl))
    assert torch.equal(pool[slots.long()], x[:, -5:].transpose(1, 2))
    assert not pool[1].any()
    for pieces in cuts:
        y, state = read(pieces)
        assert torch.equal(y, whole), pieces
        assert torch.equal(state, pool), pieces


def test_pieces():
    check_pieces("torch", [[33, 7], [1] * 40])


@pytest.mark.interpreter
def test_pieces_interpreter():
    check_pieces("triton", [[33, 7], [1, 2, 3, 34]])


@pytest.mark.gpu
def test_pieces_gpu():
    check_pieces("triton", [[33, 7], [1, 2, 3, 34], [1] * 40], "cuda")


def check_same_bits(impl, device="cpu"):
    problem = Problem(PLAIN | dict(form="cu_seqlens", dtype=torch.float32, dim=40), device)
    runs = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
        y = hybrid_ops.causal_conv1d(*leaves, impl=impl, **problem.sequences)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_same_bits():
    check_same_bits("torch")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_same_bits_gpu(impl):
    for_cuda(PLAIN)
    check_same_bits(impl, "cuda")


def test_padding_hides_nan():
    """What is padding in x never reaches a result or a gradient."""
    x = torch.randn(1, 6, 2)
    x[0, [0, 3]] = float("nan")
    x.requires_grad_()
    weight = torch.randn(2, 4, requires_grad=True)
    seq_idx = torch.tensor([[-1, 0, 0, -1, 0, 1]], dtype=torch.int32)
    y = hybrid_ops.causal_conv1d(x, weight, activation="silu", seq_idx=seq_idx)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert not y[0, [0, 3]].any()
    assert not dx[0, [0, 3]].any()


def test_out_and_dtypes():
    x, weight = torch.randn(2, 5, 6).bfloat16(), torch.randn(6, 3)
    out = torch.full((6, 2, 5), float("nan")).bfloat16().permute(1, 2, 0)
    assert hybrid_ops.causal_conv1d(x, weight, out=out) is out
    torch.testing.assert_close(out, hybrid_ops.causal_conv1d(x, weight), rtol=0, atol=0)
    _, final = hybrid_ops.causal_conv1d(x, weight, initial_states=torch.zeros(2, 6, 2), return_final_states=True)
    assert final.dtype == torch.float32


def call_op(x, pool, read, write, cu_seqlens, impl):
    """The operator itself, past the checks that read values: what a GPU does with values that nobody read."""
    y = torch.full_like(x, float("nan"))
    weight = torch.ones(x.shape[2], 3).to(x)
    torch.ops.hybrid_ops.conv1d_fwd(
        x, weight, None, None, None, cu_seqlens, read, write, y, None, pool, False, -1, impl
    )
    return y


def check_bad_values(impl, device="cpu"):
    """Slots out of range read zeros and write nothing; boundaries out of range stay inside x, and y has no hole."""
    x = torch.ones(2, 4, 8, device=device)
    pool = torch.full((2, 8, 2), 10.0, device=device)
    slots = torch.tensor([7, -5], dtype=torch.int32, device=device)
    y = call_op(x, pool, slots, slots, None, impl)
    torch.testing.assert_close(y[0, :, 0].cpu(), torch.tensor([1.0, 2, 3, 3]))
    assert (pool == 10).all()
    slots = torch.tensor([7, 1], dtype=torch.int32, device=device)
    y = call_op(x, pool, slots, slots, None, impl)
    torch.testing.assert_close(y[:, :, 0].cpu(), torch.tensor([[1.0, 2, 3, 3], [21, 12, 3, 3]]))
    assert (pool[0] == 10).all()
    assert (pool[1] == 1).all()
    assert (call_op(x, pool[:0], slots, slots, None, impl)[:, 0] == 1).all()
    for bounds, total in (([0, 2, 3], 3), ([1, 3, 99], 3), ([-4, 2, 4], 4), ([5, 9, 99], 0)):
        slots = torch.tensor([0, 1], dtype=torch.int32, device=device)
        y = call_op(x[:1], pool.clone(), None, slots, torch.tensor(bounds, dtype=torch.int32, device=device), impl)
        assert y.isfinite().all(), bounds
        assert (y[0, :, 0] != 0).sum() == total, bounds


def test_bad_values():
    check_bad_values("torch")


@pytest.mark.interpreter
def test_bad_values_interpreter():
    check_bad_values("triton")


@pytest.mark.gpu
def test_bad_values_gpu():
    check_bad_values("triton", "cuda")


INDEX = torch.tensor([0, 1], dtype=torch.int32)
POOL = dict(conv_state=torch.zeros(4, 8, 3), read_slots=INDEX)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.randn(5, 8)), ValueError, r"x must have shape \(batch, seqlen, dim\), got \(5, 8\)"),
        (dict(x=torch.ones(2, 5, 8).int()), TypeError, "x must have dtype float32 or .*, got int32"),
        (dict(weight=torch.ones(8)), ValueError, r"weight must have shape \(dim, width\), got \(8,\)"),
        (dict(weight=torch.ones(7, 4)), ValueError, r"weight must have shape \(8, \*\), got \(7, 4\)"),
        (dict(weight=torch.ones(8, 9)), ValueError, r"with width from 1 to 8, got \(8, 9\)"),
        (dict(weight=torch.ones(8, 4, device="meta")), ValueError, "weight must be on cpu, got meta"),
        (dict(bias=torch.ones(4)), ValueError, r"bias must have shape \(8,\), got \(4,\)"),
        (dict(activation="relu"), ValueError, "activation must be one of None, 'silu', got 'relu'"),
        (dict(initial_states=torch.ones(2, 8, 4)), ValueError, r"initial_states must have shape \(2, 8, 3\), got"),
        (dict(seq_idx=torch.zeros(2, 5).long()), TypeError, "seq_idx must have dtype int32, got int64"),
        (dict(seq_idx=INDEX), ValueError, r"seq_idx must have shape \(2, 5\), got \(2,\)"),
        (dict(cu_seqlens=INDEX, seq_idx=INDEX), ValueError, "at most one of cu_seqlens, seq_idx may be given"),
        (dict(cu_seqlens=INDEX), ValueError, r"x must have shape \(1, total, dim\) with cu_seqlens, got \(2, 5, 8\)"),
        (dict(x=torch.ones(1, 5, 8), cu_seqlens=INDEX), ValueError, "cu_seqlens must end at .* 5, got 1"),
        (dict(conv_state=torch.zeros(4, 8, 3)), ValueError, "read_slots or write_slots must be given with conv_state"),
        (dict(read_slots=INDEX), ValueError, "conv_state must be given with read_slots and write_slots, got None"),
        (POOL | dict(conv_state=torch.zeros(4, 8, 2)), ValueError, r"at least width - 1 = 3\), got \(4, 8, 2\)"),
        (POOL | dict(conv_state=torch.zeros(4, 7, 3)), ValueError, r"conv_state must have shape \(\*, 8, \*\), got"),
        (POOL | dict(read_slots=INDEX + 3), ValueError, r"read_slots must be in \[0, 4\) or null_slot=-1, got 4"),
        (POOL | dict(read_slots=INDEX[:1]), ValueError, r"read_slots must have shape \(2,\), got \(1,\)"),
        (POOL | dict(write_slots=INDEX * 0), ValueError, r"write_slots must be distinct, got \[0, 0\]"),
        (
            POOL | dict(write_slots=INDEX + 1),
            ValueError,
            "write_slots must not hold another sequence's read slot, got 1",
        ),
        (POOL | dict(initial_states=torch.ones(2, 8, 3)), ValueError, "at most one of conv_state, initial_states"),
        (POOL | dict(return_final_states=True), ValueError, "return_final_states must be False with conv_state"),
        (POOL | dict(bias=torch.ones(8, requires_grad=True)), ValueError, "conv_state must be None where a gradient"),
        (dict(out=torch.ones(2, 8, 5)), ValueError, r"out must have shape \(2, 5, 8\), got \(2, 8, 5\)"),
        (dict(out=torch.ones(2, 5, 8).half()), TypeError, "out must have dtype float32, got float16"),
        (dict(impl="fast"), ValueError, "impl must be one of 'auto', 'cuda', 'triton', 'torch', got 'fast'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.randn(2, 5, 8), weight=torch.ones(8, 4)) | change
    before = arguments["conv_state"].clone() if "conv_state" in arguments else None
    with pytest.raises(error, match=message):
        hybrid_ops.causal_conv1d(arguments.pop("x"), arguments.pop("weight"), **arguments)
    assert before is None or torch.equal(arguments["conv_state"], before)


def test_out_must_not_be_x():
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="out must not be x's memory"):
        hybrid_ops.causal_conv1d(x, torch.ones(8, 4), out=x)


def test_named_implementation_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors"):
        hybrid_ops.causal_conv1d(torch.randn(2, 5, 8), torch.ones(8, 4), impl="triton")
    with pytest.raises(RuntimeError, match="impl='cuda' needs CUDA tensors"):
        hybrid_ops.causal_conv1d(torch.randn(2, 5, 8), torch.ones(8, 4), impl="cuda")


def test_explain():
    assert hybrid_ops.explain("causal_conv1d", device="cpu").impl == "torch"


# --- compilation


def launch(dtype, width, form, channel_last):
    """As a layer calls it: no state, packed with a pool, or padded with states; CPU tensors, for `compiling_for`."""
    from hybrid_ops.triton_kernels import conv1d as kernels

    x = torch.empty(1, 100, 10240, dtype=dtype)
    if not channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = torch.empty(10240, width, dtype=dtype), torch.empty(10240, dtype=dtype)
    history = state = read = write = cu_seqlens = order = None
    if form == "pool":
        history = state = torch.empty(8, 10240, width + 1, dtype=dtype)
        read = write = torch.empty(3, dtype=torch.int32)
        cu_seqlens = torch.empty(4, dtype=torch.int32)
    elif form == "seq_idx":
        from hybrid_ops._torch.conv1d import order_of

        history, state = torch.empty(1, 10240, width - 1, dtype=dtype), torch.empty(1, 10240, width - 1, dtype=dtype)
        order = order_of(torch.zeros(1, 100, dtype=torch.int32))[:3]
    y = torch.empty_like(x)
    kernels.conv1d(x, weight, bias, y, history, state, read, write, cu_seqlens, order, True, -1)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        launch(torch.bfloat16, 4, "pool", True)
        if sm in (90, 100):
            launch(torch.float32, 4, "dense", True)
            launch(torch.float16, 8, "seq_idx", False)
    check(compiled, sm)


def test_opcheck():
    op = torch.ops.hybrid_ops.conv1d_fwd.default
    x, weight, bias = torch.randn(2, 6, 4).transpose(1, 2), torch.randn(6, 4), torch.randn(6)
    initial, final, y = torch.randn(2, 6, 3), torch.empty(2, 6, 3), torch.empty(2, 4, 6)
    seq_idx = torch.tensor([[0, 0, 1, 1], [-1, 0, 0, 0]], dtype=torch.int32)
    torch.library.opcheck(op, (x, weight, bias, initial, seq_idx, None, None, None, y, final, None, True, -1, "torch"))
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    pool = torch.randn(4, 6, 5)
    torch.library.opcheck(
        op, (x[:1], weight, None, None, None, cu_seqlens, INDEX, INDEX, y[:1], None, pool, False, -1, "torch")
    )


def channel_first_layer(x, weight, bias, initial_states):
    y, final = hybrid_ops.causal_conv1d(
        x.transpose(1, 2), weight, bias, initial_states=initial_states, return_final_states=True
    )
    return y * final.sum()


def packed_layer(x, weight, initial_states, cu_seqlens):
    y, final = hybrid_ops.causal_conv1d(
        x, weight, activation="silu", initial_states=initial_states, cu_seqlens=cu_seqlens, return_final_states=True
    )
    return y * final.sum()


def padded_layer(x, weight, seq_idx):
    return hybrid_ops.causal_conv1d(x, weight, activation="silu", seq_idx=seq_idx)


LAYERS = {
    channel_first_layer: lambda n: (torch.randn(2, 6, n), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)),
    packed_layer: lambda n: (
        torch.randn(1, n, 6),
        torch.randn(6, 4),
        torch.randn(3, 6, 3),
        torch.tensor([0, n // 2, n // 2, n], dtype=torch.int32),
    ),
    padded_layer: lambda n: (torch.randn(2, n, 6), torch.randn(6, 4), (torch.arange(2 * n).view(2, n) // 3 - 1).int()),
}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_torch_compile(layer, compile_once):
    compile_once(layer, "aot_eager", LAYERS[layer])


def test_torch_compile_inductor(compile_once):
    compile_once(packed_layer, "inductor", LAYERS[packed_layer])


def test_documented_examples():
    page = Path(__file__).parent.parent / "docs" / "conv1d.md"
    names = dict(hybrid_ops=hybrid_ops, torch=torch)
    results = [doctest.testfile(str(page), module_relative=False, globs=dict(names))]
    for example in doctest.DocTestFinder(recurse=False).find(hybrid_ops.causal_conv1d, "causal_conv1d", globs=names):
        results.append(doctest.DocTestRunner().run(example))
    assert sum(result.attempted for result in results) >= 10
    assert not any(result.failed for result in results)


# --- what only a GPU can show


@pytest.mark.gpu
def test_cuda_graph():
    """Replayed with other tokens, boundaries, slots and states: nothing was decided on the host."""
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 4, device="cuda").bfloat16(), torch.randn(64, device="cuda").bfloat16()
    x, out = torch.randn(1, 100, 64, device="cuda").bfloat16(), torch.empty(1, 100, 64, device="cuda").bfloat16()
    pool = torch.randn(6, 64, 5, device="cuda").bfloat16()
    bounds, slots = torch.tensor([0, 10, 10, 100]).int().cuda(), torch.tensor([1, 2, 3]).int().cuda()
    seq_idx = torch.zeros(1, 100, dtype=torch.int32, device="cuda")

    def step(x, pool, bounds, slots, seq_idx, out):
        hybrid_ops.causal_conv1d(
            x, weight, bias, cu_seqlens=bounds, conv_state=pool, read_slots=slots, write_slots=slots, out=out
        )
        return hybrid_ops.causal_conv1d(out, weight, bias, activation="silu", seq_idx=seq_idx)

    step(x, pool.clone(), bounds, slots, seq_idx, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x, pool, bounds, slots, seq_idx, out)
    for boundaries, rows in (([0, 1, 50, 100], [5, 0, -1]), ([0, 0, 0, 100], [0, 1, 2])):
        x.normal_()
        pool.normal_()
        bounds.copy_(torch.tensor(boundaries))
        slots.copy_(torch.tensor(rows))
        seq_idx.copy_((torch.arange(100) // 7 - 1)[None])
        expected_pool = pool.clone()
        expected = step(x, expected_pool, bounds, slots, seq_idx, torch.empty_like(out))
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(pool, expected_pool)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "cu_seqlens", "seq_idx"])
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_no_host_sync(form, impl):
    problem = Problem(PLAIN | dict(form=form), "cuda")
    leaves = [t.detach().requires_grad_() for t in (problem.x, problem.weight, problem.bias, problem.initial_states)]
    pool, slots = torch.zeros(9, 8, 3, device="cuda"), torch.arange(problem.nseq).int().cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, final = hybrid_ops.causal_conv1d(
            *leaves[:3], initial_states=leaves[3], return_final_states=True, impl=impl, **problem.sequences
        )
        torch.autograd.grad(y.sum() + final.sum(), leaves)
        with torch.no_grad():
            hybrid_ops.causal_conv1d(
                *leaves[:3], conv_state=pool, read_slots=slots, write_slots=slots, impl=impl, **problem.sequences
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channel_last", "channel_first"])
def test_more_than_2_31_elements(layout):
    """The last tokens of a huge tensor are those of a small problem that starts from the tokens before them."""
    dim, seqlen, tail = 18560, 117_000, 1000
    assert dim * seqlen > 2**31
    shape = (1, seqlen, dim) if layout == "channel_last" else (1, dim, seqlen)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = x if layout == "channel_last" else x.transpose(1, 2)
    weight, bias = torch.randn(dim, 4, device="cuda"), torch.randn(dim, device="cuda")
    y, final = hybrid_ops.causal_conv1d(x, weight, bias, return_final_states=True, impl="triton")
    expected, expected_final = hybrid_ops.causal_conv1d(
        x[:, -tail:],
        weight,
        bias,
        initial_states=x[:, -tail - 3 : -tail].transpose(1, 2),
        return_final_states=True,
        impl="torch",
    )
    torch.testing.assert_close(y[:, -tail:], expected)
    assert torch.equal(final, expected_final)
    torch.testing.assert_close(y[:, :tail], hybrid_ops.causal_conv1d(x[:, :tail], weight, bias, impl="torch"))
