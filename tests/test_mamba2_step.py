import doctest
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops import _device
from hybrid_ops._csrc import mamba2_step as csrc
from hybrid_ops.reference import ssd_update as update_reference
from hybrid_ops.triton_kernels import mamba2_step as kernels

from .budget import to_numpy
from .mamba2_step_cases import cases, check_step, for_cuda, oracle
from .ssd_update_cases import CPU_DTYPES, INTERPRETER_DTYPES, implementation
from .tensors import int32

GPU_IMPLS = ["triton", "cuda"]


@given(case=cases(CPU_DTYPES))
def test_step(case):
    check_step(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=25)
@given(case=cases(INTERPRETER_DTYPES))
def test_step_interpreter(case):
    check_step(case, "triton")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, headdims=(8, 24, 64, 80), dstates=(16, 20, 128)))
def test_step_gpu(case):
    check_step(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=30)
@given(case=cases(CPU_DTYPES))
def test_step_cuda_gpu(case):
    check_step(for_cuda(case), implementation("cuda"), "cuda")


MANY = dict(
    seed=0,
    dtype=torch.bfloat16,
    conv_state_dtype=torch.bfloat16,
    small_dtype=torch.bfloat16,
    ngroups=2,
    heads_per_group=16,
    headdim=64,
    dstate=64,
    width=4,
    spare=0,
    norm="group",
    norm_before_gate=False,
    regime="usual",
    conv_bias=True,
    D="head",
    dt_bias=True,
    dt_softplus=True,
    dt_limit=(0.0, math.inf),
    slots="padded",
    strided=False,
    pool="contiguous",
    out=None,
)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", CPU_DTYPES)
@pytest.mark.parametrize("batch", [24, 240])
def test_many_sequences_gpu(batch, state_dtype):
    """So many that not all CTAs of the CUDA kernel begin at once."""
    check_step(MANY | dict(batch=batch, state_dtype=state_dtype), implementation("cuda"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", CPU_DTYPES)
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 64), (64, 128), (80, 128), (64, 256)])
@pytest.mark.parametrize("batch", [1, 3])
def test_usual_gpu(batch, headdim, dstate, state_dtype):
    """Tensors as models have them, for which the CUDA kernel has code of its own."""
    sizes = dict(batch=batch, headdim=headdim, dstate=dstate, heads_per_group=8, state_dtype=state_dtype)
    check_step(MANY | sizes, implementation("cuda"), "cuda")


# --- what only the device sees ---

SIZES = {"cpu": (4, 8, 16), "cuda": (8, 64, 128)}  # H, P, N; the interpreter is slow
G, WIDTH = 2, 4


def step_inputs(batch, nslots, device, state_dtype=torch.float32, dtype=torch.float32):
    """The arguments by name, of two groups."""
    H, P, N = SIZES[device]
    g = torch.Generator().manual_seed(batch)
    inner, conv_dim = H * P, H * P + 2 * G * N
    return dict(
        zxbcdt=torch.randn(batch, inner + conv_dim + H, generator=g).to(dtype).to(device),
        conv_state=torch.randn(nslots, conv_dim, WIDTH - 1, generator=g).to(dtype).to(device),
        state=torch.randn(nslots, H, P, N, generator=g).to(state_dtype).to(device),
        conv_weight=torch.randn(conv_dim, WIDTH, generator=g).to(device),
        A=-torch.rand(H, generator=g).to(device),
        norm_weight=torch.rand(inner, generator=g).to(device),
        D=torch.randn(H, generator=g).to(device),
        group_size=inner // G,
    )


def raw(impl, t, slots, y, seed=None):
    """The operator behind the checks of the public function."""
    tensors = (t["zxbcdt"], t["conv_state"], t["state"], t["conv_weight"], None, t["A"], t["D"], None, t["norm_weight"])
    options = (True, 0.0, math.inf, 1e-5, t["group_size"], False, -1, impl)
    torch.ops.hybrid_ops.mamba2_step(*tensors, slots, seed, y, *options)


def check_bad_slots(impl, device):
    """Slots that the host cannot see: y = 0 and no other row of the pools changes; NaN of padding goes nowhere."""
    t = step_inputs(4, 3, device)
    t["zxbcdt"][0] = float("nan")
    before = {name: t[name].clone() for name in ("conv_state", "state")}
    y = torch.full((4, t["norm_weight"].numel()), float("nan"), device=device)
    raw(impl, t, int32(-1, 2, 2**31 - 1, 3).to(device), y)
    twin = t | {name: pool[2:].clone() for name, pool in before.items()} | dict(zxbcdt=t["zxbcdt"][1:2])
    torch.testing.assert_close(y[1:2], hybrid_ops.mamba2_step(**twin, impl="torch"))
    assert (y[[0, 2, 3]] == 0).all()
    for name, pool in before.items():
        assert torch.equal(t[name][:2], pool[:2])
        torch.testing.assert_close(t[name][2:], twin[name])


def test_bad_slots():
    check_bad_slots("torch", "cpu")


@pytest.mark.interpreter
def test_bad_slots_interpreter():
    check_bad_slots("triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_bad_slots_gpu(impl):
    check_bad_slots(implementation(impl), "cuda")


def check_random_bits(impl, device, usual=False):
    """The bits of `ssd_state_update`: from the same float32 states, the oracle's rounding of them."""
    t = step_inputs(3, 5, device, torch.float16, torch.bfloat16 if usual else torch.float32)
    if usual:
        t = t | {name: t[name].bfloat16() for name in ("conv_weight", "norm_weight")}
        t["conv_bias"] = t["conv_weight"][:, 0].contiguous()
    exact = t | dict(conv_state=t["conv_state"].clone(), state=t["state"].float())
    slots = int32(4, -1, 2).to(device)
    hybrid_ops.mamba2_step(**exact, slots=slots, impl=impl)
    before, seed = t["state"].clone(), torch.tensor([2**40 + 3], device=device)
    hybrid_ops.mamba2_step(**t, slots=slots, rounding="stochastic", seed=seed, impl=impl)
    store = update_reference.stochastic_store(2**40 + 3, "float16")
    for slot in (4, 2):
        expected = store(exact["state"][slot].cpu().numpy(), slot, 0)
        np.testing.assert_array_equal(to_numpy(t["state"][slot]), expected)
    assert torch.equal(t["state"][[0, 1, 3]], before[[0, 1, 3]])


def test_random_bits():
    check_random_bits("torch", "cpu")


@pytest.mark.interpreter
def test_random_bits_interpreter():
    check_random_bits("triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("usual", [False, True])
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_random_bits_gpu(impl, usual):
    check_random_bits(implementation(impl), "cuda", usual)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_more_than_2_31_elements(impl):
    implementation(impl)
    H, P, N = SIZES["cuda"]
    nslots = 2**31 // (H * P * N) + 3
    t = step_inputs(2, 2, "cuda", torch.float16, torch.float16)
    columns = 2**31 + 8  # between two rows of zxbcdt
    far = torch.zeros(columns + t["zxbcdt"].shape[1], dtype=torch.float16, device="cuda")
    zxbcdt = far.as_strided(t["zxbcdt"].shape, (columns, 1))
    zxbcdt.copy_(t["zxbcdt"])
    pools = {}
    for name in ("conv_state", "state"):
        pools[name] = torch.zeros(nslots, *t[name].shape[1:], dtype=torch.float16, device="cuda")
        pools[name][-2:] = t[name]
    slots = dict(slots=int32(nslots - 1, nslots - 2).cuda())
    y = hybrid_ops.mamba2_step(**t | pools | dict(zxbcdt=zxbcdt), **slots, impl=impl)
    expected = hybrid_ops.mamba2_step(**t, slots=int32(1, 0).cuda(), impl="torch")
    torch.testing.assert_close(y, expected)
    for name, pool in pools.items():
        torch.testing.assert_close(pool[-2:], t[name])
        assert not pool[:-2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_cuda_graph(impl):
    """Replayed with other inputs, it does what an eager call does, to the bit."""
    impl, batch = implementation(impl), 4
    t = step_inputs(batch, 9, "cuda", torch.bfloat16, torch.bfloat16)
    slots, seed = torch.arange(batch, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    options = dict(slots=slots, rounding="stochastic", seed=seed, impl=impl)
    hybrid_ops.mamba2_step(**t, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_ops.mamba2_step(**t, **options)
    for step in range(3):
        t["zxbcdt"].normal_(), seed.fill_(2**40 + step)
        slots.copy_(torch.tensor([step, 8, 5 + step % 2, -1 if step else 3]))
        twin = t | {name: t[name].clone() for name in ("conv_state", "state")}
        expected = hybrid_ops.mamba2_step(**twin, **options)
        graph.replay()
        assert torch.equal(y, expected)
        for name in ("conv_state", "state"):
            assert torch.equal(t[name], twin[name])


# --- the frame ---

SEED = torch.tensor([1])
BAD = [
    (dict(zxbcdt="z"), TypeError, "zxbcdt must be a torch.Tensor, got str"),
    (dict(zxbcdt=torch.ones(2, 3, 164)), ValueError, r"zxbcdt must have shape \(batch, 2 d_inner"),
    (dict(zxbcdt=torch.ones(2, 163)), ValueError, "zxbcdt must have 2 .* 32 .* 16 .* 4 columns .* got 163"),
    (dict(zxbcdt=torch.ones(2, 68 + 32 * 3)), ValueError, "ngroups that divides 4, got 164"),
    (dict(zxbcdt=torch.ones(2, 68)), ValueError, "ngroups that divides 4, got 68"),
    (dict(zxbcdt=torch.ones(2, 132).int()), TypeError, "zxbcdt must have dtype .* got int32"),
    (dict(state=torch.zeros(5, 4, 8)), ValueError, r"state must have shape \(nslots, nheads, headdim, dstate\), got"),
    (dict(state=torch.zeros(5, 4, 8, 0)), ValueError, "state must have at least one head"),
    (dict(state=torch.zeros(5, 4, 8, 16).int()), TypeError, "state must have dtype .* got int32"),
    (dict(state=torch.zeros(1, 4, 8, 16).expand(5, 4, 8, 16)), ValueError, "state must not have expanded dimensions"),
    (dict(state=torch.zeros(1, 4, 8, 16), conv_state=torch.zeros(1, 96, 3)), ValueError, "a row for each of the 2"),
    (dict(conv_state=torch.zeros(4, 96, 3)), ValueError, r"conv_state must have shape \(5, 96, \*\), got \(4, 96, 3\)"),
    (dict(conv_state=torch.zeros(5, 96, 2)), ValueError, r"at least width - 1 = 3\), got \(5, 96, 2\)"),
    (dict(conv_state=torch.zeros(5, 96, 1).expand(5, 96, 3)), ValueError, "conv_state must not have expanded dim"),
    (dict(conv_state=torch.zeros(5, 96, 3, device="meta")), ValueError, "conv_state must be on cpu, got meta"),
    (dict(conv_weight=torch.ones(95, 4)), ValueError, r"conv_weight must have shape \(96, \*\), got \(95, 4\)"),
    (dict(conv_weight=torch.ones(96, 9)), ValueError, r"conv_weight must have a width from 1 to 8, got \(96, 9\)"),
    (dict(conv_weight=torch.ones(96)), ValueError, r"conv_weight must have shape \(d_inner \+ 2 ngroups dstate, width"),
    (dict(conv_bias=torch.ones(32)), ValueError, r"conv_bias must have shape \(96,\), got \(32,\)"),
    (dict(A=torch.ones(3)), ValueError, r"A must have shape \(4,\), got \(3,\)"),
    (dict(A=torch.ones(4).half()), TypeError, "A must have dtype float32, got float16"),
    (dict(norm_weight=torch.ones(96)), ValueError, r"norm_weight must have shape \(32,\), got \(96,\)"),
    (dict(D=torch.ones(4, 8, 1)), ValueError, r"D must have shape \(nheads,\) or \(nheads, headdim\), got \(4, 8, 1\)"),
    (dict(dt_bias=torch.ones(1)), ValueError, r"dt_bias must have shape \(4,\), got \(1,\)"),
    (dict(dt_limit=(1.0, 0.0)), ValueError, r"dt_limit must be \(low, high\) .* got \(1.0, 0.0\)"),
    (dict(group_size=12), ValueError, "group_size must divide d_inner, 32, got 12"),
    (dict(slots=int32(0)), ValueError, r"slots must have shape \(2,\), got \(1,\)"),
    (dict(slots=torch.tensor([0, 1])), TypeError, "slots must have dtype int32, got int64"),
    (dict(slots=int32(0, 5)), ValueError, r"slots must be in \[0, 5\) or null_slot=-1, got 5"),
    (dict(slots=int32(1, 1)), ValueError, r"slots must be distinct, got \[1, 1\]"),
    (dict(rounding="up"), ValueError, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
    (dict(rounding="stochastic", seed=SEED), TypeError, "state must have dtype float16 or bfloat16, got float32"),
    (dict(seed=SEED), ValueError, "seed must be None with rounding='nearest', got a tensor"),
    (dict(out=torch.ones(2, 31)), ValueError, r"out must have shape \(2, 32\), got \(2, 31\)"),
    (dict(out=torch.ones(2, 32).half()), TypeError, "out must have dtype float32, got float16"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
    (dict(D=torch.ones(4, requires_grad=True)), ValueError, "D must not require a gradient, got one that does"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = step_inputs(2, 5, "cpu") | dict(D=None) | change
    before = {name: arguments[name].clone() for name in ("conv_state", "state")}
    with pytest.raises(error, match=message):
        hybrid_ops.mamba2_step(**arguments)
    for name, pool in before.items():
        assert pool.device.type == "meta" or torch.equal(arguments[name], pool)


def test_float64():
    t = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in step_inputs(2, 2, "cpu").items()}
    expected = oracle(t, np.float64)
    y = hybrid_ops.mamba2_step(**t)
    for got, exact in zip((y, t["conv_state"], t["state"]), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-12)  # float64 throughout


def test_is_the_three_operators():
    """In float32, where nothing is rounded between them, bit for bit."""
    t = step_inputs(3, 4, "cpu")
    twin = {name: t[name].clone() for name in ("conv_state", "state")}
    y = hybrid_ops.mamba2_step(**t)
    H, P, N = SIZES["cpu"]
    z, xBC, dt = t["zxbcdt"].split([H * P, twin["conv_state"].shape[1], H], 1)
    xBC = hybrid_ops.causal_conv1d_update(xBC, twin["conv_state"], t["conv_weight"], activation="silu")
    x, B, C = xBC.split([H * P, G * N, G * N], 1)
    tensors = (x.unflatten(1, (H, P)), dt, t["A"], B.unflatten(1, (G, N)), C.unflatten(1, (G, N)))
    states = hybrid_ops.ssd_state_update(twin["state"], *tensors, D=t["D"], dt_softplus=True)
    assert torch.equal(y, hybrid_ops.gated_rms_norm(states.flatten(1), z, t["norm_weight"], group_size=t["group_size"]))
    for name, pool in twin.items():
        assert torch.equal(t[name], pool)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        for H, P, N, width, state_dtype, dtype, seed in (
            (16, 64, 128, 4, torch.float32, torch.bfloat16, None),
            (8, 80, 20, 2, torch.float16, torch.float32, SEED),  # a window of 1, and 1 is special to Triton
        ):
            inner, conv_dim = H * P, H * P + 2 * G * N
            empty = partial(torch.empty, dtype=dtype)
            pools = (empty(4, conv_dim, width - 1), torch.empty(4, H, P, N, dtype=state_dtype))
            weights = (empty(conv_dim, width), empty(conv_dim), torch.empty(H), empty(H), empty(H), empty(inner))
            options = (True, 0.0, math.inf, 1e-5, inner // G, False, -1)
            tensors = (empty(3, inner + conv_dim + H), *pools, *weights, int32(0, 1, 2), seed, empty(3, inner))
            kernels.mamba2_step(*tensors, *options)
    assert len(compiled) == 4
    check(compiled, sm)


def test_opcheck():
    t = step_inputs(2, 5, "cpu", torch.float16)
    tensors = (t["zxbcdt"], t["conv_state"], t["state"], t["conv_weight"], None, t["A"], t["D"], t["A"])
    y = torch.empty(2, t["norm_weight"].numel())
    options = (True, 0.0, 1.0, 1e-5, t["group_size"], True, -1, "torch")
    op = torch.ops.hybrid_ops.mamba2_step.default
    torch.library.opcheck(op, (*tensors, t["norm_weight"], int32(4, 1), SEED, y, *options))


def compiled_step(zxbcdt, conv_state, state, conv_weight, A, norm_weight, D, slots):
    y = hybrid_ops.mamba2_step(zxbcdt * 2, conv_state, state, conv_weight, A, norm_weight, D=D, slots=slots)
    return y + state.mean() + conv_state.mean()  # reads the pools after the update


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def inputs(n):
        t = step_inputs(n, 40, "cpu")
        return *(v for v in t.values() if isinstance(v, torch.Tensor)), torch.randperm(40)[:n].int()

    compile_once(compiled_step, backend, inputs, grads=(False,))


def test_explain(monkeypatch):
    assert hybrid_ops.explain("mamba2_step", device="cpu").impl == "torch"
    with pytest.raises(RuntimeError, match="norm groups of whole groups of B and C"):
        hybrid_ops.explain("mamba2_step", impl="cuda", group_size=64)
    monkeypatch.setattr(_device, "choose", lambda impl, device, refusal: ("cuda", "as told"))
    explained = hybrid_ops.explain("mamba2_step", device="cpu", batch=64)
    assert explained.config == dict(cluster=8, warps=8, crowded=True)


def test_what_the_cuda_kernel_takes():
    def refusal(group_size=512, N=128, P=64, width=4, columns=None, **changes):
        H, G, batch = 64, 8, 2
        inner, conv_dim = H * P, H * P + 2 * G * N
        columns = width - 1 if columns is None else columns
        t = dict(zxbcdt=(batch, inner + conv_dim + H), conv_state=(3, conv_dim, columns), state=(3, H, P, N))
        t["conv_weight"] = (conv_dim, width)
        tensors = [changes.get(name, torch.empty(shape, device="meta")) for name, shape in t.items()]
        return csrc.refusal(*tensors, *(None,) * 6, torch.empty(batch, inner, device="meta"), group_size)

    assert refusal() is None
    assert refusal(4096) is None
    assert refusal(640, P=80) is None
    assert refusal(width=3) is None
    for bad in (64, 256):
        assert "norm groups of whole groups of B and C" in refusal(bad)
    assert "norm groups" in refusal(48 * 8, P=12, N=64)  # tiles of 8
    assert "norm groups" in refusal(4 * 8, P=4, N=256)  # heads of 8
    assert "dstate 64, 128, 256, not 16" in refusal(N=16)
    assert "widths 2 to 4" in refusal(width=5)
    assert "widths 2 to 4" in refusal(columns=5)
    assert "neighbours in rows" in refusal(zxbcdt=torch.empty(10304, 2, device="meta").T)
    assert "float64 for state" in refusal(state=torch.empty(3, 64, 64, 128, dtype=torch.float64, device="meta"))
    assert "16 bytes" in refusal(state=torch.empty(3, 64, 64, 130, device="meta")[..., :128])


@pytest.mark.parametrize("dstate", [64, 128, 256])
@pytest.mark.parametrize("heads", [(64, 64, 8), (128, 64, 8), (128, 80, 8), (64, 64, 1), (8, 64, 1), (256, 8, 1)])
def test_configurations(heads, dstate):
    """Every warp has whole tiles of one head, and a block no more than half of a multiprocessor."""
    nheads, headdim, ngroups = heads
    rows_per_group = nheads * headdim // ngroups
    for group_size in {rows_per_group, nheads * headdim}:
        for batch in (1, 4, 8, 16, 64):
            cluster, warps, _ = csrc.config(batch, nheads, headdim, dstate, group_size, rows_per_group, 132)
            rows, tile = group_size // cluster, csrc.tile(dstate)
            assert rows * cluster == group_size
            assert rows % tile == rows_per_group % rows == headdim % tile == 0
            assert -(-rows // headdim) <= 32 * warps  # a thread for each head's step
            assert 1 <= cluster <= 8
            assert 1 <= warps <= 8
            shared = 4 * (8 * dstate + 4 * rows + 12 * 32 * warps + 2 * -(-rows // headdim))  # the larger of two kinds
            assert 2 * (shared + 2048) <= 227 * 1024  # two CTAs on a multiprocessor


def test_config_of_nemotron():
    def of(batch, nheads, headdim=64):
        group_size = nheads * headdim // 8
        return tuple(csrc.config(batch, nheads, headdim, 128, group_size, group_size, 132))

    nano3 = {
        1: (8, 8, False),
        4: (4, 8, False),
        8: (2, 8, False),
        12: (4, 8, True),
        16: (2, 8, False),
        64: (4, 8, True),
    }
    assert {batch: of(batch, 64) for batch in nano3} == nano3
    large = {
        1: (8, 8, False),
        4: (8, 8, False),
        8: (2, 8, False),
        12: (8, 8, True),
        16: (2, 8, False),
        64: (8, 8, True),
    }
    assert {batch: of(batch, 128) for batch in large} == large
    assert [of(batch, 128, 80) for batch in (1, 8, 64)] == [(8, 7, False), (8, 7, True), (8, 7, True)]


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "mamba2_step.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    for example in doctest.DocTestFinder(recurse=False).find(hybrid_ops.mamba2_step, globs=names):
        results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 2
    assert all(r.attempted and not r.failed for r in results), results
