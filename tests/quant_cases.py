"""Inputs of the quantisers: every class of float32 bit patterns, in every layout."""

import re

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "bits", "classes", "tiny", "huge", "zeros")
SPECIAL = (0.0, -0.0, 2.0**-149, -(2.0**-140), 2.0**-126, 6.0, 448.0, 57344.0, 3.4e38, np.inf, -np.inf, np.nan, -np.nan)


def bit_patterns(generator, shape):
    """float32 from random bits: each exponent as often as any other, subnormal numbers, infinities and NaN too."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator)
    special = torch.rand(shape, generator=generator)
    bits = bits.where(special > 0.02, 0x7F800000).where(special > 0.01, bits & 0x7FFFFF)
    return bits.int().view(torch.float32)


def values(kind, generator, shape):
    """float32 (.., M, K)."""
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal
    if kind == "bits":
        return bit_patterns(generator, shape)
    if kind == "tiny":  # scales and products among the subnormal numbers
        return normal * 2.0 ** torch.randint(-145, -120, shape, generator=generator)
    if kind == "huge":
        return normal * 2.0**125
    if kind == "zeros":
        return torch.zeros(shape) * normal
    # blocks of different size, among them zeros; ties of both formats; now and then a special value
    columns = torch.arange(shape[-1]) // 16
    size = 2.0 ** torch.randint(-12, 3, (*shape[:-1], shape[-1] // 16 + 1), generator=generator)[..., columns]
    size *= torch.rand((*shape[:-1], shape[-1] // 16 + 1), generator=generator)[..., columns] > 0.2
    ties = torch.randint(-24, 25, shape, generator=generator) * 0.25
    chosen = torch.rand(shape, generator=generator)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
    return torch.where(chosen < 0.5, normal, ties).mul(size).where(chosen < 0.997, special)


@st.composite
def cases(draw, dtypes=DTYPES, max_rows=40, max_blocks=6, block=16, leads=((), (1,), (3,), (2, 2), (0,))):
    """A call's x, described; `block` divides both dimensions where it is more than 1."""
    rows = draw(st.sampled_from([0, 1, max_rows // 2 + 1, max_rows])) if block == 1 else None
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=draw(st.sampled_from(dtypes)),
        lead=draw(st.sampled_from(leads)),
        M=draw(st.integers(0, max_rows)) if rows is None else rows,
        K=block * draw(st.integers(0, max_blocks)),
        kind=draw(st.sampled_from(KINDS)),
        layout=draw(st.sampled_from(["dense", "slice", "transposed"])),
    )


def make(case, multiple=1):
    """x, with M rounded up to a multiple (for orientations that quantise along it)."""
    generator = torch.Generator().manual_seed(case["seed"])
    M, K = -(-case["M"] // multiple) * multiple, case["K"]
    x = values(case["kind"], generator, (*case["lead"], M, K)).to(case["dtype"])
    if case["layout"] == "slice":
        wide = torch.full((*case["lead"], M + 1, K + 3), float("nan"), dtype=case["dtype"])
        wide[..., 1:, 3:] = x
        return wide[..., 1:, 3:]
    return x.mT.contiguous().mT if case["layout"] == "transposed" else x


def same_bytes(name, got, expected):
    """A tensor and an array of the same number of bytes an element."""
    got = got.detach().cpu()
    assert tuple(got.shape) == expected.shape, (name, got.shape, expected.shape)
    kinds = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
    mine, theirs = kinds[got.element_size()]
    got, expected = got.contiguous().view(mine).numpy(), np.ascontiguousarray(expected).view(theirs)
    wrong = np.argwhere(got != expected)
    assert not len(wrong), (
        f"{name}: {len(wrong)} of {got.size} differ, the first at {wrong[0]}: {got[tuple(wrong[0])]:#x} "
        f"for {expected[tuple(wrong[0])]:#x}"
    )


def same_values(name, got, expected):
    """As `same_bytes`, but any NaN is as good as another."""
    nan = torch.isnan(got.cpu().float()).numpy()
    np.testing.assert_array_equal(nan, np.isnan(expected), err_msg=name)
    expected = torch.from_numpy(np.where(nan, 0, expected).astype(np.float32)).to(got.dtype)
    same_bytes(name, got.cpu().masked_fill(torch.from_numpy(nan), 0), to_bits(expected))


def to_bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def float32(x):
    return x.float().numpy()


def rounded_to(dtype):
    """What the reference rounds the Hadamard transform with."""
    return lambda h: torch.from_numpy(np.ascontiguousarray(h)).to(dtype).float().numpy()


def check_graph(x, call, decode):
    """A captured call follows its input."""
    decode(call())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
        decoded = decode(results)
    x.normal_(std=3.0)
    graph.replay()
    expected = call()
    for got, want in zip((*results, decoded), (*expected, decode(expected)), strict=True):
        assert torch.equal(got.float(), want.float())


def check_exact(compiled):
    """Nothing is fused, approximated or flushed to zero: what rounds, rounds as written."""
    for kernel in compiled:
        inexact = re.findall(r"\b(?:fma\.rn|div\.full|div\.approx|rcp\.approx|\w+\.ftz)\S*", kernel.asm["ptx"])
        assert not inexact, (kernel.metadata.name, set(inexact))
