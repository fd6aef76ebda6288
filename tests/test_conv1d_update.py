import doctest
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops._csrc import conv1d_update as csrc
from hybrid_ops.reference import conv1d_update as reference

from .budget import assert_within, round_to, to_numpy
from .tensors import int32, to_device

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16
NULL = 3  # a row of the pool that stands for padding, where slots are given


@st.composite
def cases(draw, dtypes, dims=(1, 8, 24), max_batch=4):
    # one draw seeds the rest: drawn one by one, choices repeat from example to example, and ragged batches went missing
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    batch = choose([0, 1, 2, max_batch, max_batch])
    form = choose(["single", "tokens", "packed", "packed"])
    T = choose([0, 1, 2, 6])
    spare = choose(range(5))
    return dict(
        seed=choose(range(2**31)),
        dtype=choose(dtypes),
        state_dtype=choose(dtypes),
        weight_dtype=choose(dtypes),
        form=form,
        lengths={
            "single": [1] * batch,
            "tokens": [T] * batch,
            "packed": [choose([0, 1, 2, 5]) for _ in range(batch)],
        }[form],
        T=T,
        dim=choose(dims),
        width=choose(range(1, 9)),
        spare=spare,
        rollback=choose([None, [choose(range(spare + 1)) for _ in range(batch)]]),
        slots=choose([None, "distinct", "padded"]),
        bias=choose([False, True]),
        activation=choose([None, "silu"]),
        strided=choose([False, True]),
        pool=choose(["contiguous", "channel-last", "slice"]),
        out=choose([None, "fresh", "strided", "x"]),
        scale=choose([1e-2, 1.0, 1e2]),
    )


def problem(case):
    """Positional arguments and options, on the CPU. A single channel has no neighbours to hide its cancellation
    behind, so its values are positive."""
    generator = torch.Generator().manual_seed(case["seed"])
    lengths, dim, width = case["lengths"], case["dim"], case["width"]
    batch, nslots, state_len = len(lengths), len(lengths) + 5, width - 1 + case["spare"]
    tokens = {"single": (batch,), "tokens": (batch, case["T"]), "packed": (sum(lengths),)}[case["form"]]

    def randn(*shape):
        values = torch.randn(*shape, generator=generator)
        return values.abs() if dim < 8 else values

    wide = case.get("offset", 9) if case["strided"] else 0
    x = (randn(*tokens, dim + wide) * case["scale"]).to(case["dtype"])[..., wide:]
    shape = {"contiguous": (nslots, dim, state_len), "channel-last": (nslots, state_len, dim)}
    state = (randn(*shape.get(case["pool"], (nslots, 2 * dim, state_len + 1))) * case["scale"]).to(case["state_dtype"])
    if case["pool"] == "channel-last":
        state = state.transpose(1, 2)
    elif case["pool"] == "slice":
        state = state[:, 1 : 2 * dim : 2, 1:]
    options = dict(activation=case["activation"])
    if case["slots"]:
        free = torch.tensor([s for s in range(nslots) if s != NULL])
        slots = free[torch.randperm(len(free), generator=generator)[:batch]].int()
        if case["slots"] == "padded":
            slots[::2] = NULL
        options |= dict(slots=slots, null_slot=NULL)
    if case["rollback"] is not None:
        options["rollback"] = torch.tensor(case["rollback"], dtype=torch.int32)
    if case["form"] == "packed":
        options["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    bias = randn(dim).to(case["weight_dtype"]) if case["bias"] else None
    return (x, state, randn(dim, width).to(case["weight_dtype"]), bias), options


def oracle(arguments, options, dtype, **more):
    as_array = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return reference.causal_conv1d_update(*(to_numpy(a, dtype) for a in arguments), dtype=dtype, **as_array, **more)


def assert_conv_within(name, y, ref, base, dtype):
    """Per group of 8 channels, or 4, or all of a few."""
    dim = ref.shape[-1]
    size = dim if dim < 8 else math.gcd(dim, 8)
    groups = (*ref.shape[:-1], dim // size, size)
    assert_within(name, y.reshape(groups), ref.reshape(groups), base.reshape(groups), dtype, axis=-2)


def check_update(case, impl, device="cpu"):
    arguments, options = problem(case)
    ref, pool = oracle(arguments, options, np.float64, round_state=lambda c: round_to(c, case["state_dtype"]))
    base, _ = oracle(arguments, options, np.float32)

    x, state, weight, bias = (to_device(a, device) for a in arguments)
    out = {
        "fresh": lambda: torch.full_like(x, float("nan")),
        "strided": lambda: torch.full((*x.shape[:-1], 2 * case["dim"]), float("nan"), dtype=x.dtype, device=device)[
            ..., ::2
        ],
        "x": lambda: x,
    }.get(case["out"], lambda: None)()
    options = {k: to_device(v, device) for k, v in options.items()}
    y = hybrid_ops.causal_conv1d_update(x, state, weight, bias, out=out, impl=impl, **options)
    assert out is None or y is out
    assert_conv_within("y", y, ref, base, case["dtype"])
    np.testing.assert_array_equal(to_numpy(state), pool)


@given(case=cases(CPU_DTYPES))
def test_update(case):
    check_update(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=40)
@given(case=cases(INTERPRETER_DTYPES))
def test_update_interpreter(case):
    check_update(case, "triton")


@pytest.mark.gpu
@settings(max_examples=33)
@given(case=cases(CPU_DTYPES, dims=(1, 8, 24, 136, 520), max_batch=40))
def test_update_gpu(case):
    check_update(case, "triton", "cuda")


def for_cuda(case):
    """The nearest case that the CUDA kernel takes."""
    if hybrid_ops._device.extension_missing() is not None:
        pytest.skip("the CUDA extension is not built")
    batch = len(case["lengths"])
    taken = dict(form="single", lengths=[1] * batch, spare=0, rollback=None, width=2 + case["width"] % 3, offset=16)
    taken |= dict(state_dtype=case["dtype"], dim=4 * (1 + case["dim"] // 4))
    taken["pool"] = "channel-last" if case["pool"] == "channel-last" else "contiguous"
    taken["out"] = None if case["out"] == "strided" else case["out"]
    return case | taken


@pytest.mark.gpu
@settings(max_examples=40)
@given(case=cases(CPU_DTYPES, dims=(1, 24, 256, 520, 1100), max_batch=40))
def test_update_cuda_gpu(case):
    check_update(for_cuda(case), "cuda", "cuda")


def check_parameters_of_any_dtype(device):
    """Weights and bias of float32 or of 16 bits, the bias wherever it lies, beside x of each dtype and every width:
    what torch says of their values, and pools that hold the same bits. Some sequences are padding."""
    torch.manual_seed(0)
    dim, slots, inside = 268, int32(8, -1, 0, 2, 9, 1, 7).to(device), int32(8, -1, 0, 2, -1, 1, 7).to(device)
    for dtype, weight_dtype, bias_dtype in itertools.product(CPU_DTYPES, repeat=3):
        for width, layout in itertools.product((2, 3, 4), (0, 1)):
            shapes = ((7, dim), (dim, width), (dim + 1,), (9, width - 1, dim) if layout else (9, dim, width - 1))
            values = (torch.randn(*shape, device=device) for shape in shapes)
            kinds = (dtype, weight_dtype, bias_dtype, dtype)
            x, weight, bias, pool = (v.to(kind) for v, kind in zip(values, kinds, strict=True))
            bias, pool = bias[1:], pool.transpose(1, 2) if layout else pool
            expected_pool = pool.to(torch.float32, copy=True)  # its own: `float()` is the pool itself in float32
            exact = (x.float(), expected_pool, weight.float(), bias.float())
            expected = hybrid_ops.causal_conv1d_update(*exact, slots=inside, impl="torch")
            y = hybrid_ops.causal_conv1d_update(x, pool, weight, bias, slots=slots, impl="cuda")
            assert (y[[1, 4]] == 0).all()
            torch.testing.assert_close(y, expected.to(dtype))
            assert torch.equal(pool, expected_pool.to(dtype))


def test_what_the_cuda_kernel_takes():
    x, state, weight = torch.empty(3, 16), torch.empty(5, 16, 3), torch.empty(16, 4)

    def refusal(x=x, state=state, weight=weight, bias=None, rollback=None, cu_seqlens=None):
        return csrc.refusal(x, state, weight, bias, rollback, cu_seqlens, torch.empty(x.shape))

    assert refusal() is None
    assert refusal(state=torch.empty(5, 3, 16).transpose(1, 2)) is None
    assert refusal(state=torch.empty(5, 16, 1), weight=torch.empty(16, 2)) is None
    assert "one token" in refusal(x=torch.empty(3, 2, 16))
    assert "one token" in refusal(rollback=int32(0, 0, 0))
    assert "one dtype" in refusal(state=state.half())
    assert "width - 1 columns" in refusal(state=torch.empty(5, 16, 4))
    assert "contiguous weights" in refusal(weight=torch.empty(4, 16).T)
    assert "side by side" in refusal(state=torch.empty(5, 16, 4)[..., 1:])
    assert refusal(torch.empty(3, 12).half(), torch.empty(5, 12, 3).half(), torch.empty(12, 4)) is None
    assert "multiples of 4" in refusal(torch.empty(3, 18), torch.empty(5, 18, 3))
    assert "multiples of 4" in refusal(torch.empty(3, 17)[:, 1:])
    assert "begin at multiples" in refusal(torch.empty(49)[1:].view(3, 16))
    assert refusal(bias=torch.empty(17)[1:]) is None
    with pytest.raises(RuntimeError, match="widths 2 to 4"):
        hybrid_ops.explain("causal_conv1d_update", impl="cuda", width=5)


@pytest.mark.gpu
def test_parameters_of_any_dtype_cuda_gpu():
    for_cuda(dict(lengths=[], width=4, dim=8, dtype=None, pool=None, out=None))
    check_parameters_of_any_dtype("cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, dims=(8, 136)))
def test_update_torch_on_gpu(case):
    check_update(case, "torch", "cuda")


def check_speculation(impl, device="cpu"):
    """Drafts, rejections, and the next drafts: the same outputs as the accepted stream read token by token."""
    torch.manual_seed(0)
    batch, dim, width, drafts = 3, 24, 4, 4
    weight, stream = torch.randn(dim, width, device=device), torch.randn(batch, 30, dim, device=device)
    state, plain = (torch.zeros(batch, dim, n, device=device) for n in (width - 1 + drafts - 1, width - 1))
    expected = torch.stack(
        [hybrid_ops.causal_conv1d_update(stream[:, t], plain, weight, impl=impl) for t in range(30)], 1
    )
    position, rejected = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.int32)
    for step in range(6):
        accepted = torch.tensor([1 + (step + b) % drafts for b in range(batch)])
        x = torch.randn(batch, drafts, dim, device=device)  # what is rejected is noise
        for b in range(batch):
            x[b, : accepted[b]] = stream[b, position[b] : position[b] + accepted[b]]
        y = hybrid_ops.causal_conv1d_update(x, state, weight, rollback=rejected.to(device), impl=impl)
        for b in range(batch):
            here = slice(position[b], position[b] + accepted[b])
            torch.testing.assert_close(y[b, : accepted[b]], expected[b, here], rtol=0, atol=0)
        position, rejected = position + accepted, (drafts - accepted).int()


def test_speculation():
    check_speculation("torch")


@pytest.mark.interpreter
def test_speculation_interpreter():
    check_speculation("triton")


@pytest.mark.gpu
def test_speculation_gpu():
    check_speculation("triton", "cuda")


def check_bad_indices(device):
    """Values that the host cannot see are skipped or clamped: only the good sequence changes anything."""
    torch.manual_seed(0)
    batch, dim, width = 6, 40, 4
    x, pool, weight = (torch.randn(*s, device=device) for s in ((batch, 3, dim), (3, dim, 5), (dim, width)))
    before = pool.clone()
    slots = torch.tensor([-7, 2, 3, 2**31 - 1, -(2**31), 1], dtype=torch.int32, device=device)
    rollback = torch.tensor([1, 1, 1, 1, 1, 2**30], dtype=torch.int32, device=device)
    y = torch.full_like(x, float("nan"))
    op = torch.ops.hybrid_ops.causal_conv1d_update
    op(x, pool, weight, None, slots, rollback, None, y, False, -1, "triton")
    one = before[1:].clone()
    rows, most = torch.tensor([1, 0], dtype=torch.int32, device=device), torch.tensor([1, 2], device=device).int()
    expected = hybrid_ops.causal_conv1d_update(x[[1, 5]], one, weight, slots=rows, rollback=most, impl="torch")
    torch.testing.assert_close(y[[1, 5]], expected)
    torch.testing.assert_close(pool, torch.cat([before[:1], one]), rtol=0, atol=0)
    assert (y[[0, 2, 3, 4]] == 0).all()

    pool, flat = before.clone(), x.flatten(0, 1)
    cu_seqlens = torch.tensor([-5, 2, 1, 2**31 - 1], dtype=torch.int32, device=device)  # [0, 2), nothing, [1, 18)
    y = torch.full_like(flat, float("nan"))
    op(flat, pool, weight, None, None, None, cu_seqlens, y, False, -1, "triton")
    assert torch.isfinite(y).all()
    torch.testing.assert_close(pool[1], before[1], rtol=0, atol=0)
    cu_seqlens = torch.tensor([0, 2, 2, 7], dtype=torch.int32, device=device)  # padding behind the last sequence
    op(flat, pool, weight, None, None, None, cu_seqlens, y, False, -1, "triton")
    assert (y[7:] == 0).all()
    assert (y[:7] != 0).all()


@pytest.mark.interpreter
def test_bad_indices_interpreter():
    check_bad_indices("cpu")


@pytest.mark.gpu
def test_bad_indices_gpu():
    check_bad_indices("cuda")


@pytest.mark.gpu
def test_more_than_2_31_elements():
    dim, state_len = 4096, 4
    nslots = 2**31 // (dim * state_len) + 2
    pool = torch.zeros(nslots, dim, state_len, dtype=torch.bfloat16, device="cuda")
    x, weight = torch.randn(2, dim, device="cuda"), torch.randn(dim, 4, device="cuda")
    pool[-2:] = torch.randn(2, dim, state_len, device="cuda")
    small = pool[-2:].clone()
    slots = torch.tensor([nslots - 1, nslots - 2], dtype=torch.int32, device="cuda")
    y = hybrid_ops.causal_conv1d_update(x, pool, weight, slots=slots)
    few = torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    torch.testing.assert_close(y, hybrid_ops.causal_conv1d_update(x, small, weight, slots=few, impl="torch"))
    torch.testing.assert_close(pool[-2:], small, rtol=0, atol=0)
    assert not pool[0].any()


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    batch, dim = 4, 520
    x, pool, weight = (torch.randn(*s, device="cuda") for s in ((batch, 2, dim), (9, dim, 5), (dim, 4)))
    slots, rollback = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(2))
    slots.copy_(torch.arange(batch))
    hybrid_ops.causal_conv1d_update(x, pool, weight, slots=slots, rollback=rollback)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_ops.causal_conv1d_update(x, pool, weight, slots=slots, rollback=rollback)
    for step in range(3):
        x.normal_()
        slots.copy_(torch.tensor([step, 8, 5 + step % 2, -1 if step else 3]))
        rollback.copy_(torch.tensor([0, step, 2, 1]).clamp(max=2))
        twin = pool.clone()
        expected = hybrid_ops.causal_conv1d_update(x, twin, weight, slots=slots, rollback=rollback, impl="torch")
        graph.replay()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(pool, twin, rtol=0, atol=0)


GOOD = dict(x=torch.randn(2, 3, 8), conv_state=torch.zeros(4, 8, 5), weight=torch.randn(8, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.ones(8)), ValueError, r"x must have shape \(batch, dim\) or \(batch, T, dim\), got \(8,\)"),
        (dict(x=torch.ones(2, 8).int()), TypeError, "x must have dtype .* got int32"),
        (
            dict(cu_seqlens=int32(0, 2)),
            ValueError,
            r"x must have shape \(total, dim\) with cu_seqlens, got \(2, 3, 8\)",
        ),
        (dict(x=torch.ones(3, 8), cu_seqlens=int32(0, 2)), ValueError, "cu_seqlens must end at .* 3, got 2"),
        (dict(x=torch.ones(3, 8), cu_seqlens=int32(1, 3)), ValueError, "cu_seqlens must start at 0, got 1"),
        (dict(x=torch.ones(3, 8), cu_seqlens=int32(0, 2, 1, 3)), ValueError, "cu_seqlens must not fall"),
        (dict(weight=torch.ones(7, 4)), ValueError, r"weight must have shape \(8, \*\), got \(7, 4\)"),
        (dict(weight=torch.ones(8, 9)), ValueError, r"weight .* width from 1 to 8, got \(8, 9\)"),
        (dict(bias=torch.ones(7)), ValueError, r"bias must have shape \(8,\), got \(7,\)"),
        (dict(activation="relu"), ValueError, "activation must be one of None, 'silu', got 'relu'"),
        (
            dict(conv_state=torch.zeros(4, 7, 5)),
            ValueError,
            r"conv_state must have shape \(\*, 8, \*\), got \(4, 7, 5\)",
        ),
        (dict(conv_state=torch.zeros(4, 8, 2)), ValueError, r"conv_state .* at least width - 1 = 3\), got \(4, 8, 2\)"),
        (dict(conv_state=torch.zeros(1, 8, 5).expand(4, 8, 5)), ValueError, "conv_state must not have expanded"),
        (dict(conv_state=torch.zeros(4, 8, 5, device="meta")), ValueError, "conv_state must be on cpu, got meta"),
        (
            dict(conv_state=torch.zeros(1, 8, 5)),
            ValueError,
            r"conv_state must have a row for each of the 2 seq.*\(1, 8",
        ),
        (dict(slots=int32(0)), ValueError, r"slots must have shape \(2,\), got \(1,\)"),
        (dict(slots=torch.tensor([0, 1])), TypeError, "slots must have dtype int32, got int64"),
        (dict(slots=int32(0, 4)), ValueError, r"slots must be in \[0, 4\) or null_slot=-1, got 4"),
        (dict(slots=int32(1, 1)), ValueError, r"slots must be distinct, got \[1, 1\]"),
        (dict(rollback=int32(0)), ValueError, r"rollback must have shape \(2,\), got \(1,\)"),
        (dict(rollback=int32(0, 3)), ValueError, r"rollback must be in \[0, 2\], .* got 3"),
        (dict(rollback=int32(0, -1)), ValueError, r"rollback must be in \[0, 2\], .* got -1"),
        (dict(out=torch.ones(2, 8)), ValueError, r"out must have shape \(2, 3, 8\), got \(2, 8\)"),
        (dict(out=torch.ones(2, 3, 8).half()), TypeError, "out must have dtype float32, got float16"),
        (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
        (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
        (dict(weight=torch.ones(8, 4, requires_grad=True)), ValueError, "weight must not require a gradient"),
        (dict(x=torch.ones(2, 8, requires_grad=True)), ValueError, "x must not require a gradient"),
    ],
)
def test_bad_input(change, error, message):
    arguments = GOOD | change
    before = arguments["conv_state"].clone()
    with pytest.raises(error, match=message):
        hybrid_ops.causal_conv1d_update(**arguments)
    if before.device.type == "cpu":
        assert torch.equal(arguments["conv_state"], before)


def test_no_gradient_needed_under_no_grad():
    with torch.no_grad():
        hybrid_ops.causal_conv1d_update(torch.randn(2, 8), torch.zeros(2, 8, 3), torch.randn(8, 4, requires_grad=True))


def launch(dtype, dim, packed):
    from hybrid_ops.triton_kernels import conv1d_update as kernels

    x, state, weight = (torch.empty(*s, dtype=dtype) for s in ((8, dim), (9, dim, 4), (dim, 4)))
    index = torch.empty(9, dtype=torch.int32)
    if packed:
        kernels.causal_conv1d_update(x, state, weight, weight[:, 0], index[:8], index[:8], index, x, True, -1)
    else:
        x = x.unsqueeze(1)
        kernels.causal_conv1d_update(x, state[..., 1:], weight, None, None, None, None, x, True, -1)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        launch(torch.bfloat16, 10240, True)
        if sm in (90, 100):
            launch(torch.float16, 10240, False)
            launch(torch.float32, 10240, False)
    check(compiled, sm)


def test_opcheck():
    torch.manual_seed(0)
    op = torch.ops.hybrid_ops.causal_conv1d_update.default
    x, pool, weight, y = (torch.randn(*s) for s in ((5, 12), (6, 12, 6), (12, 4), (5, 12)))
    rollback = torch.ones(5, dtype=torch.int32)
    torch.library.opcheck(op, (x, pool, weight, None, None, rollback, None, y, True, -1, "torch"))
    slots, cu_seqlens = int32(4, 1), int32(0, 3, 5)
    torch.library.opcheck(op, (x, pool, weight, weight[:, 0], slots, None, cu_seqlens, y, False, 4, "torch"))


def compiled_step(x, pool, weight, bias, slots, rollback):
    y = hybrid_ops.causal_conv1d_update(x * 2, pool, weight, bias, activation="silu", slots=slots, rollback=rollback)
    return y + pool.sum()  # reads the pool after the update


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grow", ["batch", "T"])
def test_torch_compile(backend, grow, compile_once):
    if backend == "inductor" and grow == "T":
        pytest.skip("one graph of inductor is enough")

    def inputs(n):
        batch, T = (n, 3) if grow == "batch" else (4, n)
        slots = torch.randperm(20)[:batch].int()
        return (
            *(torch.randn(*s) for s in ((batch, T, 12), (20, 12, 6), (12, 4), (12,))),
            slots,
            torch.randint(0, 4, (batch,), dtype=torch.int32),
        )

    compile_once(compiled_step, backend, inputs, grads=(False,))


def compiled_packed_step(x, pool, weight, cu_seqlens):
    return hybrid_ops.causal_conv1d_update(x, pool, weight, cu_seqlens=cu_seqlens) * 2


def test_torch_compile_packed(compile_once):
    def inputs(n):
        return torch.randn(n, 12), torch.randn(4, 12, 3), torch.randn(12, 4), int32(0, 2, 2, n)

    compile_once(compiled_packed_step, "aot_eager", inputs, grads=(False,))


def test_explain():
    assert hybrid_ops.explain("causal_conv1d_update", device="cpu").impl == "torch"


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "conv1d_update.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    finder = doctest.DocTestFinder(recurse=False)
    for example in finder.find(hybrid_ops.causal_conv1d_update, globs=names):
        results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 2
    assert all(r.attempted and not r.failed for r in results), results
