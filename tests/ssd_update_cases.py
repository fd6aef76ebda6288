"""Random problems for `ssd_state_update`, and the check that every implementation passes."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import ssd_update as reference
from hybrid_ops.reference import ssd_update_scaled as scaled

from .budget import assert_within, to_numpy
from .tensors import to_device

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16
SCALED = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
NULL = 3  # a row of the pool that stands for padding, where slots are given


@st.composite
def cases(draw, dtypes, headdims=(8, 24), dstates=(16, 20, 48), max_batch=3, max_groups=2, scaled_dtypes=()):
    # one draw seeds the rest: drawn one by one, choices repeat from example to example, and ragged batches went missing
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    dtype = choose(dtypes)
    # float32 errors are those of a few roundings, of dt and exp above all, one for each token of a head: with a single
    # token, whether the baseline or the kernel has the larger one is chance
    batch = choose([0, 1, 2, max_batch, max_batch]) * (8 if dtype == torch.float32 else 1)
    form = choose(["single", "tokens", "packed", "packed"])
    T = choose([0, 1, 2, 4])
    slots = choose([None, "read", "write", "both", "each", "accepted"])
    lengths = {
        "single": [1] * batch,
        "tokens": [T] * batch,
        "packed": [choose([0, 1, 3]) for _ in range(batch)],
    }[form]
    return dict(
        seed=choose(range(2**31)),
        dtype=dtype,
        state_dtype=choose([*dtypes, *dtypes, *scaled_dtypes]),
        small_dtype=choose([torch.float32, dtype]),
        form=form,
        lengths=lengths,
        T=T,
        ngroups=choose(range(1, max_groups + 1)),
        heads_per_group=choose([1, 2]),
        headdim=choose(headdims),
        dstate=choose(dstates),
        # dt |A|: as in a trained model, up to 80 a token, no step at all, steps above softplus' usual threshold
        regime=choose(["usual", "usual", "steep", "zero", "large"]),
        D=choose([None, "head", "feature"]),
        z=choose([False, True]),
        dt_bias=choose([False, True]),
        dt_softplus=choose([False, True]),
        dt_limit=choose([(0.0, math.inf), (0.0, math.inf), (0.25, 0.5)]),
        slots=slots,
        padded=choose([False, True]),
        update_state=choose([False, True]) if slots in (None, "read", "accepted") else True,
        strided=choose([False, True]),
        pool=choose(["contiguous", "transposed", "slice", "heads"]),
        out=choose([None, "fresh", "x"]),
    )


def problem(case):
    """(state, x, dt, A, B, C) and options, on the CPU. x, z, B, C, dt may be slices of one wider tensor."""
    generator = torch.Generator().manual_seed(case["seed"])
    lengths, G, P, N = case["lengths"], case["ngroups"], case["headdim"], case["dstate"]
    batch, H = len(lengths), G * case["heads_per_group"]
    tokens = {"single": (batch,), "tokens": (batch, case["T"]), "packed": (sum(lengths),)}[case["form"]]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    A = -torch.exp(rand(H) * math.log(16))  # 1 to 16, as Mamba-2 initialises it
    dt = rand(*tokens, H) * {"usual": 0.2, "steep": 80 / 16, "zero": 0.0, "large": 40.0}[case["regime"]]
    if case["regime"] == "usual" and case["dt_softplus"]:
        dt = dt * 60 - 10  # softplus of it reaches down to 5e-5
    sizes = [H * P, H * P, G * N, G * N]
    wide = randn(*tokens, sum(sizes)).to(case["dtype"])
    parts = [part if case["strided"] else part.contiguous() for part in wide.split(sizes, -1)]
    x, z = (part.unflatten(-1, (H, P)) for part in parts[:2])
    B, C = (part.unflatten(-1, (G, N)) for part in parts[2:])
    dt = dt.to(case["small_dtype"])
    if case["strided"]:
        dt = torch.cat([dt, dt], -1)[..., :H]

    width = {"single": 1, "tokens": case["T"], "packed": max([1, *lengths])}[case["form"]]
    nslots = batch * (width + 3) + 5
    shape = {"contiguous": (nslots, H, P, N), "transposed": (nslots, N, H, P), "heads": (nslots, 2 * H, P, N)}
    pool = randn(*shape.get(case["pool"], (nslots, 2 * H, P, N + 3)))

    def layout(pool):
        if case["pool"] == "transposed":
            return pool.permute(0, 2, 3, 1)
        if case["pool"] == "slice":
            return pool[:, ::2, :, 3:]
        return pool[:, ::2] if case["pool"] == "heads" else pool

    scale = None
    if case["state_dtype"] in SCALED:
        codes, scale = scaled.quantize_rows(layout(pool).numpy(), SCALED[case["state_dtype"]])
        state, scale = layout(pool.to(case["state_dtype"])), torch.from_numpy(scale)
        state.view(torch.uint8).copy_(torch.from_numpy(codes).to(case["state_dtype"]).view(torch.uint8))
    else:
        state = layout(pool.to(case["state_dtype"]))

    options = dict(dt_softplus=case["dt_softplus"], dt_limit=case["dt_limit"], update_state=case["update_state"])
    if scale is not None:
        options["state_scale"] = scale
    if case["D"]:
        options["D"] = randn(*((H,) if case["D"] == "head" else (H, P)))
    if case["z"]:
        options["z"] = z
    if case["dt_bias"]:
        options["dt_bias"] = randn(H).to(case["small_dtype"])
    free = torch.tensor([s for s in range(batch, nslots) if s != NULL])  # rows that read_slots=None does not read
    free = free[torch.randperm(len(free), generator=generator)].int()

    def padded(slots):
        if case["padded"]:
            slots[rand(*slots.shape) < 0.4] = NULL
        return slots

    if case["slots"] in ("read", "both"):
        options["read_slots"] = padded(free[:batch].clone())
    if case["slots"] in ("write", "both"):
        options["write_slots"] = padded(free[batch : 2 * batch].clone())
    if case["slots"] in ("each", "accepted"):
        table = padded(free[: batch * width].clone().view(batch, width))
        if case["slots"] == "each" or (case["update_state"] and width):
            options["write_slots"] = table
        if case["slots"] == "accepted" and width:
            options["read_slots"] = table
            options["num_accepted"] = torch.randint(1, width + 1, (batch,), generator=generator).int()
    if case["slots"]:
        options["null_slot"] = NULL
    if case["form"] == "packed":
        options["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return (state, x, dt, A, B, C), options


def oracle(arguments, options, dtype, store=lambda S, slot, t: S):
    def array(value):
        if not isinstance(value, torch.Tensor):
            return value
        return to_numpy(value, dtype) if value.is_floating_point() else value.numpy()

    named = {k: array(v) for k, v in options.items() if k != "state_scale"}
    return reference.ssd_state_update(*(array(a) for a in arguments), dtype=dtype, store=store, **named)


def float32_baselines(arguments, options, count, store):
    """[(y, pool)] of float32 computations that differ in the order of the sum over dstate alone.

    Few values dominate a head where dt and z are large, so that one float32 run may be nearly exact by luck: several
    measure what such a run is worth.
    """
    state, x, dt, A, B, C = arguments
    runs = []
    for k in range(count):
        order = torch.arange(B.shape[-1]).roll(5 * k)
        y, pool = oracle((state[..., order], x, dt, A, B[..., order], C[..., order]), options, np.float32, store)
        runs.append((y, pool[..., order.argsort().numpy()]))
    return runs


def for_cuda(case):
    """The nearest case that the CUDA kernel takes."""
    unit = {"slice": "heads", "transposed": "contiguous"}
    return case | dict(dstate={16: 64, 20: 256}.get(case["dstate"], 128), pool=unit.get(case["pool"], case["pool"]))


def implementation(impl):
    """`impl`, or a skip where it is "cuda" and not built."""
    if impl == "cuda" and hybrid_ops._device.extension_missing() is not None:
        pytest.skip("the CUDA extension is not built")
    return impl


def values_of(state, scale):
    """float64: what a pool stands for."""
    values = state.detach().cpu().to(torch.float64)
    return values if scale is None else values * scale.cpu()[..., None]


def check_update(case, impl, device="cpu"):
    arguments, options = problem(case)
    written = set()

    def store(S, slot, t):
        written.add(slot)
        return S

    exact = (values_of(arguments[0], options.get("state_scale")), *arguments[1:])
    ref, ref_pool = oracle(exact, options, np.float64, store)
    rounded = scaled.scaled_store(SCALED[case["state_dtype"]]) if case["state_dtype"] in SCALED else store
    baselines = float32_baselines(exact, options, 4 if case["dtype"] == torch.float32 else 1, rounded)

    state, x, *rest = (to_device(a, device) for a in arguments)
    options = {k: to_device(v, device) for k, v in options.items()}
    out = {"fresh": torch.full_like(x, float("nan")), "x": x}.get(case["out"])
    y = hybrid_ops.ssd_state_update(state, x, *rest, out=out, impl=impl, **options)
    assert out is None or y is out
    times = len(baselines)
    all_y = np.concatenate([y for y, _ in baselines])
    assert_within("y", torch.cat([y] * times), np.concatenate([ref] * times), all_y, case["dtype"], axis=-2)
    written = sorted(written)
    after = values_of(state, options.get("state_scale"))
    if written:  # per slot and head
        heads = (len(written) * state.shape[1], *state.shape[2:])
        # the baseline of 8-bit states is rounded already, once for each row
        widths = [case["dtype"], torch.float32 if case["state_dtype"] in SCALED else case["state_dtype"]]
        assert_within(
            "state",
            after[written].reshape(heads),
            ref_pool[written].reshape(heads),
            baselines[0][1][written].reshape(heads),
            max(widths, key=lambda d: torch.finfo(d).eps),
            axis=0,
        )
    others = [s for s in range(len(ref_pool)) if s not in written]
    assert torch.equal(after[others], exact[0][others])


SIZES = {"cpu": (2, 8, 20), "cuda": (8, 80, 128)}  # H, P, N; the interpreter is slow


def decoder(generator_seed, batch, T, device, H=None, P=None, N=None):
    """Random x, dt, A, B, C, z, D of T tokens for each sequence."""
    if H is None:
        H, P, N = SIZES[device]
    g = torch.Generator().manual_seed(generator_seed)
    x, z, B, C = (torch.randn(batch, T, *s, generator=g) for s in ((H, P), (H, P), (2, N), (2, N)))
    dt, A, D = torch.rand(batch, T, H, generator=g), -torch.rand(H, generator=g), torch.randn(H, generator=g)
    return tuple(t.to(device) for t in (x, dt, A, B, C, z, D))
