import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops

from .budget import assert_within
from .ssd_cases import cases, problem, result_dtype, run_op, run_reference, run_torch


def check_ssd(case, impl, device="cpu", oracle=run_reference):
    """Every result within the budget, head by head."""
    tensors, options = problem(case)
    ref = oracle(case, tensors, options, np.float64 if oracle is run_reference else torch.float64)
    base = oracle(case, tensors, options, np.float32 if oracle is run_reference else torch.float32)
    got = run_op(case, tensors, options, impl, device)
    for name, value in got.items():
        axis = -2 if name == "y" else -3
        assert_within(name, value, ref[name], base[name], result_dtype(case, name), axis=axis)


@given(case=cases())
def test_ssd(case):
    check_ssd(case, "torch")
