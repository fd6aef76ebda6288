import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import ssd as reference

from .budget import assert_within, to_numpy
from .ssd_cases import cases, problem

# slices of the error budget: heads, groups for B and C; for dt, one number a token, all heads together
AXES = dict(x=-2, z=-2, dt=None, A=0, B=-2, C=-2, D=0, initial_states=-3)
# A head's gradient of A or D is one number, a sum over all tokens: where its terms have both signs it is as good as
# they happen to cancel, in the baseline too. These two are held to the budget on problems without negative numbers.
TOKEN_SUMS = ("A", "D")
# With steep decays these are a single term, the least decayed: an exponent of float32 has an error of |exponent|
# roundings, by how many of them a baseline is off is luck.
OF_EXPONENTS = ("A", "initial_states")
STEEPEST_EXPONENT = 88


def check_gradients(case, device="cpu"):
    """Every gradient against the sequential adjoint, given random gradients of every result."""
    if case["dtype"] == torch.float16:  # the gradient of dt, a sum over all later tokens, leaves float16's range
        case = case | dict(small_fp32=True)
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
    if case["dtype"] == torch.float16 and case["scale"] > 1:  # dB and dC, too
        upstream = [g / 8 for g in upstream]
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
            if name in OF_EXPONENTS and case["regime"] in ("steep", "large"):
                by_head = [np.moveaxis(a, AXES[name], 0).reshape(a.shape[AXES[name]], -1)
                           for a in (to_numpy(leaf.grad), ref[f"d{name}"])]  # fmt: skip
                error, largest = np.abs(by_head[0] - by_head[1]).max(1, initial=0), np.abs(by_head[1]).max(1, initial=0)
                assert (error <= STEEPEST_EXPONENT * torch.finfo(coarser).eps * largest + 1e-34).all(), name
                continue
            assert_within(f"d{name}", leaf.grad, ref[f"d{name}"], base[f"d{name}"], coarser, axis=AXES[name])
    if case["dt_bias"]:  # its terms cancel whatever the signs; but they are those of dt
        terms = to_numpy(leaves["dt"].grad).reshape(-1, leaves["dt"].shape[-1])
        roundings = sum(torch.finfo(leaves[name].dtype).eps for name in ("dt", "dt_bias"))
        error = np.abs(to_numpy(leaves["dt_bias"].grad) - terms.sum(0))
        assert (error <= roundings * np.abs(terms).sum(0)).all()


# a slice of few numbers is no measure of error: its baseline may be exact by luck
LENGTHS = st.one_of(st.sampled_from([32, 33, 63, 64, 65]), st.integers(24, 150))
SIZES = st.integers(8, 40)
GRADIENT_CASES = dict(
    lengths=LENGTHS,
    headdims=SIZES,
    dstates=SIZES,
    pools=False,
    signs=("both", "positive"),
    state_dtypes=(None, torch.bfloat16),  # float16 ends at 1e-7, where gradients that crossed many tokens begin
)


@given(case=cases(**GRADIENT_CASES))
def test_backward(case):
    check_gradients(case)


@pytest.mark.gpu
@settings(max_examples=30)
@given(
    case=cases(
        **GRADIENT_CASES
        | dict(headdims=st.sampled_from([8, 64, 80]), dstates=st.sampled_from([16, 96, 128]), heads_per_group=(1, 8))
    )
)
def test_backward_gpu(case):
    check_gradients(case, "cuda")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


SEQ_IDX = int32([1] * 3 + [-1] * 2 + [1] * 3 + [2] * 2 + [-1] * 2 + [0] * 20 + [-1] * 2)
LIMIT = dict(dt_limit=(0.3, 0.9))


# two chunks of the algorithm, 32 tokens or those of state_interval, need not take many tokens
@pytest.mark.parametrize(
    ("seqlen", "batch", "leaves", "options"),
    [
        (5, 2, (), {}),
        (0, 2, ("initial_states",), dict(return_final_states=True)),
        (34, 1, ("D", "dt_bias", "initial_states"), dict(dt_softplus=True, return_final_states=True)),
        (18, 2, ("D2", "z"), dict(dt_softplus=True, state_interval=16) | LIMIT),
        (18, 2, ("dt_bias", "initial_states"), dict(state_interval=16, seq_offsets=int32(3, 15))),
        (
            20,
            1,
            ("D", "z", "dt_bias", "initial_states"),
            dict(
                dt_softplus=True,
                state_interval=16,
                return_final_states=True,
                seq_offsets=int32(3, 15, 0, 16),
                cu_seqlens=int32(0, 5, 5, 19, 20),
            ),
        ),
        (
            34,
            1,
            ("D2", "z", "dt_bias", "initial_states"),
            dict(dt_softplus=True, return_final_states=True, seq_idx=SEQ_IDX),
        ),
    ],
)
def test_gradcheck(seqlen, batch, leaves, options):
    torch.manual_seed(0)
    nheads, headdim, ngroups, dstate = 4, 1, 2, 2
    nseq = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else batch
    shapes = dict(
        x=(batch, seqlen, nheads, headdim),
        dt=(batch, seqlen, nheads),
        A=(nheads,),
        B=(batch, seqlen, ngroups, dstate),
        C=(batch, seqlen, ngroups, dstate),
        D=(nheads,),
        D2=(nheads, headdim),
        z=(batch, seqlen, nheads, headdim),
        dt_bias=(nheads,),
        initial_states=(nseq, nheads, headdim, dstate),
    )
    names = ("x", "dt", "A", "B", "C", *leaves)
    values = [torch.randn(shapes[name], dtype=torch.float64) for name in names]
    values[1].abs_()
    values[2] = -values[2].abs()

    def scan(*tensors):
        given = {name.rstrip("2"): t for name, t in zip(names, tensors, strict=True)}
        return hybrid_ops.ssd_chunk_scan(**given, **options, chunk_size=16)

    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in values], nondet_tol=0.0)


def test_same_bits_from_run_to_run():
    torch.manual_seed(0)
    leaves = [
        t.requires_grad_()
        for t in (
            torch.randn(2, 200, 4, 16),
            torch.rand(2, 200, 4),
            -torch.rand(4),
            torch.randn(2, 200, 2, 16),
            torch.randn(2, 200, 2, 16),
        )
    ]
    upstream = torch.randn(2, 200, 4, 16)
    first, second = (torch.autograd.grad(hybrid_ops.ssd_chunk_scan(*leaves), leaves, upstream) for _ in range(2))
    assert all(torch.equal(mine, again) for mine, again in zip(first, second, strict=True))
