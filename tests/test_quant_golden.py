"""NVFP4 bytes of Transformer Engine v2.18 and ModelOpt 0.47.0 (see golden/make.py), from every implementation."""

import numpy as np
import pytest
import torch

import hybrid_ops
from hybrid_ops.reference import quant_nvfp4 as reference

from .golden.nvfp4 import CASES, FILE, MATRICES, inputs
from .quant_cases import rounded_to, same_bytes

GOLDEN = np.load(FILE)


def golden(name, matrices):
    return GOLDEN[f"{name}_data"][matrices], GOLDEN[f"{name}_scale"][matrices]


def check(name, impl, device="cpu", matrices=slice(None)):
    options, dtype = CASES[name]
    x = torch.from_numpy(inputs(name)[matrices]).to(dtype).to(device)
    q = hybrid_ops.nvfp4_quantize(x, **options, impl=impl)
    data, scale = golden(name, matrices)
    same_bytes("scale", q.scale, scale)
    same_bytes("data", q.data, data)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    assert GOLDEN[f"{name}_scale"].size >= 10_000
    check(name, "torch")


@pytest.mark.parametrize("name", CASES)
def test_golden_reference(name):
    options, dtype = CASES[name]
    data, scale, _ = reference.nvfp4_quantize(inputs(name), **options, round_hadamard=rounded_to(dtype))
    np.testing.assert_array_equal(scale, golden(name, slice(None))[1])
    np.testing.assert_array_equal(data, golden(name, slice(None))[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_golden_interpreter(name):
    check(name, "triton", matrices=slice(MATRICES - 2, MATRICES))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_golden_gpu(name, impl):
    check(name, impl, "cuda")


def test_inputs_tell_the_modes_apart():
    """On these inputs each mode has bytes of its own: golden bytes of one would not pass for another's."""
    for name, others in (("te", ["modelopt"]), ("te_mse", ["modelopt_mse", "te_mae"]), ("modelopt", ["modelopt_mse"])):
        x = inputs(name)
        mine = reference.nvfp4_quantize(x, **CASES[name].options)
        for other in others:
            theirs = reference.nvfp4_quantize(x, **CASES[other].options)
            assert not np.array_equal(mine[0], theirs[0]), (name, other)
            assert not np.array_equal(mine[1], theirs[1]), (name, other)
