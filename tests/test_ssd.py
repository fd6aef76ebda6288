import contextlib
import functools
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops import _device
from hybrid_ops._csrc import ssd as csrc
from hybrid_ops.bench import ssd as bench
from hybrid_ops.bench.cases import MODELS, mixer_of
from hybrid_ops.reference import ssd as reference

from .budget import assert_within, measure, to_numpy
from .ssd_cases import (
    DTYPES,
    cases,
    problem,
    result_dtype,
    rounded_operands,
    run_op,
    run_reference,
    run_torch,
)


def check_ssd(case, impl, device="cpu", oracle=run_reference, rounds_operands=False):
    """Every result within the budget, head by head.

    rounds_operands: of a kernel whose products take them in x's dtype; 3 to 7 problems in 1000 leave y's budget by
    that alone, all else exact. They fail like any other, and say what that alone needs.
    """
    tensors, options = problem(case)
    wide, narrow = (np.float64, np.float32) if oracle is run_reference else (torch.float64, torch.float32)
    ref, base = oracle(case, tensors, options, wide), oracle(case, tensors, options, narrow)
    got = run_op(case, tensors, options, impl, device)
    for name, value in got.items():
        axis = -2 if name == "y" else -3
        try:
            assert_within(name, value, ref[name], base[name], result_dtype(case, name), axis=axis)
        except AssertionError as failure:
            if name != "y" or not rounds_operands:
                raise
            exact = rounded_operands(case, tensors, options)  # but for its operands
            needed = measure(name, exact, ref[name], base[name], case["dtype"], axis=axis).ratio
            raise AssertionError(f"{failure}; its operands' rounding alone needs {needed:.3f} of the budget") from None


# Triton's interpreter truncates float32 to bfloat16, and takes a millisecond an instruction
INTERPRETER_CASES = dict(
    dtypes=[torch.float32, torch.float16],
    state_dtypes=(None, torch.float32, torch.float16),
    lengths=st.one_of(st.sampled_from([0, 1, 31, 32, 33]), st.integers(0, 70)),
    max_sequences=3,
    headdims=st.sampled_from([8, 16, 24]),
    dstates=st.sampled_from([16, 24, 32, 130]),
    heads_per_group=(1, 2),
    intervals=(0, 16),
    rounds_operands=True,
)
GPU_CASES = dict(
    lengths=st.one_of(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 256]), st.integers(0, 300)),
    headdims=st.sampled_from([8, 64, 72, 80, 128]),
    dstates=st.sampled_from([16, 64, 96, 128, 256]),
    heads_per_group=(1, 3, 8, 16),
    rounds_operands=True,
)


@given(case=cases())
def test_ssd(case):
    check_ssd(case, "torch")


@given(case=cases(dtypes=[torch.float64], layouts=("dense", "packed"), state_dtypes=(torch.float32,)))
def test_rounded_operands(case):
    """Operands in float64, which rounds nothing: the reference, but for what float64 itself rounds of a sum."""
    tensors, options = problem(case)
    y = rounded_operands(case, tensors, options, chunk=16)
    np.testing.assert_allclose(
        to_numpy(y), run_reference(case, tensors, options, np.float64)["y"], rtol=1e-9, atol=1e-9
    )


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(**INTERPRETER_CASES))
def test_ssd_interpreter(case):
    check_ssd(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [8, 64, 72, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=5)  # each compiles three kernels
@given(data=st.data())
def test_ssd_gpu(dtype, headdim, data):
    case = data.draw(cases(**GPU_CASES | dict(headdims=st.just(headdim)), dtypes=[dtype]))
    check_ssd(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=10)
@given(case=cases(**GPU_CASES))
def test_torch_on_gpu(case):
    check_ssd(case, "torch", "cuda")


LONG_CASES = GPU_CASES | dict(lengths=st.integers(1000, 3000), ngroups=(1, 8), intervals=(0, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6)
@given(data=st.data())
def test_long_sequences_gpu(dtype, data):
    check_ssd(data.draw(cases(**LONG_CASES, dtypes=[dtype])), "triton", "cuda", run_torch)


PREFIX = dict(
    dtype=torch.float32,
    layout="dense",
    lengths=[45],
    batch=2,
    ngroups=2,
    heads_per_group=2,
    headdim=8,
    dstate=16,
    regime="usual",
    scale=1.0,
    strided=False,
    aligned=False,
    D="head",
    z=True,
    dt_bias=True,
    dt_softplus=True,
    limited=False,
    initial=True,
    offsets=False,
    interval=0,
    small_fp32=True,
    state_dtype=None,
    pool=False,
    signs="both",
    seed=0,
)


def check_pieces(impl, device, cuts):
    """The state after every cut is the same whether a prompt is read at once, in pieces, or token by token."""
    tensors, options = problem(PREFIX)
    tokens = ("x", "dt", "B", "C", "z")
    states, base = (
        reference.ssd_chunk_scan(
            **{name: to_numpy(t, dtype) for name, t in tensors.items()}, **options | dict(state_interval=1), dtype=dtype
        )[2]
        for dtype in (np.float64, np.float32)
    )
    pieces = {}
    for begins in ([0] * len(cuts), [0, *cuts[:-1]]):  # at once, then piece after piece
        state = tensors["initial_states"]
        for begin, end in zip(begins, cuts, strict=True):
            part = {name: (t[:, begin:end] if name in tokens else t).to(device) for name, t in tensors.items()}
            if begin > 0:
                part["initial_states"] = state
            arguments = [part.pop(name) for name in ("x", "dt", "A", "B", "C")]
            y, state = hybrid_ops.ssd_chunk_scan(*arguments, **part, **options, return_final_states=True, impl=impl)
            assert_within("state", state, states[:, end - 1], base[:, end - 1], torch.float32, axis=-3)
            pieces.setdefault(end, []).append((y[:, -1], state))
    for once, stepwise in pieces.values():
        torch.testing.assert_close(once, stepwise, rtol=1e-5, atol=1e-5)  # the budget above is the strict check


@pytest.mark.parametrize("cuts", [[7, 32, 33, 45], list(range(1, 46))])
def test_pieces(cuts):
    check_pieces("torch", "cpu", cuts)


@pytest.mark.interpreter
def test_pieces_interpreter():
    check_pieces("triton", "cpu", [7, 33, 45])


@pytest.mark.gpu
@pytest.mark.parametrize("cuts", [[7, 32, 33, 45], list(range(1, 46))])
def test_pieces_gpu(cuts):
    check_pieces("triton", "cuda", cuts)


def check_batch_invariant(
    impl, device, lengths=(300, 0, 129, 40), headdim=16, dstate=32, nheads=4, dtype=torch.float32
):
    """Bits do not depend on other sequences, on dense or packed, nor on cuts at multiples of chunk_size."""
    torch.manual_seed(0)
    total = sum(lengths)
    x, z = (torch.randn(1, total, nheads, headdim, device=device, dtype=dtype) for _ in range(2))
    dt, A = torch.rand(1, total, nheads, device=device), -torch.rand(nheads, device=device)
    B, C = (torch.randn(1, total, 2, dstate, device=device, dtype=dtype) for _ in range(2))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    offsets = torch.tensor([5, 0, 128, 3], dtype=torch.int32, device=device)
    options = dict(return_final_states=True, batch_invariant=True, impl=impl)
    y, final = hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, z=z, cu_seqlens=cu_seqlens, seq_offsets=offsets, **options)
    for b, (begin, length, offset) in enumerate(zip(cu_seqlens.tolist(), lengths, offsets.tolist(), strict=False)):
        state = None
        for cut in [*range(begin + 128 - offset % 128, begin + length, 128), begin + length]:
            piece = slice(begin, cut)
            at = torch.tensor([offset], dtype=torch.int32, device=device)
            mine, state = hybrid_ops.ssd_chunk_scan(
                *(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece]),
                z=z[:, piece],
                initial_states=state,
                seq_offsets=at,
                **options,
            )
            assert torch.equal(mine, y[:, piece]), f"sequence {b}, tokens {begin} to {cut}"
            begin, offset = cut, offset + cut - begin
        assert torch.equal(state[0], final[b]), f"final state of sequence {b}"


def test_batch_invariant():
    check_batch_invariant("torch", "cpu")


@pytest.mark.interpreter
def test_batch_invariant_interpreter():
    check_batch_invariant("triton", "cpu", headdim=8, dstate=16, nheads=2)


@pytest.mark.gpu
def test_batch_invariant_gpu():
    check_batch_invariant("triton", "cuda", lengths=(1000, 0, 129, 40), headdim=64, dstate=128, nheads=16)


# --- the CUDA kernel

CUDA_CASES = dict(
    dtypes=[torch.bfloat16],
    layouts=("dense", "packed"),
    lengths=st.one_of(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 256]), st.integers(1, 400)),
    headdims=st.sampled_from([8, 64, 72, 80, 128]),
    dstates=st.sampled_from([72, 96, 128]),
    heads_per_group=(2, 4, 16),
    intervals=(0, 64, 192),
    state_dtypes=(None, torch.float32),
    rounds_operands=True,
    aligned=True,
)
WIDE = dict(headdims=st.sampled_from([8, 40, 64]), dstates=st.sampled_from([136, 200, 256]))
NARROW = dict(headdims=st.sampled_from([8, 40, 64]))
PAIRS = csrc.Config(segments=1, heads=2)
TURNS = csrc.Config(segments=1, turns=2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("chosen", "sizes"),
    [
        (None, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (8, {}),
        (None, WIDE),
        (2, WIDE),
        (5, WIDE),
        (PAIRS, NARROW),
        (TURNS, {}),
        (TURNS, WIDE),
    ],
)
@settings(max_examples=15)
@given(data=st.data())
def test_ssd_cuda(chosen, sizes, data):
    """As it is chosen; and whole sequences, or so many segments of each, or pairs of heads, or turns."""
    case = data.draw(cases(**CUDA_CASES | sizes))
    assume(case["dtype"] == torch.bfloat16 and case["batch"] * sum(case["lengths"]) > 0)
    assume(case["layout"] == "packed" or case["lengths"][0] > 0)
    with configured(chosen):
        check_ssd(case, "cuda", "cuda", rounds_operands=True)


def test_cuda_configuration(monkeypatch):
    """Segments or turns where heads and sequences do not fill the GPU; what `explain` says of it."""
    assert csrc.config(1, 8192, 128, 8, 64, 128, False, 132)[:3] == (1, 1, 1)  # Super
    assert csrc.config(4, 8192, 128, 8, 64, 128, False, 132)[:3] == (1, 2, 1)
    assert csrc.config(4, 8192, 128, 8, 64, 128, True, 132)[:3] == (1, 1, 1)
    assert csrc.config(4, 8192, 128, 128, 64, 128, False, 132)[:3] == (1, 1, 1)
    assert csrc.config(8, 16384, 64, 8, 64, 128, False, 132)[:3] == (1, 2, 1)  # Nemotron 3 Nano
    assert csrc.config(1, 8192, 64, 8, 64, 128, False, 132)[:3] == (2, 1, 1)
    assert csrc.config(1, 8192, 64, 8, 64, 128, True, 132)[:3] == (1, 1, 2)
    assert csrc.config(1, 512, 64, 8, 64, 128, False, 132)[:3] == (1, 1, 2)
    assert csrc.config(1, 8192, 16, 1, 64, 128, False, 132)[:3] == (8, 1, 1)  # Super by 8 GPUs
    assert csrc.config(1, 8192, 16, 1, 80, 128, False, 132)[:3] == (8, 1, 1)  # Nano v2 by 8 GPUs
    assert csrc.config(1, 8192, 16, 1, 64, 128, True, 132)[:3] == (1, 1, 2)
    assert csrc.config(1, 512, 128, 8, 64, 128, False, 132)[:3] == (1, 1, 1)
    monkeypatch.setattr(_device, "not_sm90", lambda device: None)
    monkeypatch.setattr(_device, "choose", lambda impl, device, refusal: ("cuda", "as told"))
    explained = hybrid_ops.explain("ssd_chunk_scan", device="cpu", dtype=torch.bfloat16, nheads=16)
    assert explained.config == dict(segments=8, heads=1, turns=1, normed=False)


@pytest.mark.parametrize("ways", [1, 8])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "tiny"])
def test_cuda_takes_every_model(model, ways):
    """x, B and C as they are: slices of the convolution's output, whole or of one of 8 GPUs; z of in_proj's."""
    mixer = mixer_of(model, ways)
    tensors = bench.inputs(mixer, torch.Generator().manual_seed(0), 1, 64)
    x, A, B, C = (tensors[name] for name in "xABC")
    z = slice_of_rows(x.shape, 2 * mixer.inner + 2 * B[0, 0].numel() + x.shape[2], device="cpu")
    assert csrc.refusal(x, A, B, C, z, None, (), torch.empty_like(x), None, (), 0) is None
    odd = slice_of_rows(x.shape, x[0, 0].numel() + 1, device="cpu")
    assert "rows of z that begin at multiples of 4" in csrc.refusal(x, A, B, C, odd, None, (), x, None, (), 0)


def slice_of_rows(shape, width, device="cuda"):
    """The first columns of rows of so many."""
    batch, seqlen, nheads, headdim = shape
    rows = torch.randn(batch, seqlen, width, device=device, dtype=torch.bfloat16)
    return rows[..., : nheads * headdim].unflatten(-1, (nheads, headdim))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("chosen", "headdim", "dstate"),
    [(1, 64, 128), (2, 40, 128), (3, 80, 96), (1, 128, 128), (1, 64, 256), (PAIRS, 64, 128), (TURNS, 64, 128)],
)
def test_rows_of_z_may_begin_anywhere_cuda(chosen, headdim, dstate):
    """At multiples of 4 bytes, as slices of in_proj's output do in shards of some models: the same bits."""
    torch.manual_seed(0)
    x, dt = torch.randn(1, 330, 8, headdim, device="cuda").bfloat16(), torch.rand(1, 330, 8, device="cuda")
    B, C = (torch.randn(1, 330, 2, dstate, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    z = slice_of_rows(x.shape, 8 * headdim + 6)
    cu_seqlens = torch.tensor([0, 70, 70, 200, 330], dtype=torch.int32, device="cuda")
    options = dict(cu_seqlens=cu_seqlens, impl="cuda")
    with configured(chosen):
        got, expected = (
            hybrid_ops.ssd_chunk_scan(x, dt, -torch.ones(8, device="cuda"), B, C, z=z, **options)
            for z in (z, z.contiguous())
        )
    assert torch.equal(got, expected)


@contextlib.contextmanager
def configured(chosen):
    """Within it the CUDA kernel has this configuration, or so many segments, and nothing remembered is used."""
    with pytest.MonkeyPatch.context() as patch:
        if chosen is not None:
            config = csrc.Config(chosen) if isinstance(chosen, int) else chosen
            forced = functools.partial(csrc.ssd_chunk_scan.__wrapped__, chosen=config)
            patch.setattr(csrc, "ssd_chunk_scan", forced)
            patch.setattr(csrc, "config", lambda *problem: config)
            public = sys.modules["hybrid_ops.ssd"]
            patch.setattr(public, "_check", public._check.__wrapped__)
        yield


@pytest.mark.gpu
@settings(max_examples=6)
@given(data=st.data())
def test_long_sequences_cuda(data):
    lengths = dict(lengths=st.integers(1000, 3000), ngroups=(1, 8), intervals=(0, 256))
    case = data.draw(cases(**CUDA_CASES | lengths))
    assume(case["batch"] * len(case["lengths"]) > 0)
    check_ssd(case, "cuda", "cuda", run_torch)


# dt |A| as in a trained model and up to 80 a token, and inputs of 4 orders, as residual streams have across a model
EXTREMES = pytest.mark.parametrize(
    ("regime", "scale"), [("usual", 1e-2), ("usual", 1e2), ("steep", 1.0), ("large", 1.0)]
)


def check_extremes(regime, scale, seqlen, impl, device, oracle):
    case = dict(seed=1, dtype=torch.bfloat16, layout="dense", lengths=[seqlen], batch=1, ngroups=1, heads_per_group=2)
    case |= dict(headdim=64, dstate=128, regime=regime, scale=scale, strided=False, aligned=True, D="head", z=True)
    case |= dict(dt_bias=True, dt_softplus=True, limited=False, initial=True, offsets=False, interval=0)
    case |= dict(small_fp32=True, state_dtype=None, pool=False, signs="both")
    check_ssd(case, impl, device, oracle, rounds_operands=impl == "cuda")


@EXTREMES
def test_extremes(regime, scale):
    check_extremes(regime, scale, 1000, "torch", "cpu", run_reference)


@pytest.mark.gpu
@EXTREMES
@pytest.mark.parametrize("chosen", [None, 1])
def test_extremes_cuda(chosen, regime, scale):
    with configured(chosen):
        check_extremes(regime, scale, 131072, "cuda", "cuda", run_torch)


@pytest.mark.gpu
def test_batch_invariant_cuda():
    check_batch_invariant(
        "cuda", "cuda", lengths=(1000, 1, 129, 40), headdim=64, dstate=128, nheads=16, dtype=torch.bfloat16
    )


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [1, 2, 3, PAIRS, TURNS])
def test_neighbours_may_hold_anything_cuda(chosen):
    """Sequences of a packed batch are copied in boxes that reach into each other."""
    torch.manual_seed(0)
    lengths = (100, 1, 0, 63, 200)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    tensors = [
        torch.randn(1, sum(lengths), *shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((4, 64), (4,), (2, 128), (2, 128), (4, 64))
    ]
    A = -torch.rand(4, device="cuda")

    def run(x, dt, B, C, z):
        options = dict(cu_seqlens=cu_seqlens, return_final_states=True, dt_softplus=True, impl="cuda")
        with configured(chosen):
            return hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, z=z, **options)

    expected = run(*tensors)
    for s, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        dirty = [t.clone() for t in tensors]
        for t in dirty:
            t[:, begin:end] = float("nan")
        y, final = run(*dirty)
        outside = [t for t in range(sum(lengths)) if not begin <= t < end]
        assert torch.equal(y[:, outside], expected[0][:, outside])
        others = [i for i in range(len(lengths)) if i != s]
        assert torch.equal(final[others], expected[1][others])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("chosen", "dstate"),
    [(1, 128), (2, 128), (8, 128), (PAIRS, 128), (TURNS, 128), (1, 256), (4, 256), (TURNS, 256)],
)
def test_same_bits_cuda(chosen, dstate):
    """Every time, 1000 times: a race would show."""
    torch.manual_seed(0)
    x, z = (torch.randn(1, 1000, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    B, C = (torch.randn(1, 1000, 2, dstate, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dt, A = torch.randn(1, 1000, 16, device="cuda"), -torch.rand(16, device="cuda")
    options = dict(z=z, dt_softplus=True, return_final_states=True, impl="cuda")
    with configured(chosen):
        expected = hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, **options)
        differ = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(1000):
            for got, first in zip(hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, **options), expected, strict=True):
                differ |= (got != first).any()
    assert not differ


@pytest.mark.gpu
@settings(max_examples=10)
@given(data=st.data())
def test_turns_have_the_bits_of_one_cuda(data):
    """Whether two CTAs take turns or one makes all of y."""
    case = data.draw(cases(**CUDA_CASES))
    assume(case["dtype"] == torch.bfloat16 and case["batch"] * sum(case["lengths"]) > 0)
    tensors, options = problem(case)
    results = []
    for chosen in (1, TURNS):
        with configured(chosen):
            results.append(run_op(case, tensors, options, "cuda", "cuda"))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)  # equal: the same sums in the same order


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [4, TURNS])
def test_in_place_cuda(chosen):
    """A pool gets a sequence's last state in the slot of its first, which another CTA may not have read by then."""
    torch.manual_seed(0)
    lengths, nheads = (192, 64, 320, 128) * 4, 32
    x = torch.randn(1, sum(lengths), nheads, 64, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(1, sum(lengths), 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dt, A = torch.rand(1, sum(lengths), nheads, device="cuda") / 64, -torch.rand(nheads, device="cuda")
    first = torch.randn(2 * len(lengths), nheads, 64, 128, device="cuda")
    slots = torch.arange(len(lengths), device="cuda", dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], device="cuda", dtype=torch.int32)
    load, beside = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()

    def run(write_slots):
        pool = first.clone()
        options = dict(ssm_state=pool, read_slots=slots, write_slots=write_slots, cu_seqlens=cu_seqlens, impl="cuda")
        return hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, **options), pool[write_slots.long()]

    with configured(chosen):
        expected = run(slots + len(lengths))
        for _ in range(50):
            with torch.cuda.stream(beside):  # so that some CTAs begin late
                load @ load
            for got, value in zip(run(slots), expected, strict=True):
                assert torch.equal(got, value)


# --- what only a GPU can show


@pytest.mark.gpu
def test_cuda_graph():
    """Replayed with other tokens, boundaries, slots and states: nothing was decided on the host."""
    torch.manual_seed(0)

    def draw(bounds, read, write):
        return dict(
            x=torch.randn(1, 500, 8, 64).bfloat16(),
            dt=torch.rand(1, 500, 8),
            B=torch.randn(1, 500, 1, 128).bfloat16(),
            C=torch.randn(1, 500, 1, 128).bfloat16(),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            read_slots=torch.tensor(read, dtype=torch.int32),
            write_slots=torch.tensor(write, dtype=torch.int32),
            ssm_state=torch.randn(6, 8, 64, 128),
        )

    first, second = draw((0, 200, 200, 500), (0, 1, 2), (0, 1, 2)), draw((0, 1, 400, 500), (5, -1, 2), (5, 4, -1))
    buffers = {name: t.cuda() for name, t in first.items()}
    A, out = -torch.rand(8, device="cuda"), torch.empty(1, 500, 8, 64, device="cuda").bfloat16()
    hybrid_ops.ssd_chunk_scan(A=A, **buffers, out=out)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hybrid_ops.ssd_chunk_scan(A=A, **buffers, out=out)
    for values in (first, second):
        for name, t in values.items():
            buffers[name].copy_(t)
        graph.replay()
        expected = {name: t.cuda() for name, t in values.items()}
        assert torch.equal(hybrid_ops.ssd_chunk_scan(A=A, **expected), out)
        assert torch.equal(expected["ssm_state"], buffers["ssm_state"])


@pytest.mark.gpu
def test_beyond_2_to_31_elements():
    """The last sequence of a batch of more than 2^31 elements has the bits that it has alone."""
    torch.manual_seed(0)
    seqlen, tail = 2**31 // (64 * 64) + 1000, 777
    x, B, C = (
        torch.zeros(1, seqlen, n, m, device="cuda", dtype=torch.bfloat16) for n, m in ((64, 64), (1, 16), (1, 16))
    )
    dt, A = torch.rand(1, seqlen, 64, device="cuda"), -torch.rand(64, device="cuda")
    for t in (x, B, C):
        t[:, -tail:] = torch.randn_like(t[:, -tail:])
    bounds = torch.tensor([0, seqlen - tail, seqlen], dtype=torch.int32, device="cuda")
    y, states = hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, cu_seqlens=bounds, return_final_states=True)
    alone, state = hybrid_ops.ssd_chunk_scan(
        *(x[:, -tail:], dt[:, -tail:], A, B[:, -tail:], C[:, -tail:]), return_final_states=True
    )
    assert torch.equal(y[:, -tail:], alone)
    assert torch.equal(states[1], state[0])
