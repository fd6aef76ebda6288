import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops._torch import ssd_update as torch_update
from hybrid_ops.reference import ssd_update as reference
from hybrid_ops.triton_kernels import ssd_update as kernels

from .budget import assert_within, to_numpy
from .test_conv1d_update import int32, to_device

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16
NULL = 3  # a row of the pool that stands for padding, where slots are given
NARROW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@st.composite
def cases(draw, dtypes, headdims=(8, 24), dstates=(16, 20, 48), max_batch=3, max_groups=2):
    batch = draw(st.sampled_from([0, 1, 2, max_batch]))
    form = draw(st.sampled_from(["single", "tokens", "packed"]))
    T = draw(st.sampled_from([0, 1, 2, 4]))
    slots = draw(st.sampled_from([None, "read", "write", "both", "each", "accepted"]))
    dtype = draw(st.sampled_from(dtypes))
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=dtype,
        state_dtype=draw(st.sampled_from(dtypes)),
        small_dtype=draw(st.sampled_from([torch.float32, dtype])),
        form=form,
        lengths={
            "single": [1] * batch,
            "tokens": [T] * batch,
            "packed": draw(st.lists(st.sampled_from([0, 1, 3]), min_size=batch, max_size=batch)),
        }[form],
        T=T,
        ngroups=draw(st.integers(1, max_groups)),
        heads_per_group=draw(st.sampled_from([1, 2])),
        headdim=draw(st.sampled_from(headdims)),
        dstate=draw(st.sampled_from(dstates)),
        # dt |A|: as in a trained model, up to 80 a token, no step at all, steps above softplus' usual threshold
        regime=draw(st.sampled_from(["usual", "usual", "steep", "zero", "large"])),
        D=draw(st.sampled_from([None, "head", "feature"])),
        z=draw(st.booleans()),
        dt_bias=draw(st.booleans()),
        dt_softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from([(0.0, math.inf), (0.0, math.inf), (0.25, 0.5)])),
        slots=slots,
        padded=draw(st.booleans()),
        update_state=draw(st.booleans()) if slots in (None, "read", "accepted") else True,
        strided=draw(st.booleans()),
        pool=draw(st.sampled_from(["contiguous", "transposed", "slice"])),
        out=draw(st.sampled_from([None, "fresh", "x"])),
    )


def problem(case):
    """(state, x, dt, A, B, C) and options, on the CPU. x, z, B, C, dt may be slices of one wider tensor."""
    generator = torch.Generator().manual_seed(case["seed"])
    lengths, G, P, N = case["lengths"], case["ngroups"], case["headdim"], case["dstate"]
    batch, H = len(lengths), G * case["heads_per_group"]
    tokens = {"single": (batch,), "tokens": (batch, case["T"]), "packed": (sum(lengths),)}[case["form"]]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    A = -torch.exp(rand(H) * math.log(16))  # 1 to 16, as Mamba-2 initialises it
    dt = rand(*tokens, H) * {"usual": 0.2, "steep": 80 / 16, "zero": 0.0, "large": 40.0}[case["regime"]]
    if case["regime"] == "usual" and case["dt_softplus"]:
        dt = dt * 60 - 10  # softplus of it reaches down to 5e-5
    sizes = [H * P, H * P, G * N, G * N]
    wide = randn(*tokens, sum(sizes)).to(case["dtype"])
    parts = [part if case["strided"] else part.contiguous() for part in wide.split(sizes, -1)]
    x, z = (part.unflatten(-1, (H, P)) for part in parts[:2])
    B, C = (part.unflatten(-1, (G, N)) for part in parts[2:])
    dt = dt.to(case["small_dtype"])
    if case["strided"]:
        dt = torch.cat([dt, dt], -1)[..., :H]

    width = {"single": 1, "tokens": case["T"], "packed": max([1, *lengths])}[case["form"]]
    nslots = batch * (width + 2) + 5
    shape = {"contiguous": (nslots, H, P, N), "transposed": (nslots, N, H, P)}
    state = randn(*shape.get(case["pool"], (nslots, 2 * H, P, N + 3))).to(case["state_dtype"])
    if case["pool"] == "transposed":
        state = state.permute(0, 2, 3, 1)
    elif case["pool"] == "slice":
        state = state[:, ::2, :, 3:]

    options = dict(dt_softplus=case["dt_softplus"], dt_limit=case["dt_limit"], update_state=case["update_state"])
    if case["D"]:
        options["D"] = randn(*((H,) if case["D"] == "head" else (H, P)))
    if case["z"]:
        options["z"] = z
    if case["dt_bias"]:
        options["dt_bias"] = randn(H).to(case["small_dtype"])
    free = torch.tensor([s for s in range(batch, nslots) if s != NULL])  # rows that read_slots=None does not read
    free = free[torch.randperm(len(free), generator=generator)].int()

    def padded(slots):
        if case["padded"]:
            slots[rand(*slots.shape) < 0.4] = NULL
        return slots

    if case["slots"] in ("read", "both"):
        options["read_slots"] = padded(free[:batch].clone())
    if case["slots"] in ("write", "both"):
        options["write_slots"] = padded(free[batch : 2 * batch].clone())
    if case["slots"] in ("each", "accepted"):
        table = padded(free[: batch * width].clone().view(batch, width))
        if case["slots"] == "each" or (case["update_state"] and width):
            options["write_slots"] = table
        if case["slots"] == "accepted" and width:
            options["read_slots"] = table
            options["num_accepted"] = torch.randint(1, width + 1, (batch,), generator=generator).int()
    if case["slots"]:
        options["null_slot"] = NULL
    if case["form"] == "packed":
        options["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return (state, x, dt, A, B, C), options


def oracle(arguments, options, dtype, store=lambda S, slot, t: S):
    def array(value):
        if not isinstance(value, torch.Tensor):
            return value
        return to_numpy(value, dtype) if value.is_floating_point() else value.numpy()

    named = {k: array(v) for k, v in options.items()}
    return reference.ssd_state_update(*(array(a) for a in arguments), dtype=dtype, store=store, **named)


def check_update(case, impl, device="cpu"):
    arguments, options = problem(case)
    written = set()

    def store(S, slot, t):
        written.add(slot)
        return S

    ref, ref_pool = oracle(arguments, options, np.float64, store)
    base, base_pool = oracle(arguments, options, np.float32)

    before = arguments[0].clone()
    state, x, *rest = (to_device(a, device) for a in arguments)
    options = {k: to_device(v, device) for k, v in options.items()}
    out = {"fresh": torch.full_like(x, float("nan")), "x": x}.get(case["out"])
    y = hybrid_ops.ssd_state_update(state, x, *rest, out=out, impl=impl, **options)
    assert out is None or y is out
    assert_within("y", y, ref, base, case["dtype"], axis=-2)
    written = sorted(written)
    if written:  # per slot and head
        heads = (len(written) * state.shape[1], *state.shape[2:])
        assert_within(
            "state",
            state.cpu()[written].reshape(heads),
            ref_pool[written].reshape(heads),
            base_pool[written].reshape(heads),
            max(case["dtype"], case["state_dtype"], key=lambda d: torch.finfo(d).eps),
            axis=0,
        )
    others = [s for s in range(len(before)) if s not in written]
    assert torch.equal(state.cpu()[others], before[others])


@given(case=cases(CPU_DTYPES))
def test_update(case):
    check_update(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(INTERPRETER_DTYPES))
def test_update_interpreter(case):
    check_update(case, "triton")


@pytest.mark.gpu
@settings(max_examples=150)
@given(case=cases(CPU_DTYPES, headdims=(8, 64, 80), dstates=(16, 20, 96, 128, 256), max_batch=20, max_groups=4))
def test_update_gpu(case):
    check_update(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES))
def test_update_torch_on_gpu(case):
    check_update(case, "torch", "cuda")


# --- rounding: the reference (in floating point) = torch = Triton (in integers), bit for bit ---


@triton.jit
def round_kernel(v_ptr, bits_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, bits = tl.load(v_ptr + i, i < size, other=0.0), tl.load(bits_ptr + i, i < size, other=0)
    tl.store(out_ptr + i, kernels.round_stochastic(v, bits, out_ptr.dtype.element_ty), i < size)


@triton.jit
def bits_kernel(
    seed_ptr, row_ptr, out_ptr, t, dstate, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    bits = kernels.random_bits(tl.load(seed_ptr), tl.load(row_ptr + p), dstate, t, BLOCK_N, ALIGNED)
    tl.store(out_ptr + p[:, None] * BLOCK_N + n[None, :], bits.to(tl.int32))


def values_of_every_class():
    """float32: signed zeros, subnormal numbers of both formats and of float32, ties, maxima and beyond, inf, NaN."""
    generator = torch.Generator().manual_seed(0)
    special = [0.0, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-25]
    special += [1.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 2 - 2.0**-23, 65504.0, 65503.99, 65519.0, 65520.0]
    special += [65536.0, 131072.0, 3.3895314e38, 3.4e38, math.inf, math.nan]
    exponent = torch.arange(0, 256).repeat_interleave(24)  # all of them, with random mantissas
    random = (exponent << 23 | torch.randint(0, 2**23, exponent.shape, generator=generator)).int().view(torch.float32)
    exact = torch.randn(500, generator=generator).half().float()  # on the grid already
    values = torch.cat([torch.tensor(special), random, exact, exact * 2.0**-16])
    return torch.cat([values, -values])


def assert_same_bits(got, expected):
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def check_rounding(dtype, impl, device="cpu"):
    v = values_of_every_class()
    random = torch.randint(0, 2**16, v.shape, generator=torch.Generator().manual_seed(1))
    for bits in (random, *(torch.full(v.shape, b) for b in (0, 1, 0x7FFF, 0x8000, 0xFFFF))):
        expected = torch.from_numpy(reference.round_stochastic(v.numpy(), bits.numpy(), NARROW[dtype]))
        # float64 to the narrow type changes nothing: the reference returns values of its grid
        assert torch.equal(expected.to(dtype).double().nan_to_num(7.0), expected.nan_to_num(7.0))
        if impl == "torch":
            got = torch_update.round_stochastic(v.to(device), bits.to(device), dtype)
        else:
            got = torch.empty(v.shape, dtype=dtype, device=device)
            grid = (triton.cdiv(len(v), 1024),)
            round_kernel[grid](v.to(device), bits.int().to(device), got, len(v), BLOCK=1024)
        assert_same_bits(got.cpu(), expected.to(dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding(dtype):
    check_rounding(dtype, "torch")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_interpreter(dtype):
    check_rounding(dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_gpu(dtype, impl):
    check_rounding(dtype, impl, "cuda")


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_unbiased(dtype):
    """Over all 2^16 bits: the mean is v to 2^-16 steps, the variance p (1 - p)."""
    bits = torch.arange(2**16)
    for base, step in ((1.0, torch.finfo(dtype).eps), (-3.0, 2 * torch.finfo(dtype).eps)):
        for sixteenths in (0, 1, 12345, 2**15, 2**16 - 1):
            p = sixteenths // 2**9 / 2**7  # float32 holds 7 more bits than bfloat16 + 9: a fraction that both can hold
            v = torch.full((2**16,), base + math.copysign(p * step, base))
            rounded = torch_update.round_stochastic(v, bits, dtype).double()
            assert abs(rounded.mean() - v[0].double()) <= step * 2.0**-16
            assert abs(rounded.var(correction=0) / step**2 - p * (1 - p)) < 1e-9


def test_philox():
    """The known answers that Random123 ships, from the reference and from torch."""
    answers = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0xA4093822, 0x299F31D0, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344): (
            *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    }
    for (k0, k1, *counter), words in answers.items():
        assert tuple(int(w) for w in reference.philox4x32_10((k0, k1), counter)) == words
        seed = torch.tensor([k1 << 32 | k0], dtype=torch.uint64).view(torch.int64)
        got = torch_update.philox4x32_10(seed, tuple(torch.tensor([c]) for c in counter))
        assert tuple(int(w) for w in got) == words


def check_random_bits(impl, device="cpu"):
    for seed in (0, 1, -1, 0x1234_5678_9ABC_DEF0):
        for t in (0, 5):
            for dstate, rows in ((32, [0, 32, 2**31 - 32, 2**36 + 64]), (20, [0, 20, 40, 2**33 + 4])):
                if impl == "torch" and dstate == 20:
                    continue  # asks for whole slots, which begin at multiples of 8
                row = torch.tensor(rows)
                expected = reference.random_bits(seed, row[:, None].numpy() + np.arange(32), t)
                seeds = torch.tensor([seed], device=device)
                if impl == "triton":
                    got = torch.empty(4, 32, dtype=torch.int32, device=device)
                    bits_kernel[(1,)](
                        seeds, row.to(device), got, t, dstate, BLOCK_P=4, BLOCK_N=32, ALIGNED=dstate == 32
                    )
                else:
                    index = row[:, None] + torch.arange(32)
                    got = torch_update.random_bits(seeds, index.to(device), torch.full((4, 1), t, device=device))
                np.testing.assert_array_equal(got.cpu().numpy(), expected)


def test_random_bits():
    check_random_bits("torch")


@pytest.mark.interpreter
def test_random_bits_interpreter():
    check_random_bits("triton")


@pytest.mark.gpu
def test_random_bits_gpu():
    check_random_bits("triton", "cuda")


def test_random_bits_are_uniform():
    bits = reference.random_bits(42, np.arange(2**18), 0)
    assert abs(bits.mean() - (2**16 - 1) / 2) < 5 * 2**16 / math.sqrt(12 * 2**18)  # five standard deviations
    for bit in range(16):
        assert abs((bits >> bit & 1).mean() - 0.5) < 5 * 0.5 / 2**9
    neighbours = np.corrcoef(bits[:-1], bits[1:])[0, 1]
    assert abs(neighbours) < 5 / 2**9
    assert (bits != reference.random_bits(42, np.arange(2**18), 1)).mean() > 0.99
    assert (bits != reference.random_bits(43, np.arange(2**18), 0)).mean() > 0.99


def check_stochastic(dtype, impl, dstate, device="cpu"):
    """The stored states are the unrounded ones (a float32 pool holds them), rounded with exactly the promised bits."""
    torch.manual_seed(0)
    batch, T, H, P = 3, 3, 2, 8
    seed = torch.tensor([0x0123_4567_89AB_CDEF], device=device)
    narrow = (torch.randn(16, H, P, dstate) * 10.0 ** torch.randint(-7, 4, (16, H, P, dstate))).to(dtype).to(device)
    x, dt = torch.randn(batch, T, H, P, device=device), torch.rand(batch, T, H, device=device)
    A, B = -torch.rand(H, device=device), torch.randn(batch, T, 1, dstate, device=device)
    table = torch.randperm(16)[: batch * T].int().view(batch, T)
    table[1, 1] = -1
    for write in (table, table[:, 2]):
        write = write.to(device)
        wide, stored = narrow.float(), narrow.clone()
        options = dict(read_slots=table[:, 0].to(device), write_slots=write, impl=impl)
        expected_y = hybrid_ops.ssd_state_update(wide, x, dt, A, B, B, **options)
        y = hybrid_ops.ssd_state_update(stored, x, dt, A, B, B, rounding="stochastic", seed=seed, **options)
        assert torch.equal(y, expected_y)
        expected = narrow.cpu().double().numpy()
        round_for = reference.stochastic_store(int(seed), NARROW[dtype])
        for slots in write.view(batch, -1).tolist():
            for t, slot in enumerate(slots):
                if slot >= 0:
                    v = wide[slot].cpu().numpy()
                    expected[slot] = round_for(v, slot, t if write.dim() == 2 else T - 1)
        np.testing.assert_array_equal(to_numpy(stored), expected)


@pytest.mark.parametrize("dstate", [16, 20])
@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic(dtype, dstate):
    check_stochastic(dtype, "torch", dstate)


@pytest.mark.interpreter
@pytest.mark.parametrize("dstate", [16, 20])
def test_stochastic_interpreter(dstate):
    check_stochastic(torch.float16, "triton", dstate)


@pytest.mark.gpu
@pytest.mark.parametrize("dstate", [16, 20, 128])
@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_gpu(dtype, dstate):
    check_stochastic(dtype, "triton", dstate, "cuda")


def test_stochastic_keeps_small_increments():
    """An eighth of a step, 160 times: lost by rounding to nearest, kept on average by stochastic rounding."""
    x, B = torch.ones(1, 1, 64), torch.ones(1, 1, 64)
    dt, A = torch.full((1, 1), 2.0**-13), torch.zeros(1)
    nearest, stochastic = (torch.ones(1, 1, 64, 64, dtype=torch.float16) for _ in range(2))
    for step in range(160):
        hybrid_ops.ssd_state_update(nearest, x, dt, A, B, B)
        hybrid_ops.ssd_state_update(stochastic, x, dt, A, B, B, rounding="stochastic", seed=torch.tensor([step]))
    assert (nearest == 1).all()
    expected, step = 1 + 160 * 2.0**-13, 2.0**-10
    sigma = step * math.sqrt(160 * 1 / 8 * 7 / 8)  # of one element: 160 independent roundings
    assert abs(stochastic.double().mean() - expected) < 5 * sigma / 64
    assert 0.9 < stochastic.double().std() / sigma < 1.1


# --- several tokens a call ---


SIZES = {"cpu": (2, 8, 20), "cuda": (8, 80, 96)}  # H, P, N; the interpreter is slow


def decoder(generator_seed, batch, T, device, H=None, P=None, N=None):
    """Random x, dt, A, B, C, z, D of T tokens for each sequence."""
    if H is None:
        H, P, N = SIZES[device]
    g = torch.Generator().manual_seed(generator_seed)
    x, z, B, C = (torch.randn(batch, T, *s, generator=g) for s in ((H, P), (H, P), (2, N), (2, N)))
    dt, A, D = torch.rand(batch, T, H, generator=g), -torch.rand(H, generator=g), torch.randn(H, generator=g)
    return tuple(t.to(device) for t in (x, dt, A, B, C, z, D))


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
def test_several_tokens_gpu():
    check_tokens_at_once("triton", "cuda")
    check_speculation("triton", "cuda")


# --- what only the device sees ---


def raw(state, x, dt, A, B, C, y, *, read=None, write=None, accepted=None, cu_seqlens=None):
    """The operator behind the checks of the public function."""
    limits = (False, 0.0, math.inf, True, -1, "triton")
    op = torch.ops.hybrid_ops.ssd_state_update
    op(state, x, dt, A, B, C, None, None, None, read, write, accepted, cu_seqlens, None, y, *limits)


def check_bad_indices(device):
    """Values that the host cannot see are skipped or clamped: only good sequences and slots change anything."""
    x, dt, A, B, C, _, _ = decoder(3, 4, 3, device)
    before = torch.randn(3, *SIZES[device], device=device)
    huge = 2**31 - 1

    pool, y = before.clone(), torch.full_like(x, float("nan"))
    read = int32(-7, 2, huge, 3).to(device)
    raw(pool, x, dt, A, B, C, y, read=read)
    twin = before[2:].clone()
    expected = hybrid_ops.ssd_state_update(twin, x[1:2], dt[1:2], A, B[1:2], C[1:2], impl="torch")
    torch.testing.assert_close(y[1:2], expected)
    torch.testing.assert_close(pool, torch.cat([before[:2], twin]))
    assert (y[[0, 2, 3]] == 0).all()

    pool, y = before.clone(), torch.full_like(x, float("nan"))
    write = torch.tensor([[-9, huge, 3], [-1, 2, 3], [3, 3, 3], [3, 3, 3]], dtype=torch.int32, device=device)
    table, accepted = write * 0 + 1, int32(1, 3, 0, 4).to(device)
    raw(pool, x, dt, A, B, C, y, read=table, write=write, accepted=accepted)
    assert (y[:2] != 0).all()
    assert (y[2:] == 0).all()
    assert torch.equal(pool[:2], before[:2])
    assert not torch.equal(pool[2], before[2])

    pool = before.clone()
    flat = [t.flatten(0, 1) for t in (x, dt, B, C)]
    y = torch.full_like(flat[0], float("nan"))
    for bounds in ((-5, 2, 1, huge), (0, 2, 2, 7)):
        cu_seqlens = int32(*bounds).to(device)
        raw(pool, flat[0], flat[1], A, *flat[2:], y, cu_seqlens=cu_seqlens)
        assert torch.equal(pool[1], before[1])  # a sequence without tokens
        assert torch.isfinite(y).all()
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
    H, P, N = 128, 64, 128
    nslots = 2**31 // (H * P * N) + 3
    pool = torch.zeros(nslots, H, P, N, dtype=torch.float16, device="cuda")
    pool[-2:].normal_()
    small, wide = pool[-2:].clone(), pool[-2:].float()
    x, dt, A, B, C, _, _ = decoder(4, 2, 1, "cuda", H, P, N)
    x, dt, B, C = (t[:, 0] for t in (x, dt, B, C))
    swapped, few = int32(nslots - 1, nslots - 2).cuda(), int32(1, 0).cuda()
    y = hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, read_slots=swapped)
    expected = hybrid_ops.ssd_state_update(small, x, dt, A, B, C, read_slots=few, impl="torch")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(pool[-2:], small)
    assert not pool[:-2].any()
    pool[-2:] = wide.half()
    seed = torch.tensor([5], device="cuda")
    hybrid_ops.ssd_state_update(pool, x, dt, A, B, C, read_slots=swapped, rounding="stochastic", seed=seed)
    hybrid_ops.ssd_state_update(wide, x, dt, A, B, C, read_slots=few)
    expected = reference.stochastic_store(5, "float16")(wide[1].cpu().numpy(), nslots - 1, 0)
    np.testing.assert_array_equal(to_numpy(pool[-1]), expected)


@pytest.mark.gpu
def test_cuda_graph():
    batch = 4
    x, dt, A, B, C, z, D = decoder(5, batch, 1, "cuda")
    pool = torch.randn(9, *SIZES["cuda"], device="cuda").half()
    slots, seed = torch.arange(batch, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    options = dict(D=D, z=z, dt_softplus=True, read_slots=slots, rounding="stochastic", seed=seed)
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
    (dict(state=torch.zeros(5, H, P, N, dtype=torch.int8)), TypeError, "state must have dtype .* got int8"),
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
    (dict(state_scale=torch.ones(5, H, P)), ValueError, "state_scale must be None, .* 8-bit states are not supported"),
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
        seed = SEED if state_dtype in NARROW else None
        slots, bounds = (index, index, index[:, 0]), torch.empty(batch + 1, dtype=torch.int32)
        kernels.ssd_state_update(state, x, dt, A, B, B, A, x, A, *slots, bounds, seed, x, *limits)
    else:
        nothing = (None,) * 8
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
    torch.library.opcheck(op, (pool, x, dt, A, B, C, D, z, A, *slots, None, None, torch.empty_like(x), *limits))
    flat = (x.flatten(0, 1), dt.flatten(0, 1), A, B.flatten(0, 1), C.flatten(0, 1))
    rest = (None, None, None, None, None, None, int32(0, 2, 6), SEED, torch.empty_like(flat[0]))
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


def test_docs():
    page = Path(__file__).parent.parent / "docs" / "ssd_update.md"
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    results = [doctest.testfile(str(page), module_relative=False, globs=names)]
    for example in doctest.DocTestFinder(recurse=False).find(hybrid_ops.ssd_state_update, globs=names):
        results.append(doctest.DocTestRunner().run(example))
    assert len(results) == 2
    assert all(r.attempted and not r.failed for r in results), results
