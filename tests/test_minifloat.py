"""Rounding to E2M1, E4M3 and E5M2: NumPy, torch and Triton against exact arithmetic and torch's own casts."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hybrid_ops._torch import minifloat as torch_minifloat
from hybrid_ops.reference import minifloat as reference
from hybrid_ops.triton_kernels import minifloat as kernels

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def patterns():
    """float32: all bfloat16 and float16 values, all ties and grid points with their neighbours, random bits, NaN."""
    half = np.arange(2**16, dtype=np.uint32)
    parts = [half << 16, half.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)]
    for target in reference.FORMATS:
        grid = reference.magnitudes(target)
        points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, grid[-1:] * 1.0625]).astype(np.float32)
        bits = points.view(np.int32)[:, None] + np.arange(-3, 4)
        parts += [bits.astype(np.uint32).ravel(), bits.astype(np.uint32).ravel() ^ 0x80000000]
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([*parts, random]).astype(np.uint32).view(np.float32)


def exact_code(v, target):
    """In rational numbers: the nearest value of the format, ties to the even code."""
    form = reference.FORMATS[target]
    if np.isnan(v):
        return form.nan
    grid = [Fraction(g) for g in reference.magnitudes(target)]
    sign = form.sign if (v < 0 if target == "e2m1" else np.signbit(v)) else 0
    if abs(v) >= form.largest:
        return len(grid) - 1 | sign
    exact = abs(Fraction(float(v)))
    return min(range(len(grid)), key=lambda code: (abs(grid[code] - exact), code % 2)) | sign


@pytest.mark.parametrize("target", reference.FORMATS)
def test_reference_is_exact(target):
    grid = reference.magnitudes(target)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32).view(np.int32)
    near = (points[:, None] + np.arange(-1, 2)).astype(np.int32).view(np.float32).ravel()
    v = np.concatenate([near, -near, np.float32([np.inf, -np.inf, np.nan, 3e38, 1e-45, -1e-45]), patterns()[::2999]])
    np.testing.assert_array_equal(reference.encode(v, target), [exact_code(value, target) for value in v])


@pytest.mark.parametrize("target", FP8)
def test_reference_is_torchs_cast(target):
    v = patterns()
    largest = reference.FORMATS[target].largest
    with np.errstate(invalid="ignore"):
        cast = torch.from_numpy(v).clamp(-largest, largest).to(FP8[target])
    np.testing.assert_array_equal(reference.encode(v, target)[~np.isnan(v)], cast.view(torch.uint8)[~np.isnan(v)])
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(reference.decode(codes.numpy(), target), codes.view(FP8[target]).float())


@triton.jit
def encode_kernel(v_ptr, bits_ptr, out_ptr, size, TARGET: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + i, i < size, other=0.0)
    if STOCHASTIC:
        code = kernels.encode_e2m1_stochastic(v, tl.load(bits_ptr + i, i < size, other=0))
    else:
        code = kernels.encode(v, TARGET)
    tl.store(out_ptr + i, code.to(tl.uint8), i < size)


@triton.jit
def decode_kernel(code_ptr, out_ptr, TARGET: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, kernels.decode(tl.load(code_ptr + i).to(tl.int32), TARGET))


@triton.jit
def amax_kernel(v_ptr, out_ptr, BLOCK: tl.constexpr):
    v = tl.load(v_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), kernels.amax_bits(v, 0))


@triton.jit
def cast_kernel(v_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = kernels.widen(tl.load(v_ptr + i, i < size, other=0.0))
    tl.store(out_ptr + i, kernels.cast(v, out_ptr.dtype.element_ty), i < size)


def check_encode(target, bits, encode):
    v = patterns()
    expected = reference.encode(v, target, bits)
    np.testing.assert_array_equal(encode(v), expected)


def all_bits(size):
    yield None
    yield np.random.default_rng(1).integers(0, 2**16, size)
    for value in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        yield np.full(size, value)


@pytest.mark.parametrize("target", FP8)
def test_torch_fp8(target):
    check_encode(target, None, lambda v: torch_minifloat.encode_fp8(torch.from_numpy(v), target).numpy())


def test_torch_e2m1():
    for bits in all_bits(len(patterns())):
        tensor = None if bits is None else torch.from_numpy(bits)
        check_encode("e2m1", bits, lambda v, b=tensor: torch_minifloat.encode_e2m1(torch.from_numpy(v), b).numpy())
    codes = np.arange(16)
    np.testing.assert_array_equal(torch_minifloat.decode_e2m1(torch.from_numpy(codes)), reference.decode(codes, "e2m1"))


def test_stochastic_rounding_is_unbiased():
    """Over all 2^16 bits the mean is v, to 2^-16 steps."""
    bits = torch.arange(2**16)
    for v, step in ((0.1, 0.5), (0.9, 0.5), (1.3, 0.5), (2.7, 1.0), (-4.2, 2.0), (5.999, 2.0)):
        codes = torch_minifloat.encode_e2m1(torch.full((2**16,), v), bits)
        mean = torch_minifloat.decode_e2m1(codes).double().mean()
        assert abs(mean - v) <= step * 2.0**-16 + 1e-6


def by_triton(v, target, bits, device):
    v, code = torch.from_numpy(v).to(device), torch.empty(len(v), dtype=torch.uint8, device=device)
    random = v if bits is None else torch.from_numpy(bits).int().to(device)
    block = 2**15 if device == "cpu" else 1024
    encode_kernel[(triton.cdiv(len(v), block),)](
        v, random, code, len(v), TARGET=target, STOCHASTIC=bits is not None, BLOCK=block, enable_fp_fusion=False
    )
    return code.cpu().numpy()


def check_kernels(device):
    for target in reference.FORMATS:
        for bits in all_bits(len(patterns())) if target == "e2m1" else (None,):
            check_encode(target, bits, lambda v, t=target, b=bits: by_triton(v, t, b, device))
        codes = (torch.arange(256) % (16 if target == "e2m1" else 256)).to(torch.uint8)
        got = torch.empty(256, device=device)
        decode_kernel[(1,)](codes.to(device), got, TARGET=target)
        np.testing.assert_array_equal(got.cpu(), reference.decode(codes.numpy(), target))


def check_casts(device):
    """To bfloat16 and float16 as torch does it; from them without loss, subnormal numbers included."""
    v = torch.from_numpy(patterns())
    narrow = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        for x, to in ((v, dtype), (narrow.view(dtype), torch.float32)):
            got = torch.empty(len(x), dtype=to, device=device)
            cast_kernel[(triton.cdiv(len(x), 2**13),)](x.to(device), got, len(x), BLOCK=2**13)
            np.testing.assert_array_equal(got.cpu().double(), x.to(to).double())


def check_amax(device):
    v = np.resize(patterns()[::31], (512, 64))
    v[0], v[1, 1:], v[2], v[3, ::2] = np.nan, np.nan, 0, -np.inf
    got = torch.empty(len(v), dtype=torch.int32, device=device)
    amax_kernel[(len(v),)](torch.from_numpy(v).to(device), got, BLOCK=64)
    expected = np.nan_to_num(np.abs(v), nan=0.0, posinf=np.inf).max(1).astype(np.float32)
    np.testing.assert_array_equal(got.cpu(), expected.view(np.int32))


@pytest.mark.interpreter
@pytest.mark.parametrize("check", [check_kernels, check_casts, check_amax])
def test_kernels_interpreter(check):
    check("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_kernels, check_casts, check_amax])
def test_kernels_gpu(check):
    check("cuda")
