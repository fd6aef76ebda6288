import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import hybrid_ops
from hybrid_ops._csrc import ssd_update as csrc
from hybrid_ops.reference import ssd_update as reference
from hybrid_ops.triton_kernels import ssd_update as kernels

from .budget import to_numpy
from .ssd_update_cases import (
    CPU_DTYPES,
    INTERPRETER_DTYPES,
    NULL,
    SCALED,
    SIZES,
    cases,
    check_update,
    decoder,
    for_cuda,
    implementation,
    oracle,
)
from .tensors import int32

GPU_IMPLS = ["triton", "cuda"]


@given(case=cases(CPU_DTYPES, scaled_dtypes=SCALED))
def test_update(case):
    check_update(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES, scaled_dtypes=SCALED))
def test_update_interpreter(case):
    check_update(case, "triton")


@pytest.mark.gpu
@settings(max_examples=26)
@given(
    case=cases(
        CPU_DTYPES,
        headdims=(8, 64, 80),
        dstates=(16, 20, 96, 128, 256),
        max_batch=4,
        max_groups=3,
        scaled_dtypes=SCALED,
    )
)
def test_update_gpu(case):
    check_update(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=40)
@given(case=cases(CPU_DTYPES, headdims=(8, 24, 64, 80), max_batch=4, max_groups=3, scaled_dtypes=SCALED))
def test_update_cuda_gpu(case):
    check_update(for_cuda(case), implementation("cuda"), "cuda")


MANY = dict(
    seed=0,
    dtype=torch.bfloat16,
    small_dtype=torch.float32,
    form="single",
    lengths=[1] * 300,
    T=1,
    ngroups=1,
    heads_per_group=2,
    headdim=64,
    dstate=128,
    regime="usual",
    D="head",
    z=True,
    dt_bias=True,
    dt_softplus=True,
    dt_limit=(0.0, math.inf),
    slots="both",
    padded=True,
    update_state=True,
    strided=True,
    pool="contiguous",
    out=None,
)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", SCALED)
def test_many_sequences_gpu(state_dtype):
    """So many that a CTA of the CUDA kernel asks L2 for another one's states."""
    check_update(MANY | dict(state_dtype=state_dtype), implementation("cuda"), "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES))
def test_update_torch_on_gpu(case):
    check_update(case, "torch", "cuda")


# --- several tokens a call ---


def check_tokens_at_once(impl, device="cpu"):
    """With a float32 pool, T tokens in one call = one call each, bit for bit; packed = padded."""
    x, dt, A, B, C, z, D = decoder(0, 3, 4, device)
    pool = torch.randn(3, *SIZES[device], device=device)
    at_once, each, packed = (pool.clone() for _ in range(3))
    y = hybrid_ops.ssd_state_update(at_once, x, dt, A, B, C, D=D, z=z, dt_softplus=True, impl=impl)
    for t in range(4):
        arguments = (each, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        one = hybrid_ops.ssd_state_update(*arguments, D=D, z=z[:, t], dt_softplus=True, impl=impl)
        assert torch.equal(one, y[:, t])
    assert torch.equal(each, at_once)
    flat = [t.flatten(0, 1) for t in (x, dt, B, C, z)]
    arguments = (packed, *flat[:2], A, *flat[2:4])
    options = dict(D=D, z=flat[4], dt_softplus=True, cu_seqlens=int32(0, 4, 8, 12).to(device), impl=impl)
    assert torch.equal(hybrid_ops.ssd_state_update(*arguments, **options), y.flatten(0, 1))
    assert torch.equal(packed, at_once)


def check_speculation(impl, device="cpu"):
    """Drafts with a state stored after each, some accepted: the same outputs as the accepted stream token by token."""
    batch, drafts, length = 2, 3, 12
    x, dt, A, B, C, _, _ = decoder(1, batch, length, device)
    noise = decoder(2, batch, drafts, device)
    plain = torch.zeros(batch, *SIZES[device], device=device)
    expected = torch.stack(
        [hybrid_ops.ssd_state_update(plain, x[:, t], dt[:, t], A, B[:, t], C[:, t], impl=impl) for t in range(length)],
        1,
    )
    pool = torch.zeros(batch * drafts, *SIZES[device], device=device)
    table = torch.arange(batch * drafts, dtype=torch.int32).view(batch, drafts).to(device)
    position, accepted = torch.zeros(batch, dtype=torch.long), torch.ones(batch, dtype=torch.int32)
    for step in range(5):
        now = torch.tensor([1 + (step + b) % drafts for b in range(batch)])
        inputs = [n.clone() for n in (noise[0], noise[1], noise[3], noise[4])]  # what is rejected is noise
        for whole, part in zip((x, dt, B, C), inputs, strict=True):
            for b in range(batch):
                part[b, : now[b]] = whole[b, position[b] : position[b] + now[b]]
        options = dict(read_slots=table, num_accepted=accepted.to(device), write_slots=table, impl=impl)
        y = hybrid_ops.ssd_state_update(pool, inputs[0], inputs[1], A, *inputs[2:], **options)
        for b in range(batch):
            assert torch.equal(y[b, : now[b]], expected[b, position[b] : position[b] + now[b]])
        position, accepted = position + now, now.int()


def test_several_tokens():
    check_tokens_at_once("torch")
    check_speculation("torch")


@pytest.mark.interpreter
def test_several_tokens_interpreter():
    check_tokens_at_once("triton")
    check_speculation("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_several_tokens_gpu(impl):
    check_tokens_at_once(implementation(impl), "cuda")
    check_speculation(impl, "cuda")


def check_padding(impl, device="cpu"):
    """Read, null_slot is a sequence of padding, whatever its write slot; written, it only drops that state."""
    x, dt, A, B, C, _, _ = decoder(9, 3, 2, device)
    before = torch.randn(8, *SIZES[device], device=device)
    for write in (int32(4, 5, NULL), torch.stack([int32(4, 5, NULL), int32(6, 7, NULL)], 1)):
        pool = before.clone()
        read, write = int32(1, NULL, 2).to(device), write.to(device)
        options = dict(write_slots=write, null_slot=NULL, impl=impl)
        y = hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, read_slots=read, **options)
        alone = before[[1, 2]]
        expected = hybrid_ops.ssd_state_update(alone, x[[0, 2]], dt[[0, 2]], A, B[[0, 2]], C[[0, 2]], impl=impl)
        assert torch.equal(y[[0, 2]], expected)
        assert (y[1] == 0).all()
        last = 4 if write.dim() == 1 else 6
        assert torch.equal(pool[last], alone[0])
        kept = [s for s in range(8) if s != last and (s != 4 or write.dim() == 1)]
        assert torch.equal(pool[kept], before[kept])


def test_padding():
    check_padding("torch")


@pytest.mark.interpreter
def test_padding_interpreter():
    check_padding("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_padding_gpu(impl):
    check_padding(implementation(impl), "cuda")


# --- what only the device sees ---


def raw(impl, state, x, dt, A, B, C, y, *, read=None, write=None, accepted=None, cu_seqlens=None):
    """The operator behind the checks of the public function."""
    limits = (False, 0.0, math.inf, True, -1, impl)
    op = torch.ops.hybrid_ops.ssd_state_update
    op(state, x, dt, A, B, C, None, None, None, read, write, accepted, cu_seqlens, None, None, y, *limits)


def check_bad_indices(impl, device):
    """Values that the host cannot see are skipped or clamped: only good sequences and slots change anything."""
    x, dt, A, B, C, _, _ = decoder(3, 4, 3, device)
    before = torch.randn(3, *SIZES[device], device=device)
    huge = 2**31 - 1

    pool, y = before.clone(), torch.full_like(x, float("nan"))
    read = int32(-7, 2, huge, 3).to(device)
    raw(impl, pool, x, dt, A, B, C, y, read=read)
    twin = before[2:].clone()
    expected = hybrid_ops.ssd_state_update(twin, x[1:2], dt[1:2], A, B[1:2], C[1:2], impl="torch")
    torch.testing.assert_close(y[1:2], expected)
    torch.testing.assert_close(pool, torch.cat([before[:2], twin]))
    assert (y[[0, 2, 3]] == 0).all()

    pool, y = before.clone(), torch.full_like(x, float("nan"))
    write = torch.tensor([[-9, huge, 3], [-1, 2, 3], [3, 3, 3], [3, 3, 3]], dtype=torch.int32, device=device)
    table, accepted = write * 0 + 1, int32(1, 3, 0, 4).to(device)
    raw(impl, pool, x, dt, A, B, C, y, read=table, write=write, accepted=accepted)
    assert (y[:2] != 0).all()
    assert (y[2:] == 0).all()
    assert torch.equal(pool[:2], before[:2])
    assert not torch.equal(pool[2], before[2])

    pool = before.clone()
    flat = [t.flatten(0, 1) for t in (x, dt, B, C)]
    y = torch.full_like(flat[0], float("nan"))
    for bounds in ((-5, 2, 1, huge), (0, 2, 2, 7)):
        cu_seqlens = int32(*bounds).to(device)
        raw(impl, pool, flat[0], flat[1], A, *flat[2:], y, cu_seqlens=cu_seqlens)
        assert torch.equal(pool[1], before[1])  # a sequence without tokens
        assert torch.isfinite(y).all()
    assert (y[7:] == 0).all()
    assert (y[:7] != 0).all()


@pytest.mark.interpreter
def test_bad_indices_interpreter():
    check_bad_indices("triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_bad_indices_gpu(impl):
    check_bad_indices(implementation(impl), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_more_than_2_31_elements(impl):
    implementation(impl)
    H, P, N = 128, 64, 128
    nslots = 2**31 // (H * P * N) + 3
    pool = torch.zeros(nslots, H, P, N, dtype=torch.float16, device="cuda")
    pool[-2:].normal_()
    small, wide = pool[-2:].clone(), pool[-2:].float()
    x, dt, A, B, C, _, _ = decoder(4, 2, 1, "cuda", H, P, N)
    x, dt, B, C = (t[:, 0] for t in (x, dt, B, C))
    swapped, few = int32(nslots - 1, nslots - 2).cuda(), int32(1, 0).cuda()
    y = hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, read_slots=swapped, impl=impl)
    expected = hybrid_ops.ssd_state_update(small, x, dt, A, B, C, read_slots=few, impl="torch")
    sums = N * 2.0**-24 * float(expected.abs().max())  # in another order
    torch.testing.assert_close(y, expected, rtol=0, atol=sums)
    torch.testing.assert_close(pool[-2:], small)
    assert not pool[:-2].any()
    pool[-2:] = wide.half()
    seed = torch.tensor([5], device="cuda")
    random = dict(rounding="stochastic", seed=seed, impl=impl)
    hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, read_slots=swapped, **random)
    hybrid_ops.ssd_state_update(wide, x, dt, A, B, C, read_slots=few, impl=impl)
    expected = reference.stochastic_store(5, "float16")(wide[1].cpu().numpy(), nslots - 1, 0)
    np.testing.assert_array_equal(to_numpy(pool[-1]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_cuda_graph(impl):
    batch, impl = 4, implementation(impl)
    x, dt, A, B, C, z, D = decoder(5, batch, 1, "cuda")
    pool = torch.randn(9, *SIZES["cuda"], device="cuda").half()
    slots, seed = torch.arange(batch, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    options = dict(D=D, z=z, dt_softplus=True, read_slots=slots, rounding="stochastic", seed=seed, impl=impl)
    hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, **options)
    for step in range(3):
        x.normal_(), dt.uniform_(), seed.fill_(2**40 + step)
        slots.copy_(torch.tensor([step, 8, 5 + step % 2, -1 if step else 3]))
        twin = pool.clone()
        expected = hybrid_ops.ssd_state_update(twin, x, dt, A, B, C, **options)
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(pool, twin)


# --- the frame ---

H, P, N, G = 4, 8, 16, 2


def good():
    x, dt, A, B, C, _, _ = decoder(6, 2, 3, "cpu", H, P, N)
    return dict(state=torch.zeros(5, H, P, N), x=x, dt=dt, A=A, B=B, C=C)


def packed():
    arguments = good()
    return arguments | {k: arguments[k].flatten(0, 1) for k in ("x", "dt", "B", "C")}


TABLE = torch.arange(2, dtype=torch.int32).view(2, 1)
SEED = torch.tensor([1])
BAD = [
    (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
    (dict(x=torch.ones(H, P)), ValueError, r"x must have shape \(batch, nheads, headdim\) or .*got \(4, 8\)"),
    (dict(x=torch.ones(2, 3, H, P).int()), TypeError, "x must have dtype .* got int32"),
    (dict(cu_seqlens=int32(0, 2)), ValueError, r"x must have shape \(total, nheads, headdim\) with cu_seqlens, got"),
    (dict(dt=torch.ones(2, 3, 3)), ValueError, r"dt must have shape \(2, 3, 4\), got \(2, 3, 3\)"),
    (dict(A=torch.ones(3)), ValueError, r"A must have shape \(4,\), got \(3,\)"),
    (dict(A=torch.ones(H).bfloat16()), TypeError, "A must have dtype float32, got bfloat16"),
    (dict(B=torch.ones(2, 3, 3, N)), ValueError, "B must have a number of groups that divides the 4 heads"),
    (dict(B=torch.ones(2, 3, G, 0)), ValueError, "B must have dstate >= 1"),
    (dict(B=torch.ones(2, 3, G, N).half()), TypeError, "B must have dtype float32, got float16"),
    (dict(C=torch.ones(2, 3, 1, N)), ValueError, r"C must have shape \(2, 3, 2, 16\), got \(2, 3, 1, 16\)"),
    (dict(state=torch.zeros(5, H, P, 8)), ValueError, r"state must have shape \(\*, 4, 8, 16\), got \(5, 4, 8, 8\)"),
    (dict(state=torch.zeros(5, H, P, N, dtype=torch.int16)), TypeError, "state must have dtype .* got int16"),
    (
        dict(state=torch.zeros(5, H, P, N, dtype=torch.int8)),
        ValueError,
        r"state_scale must be \(nslots, nheads, headdim\) with a state in int8, got None",
    ),
    (
        dict(state=torch.zeros(5, H, P, N, dtype=torch.int8), state_scale=torch.ones(5, H)),
        ValueError,
        r"state_scale must have shape \(5, 4, 8\), got \(5, 4\)",
    ),
    (dict(state=torch.zeros(5, H, P, N, device="meta")), ValueError, "state must be on cpu, got meta"),
    (dict(state=torch.zeros(1, H, P, N).expand(5, H, P, N)), ValueError, "state must not have expanded dimensions"),
    (dict(state=torch.zeros(1, H, P, N)), ValueError, "state must have a row for each of the 2 sequences"),
    (dict(D=torch.ones(P)), ValueError, r"D must have shape \(4,\), got \(8,\)"),
    (dict(D=torch.ones(H, P, 1)), ValueError, r"D must have shape \(nheads,\) or \(nheads, headdim\), got \(4, 8, 1\)"),
    (dict(z=torch.ones(2, H, P)), ValueError, r"z must have shape \(2, 3, 4, 8\), got \(2, 4, 8\)"),
    (dict(dt_bias=torch.ones(1)), ValueError, r"dt_bias must have shape \(4,\), got \(1,\)"),
    (dict(dt_limit=(1.0, 0.0)), ValueError, r"dt_limit must be \(low, high\) .* got \(1.0, 0.0\)"),
    (dict(read_slots=int32(0)), ValueError, r"read_slots must have shape \(2,\), got \(1,\)"),
    (dict(read_slots=torch.tensor([0, 1])), TypeError, "read_slots must have dtype int32, got int64"),
    (dict(read_slots=int32(0, 5)), ValueError, r"read_slots must be in \[0, 5\) or null_slot=-1, got 5"),
    (dict(read_slots=int32(1, 1)), ValueError, r"read_slots without write_slots must be distinct, got \[1, 1\]"),
    (dict(read_slots=TABLE), ValueError, r"read_slots must have shape \(2,\), got \(2, 1\)"),
    (dict(write_slots=int32(3, 3)), ValueError, r"write_slots must be distinct, got \[3, 3\]"),
    (dict(write_slots=int32(1, 0)), ValueError, "write_slots must not hold a slot that another sequence reads, got 1"),
    (dict(read_slots=int32(2, 3), write_slots=int32(4, 2)), ValueError, "another sequence reads, got 2"),
    (dict(write_slots=TABLE), ValueError, r"write_slots must have shape \(2, 3\), got \(2, 1\)"),
    (dict(write_slots=int32(0, 1), update_state=False), ValueError, "write_slots must be None with update_state=False"),
    (dict(num_accepted=int32(1, 1)), ValueError, r"read_slots must be \(batch, W\) with num_accepted, got None"),
    (dict(read_slots=TABLE, num_accepted=int32(1, 2)), ValueError, r"num_accepted must be in \[1, 1\], got 2"),
    (dict(read_slots=TABLE, num_accepted=int32(0, 1)), ValueError, r"num_accepted must be in \[1, 1\], got 0"),
    (packed() | dict(cu_seqlens=int32(0, 5)), ValueError, "cu_seqlens must end at the number of tokens, 6, got 5"),
    (packed() | dict(cu_seqlens=int32(0, 4, 2, 6)), ValueError, "cu_seqlens must not fall"),
    (
        packed() | dict(cu_seqlens=int32(0, 4, 6), write_slots=TABLE),
        ValueError,
        r"write_slots must have a column for each of the 4 tokens of the longest sequence, got \(2, 1\)",
    ),
    (dict(state_scale=torch.ones(5, H, P)), ValueError, "state_scale must be None with a state in float32, got a"),
    (dict(rounding="up"), ValueError, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
    (dict(rounding="stochastic", seed=SEED), TypeError, "state must have dtype float16 or bfloat16, got float32"),
    (dict(seed=SEED), ValueError, "seed must be None with rounding='nearest', got a tensor"),
    (dict(rounding="stochastic", state=torch.zeros(5, H, P, N).half()), ValueError, "seed must be .*, got None"),
    (
        dict(rounding="stochastic", state=torch.zeros(5, H, P, N).half(), seed=SEED.int()),
        TypeError,
        "seed must have dtype int64, got int32",
    ),
    (dict(out=torch.ones(2, H, P)), ValueError, r"out must have shape \(2, 3, 4, 8\), got \(2, 4, 8\)"),
    (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    (dict(impl="triton"), RuntimeError, "impl='triton' needs CUDA tensors"),
    (dict(D=torch.ones(H, requires_grad=True)), ValueError, "D must not require a gradient, got one that does"),
    (dict(A=torch.ones(H, requires_grad=True)), ValueError, "A must not require a gradient, got one that does"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = good() | change
    before = arguments["state"].clone()
    with pytest.raises(error, match=message):
        hybrid_ops.ssd_state_update(**arguments)
    if before.device.type == "cpu":
        assert torch.equal(arguments["state"], before)


def test_float64():
    x, dt, A, B, C, z, D = (t.double() for t in decoder(7, 2, 3, "cpu"))
    pool = torch.randn(2, *SIZES["cpu"], dtype=torch.float64)
    ref, ref_pool = oracle((pool, x, dt, A, B, C), dict(D=D, z=z, dt_softplus=True), np.float64)
    y = hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, D=D, z=z, dt_softplus=True)
    np.testing.assert_allclose(y.numpy(), ref, rtol=0, atol=1e-12)  # float64 throughout
    np.testing.assert_allclose(pool.numpy(), ref_pool, rtol=0, atol=1e-12)


def launch(dtype, state_dtype, headdim, dstate, full):
    batch, nheads, ngroups = 4, 16, 8
    tokens = (batch,) if full else (batch, 1)
    state = torch.empty(9, nheads, headdim, dstate, dtype=state_dtype)
    x, B, dt = (torch.empty(*tokens, *s, dtype=dtype) for s in ((nheads, headdim), (ngroups, dstate), (nheads,)))
    A, index = torch.empty(nheads), torch.empty(batch, 2, dtype=torch.int32)
    limits = (True, 0.0, math.inf, True, -1)
    if full:  # packed, drafts, everything that there is
        seed = None if state_dtype == torch.float32 else SEED
        slots, bounds = (index, index, index[:, 0]), torch.empty(batch + 1, dtype=torch.int32)
        kernels.ssd_state_update(state, x, dt, A, B, B, A, x, A, *slots, bounds, seed, None, x, *limits)
    else:
        nothing = (None,) * 9
        kernels.ssd_state_update(state, x, dt, A, B, B, *nothing, x, *limits)


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
    op = torch.ops.hybrid_ops.ssd_state_update.default
    x, dt, A, B, C, z, D = decoder(8, 2, 3, "cpu")
    limits = (True, 0.0, 1.0, True, -1, "torch")
    pool = torch.randn(7, *SIZES["cpu"])
    table, accepted = torch.arange(6, dtype=torch.int32).view(2, 3), int32(1, 3)
    slots = (table, table, accepted)
    torch.library.opcheck(op, (pool, x, dt, A, B, C, D, z, A, *slots, None, None, None, torch.empty_like(x), *limits))
    flat = (x.flatten(0, 1), dt.flatten(0, 1), A, B.flatten(0, 1), C.flatten(0, 1))
    rest = (None, None, None, None, None, None, int32(0, 2, 6), SEED, None, torch.empty_like(flat[0]))
    torch.library.opcheck(op, (pool.half(), *flat, *rest, *limits))


def compiled_step(state, x, dt, A, B, C, z, D, read, write):
    y = hybrid_ops.ssd_state_update(
        state, x * 2, dt, A, B, C, D=D, z=z, dt_bias=A, dt_softplus=True, read_slots=read, write_slots=write
    )
    return y + state.mean()  # reads the pool after the update


@pytest.mark.parametrize(
    ("backend", "grow"), [("aot_eager", "batch"), ("aot_eager", "T"), ("inductor", "batch")], ids=lambda p: p
)
def test_torch_compile(backend, grow, compile_once):
    def inputs(n):
        x, dt, A, B, C, z, D = decoder(n, *((n, 3) if grow == "batch" else (4, n)), "cpu", H, P, N)
        slots = torch.randperm(40)[: 2 * len(x)].int()
        return torch.randn(40, H, P, N), x, dt, A, B, C, z, D, slots[: len(x)], slots[len(x) :]

    compile_once(compiled_step, backend, inputs, grads=(False,))


def compiled_drafts(state, x, dt, A, B, C, table, accepted, cu_seqlens, seed):
    options = dict(read_slots=table, write_slots=table, num_accepted=accepted, cu_seqlens=cu_seqlens)
    return hybrid_ops.ssd_state_update(state, x, dt, A, B, C, rounding="stochastic", seed=seed, **options) * 2


def test_torch_compile_packed(compile_once):
    def inputs(n):
        x, dt, A, B, C, _, _ = decoder(n, 1, n, "cpu", H, P, N)
        table = torch.arange(40, dtype=torch.int32).view(2, 20)
        return torch.randn(40, H, P, N).half(), x[0], dt[0], A, B[0], C[0], table, int32(2, 1), int32(0, 2, n), SEED

    compile_once(compiled_drafts, "aot_eager", inputs, grads=(False,))


def test_explain():
    assert hybrid_ops.explain("ssd_state_update", device="cpu").impl == "torch"
    with pytest.raises(RuntimeError, match="dstate 64, 128, 256, not 16"):
        hybrid_ops.explain("ssd_state_update", impl="cuda", dstate=16)


def test_what_the_cuda_kernel_takes():
    def refusal(*shape, dtype=torch.float32, x=None, batch=1):
        state = torch.empty(shape, dtype=dtype)
        return csrc.refusal(torch.empty(batch, 4, 8) if x is None else x, state, (), batch)

    assert refusal(3, 4, 8, 128) is None
    assert refusal(3, 4, 8, 64, dtype=torch.float16) is None
    assert "dstate 64, 128, 256, not 16" in refusal(3, 4, 8, 16)
    assert "float64 for state" in refusal(3, 4, 8, 128, dtype=torch.float64)
    assert "grids" in refusal(3, 4, 8, 128, batch=65536)
    assert "32 bits" in refusal(
        3, 4, 8, 128, x=torch.empty(2, 4, 8, device="meta").as_strided((2, 4, 8), (2**31, 8, 1))
    )
    for state in (torch.empty(3, 4, 8, 129)[..., 1:], torch.empty(3, 4, 128, 8).mT):
        assert "16 bytes" in csrc.refusal(torch.empty(1, 4, 8), state, (), 1)


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "ssd_update.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    for example in doctest.DocTestFinder(recurse=False).find(hybrid_ops.ssd_state_update, globs=names):
        results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 2
    assert all(r.attempted and not r.failed for r in results), results
