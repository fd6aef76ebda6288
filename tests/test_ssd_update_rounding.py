"""Stochastic rounding: the reference (in floating point) = torch = Triton (in integers), bit for bit."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import hybrid_ops
from hybrid_ops._torch import ssd_update as torch_update
from hybrid_ops.reference import ssd_update as reference
from hybrid_ops.reference import ssd_update_scaled as scaled
from hybrid_ops.triton_kernels import ssd_update as kernels

from .budget import to_numpy
from .ssd_update_cases import SCALED, implementation

NARROW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


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


def check_stochastic(dtype, impl, dstate, device="cpu", batch=3, T=3, P=8):
    """The stored states are the unrounded ones (a float32 pool holds them), rounded with exactly the promised bits."""
    torch.manual_seed(0)
    H, nslots = 2, batch * T + 7
    seed = torch.tensor([0x0123_4567_89AB_CDEF], device=device)
    shape = (nslots, H, P, dstate)
    narrow = (torch.randn(shape) * 10.0 ** torch.randint(-7, 4, shape)).to(dtype).to(device)
    x, dt = torch.randn(batch, T, H, P, device=device), torch.rand(batch, T, H, device=device)
    A, B = -torch.rand(H, device=device), torch.randn(batch, T, 1, dstate, device=device)
    table = torch.randperm(nslots)[: batch * T].int().view(batch, T)
    table[1, T // 2] = -1
    for write in (table, table[:, T - 1]):
        write = write.to(device)
        wide, stored = narrow.float(), narrow.clone()
        options = dict(read_slots=table[:, 0].to(device), write_slots=write, impl=impl)
        expected_y = hybrid_ops.ssd_state_update(wide, x, dt, A, B, B, **options)
        y = hybrid_ops.ssd_state_update(stored, x, dt, A, B, B, rounding="stochastic", seed=seed, **options)
        # the sum over dstate may run in another order where the state has another width: some ulp of the largest
        assert (y - expected_y).abs().max() <= 1e-6 * expected_y.abs().max()
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
@pytest.mark.parametrize(
    ("impl", "dstate"), [("triton", 16), ("triton", 20), ("triton", 128), ("cuda", 64), ("cuda", 128), ("cuda", 256)]
)
@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_gpu(dtype, impl, dstate):
    check_stochastic(dtype, implementation(impl), dstate, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 64), (64, 128), (64, 256), (80, 128)])
def test_stochastic_many_sequences_gpu(headdim, dstate):
    """So many that a CTA of the CUDA kernel asks L2 for another one's states."""
    check_stochastic(torch.float16, implementation("cuda"), dstate, "cuda", batch=300, T=1, P=headdim)


def check_scaled(dtype, impl, device="cpu"):
    """Codes and scales of the reference, exactly (but codes that a scale of NaN makes meaningless); the state is B."""
    rows = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-38, 34, 6)[:, None]
    rows[1], rows[2, 5], rows[3, 7], rows[4, :2] = 0.0, math.nan, math.inf, torch.tensor([-math.inf, math.nan])
    rows[5] = torch.arange(64) - 31.5  # ties
    rows[5, 0] = 127.0
    n, (codes, scale) = len(rows), scaled.quantize_rows(rows.numpy(), SCALED[dtype])
    pool, scales = torch.zeros(n, 1, 2, 64, device=device).to(dtype), torch.ones(n, 1, 2, device=device)
    one, B = torch.ones(n, 1, device=device), rows[:, None].to(device)
    x = one[..., None].expand(n, 1, 2)
    hybrid_ops.ssd_state_update(pool, x, one, -one[0], B, B, state_scale=scales, impl=impl)
    for p in range(2):
        np.testing.assert_array_equal(scales[:, 0, p].cpu().numpy(), scale)
        whole = ~np.isnan(scale)
        np.testing.assert_array_equal(pool[:, 0, p].float().cpu().numpy()[whole], codes[whole])


@pytest.mark.parametrize("dtype", SCALED)
def test_scaled(dtype):
    check_scaled(dtype, "torch")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", SCALED)
def test_scaled_interpreter(dtype):
    check_scaled(dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", SCALED)
def test_scaled_gpu(dtype, impl):
    check_scaled(dtype, implementation(impl), "cuda")


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
