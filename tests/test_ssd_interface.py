"""What `ssd_chunk_scan` promises beside numbers: errors, dtypes, operators, compilation, documentation."""

import doctest
from pathlib import Path

import pytest
import torch

import hybrid_ops


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def small(**changes):
    """Arguments of a valid call, by name."""
    torch.manual_seed(0)
    arguments = dict(
        x=torch.randn(2, 20, 4, 8),
        dt=torch.rand(2, 20, 4),
        A=-torch.rand(4),
        B=torch.randn(2, 20, 2, 16),
        C=torch.randn(2, 20, 2, 16),
    )
    return arguments | changes


def check_padding_may_hold_anything(impl, device="cpu"):
    seq_idx = torch.zeros(2, 20, dtype=torch.int32)
    seq_idx[:, 5:9] = -1
    clean = small(z=torch.randn(2, 20, 4, 8), seq_idx=seq_idx)
    dirty = dict(clean)
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = clean[name].clone()
        dirty[name][:, 5:9] = float("nan")
    got, expected = (
        hybrid_ops.ssd_chunk_scan(
            **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()},
            return_final_states=True,
            impl=impl,
        )
        for given in (dirty, clean)
    )
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_padding_may_hold_anything():
    check_padding_may_hold_anything("torch")


@pytest.mark.interpreter
def test_padding_may_hold_anything_interpreter():
    check_padding_may_hold_anything("triton")


@pytest.mark.gpu
def test_padding_may_hold_anything_gpu():
    check_padding_may_hold_anything("triton", "cuda")


def test_results_and_their_dtypes():
    arguments = small(x=small()["x"].bfloat16(), B=small()["B"].bfloat16(), C=small()["C"].bfloat16())
    out = torch.full((2, 4, 20, 8), float("nan")).bfloat16().transpose(1, 2)
    assert hybrid_ops.ssd_chunk_scan(**arguments, out=out) is out
    y, final, kept = hybrid_ops.ssd_chunk_scan(
        **arguments, return_final_states=True, state_interval=16, chunk_size=16, state_dtype=torch.float16
    )
    assert torch.equal(y, out)
    assert (y.dtype, final.dtype, kept.dtype) == (torch.bfloat16, torch.float16, torch.float16)
    assert (final.shape, kept.shape) == ((2, 4, 8, 16), (2, 2, 4, 8, 16))
    assert hybrid_ops.ssd_chunk_scan(**arguments, return_final_states=True)[1].dtype == torch.float32
    assert hybrid_ops.ssd_chunk_scan(**arguments, state_interval=16, chunk_size=16)[1].shape == (2, 2, 4, 8, 16)


def test_autocast_changes_nothing():
    expected = hybrid_ops.ssd_chunk_scan(**small())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hybrid_ops.ssd_chunk_scan(**small()), expected)


POOL = dict(ssm_state=torch.zeros(6, 4, 8, 16), read_slots=int32(0, 1), write_slots=int32(0, 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.randn(2, 20, 32)), ValueError, r"x must have shape \(batch, seqlen, nheads, headdim\), got"),
        (dict(x=3.0), TypeError, "x must be a torch.Tensor, got float"),
        (dict(x=torch.ones(2, 20, 4, 8).int()), TypeError, "x must have dtype float32 or .*, got int32"),
        (dict(x=torch.ones(2, 20, 0, 8)), ValueError, "x must have at least one head and one feature"),
        (dict(dt=torch.rand(2, 20, 3)), ValueError, r"dt must have shape \(2, 20, 4\), got \(2, 20, 3\)"),
        (dict(dt=torch.rand(2, 20, 4).double()), TypeError, "dt must have dtype float32 or .*, got float64"),
        (dict(A=-torch.rand(4).bfloat16()), TypeError, "A must have dtype float32, got bfloat16"),
        (dict(B=torch.randn(2, 20, 3, 16)), ValueError, "B must have a number of groups that divides the 4 heads of x"),
        (dict(B=torch.randn(2, 20, 2, 16).half()), TypeError, "B must have dtype float32, got float16"),
        (dict(C=torch.randn(2, 20, 2, 8)), ValueError, r"C must have shape \(2, 20, 2, 16\), got \(2, 20, 2, 8\)"),
        (dict(D=torch.ones(4, 7)), ValueError, r"D must have shape \(4, 8\), got \(4, 7\)"),
        (dict(D=torch.ones(4, 8, 1)), ValueError, r"D must have shape \(nheads,\) or \(nheads, headdim\), got"),
        (dict(z=torch.ones(2, 20, 4, 9)), ValueError, r"z must have shape \(2, 20, 4, 8\), got"),
        (dict(dt_bias=torch.ones(4, device="meta")), ValueError, "dt_bias must be on cpu, got meta"),
        (
            dict(dt_limit=(1.0, 0.5)),
            ValueError,
            r"dt_limit must be \(low, high\) with 0 <= low <= high, got \(1.0, 0.5",
        ),
        (dict(chunk_size=100), ValueError, "chunk_size must be a power of two >= 16, got 100"),
        (
            dict(chunk_size=64, batch_invariant=True),
            ValueError,
            "chunk_size must be >= 128 with batch_invariant, got 64",
        ),
        (dict(state_interval=64), ValueError, "state_interval must be a multiple of chunk_size=128 or 0, got 64"),
        (dict(initial_states=torch.ones(2, 4, 16, 8)), ValueError, r"initial_states must have shape \(2, 4, 8, 16\)"),
        (dict(state_dtype=torch.float64), ValueError, "state_dtype must be one of .*, got torch.float64"),
        (dict(cu_seqlens=int32(0, 20)), ValueError, r"x must have batch 1 with cu_seqlens, got \(2, 20, 4, 8\)"),
        (dict(seq_idx=torch.zeros(2, 20)), TypeError, "seq_idx must have dtype int32, got float32"),
        (dict(seq_idx=torch.zeros(20, 2).int()), ValueError, r"seq_idx must have shape \(2, 20\), got \(20, 2\)"),
        (
            dict(seq_idx=torch.zeros(2, 20).int(), state_interval=128),
            ValueError,
            "state_interval must be 0 with seq_idx",
        ),
        (dict(seq_offsets=int32(1)), ValueError, r"seq_offsets must have shape \(2,\), got \(1,\)"),
        (dict(seq_offsets=int32(1, -2)), ValueError, "seq_offsets must not be negative, got -2"),
        (dict(read_slots=int32(0, 1)), ValueError, "read_slots must be None without ssm_state"),
        (
            POOL | dict(return_final_states=True),
            ValueError,
            "with ssm_state, initial_states and state_dtype must be None",
        ),
        (
            POOL | dict(ssm_state=torch.zeros(6, 4, 16, 8)),
            ValueError,
            r"ssm_state must have shape \(\*, 4, 8, 16\), got",
        ),
        (
            POOL | dict(ssm_state=torch.zeros(6, 4, 16, 8).mT),
            ValueError,
            "ssm_state must have contiguous slots, got strides",
        ),
        (
            POOL | dict(read_slots=None, write_slots=None),
            ValueError,
            "ssm_state must come with read_slots, write_slots or",
        ),
        (POOL | dict(write_slots=int32(0, 6)), ValueError, r"write_slots must be in \[0, 6\) or null_slot=-1, got 6"),
        (POOL | dict(write_slots=int32(2, 2)), ValueError, "write_slots and interval_slots must be distinct, got"),
        (POOL | dict(write_slots=int32(1, 0)), ValueError, "must not name a slot that is still read, got 0"),
        (POOL | dict(state_interval=128), ValueError, "interval_slots and state_interval > 0 must come together"),
        (
            POOL | dict(x=torch.randn(2, 20, 4, 8).requires_grad_()),
            ValueError,
            "ssm_state must be None where a gradient",
        ),
        (dict(out=torch.ones(2, 20, 4, 9)), ValueError, r"out must have shape \(2, 20, 4, 8\), got"),
        (
            dict(x=torch.randn(2, 20, 4, 8).requires_grad_(), out=torch.ones(2, 20, 4, 8)),
            ValueError,
            "out must be None where a gradient is needed",
        ),
        (dict(impl="fast"), ValueError, "impl must be one of 'auto', 'cuda', 'triton', 'torch', got 'fast'"),
    ],
)
def test_bad_input(changes, error, message):
    written = [changes[name] for name in ("ssm_state", "out") if name in changes]
    before = [t.clone() for t in written]
    with pytest.raises(error, match=message):
        hybrid_ops.ssd_chunk_scan(**small(**changes))
    assert all(torch.equal(now, then) for now, then in zip(written, before, strict=True))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (int32(1, 20), "cu_seqlens must start at 0, got 1"),
        (int32(0, 12, 9, 20), "cu_seqlens must not fall"),
        (int32(0, 19), "cu_seqlens must end at the number of tokens, 20, got 19"),
    ],
)
def test_bad_cu_seqlens(bounds, message):
    packed = {name: t[:1] if t.dim() > 1 else t for name, t in small().items()}
    with pytest.raises(ValueError, match=message):
        hybrid_ops.ssd_chunk_scan(**packed, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="at most one of seq_idx, cu_seqlens may be given"):
        hybrid_ops.ssd_chunk_scan(**packed, cu_seqlens=int32(0, 20), seq_idx=torch.zeros(1, 20).int())


def test_named_implementation_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors"):
        hybrid_ops.ssd_chunk_scan(**small(), impl="triton")
    assert hybrid_ops.explain("ssd_chunk_scan", device="cpu").impl == "torch"


@pytest.mark.interpreter
def test_explain_interpreter():
    choice = hybrid_ops.explain("ssd_chunk_scan", device="cpu", impl="triton", state_interval=16, chunk_size=16)
    assert (choice.impl, choice.config["Q"]) == ("triton", 16)


def test_opcheck():
    a = small()
    inputs = tuple(a.values())
    y, state, kept = torch.empty(2, 20, 4, 8), torch.zeros(2, 4, 8, 16), torch.empty(2, 2, 4, 8, 16)
    D, bias = torch.ones(4, 8), torch.zeros(4)
    op = torch.ops.hybrid_ops.ssd_chunk_scan_fwd.default
    options = (None, True, 0.0, 1.0, 16, -1, False, 0.0, "torch")
    torch.library.opcheck(op, (*inputs, D, y, bias, state, *[None] * 6, y.clone(), state.clone(), kept, None, *options))
    pool = (int32(0, 1), int32(1, 0), int32([2], [3]))
    torch.library.opcheck(op, (*inputs, *[None] * 7, *pool, y, None, None, torch.zeros(4, 4, 8, 16), *options))
    op = torch.ops.hybrid_ops.ssd_chunk_scan_bwd.default
    leaves = (*inputs, D, y, bias, state)
    grads = [torch.empty_like(t) for t in leaves]
    torch.library.opcheck(op, (y, state, kept.zero_(), *leaves, None, None, None, *grads, *options[1:5]))


def compiled_scan(x, dt, A, B, C, D, z, states):
    y, final = hybrid_ops.ssd_chunk_scan(
        x, dt, A, B, C, D=D, z=z, dt_softplus=True, initial_states=states, return_final_states=True
    )
    return (y * y).sum() + final.sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def inputs(n):
        a = small()
        tokens = {name: a[name].repeat(1, 2, 1, 1)[:, :n] if a[name].dim() == 4 else a[name] for name in a}
        return (
            *(tokens | dict(dt=torch.rand(2, n, 4))).values(),
            torch.ones(4),
            a["x"].repeat(1, 2, 1, 1)[:, :n],
            STATES,
        )

    compile_once(compiled_scan, backend, inputs, lengths=(20, 33, 39))


STATES = torch.ones(2, 4, 8, 16)


@pytest.mark.parametrize(
    ("sm", "dtype", "headdim", "dstate"),
    [
        *((sm, torch.bfloat16, 64, 128) for sm in (80, 89, 90, 100, 120)),
        *((sm, torch.float32, 64, 128) for sm in (90, 100)),
        (90, torch.float16, 80, 256),
        (100, torch.float16, 80, 256),
    ],
)
def test_compiles(sm, dtype, headdim, dstate, monkeypatch):
    from .triton_targets import check, compiling_for

    x, z = (torch.empty(1, 300, 8, headdim, dtype=dtype) for _ in range(2))
    B, C = (torch.empty(1, 300, 2, dstate, dtype=dtype) for _ in range(2))
    options = dict(D=torch.empty(8), z=z, dt_softplus=True, impl="triton")
    states = torch.zeros(3, 8, headdim, dstate)
    if dtype == torch.float16:
        options |= dict(seq_idx=torch.zeros(1, 300).int(), initial_states=states[:1], return_final_states=True)
    else:
        options |= dict(cu_seqlens=int32(0, 300), ssm_state=states, read_slots=int32(1), write_slots=int32(2))
    monkeypatch.setattr("hybrid_ops._device.triton_interpreted", lambda: True)  # CPU tensors, which nothing will read
    with compiling_for(sm, monkeypatch) as compiled:
        hybrid_ops.ssd_chunk_scan(x, torch.empty(1, 300, 8), torch.empty(8), B, C, **options)
    check(compiled, sm)


def test_documented_examples():
    page = Path(__file__).parent.parent / "docs" / "ssd.md"
    names = dict(hybrid_ops=hybrid_ops, torch=torch)
    results = [doctest.testfile(str(page), module_relative=False, globs=dict(names))]
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    results += [runner.run(e) for e in finder.find(hybrid_ops.ssd_chunk_scan, "ssd_chunk_scan", globs=names)]
    assert sum(result.attempted for result in results) >= 6
    assert not any(result.failed for result in results)
