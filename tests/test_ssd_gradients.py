import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import ssd as reference

from .budget import assert_within, to_numpy
from .ssd_cases import cases, problem

# slices of the error budget: heads, groups for B and C
AXES = dict(x=-2, z=-2, dt=-1, A=0, B=-2, C=-2, D=0, initial_states=-3)
# A head's gradient of A or D is one number, a sum over all tokens: where its terms have both signs it is as good as they
# happen to cancel, in the baseline too. These two are held to the budget on problems without negative numbers.
TOKEN_SUMS = ("A", "D")


def check_gradients(case, device="cpu"):
    """Every gradient against the sequential adjoint, given random gradients of every result."""
    tensors, options = problem(case)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    leaves = {
        name: t.to(device).detach().requires_grad_(t.is_floating_point()) if t is not None else None
        for name, t in tensors.items()
    }
    arguments = [leaves[name] for name in ("x", "dt", "A", "B", "C")]
    rest = {name: t for name, t in leaves.items() if name not in ("x", "dt", "A", "B", "C")}
    results = hybrid_ops.ssd_chunk_scan(*arguments, **rest, **options, chunk_size=16, return_final_states=True)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    if case["signs"] == "positive":
        upstream = [g.abs() for g in upstream]
    torch.autograd.backward(results, [g.to(device) for g in upstream])

    def adjoint(dtype):
        arrays = {
            name: to_numpy(t, dtype) if t.is_floating_point() else t.numpy()
            for name, t in tensors.items()
            if t is not None
        }
        dstates = dict(dfinal_states=to_numpy(upstream[1], dtype))
        if case["interval"]:
            dstates["dinterval_states"] = to_numpy(upstream[2], dtype)
        return reference.ssd_chunk_scan_bwd(to_numpy(upstream[0], dtype), **arrays, **options, **dstates, dtype=dtype)

    ref, base = adjoint(np.float64), adjoint(np.float32)
    for name, leaf in leaves.items():
        if name in AXES and leaf is not None and (name not in TOKEN_SUMS or case["signs"] == "positive"):
            coarser = max((case["dtype"], leaf.dtype), key=lambda dtype: torch.finfo(dtype).eps)
            assert_within(f"d{name}", leaf.grad, ref[f"d{name}"], base[f"d{name}"], coarser, axis=AXES[name])
    if case["dt_bias"]:  # its terms cancel whatever the signs; but they are those of dt
        terms = to_numpy(leaves["dt"].grad).reshape(-1, leaves["dt"].shape[-1])
        roundings = sum(torch.finfo(leaves[name].dtype).eps for name in ("dt", "dt_bias"))
        error = np.abs(to_numpy(leaves["dt_bias"].grad) - terms.sum(0))
        assert (error <= roundings * np.abs(terms).sum(0)).all()


# a slice of few numbers is no measure of error: its baseline may be exact by luck
LENGTHS = st.one_of(st.sampled_from([32, 33, 63, 64, 65]), st.integers(8, 150))
SIZES = st.integers(8, 40)
GRADIENT_CASES = dict(lengths=LENGTHS, headdims=SIZES, dstates=SIZES, pools=False, signs=("both", "positive"))


@given(case=cases(**GRADIENT_CASES))
def test_backward(case):
    check_gradients(case)
