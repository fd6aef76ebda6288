"""FP8 bytes of Transformer Engine v2.18 and ModelOpt 0.47.0 (see golden/make.py), from every implementation."""

import numpy as np
import pytest
import torch

import hybrid_ops
from hybrid_ops.reference import quant_fp8 as reference
from hybrid_ops.reference.minifloat import encode

from .golden.fp8 import CASES, FILE, digests_of, inputs
from .quant_cases import to_bits

GOLDEN = np.load(FILE)
TARGETS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def compare(name, data, scale, matrices=slice(None)):
    for part, digests in zip(("scale", "data"), digests_of(data, scale)[::-1], strict=True):
        golden = GOLDEN[f"{name}_{part}"][matrices]
        assert digests.shape == golden.shape
        wrong = np.argwhere(digests != golden)
        assert not len(wrong), f"{part}: {len(wrong)} of {golden.size} rows differ, the first at {wrong[0]}"


def check(name, impl, device="cpu", matrices=slice(None)):
    options, _, dtype = CASES[name]
    x = torch.from_numpy(inputs(name)[matrices]).to(dtype).to(device)
    q = hybrid_ops.fp8_quantize(x, **options, impl=impl)
    compare(name, to_bits(q.data.cpu()), q.scale.cpu().contiguous().numpy(), matrices)


def by_reference(name, x):
    options = dict(CASES[name].options)
    return reference.fp8_quantize(x, target=TARGETS[options.pop("dtype")], **options)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    check(name, "torch")


@pytest.mark.parametrize("name", CASES)
def test_golden_reference(name):
    options, _, dtype = CASES[name]
    data, scale = by_reference(name, inputs(name))
    compare(name, data, scale)
    assert scale.size >= 10_000 or name.startswith("square")
    assert np.isin(data & 0x7F, [1, 2, 3]).mean() > 0.05  # subnormal numbers of FP8
    if name != "mx" and dtype == torch.float32:  # largest / amax overflows
        assert (scale == (np.float32(2.0**-127) if options["pow2_scale"] else 1 / reference.FLOAT_MAX)).any()


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_golden_interpreter(name):
    check(name, "triton", matrices=slice(-1, None))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_golden_gpu(name, impl):
    check(name, impl, "cuda")


@pytest.mark.parametrize("name", ["tensor_e4m3", "row_e5m2", "square_e4m3", "mx"])
def test_mutants_are_rejected(name):
    """One bit of a code and of a scale; scales rounded otherwise; codes of x / scale."""
    x, (options, *_) = inputs(name), CASES[name]
    data, scale = by_reference(name, x)
    for part, mutant in (("data", (flipped(data), scale)), ("scale", (data, flipped(scale)))):
        with pytest.raises(AssertionError, match=rf"{part}: 1 of \d+ rows differ, the first at \[0"):
            compare(name, *mutant)
    other = dict(scaling=options["scaling"], target=TARGETS[options["dtype"]], pow2_scale=True)
    if name == "mx":
        mutants = [reference.fp8_quantize(x, **other | dict(target="e5m2"))]
    else:
        divided = x / reference.per_element(tiles(scale, name), reference.TILES[options["scaling"]], x.shape)
        mutants = [reference.fp8_quantize(x, **other), (encode(divided, other["target"]), scale)]
    for mutant in mutants:
        with pytest.raises(AssertionError, match="rows differ"):
            compare(name, *mutant)


def flipped(array):
    mutant = array.copy()
    mutant.view(np.uint8).flat[0] ^= 1
    return mutant


def tiles(scale, name):
    return scale[..., None, None] if name.startswith("tensor") else scale
