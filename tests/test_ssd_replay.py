import doctest
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops._csrc import ssd_replay as csrc
from hybrid_ops.triton_kernels import ssd_replay as kernels

from .ssd_replay_cases import cases, check_stream, for_cuda
from .ssd_update_cases import CPU_DTYPES, INTERPRETER_DTYPES, SIZES, decoder, implementation
from .tensors import int32

GPU_IMPLS = ["triton", "cuda"]


@given(case=cases(CPU_DTYPES))
def test_stream(case):
    check_stream(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=9)
@given(case=cases(INTERPRETER_DTYPES, steps=2, float32_times=8))
def test_stream_interpreter(case):
    check_stream(case, "triton")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, headdims=(8, 64, 80), dstates=(16, 20, 96, 128), max_groups=3, steps=2))
def test_stream_gpu(case):
    check_stream(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=30)
@given(case=cases(CPU_DTYPES, headdims=(8, 24, 64, 80), max_groups=3, steps=3))
def test_stream_cuda_gpu(case):
    check_stream(for_cuda(case), implementation("cuda"), "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES))
def test_stream_torch_on_gpu(case):
    check_stream(case, "torch", "cuda")


# --- beside ssd_state_update ---


def check_beside_update(impl, device="cpu"):
    """Drafts with rejections, over several flushes: y and the states are those of the accepted tokens one by one."""
    H, P, N = SIZES[device]
    batch, drafts, length = 3, 3, 30
    x, dt, A, B, C, z, D = decoder(1, batch, length, device)
    noise = decoder(2, batch, drafts, device)
    plain = torch.randn(batch, H, P, N, device=device)
    state, cache = plain.clone(), hybrid_ops.ReplayCache.new(batch, H, P, 2, N, capacity=7, device=device)
    expected = torch.stack(
        [
            hybrid_ops.ssd_state_update(plain, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, z=z[:, t], impl="torch")
            for t in range(length)
        ],
        1,
    )
    position, rollback = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.int32)
    while position.min() < length:
        now = torch.minimum(1 + (position + torch.arange(batch)) % drafts, length - position)
        inputs = [n.clone() for n in (noise[0], noise[1], noise[3], noise[4], noise[5])]  # what is rejected is noise
        for whole, part in zip((x, dt, B, C, z), inputs, strict=True):
            for b in range(batch):
                part[b, : now[b]] = whole[b, position[b] : position[b] + now[b]]
        options = dict(D=D, z=inputs[4], rollback=rollback.to(device), impl=impl)
        y = hybrid_ops.ssd_replay_update(state, cache, inputs[0], inputs[1], A, *inputs[2:4], **options)
        for b in range(batch):
            wanted = expected[b, position[b] : position[b] + now[b]]
            # a few roundings for each token in the ring, of sums that may be much larger than their result
            torch.testing.assert_close(y[b, : now[b]], wanted, rtol=0, atol=2e-6 * float(expected.abs().max()))
        position, rollback = position + now, (drafts - now).int()
    hybrid_ops.ssd_replay_materialize(state, cache, A, rollback=rollback.to(device), impl=impl)
    torch.testing.assert_close(state, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))
    assert (cache.length == 0).all()


def test_beside_update():
    check_beside_update("torch")


@pytest.mark.interpreter
def test_beside_update_interpreter():
    check_beside_update("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_beside_update_gpu(impl):
    check_beside_update(implementation(impl), "cuda")


def test_materialize_elsewhere():
    """The copy is what an update goes on from; the slot itself stays as it is."""
    x, dt, A, B, C, _, _ = decoder(3, 2, 5, "cpu")
    state, cache = torch.randn(5, *SIZES["cpu"]), hybrid_ops.ReplayCache.new(5, 2, 8, 2, 20)
    slots = int32(4, 1)
    hybrid_ops.ssd_replay_update(state, cache, x, dt, A, B, C, slots=slots)
    before = state.clone(), cache.ring.clone()
    hybrid_ops.ssd_replay_materialize(state, cache, A, slots=slots, rollback=int32(0, 2), write_slots=int32(-1, 3))
    assert torch.equal(state[[0, 1, 2, 4]], before[0][[0, 1, 2, 4]])
    assert torch.equal(cache.ring, before[1])
    expected = before[0][[1]]
    hybrid_ops.ssd_state_update(expected, x[1:, :3], dt[1:, :3], A, B[1:, :3], C[1:, :3])
    torch.testing.assert_close(state[[3]], expected)


# --- what only the device sees ---


def raw(impl, state, cache, x, dt, A, B, C, y, slots, rollback):
    """The operator behind the checks of the public function."""
    nothing = (None, None, None)
    limits = (cache.capacity, False, 0.0, math.inf, -1, impl)
    op = torch.ops.hybrid_ops.ssd_replay_update
    op(state, *cache[:4], x, dt, A, B, C, *nothing, slots, rollback, None, y, *limits)


def check_bad_indices(impl, device="cpu"):
    """Values that the host cannot see are skipped or clamped: only good sequences and slots change anything."""
    H, P, N = SIZES[device]
    x, dt, A, B, C, _, _ = decoder(3, 4, 2, device)
    before, huge = torch.randn(3, H, P, N, device=device), 2**31 - 1
    state, cache = before.clone(), hybrid_ops.ReplayCache.new(3, H, P, 2, N, max_tokens=3, device=device)
    cache.ring.copy_(5 + 256 * torch.tensor([3, 0, 15], device=device))
    y = torch.full_like(x, float("nan"))
    raw(impl, state, cache, x, dt, A, B, C, y, int32(-7, 2, huge, 3).to(device), int32(0, -9, huge, 0).to(device))
    assert torch.equal(
        y != 0, torch.tensor([False, True, False, False], device=device)[:, None, None, None].expand_as(y)
    )
    assert torch.equal(state[:2], before[:2])
    assert cache.ring.tolist() == [5 + 256 * 3, 5, (5 + 15) % 19 + 256 * 2]
    raw(impl, state, cache, x[:1], dt[:1], A, B[:1], C[:1], y[:1], int32(0).to(device), int32(huge).to(device))
    assert cache.length.tolist() == [2, 0, 2]
    assert torch.equal(state[0], before[0])


def test_bad_indices_torch():
    check_bad_indices("torch")


@pytest.mark.interpreter
def test_bad_indices_interpreter():
    check_bad_indices("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_bad_indices_gpu(impl):
    check_bad_indices(implementation(impl), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_more_than_2_31_elements(impl):
    implementation(impl)
    H, P, N, capacity = 128, 64, 128, 3
    nslots = 2**31 // (H * P * N) + 3
    state = torch.zeros(nslots, H, P, N, dtype=torch.float16, device="cuda")
    state[-2:].normal_()
    small, few = state[-2:].clone(), int32(1, 0).cuda()
    many = int32(nslots - 1, nslots - 2).cuda()
    caches = [hybrid_ops.ReplayCache.new(n, H, P, 2, N, capacity=capacity, device="cuda") for n in (nslots, 2)]
    for step in range(5):
        x, dt, A, B, C, _, _ = decoder(step, 2, 1, "cuda", H, P, N)
        y = hybrid_ops.ssd_replay_update(state, caches[0], x, dt, A, B, C, slots=many, impl=impl)
        expected = hybrid_ops.ssd_replay_update(small, caches[1], x, dt, A, B, C, slots=few, impl="torch")
        # sums in another order, and two states that rounded differently in places
        torch.testing.assert_close(y, expected, rtol=0, atol=2.0**-10 * float(expected.abs().max()))
    torch.testing.assert_close(state[-2:], small)
    assert not state[:-2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_cuda_graph(impl):
    """One captured step, replayed through flushes with other inputs, slots and rejections."""
    batch, T, impl = 4, 2, implementation(impl)
    H, P, N = SIZES["cuda"]
    x, dt, A, B, C, z, D = decoder(5, batch, T, "cuda")
    state = torch.randn(9, H, P, N, device="cuda").half()
    cache = hybrid_ops.ReplayCache.new(9, H, P, 2, N, capacity=5, max_tokens=T, device="cuda")
    slots, rollback = (torch.arange(batch, dtype=torch.int32, device="cuda") * n for n in (1, 0))
    seed = torch.zeros(1, dtype=torch.long, device="cuda")
    options = dict(D=D, z=z, dt_softplus=True, slots=slots, rollback=rollback, rounding="stochastic", seed=seed)

    def step(state, cache):
        return hybrid_ops.ssd_replay_update(state, cache, x, dt, A, B, C, **options, impl=impl)

    step(state, cache)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(state, cache)
    for number in range(12):
        x.normal_(), dt.uniform_(), seed.fill_(2**40 + number)
        slots.copy_(torch.tensor([number % 5, 8, 5 + number % 2, -1 if number % 3 else 7]))
        rollback.copy_(torch.tensor([0, 1, 2, number % 3]))
        twin = state.clone(), cache._make(t.clone() if isinstance(t, torch.Tensor) else t for t in cache)
        expected = step(*twin)
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(state, twin[0])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(cache[:4], twin[1][:4], strict=True))


# --- the frame ---

H, P, N, G = 4, 8, 16, 2


def good():
    x, dt, A, B, C, _, _ = decoder(6, 2, 3, "cpu", H, P, N)
    return dict(state=torch.zeros(5, H, P, N), cache=new(), x=x, dt=dt, A=A, B=B, C=C)


def new(**options):
    return hybrid_ops.ReplayCache.new(5, H, P, G, N, **dict(capacity=6, max_tokens=3) | options)


SEED = torch.tensor([1])
BAD = [
    (dict(cache=(1, 2)), TypeError, "cache must be a hybrid_ops.ReplayCache, got tuple"),
    (dict(cache=new(dtype=torch.float16)), TypeError, "cache.x must have dtype float32, got float16"),
    (
        dict(cache=new()._replace(B=torch.zeros(5, 1, 9, N))),
        ValueError,
        r"cache.B must have shape \(5, 2, 9, 16\), got",
    ),
    (dict(cache=new()._replace(dt=torch.zeros(5, H, 8))), ValueError, r"cache.dt must have shape \(5, 4, 9\), got"),
    (dict(cache=new()._replace(ring=torch.zeros(5))), TypeError, "cache.ring must have dtype int32, got float32"),
    (
        dict(cache=new()._replace(capacity=9)),
        ValueError,
        "cache.capacity must be from 1 to 16, and less than the places",
    ),
    (
        dict(cache=new(max_tokens=2)),
        ValueError,
        r"x must have 1 to 2 tokens, as cache has room for, got \(2, 3, 4, 8\)",
    ),
    (dict(state=torch.zeros(4, H, P, N)), ValueError, r"cache.x must have shape \(4, 4, \*, 8\), got"),
    (dict(state=torch.zeros(5, H, P, N).to(torch.int8)), TypeError, "state must have dtype .* got int8"),
    (dict(x=torch.ones(2, 3, 3, P)), ValueError, "dt must have shape"),
    (dict(A=torch.ones(3)), ValueError, r"A must have shape \(4,\), got \(3,\)"),
    (dict(dt_limit=(1.0, 0.0)), ValueError, r"dt_limit must be \(low, high\) .* got \(1.0, 0.0\)"),
    (dict(slots=int32(0)), ValueError, r"slots must have shape \(2,\), got \(1,\)"),
    (dict(slots=int32(0, 5)), ValueError, r"slots must be in \[0, 5\) or null_slot=-1, got 5"),
    (dict(slots=int32(1, 1)), ValueError, r"slots must be distinct, got \[1, 1\]"),
    (dict(rollback=int32(0, 7)), ValueError, r"rollback must be in \[0, 6\], the capacity, got 7"),
    (dict(rollback=int32(-1, 0)), ValueError, r"rollback must be in \[0, 6\], the capacity, got -1"),
    (dict(rounding="stochastic", seed=SEED), TypeError, "state must have dtype float16 or bfloat16, got float32"),
    (dict(out=torch.ones(2, H, P)), ValueError, r"out must have shape \(2, 3, 4, 8\), got \(2, 4, 8\)"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
    (
        dict(C=torch.ones(2, 3, G, N, requires_grad=True)),
        ValueError,
        "C must not require a gradient, got one that does",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = good() | change
    with pytest.raises(error, match=message):
        hybrid_ops.ssd_replay_update(**arguments)
    assert not arguments["state"].any()
    if isinstance(arguments["cache"], hybrid_ops.ReplayCache):
        assert not arguments["cache"].ring.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(A=torch.ones(3)), ValueError, r"A must have shape \(4,\), got \(3,\)"),
        (dict(rollback=int32(0, 0)), ValueError, r"rollback must have shape \(5,\), got \(2,\)"),
        (dict(slots=int32(0, 0)), ValueError, r"must be distinct, got \[0, 0\]"),
        (dict(slots=int32(0, 1), write_slots=int32(2, 2)), ValueError, r"write_slots must be distinct, got \[2, 2\]"),
        (dict(slots=int32(0, 1), write_slots=int32(2, 1)), ValueError, "write_slots must hold none of slots, got 1"),
        (dict(slots=int32(0, 1), write_slots=int32(2, 0)), ValueError, "another sequence reads, got 0"),
        (dict(seed=SEED), ValueError, "seed must be None with rounding='nearest', got a tensor"),
    ],
)
def test_bad_input_of_materialize(change, error, message):
    arguments = dict(state=torch.zeros(5, H, P, N), cache=new(), A=torch.ones(H)) | change
    with pytest.raises(error, match=message):
        hybrid_ops.ssd_replay_materialize(**arguments)


@pytest.mark.parametrize("bad", [dict(capacity=0), dict(capacity=17), dict(max_tokens=0), dict(max_tokens=7)])
def test_bad_cache(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be from 1 to .*, got {value}"):
        new(**bad)


def test_float64():
    x, dt, A, B, C, z, D = (t.double() for t in decoder(7, 2, 3, "cpu"))
    options, plain = dict(D=D, dt_softplus=True), torch.randn(2, *SIZES["cpu"], dtype=torch.float64)
    state, cache = plain.clone(), hybrid_ops.ReplayCache.new(2, 2, 8, 2, 20, capacity=4, max_tokens=3, dtype=x.dtype)
    for _ in range(3):
        expected = hybrid_ops.ssd_state_update(plain, x, dt, A, B, C, z=z, **options)
        y = hybrid_ops.ssd_replay_update(state, cache, x, dt, A, B, C, z=z, **options)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)  # float64 throughout
    hybrid_ops.ssd_replay_materialize(state, cache, A)
    torch.testing.assert_close(state, plain, rtol=0, atol=1e-12)


def launch(dtype, state_dtype, headdim, dstate, full):
    batch, nheads, ngroups = 4, 16, 8
    state = torch.empty(9, nheads, headdim, dstate, dtype=state_dtype)
    *kept, capacity = hybrid_ops.ReplayCache.new(9, nheads, headdim, ngroups, dstate, dtype=dtype)
    shapes = ((nheads, headdim), (ngroups, dstate), (nheads,))
    x, B, dt = (torch.empty(batch, 4 if full else 1, *s, dtype=dtype) for s in shapes)
    A, index = torch.empty(nheads), torch.empty(batch, dtype=torch.int32)
    seed = SEED if full and state_dtype != torch.float32 else None
    options = (capacity, True, 0.0, math.inf, -1)
    if full:
        kernels.ssd_replay_update(state, *kept, x, dt, A, B, B, A, x, A, index, index, seed, x, *options)
        kernels.ssd_replay_materialize(state, *kept, A, index, index, index, seed, capacity, -1)
    else:
        kernels.ssd_replay_update(state, *kept, x, dt, A, B, B, *(None,) * 6, x, *options)
        kernels.ssd_replay_materialize(state, *kept, A, *(None,) * 4, capacity, -1)


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from .triton_targets import check, compiling_for

    with compiling_for(sm, monkeypatch) as compiled:
        launch(torch.bfloat16, torch.float32, 64, 128, False)
        if sm in (90, 100):
            launch(torch.float16, torch.float16, 80, 256, True)
            launch(torch.float32, torch.bfloat16, 64, 20, True)
    check(compiled, sm)


def test_opcheck():
    x, dt, A, B, C, z, D = decoder(8, 2, 3, "cpu")
    state = torch.randn(7, *SIZES["cpu"]).half()
    *kept, capacity = hybrid_ops.ReplayCache.new(7, 2, 8, 2, 20, capacity=4, max_tokens=3)
    kept[3] += 256 * 3
    index = (int32(4, 1), int32(0, 2))
    rest = (SEED, torch.empty_like(x), capacity, True, 0.0, 1.0, -1, "torch")
    op = torch.ops.hybrid_ops.ssd_replay_update.default
    torch.library.opcheck(op, (state, *kept, x, dt, A, B, C, D, z, A, *index, *rest))
    op = torch.ops.hybrid_ops.ssd_replay_materialize.default
    torch.library.opcheck(op, (state, *kept, A, *index, int32(0, -1), SEED, capacity, -1, "torch"))


def compiled_step(state, cache_x, cache_B, cache_dt, ring, x, dt, A, B, C, z, D, slots, rollback):
    cache = hybrid_ops.ReplayCache(cache_x, cache_B, cache_dt, ring, 4)
    options = dict(D=D, z=z, dt_bias=A, dt_softplus=True, slots=slots, rollback=rollback)
    y = hybrid_ops.ssd_replay_update(state, cache, x * 2, dt, A, B, C, **options)
    hybrid_ops.ssd_replay_materialize(state, cache, A, slots=slots)
    return y + state.mean() + cache.length.sum()  # reads what was updated


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    def inputs(n):
        x, dt, A, B, C, z, D = decoder(n, n, 3, "cpu", H, P, N)
        *kept, _ = hybrid_ops.ReplayCache.new(40, H, P, G, N, capacity=4, max_tokens=3)
        kept[3] += 256 * 3
        slots, rollback = torch.randperm(40)[:n].int(), torch.arange(n).int() % 3
        return torch.randn(40, H, P, N), *kept, x, dt, A, B, C, z, D, slots, rollback

    compile_once(compiled_step, backend, inputs, grads=(False,))


def test_explain():
    for op in ("ssd_replay_update", "ssd_replay_materialize"):
        assert hybrid_ops.explain(op, device="cpu").impl == "torch"
        with pytest.raises(RuntimeError, match="dstate 64, 128, 256, not 16"):
            hybrid_ops.explain(op, impl="cuda", dstate=16)


def test_what_the_cuda_kernel_takes():
    def refusal(headdim=64, dstate=128, dtype=torch.float32, x_dtype=torch.bfloat16, batch=1, tokens=1, pool=None):
        state = torch.empty(3, 4, headdim, dstate, dtype=dtype) if pool is None else pool
        *kept, _ = hybrid_ops.ReplayCache.new(3, 4, headdim, 2, dstate, dtype=x_dtype)
        return csrc.refusal(state, *kept, tokens, batch, ())

    assert refusal() is None
    assert refusal(headdim=80, dstate=256, dtype=torch.float16, tokens=16) is None
    assert "dstate 64, 128, 256, not 16" in refusal(dstate=16)
    assert "float64 for x" in refusal(x_dtype=torch.float64)
    assert "float64 for state" in refusal(dtype=torch.float64)
    assert "rows of cache.x" in refusal(headdim=12)
    assert "65535 sequences" in refusal(batch=65536)
    assert "16 tokens at once, not 17" in refusal(tokens=17)
    for pool in (torch.empty(3, 4, 64, 129)[..., 1:], torch.empty(3, 4, 128, 64).mT):
        assert "rows of state" in refusal(pool=pool)


def test_what_the_kernel_of_one_token_takes():
    def takes(state_dtype=torch.bfloat16, dtype=torch.bfloat16, steps=1, offset=0, pool=None):
        state = torch.empty(3, 4, 64, 128, dtype=state_dtype) if pool is None else pool
        cache = hybrid_ops.ReplayCache.new(3, 4, 64, 2, 128, dtype=dtype)
        x, z = torch.empty(2, 2, 4, 64 + offset, dtype=dtype)[..., offset:]
        B, C = torch.empty(2, 2, 2, 128 + offset, dtype=dtype)[..., offset:]
        return csrc.takes_one(state, cache.x, steps, (x, None, z), (B, C))

    assert takes()
    assert takes(torch.float16)
    assert not takes(torch.float32)
    assert not takes(dtype=torch.float16)
    assert not takes(steps=2)
    assert not takes(offset=2)
    assert not takes(offset=1)
    assert takes(pool=torch.empty(3, 8, 64, 128, dtype=torch.float16)[:, ::2])
    assert not takes(pool=torch.empty(3, 4, 64, 256, dtype=torch.float16)[..., :128])
    x = torch.empty(2, 4, 66, dtype=torch.bfloat16)[..., 2:]  # pairs suffice for x
    cache = hybrid_ops.ReplayCache.new(3, 4, 64, 2, 128)
    assert csrc.takes_one(torch.empty(3, 4, 64, 128).half(), cache.x.bfloat16(), 1, (x,), ())


@pytest.mark.gpu
@settings(max_examples=30)
@given(case=cases([torch.bfloat16, torch.float16], headdims=(8, 24, 64, 136), max_groups=3, steps=24))
def test_stream_of_one_token_gpu(case):
    one = dict(dtype=torch.bfloat16, tokens=[None, 1] * 12)
    check_stream(for_cuda(case) | one, implementation("cuda"), "cuda")


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "ssd_replay.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    for function in (hybrid_ops.ssd_replay_update, hybrid_ops.ssd_replay_materialize):
        for example in doctest.DocTestFinder(recurse=False).find(function, globs=names):
            results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 3
    assert all(r.attempted and not r.failed for r in results), results
