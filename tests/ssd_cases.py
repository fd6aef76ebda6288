"""Random problems for `ssd_chunk_scan`, and the two values that the budget needs of each: float64 and float32."""

import itertools
import math

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import ssd as reference

from .budget import to_numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = st.one_of(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65]), st.integers(0, 150))
SIZES = st.integers(1, 40)


@st.composite
def cases(
    draw,
    dtypes=DTYPES,
    layouts=("dense", "packed", "seq_idx"),
    lengths=LENGTHS,
    max_sequences=4,
    headdims=SIZES,
    dstates=SIZES,
    ngroups=(1, 2),
    heads_per_group=(1, 2, 3),
    intervals=(0, 0, 16, 48),
    pools=True,
    signs=("both",),
    state_dtypes=(None, None, torch.float32, torch.bfloat16, torch.float16),
    rounds_operands=False,
    aligned=False,
):
    layout = draw(st.sampled_from(layouts))
    interval = 0 if layout == "seq_idx" else draw(st.sampled_from(intervals))
    dtype = draw(st.sampled_from(dtypes))
    runs = draw(st.lists(lengths, min_size=0 if layout == "packed" else 1, max_size=max_sequences))
    batch = draw(st.sampled_from([0, 1, 2])) if layout != "packed" else 1
    # A token's weight in y is computed once for all features: a head with a few such weights is no measure of error,
    # for theirs may cancel, or be rounded by a kernel to x's dtype, with more or less luck than the baseline has.
    count = batch * (runs[0] if layout == "dense" else sum(runs))
    if count < 64 and rounds_operands:
        dtype = torch.float32
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=dtype,
        layout=layout,
        lengths=runs,
        batch=batch,
        ngroups=draw(st.sampled_from(ngroups)),
        heads_per_group=draw(st.sampled_from(heads_per_group)),
        headdim=draw(headdims),
        dstate=draw(dstates),
        # dt |A|: as in a trained model, up to 80 a token, no step at all, as steep by steps above softplus' threshold
        regime=draw(st.sampled_from(["usual", "usual", "steep", "zero", "large"])),
        scale=draw(st.sampled_from([1e-2, 1.0, 10.0])),
        strided=draw(st.booleans()),
        aligned=aligned,  # slices begin at multiples of 16 bytes, and indices and states are contiguous
        D=draw(st.sampled_from([None, "head", "feature"])),
        z=draw(st.booleans()),
        dt_bias=draw(st.booleans()),
        dt_softplus=draw(st.booleans()),
        limited=draw(st.booleans()),  # three steps of four beyond dt_limit
        initial=draw(st.booleans()),
        offsets=draw(st.booleans()) if layout != "seq_idx" else False,
        interval=interval,
        small_fp32=draw(st.booleans()),
        state_dtype=draw(st.sampled_from(state_dtypes)),
        pool=draw(st.booleans()) if pools else False,
        signs="positive" if count < 16 else draw(st.sampled_from(signs)),
    )


def problem(case):
    """(tensors by name, options) on the CPU; all of x, z, dt, B, C may be slices of one wider tensor."""
    generator = torch.Generator().manual_seed(case["seed"])
    packed = case["layout"] == "packed"
    batch = case["batch"]
    seqlen = sum(case["lengths"]) if packed or case["layout"] == "seq_idx" else case["lengths"][0]
    nheads, P, N, G = case["ngroups"] * case["heads_per_group"], case["headdim"], case["dstate"], case["ngroups"]
    nseq = len(case["lengths"]) if packed else batch
    dtype = case["dtype"]
    small = torch.float32 if case["small_fp32"] else dtype

    def randn(*shape):
        values = torch.randn(*shape, generator=generator)
        return values.abs() if case["signs"] == "positive" else values

    A = -torch.exp(torch.rand(nheads, generator=generator) * math.log(16))  # 1 to 16, as Mamba-2 initialises it
    dt_max = {"usual": 0.2, "steep": 80 / 16, "zero": 0.0, "large": 40.0}[case["regime"]]
    if case["regime"] == "large":
        A = A / 8
    dt = torch.rand(batch, seqlen, nheads, generator=generator) * dt_max
    if case["dt_softplus"]:
        dt = dt + torch.log(-torch.expm1(-dt.clamp(min=1e-3)))  # its inverse, to the same range
    widths = (nheads * P, nheads * P, G * N, G * N)
    if case["strided"]:
        beside = 8 if case["aligned"] else 5
        parts = randn(batch, seqlen, sum(widths) + beside).to(dtype)[..., beside:].split(widths, -1)
    else:
        parts = [randn(batch, seqlen, width).to(dtype) for width in widths]
    z, x, B, C = (t.unflatten(-1, (-1, n)) for t, n in zip(parts, (P, P, N, N), strict=True))
    scale = case["scale"]
    if dtype == torch.float16 and case["regime"] == "large":  # y would be beyond float16
        scale = min(scale, 1.0)
    tensors = dict(x=x * scale if scale != 1 else x, dt=dt.to(small), A=A, B=B, C=C)
    if case["z"]:
        tensors["z"] = z
    if case["D"] is not None:
        tensors["D"] = randn(*((nheads,) if case["D"] == "head" else (nheads, P))).to(small)
    if case["dt_bias"]:
        tensors["dt_bias"] = (randn(nheads) * 0.1).to(small)
    if case["layout"] == "packed":
        tensors["cu_seqlens"] = torch.tensor([0, *np.cumsum(case["lengths"])], dtype=torch.int32)
    if case["layout"] == "seq_idx":
        tensors["seq_idx"] = numbers(case["lengths"], batch, generator)
    if case["offsets"]:
        tensors["seq_offsets"] = torch.randint(0, 100, (nseq,), generator=generator, dtype=torch.int32)
    limit = (dt_max / 4, dt_max / 2) if case["limited"] else (0.0, math.inf)
    options = dict(dt_softplus=case["dt_softplus"], dt_limit=limit, state_interval=case["interval"])
    states = (nheads, P, N)
    stored = case["state_dtype"] or torch.float32
    if case["pool"]:
        nslots = 3 * nseq + 4
        tensors["ssm_state"] = (randn(2 * nslots, *states) * case["scale"]).to(stored)[::2]
        slots = torch.randperm(nslots, generator=generator, dtype=torch.int32)
        tensors["read_slots"] = slots[:nseq].clone() if case["initial"] else None
        tensors["write_slots"] = (slots if case["initial"] else slots.roll(1))[:nseq].clone()
        if nseq:  # this one starts from zeros, and its last state is not kept
            for name in ("read_slots", "write_slots"):
                if tensors[name] is not None:
                    tensors[name][0] = -1
        if case["interval"]:
            tensors["interval_slots"] = slots[nseq + 1 : 3 * nseq + 1].reshape(nseq, 2)
    elif case["initial"]:
        tensors["initial_states"] = (randn(nseq, *states) * case["scale"]).to(stored)
    if case["strided"]:
        apart = {"dt", "dt_bias", "D"} if case["aligned"] else set(tensors) - {"x", "z", "B", "C", "ssm_state"}
        for name in apart & set(tensors):
            if tensors[name] is not None:
                tensors[name] = torch.stack([tensors[name]] * 2, dim=-1)[..., 0]  # elements lie apart
    return tensors, options


def numbers(lengths, batch, generator):
    """seq_idx: runs of the given lengths, numbers not in order, some of them padding."""
    rows = [
        np.repeat(torch.randint(-1, 3, (len(lengths),), generator=generator).numpy(), lengths) for _ in range(batch)
    ]
    return torch.tensor(np.array(rows), dtype=torch.int32).reshape(batch, sum(lengths))


def run_op(case, tensors, options, impl, device="cpu"):
    """Results by name."""
    on_device = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    if case["pool"]:  # updated in place, and the case is still to be computed in other precisions
        on_device["ssm_state"] = spaced_clone(tensors["ssm_state"], device)
    arguments = [on_device.pop(name) for name in ("x", "dt", "A", "B", "C")]
    if case["pool"]:
        y = hybrid_ops.ssd_chunk_scan(*arguments, **on_device, **options, chunk_size=16, impl=impl)
        return dict(y=y, ssm_state=on_device["ssm_state"])
    results = hybrid_ops.ssd_chunk_scan(
        *arguments,
        **on_device,
        **options,
        chunk_size=16,
        return_final_states=True,
        state_dtype=case["state_dtype"],
        impl=impl,
    )
    return dict(zip(("y", "final_states", "interval_states"), results, strict=False))


def spaced_clone(pool, device):
    """A copy whose slots lie apart as those of `pool` do."""
    return pool.new_empty(2 * len(pool), *pool.shape[1:], device=device)[::2].copy_(pool)


def run_reference(case, tensors, options, dtype):
    arrays = {
        name: None if t is None else to_numpy(t, dtype) if t.is_floating_point() else t.numpy()
        for name, t in tensors.items()
    }
    if case["pool"]:
        y, pool = reference.ssd_chunk_scan_pool(**arrays, **options, dtype=dtype)
        return dict(y=y, ssm_state=pool)
    results = reference.ssd_chunk_scan(**arrays, **options, dtype=dtype)
    return dict(zip(("y", "final_states", "interval_states"), results, strict=True))


def run_torch(case, tensors, options, dtype):
    """The same from the chunked algorithm in torch, for problems that take the reference too long."""
    wide = {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in tensors.items()}
    results = run_op(case | dict(state_dtype=None), wide, options, "torch")
    return {name: to_numpy(t) for name, t in results.items()}


def rounded_operands(case, tensors, options, chunk=64):
    """y as exact as a kernel can make it whose products take operands of x's dtype: float64, but for these.

    They are, of each chunk: the state that enters it, C B^T with its decays below the diagonal, and the weighted x.
    """

    def rounded(t):
        return t.to(case["dtype"]).double()

    x, dt, A, B, C = (tensors[name].double() for name in ("x", "dt", "A", "B", "C"))
    if "dt_bias" in tensors:
        dt = dt + tensors["dt_bias"].double()
    if options["dt_softplus"]:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(*options["dt_limit"])
    B, C = (t.repeat_interleave(case["heads_per_group"], 2) for t in (B, C))
    y = torch.zeros_like(x)
    for n, (row, first, end) in enumerate(sequences(tensors)):
        state = entering(tensors, n, x.new_zeros(x.shape[2], x.shape[3], B.shape[3]))
        lead = int(tensors["seq_offsets"][n]) % chunk if "seq_offsets" in tensors else 0
        for begin in range(first - lead, end, chunk) if first < end else ():
            tokens = slice(max(begin, first), min(begin + chunk, end))
            x_c, dt_c, B_c, C_c = (t[row, tokens].transpose(0, 1) for t in (x, dt, B, C))  # heads first
            a = (dt_c * A[:, None]).cumsum(1)
            mixed = C_c @ B_c.mT * (a[:, :, None] - a[:, None, :]).clamp(max=0).exp() * dt_c[:, None, :]
            own = mixed.diagonal(dim1=1, dim2=2)[..., None]
            from_state = C_c @ rounded(state).mT * a.exp()[..., None]
            y[row, tokens] = (from_state + rounded(mixed.tril(-1)) @ x_c + own * x_c).transpose(0, 1)
            weighted = rounded(x_c * ((a[:, -1:] - a).exp() * dt_c)[..., None])
            state = state * a[:, -1].exp()[:, None, None] + weighted.mT @ B_c
    if "D" in tensors:
        y += x * (tensors["D"].double() if case["D"] == "feature" else tensors["D"].double()[:, None])
    if "z" in tensors:
        y *= torch.nn.functional.silu(tensors["z"].double())
    return y.to(case["dtype"])


def sequences(tensors):
    """(batch row, first token, the one behind the last) of every sequence."""
    if "cu_seqlens" in tensors:
        bounds = tensors["cu_seqlens"].tolist()
        return [(0, first, end) for first, end in itertools.pairwise(bounds)]
    batch, seqlen = tensors["x"].shape[:2]
    return [(row, 0, seqlen) for row in range(batch)]


def entering(tensors, n, zeros):
    """The state that enters the n-th sequence."""
    if "initial_states" in tensors:
        return tensors["initial_states"][n].double()
    slots = tensors.get("read_slots")
    return zeros if slots is None or slots[n] < 0 else tensors["ssm_state"][slots[n]].double()


def result_dtype(case, name):
    """States are stored in their own dtype, which may be coarser than x's."""
    if name == "y":
        return case["dtype"]
    stored = case["state_dtype"] or torch.float32
    return max((case["dtype"], stored), key=lambda dtype: torch.finfo(dtype).eps)
