"""Random problems for `mamba2_step`, and the check that every implementation passes."""

import math
import random

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import mamba2_step as reference

from .budget import assert_within, to_numpy
from .tensors import to_device

NULL = 3  # a row of the pools that stands for padding, where slots are given
WEIGHTS = ("conv_weight", "A", "norm_weight", "conv_bias", "D", "dt_bias")


@st.composite
def cases(draw, dtypes, headdims=(8, 24), dstates=(16, 20), max_batch=3):
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    dtype = choose(dtypes)
    ngroups, heads_per_group = choose([1, 2]), choose([1, 2, 4])
    return dict(
        seed=choose(range(2**31)),
        dtype=dtype,
        state_dtype=choose(dtypes),
        conv_state_dtype=choose([dtype, torch.float32]),
        small_dtype=choose([dtype, torch.float32]),
        # float32 errors are those of a few roundings: over more sequences they are less a matter of chance
        batch=choose([0, 1, 2, max_batch]) * (4 if dtype == torch.float32 else 1),
        ngroups=ngroups,
        heads_per_group=heads_per_group,
        headdim=choose(headdims),
        dstate=choose(dstates),
        width=choose([1, 2, 3, 4, 4, 4, 6]),
        spare=choose([0, 0, 2]),  # columns of the window that no token sees
        norm=choose(["group", "group", "all", "head"]),
        norm_before_gate=choose([False, False, True]),
        regime=choose(["usual", "usual", "steep", "zero"]),
        conv_bias=choose([False, True, True]),
        D=choose([None, "head", "feature"]),
        dt_bias=choose([False, True]),
        dt_softplus=choose([True, True, False]),
        dt_limit=choose([(0.0, math.inf), (0.25, 0.5)]),
        slots=choose([None, "some", "padded"]),
        strided=choose([False, True]),
        pool=choose(["contiguous", "channel_last", "heads"]),
        out=choose([None, "fresh"]),
    )


def group_size(case):
    inner = case["ngroups"] * case["heads_per_group"] * case["headdim"]
    return {"all": inner, "group": inner // case["ngroups"], "head": case["headdim"]}[case["norm"]]


def problem(case):
    """The arguments by name, on the CPU."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, G, P, N = (case[k] for k in ("batch", "ngroups", "headdim", "dstate"))
    H, small, dtype = G * case["heads_per_group"], case["small_dtype"], case["dtype"]
    inner, conv_dim, nslots = H * P, H * P + 2 * G * N, batch + 5
    columns = case["width"] - 1 + case["spare"]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    dt = torch.rand(batch, H, generator=generator) * {"usual": 0.2, "steep": 80 / 16, "zero": 0.0}[case["regime"]]
    if case["regime"] == "usual" and case["dt_softplus"]:
        dt = dt * 30 - 5
    zxbcdt = torch.cat([randn(batch, inner + conv_dim), dt], 1).to(dtype)
    if case["strided"]:
        zxbcdt = torch.cat([zxbcdt, zxbcdt], 1)[:, : zxbcdt.shape[1]]
    conv_state = randn(nslots, conv_dim, columns)
    if case["pool"] == "channel_last":
        conv_state = conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    state = randn(nslots, H, P, N)
    if case["pool"] == "heads":
        state = state.repeat_interleave(2, 1)[:, ::2]
    arguments = dict(
        zxbcdt=zxbcdt,
        conv_state=conv_state.to(case["conv_state_dtype"]),
        state=state.to(case["state_dtype"]),
        conv_weight=(0.5 * randn(conv_dim, case["width"])).to(small),
        A=-torch.exp(torch.rand(H, generator=generator) * math.log(16)),
        norm_weight=(1 + 0.1 * randn(inner)).to(small),
    )
    if case["conv_bias"]:
        arguments["conv_bias"] = randn(conv_dim).to(small)
    if case["D"]:
        arguments["D"] = randn(*((H,) if case["D"] == "head" else (H, P)))
    if case["dt_bias"]:
        arguments["dt_bias"] = randn(H).to(small)
    if case["slots"]:
        slots = torch.tensor([s for s in range(nslots) if s != NULL])
        slots = slots[torch.randperm(len(slots), generator=generator)][:batch].int()
        if case["slots"] == "padded":
            slots[torch.rand(batch, generator=generator) < 0.4] = NULL
        arguments["slots"] = slots
        arguments["null_slot"] = NULL
    options = ("dt_softplus", "dt_limit", "norm_before_gate")
    # of few features, a group that cancels to almost nothing would have its rounding magnified by a small eps
    return arguments | {k: case[k] for k in options} | dict(group_size=group_size(case), eps=1.0)


def oracle(arguments, dtype, store=lambda S, slot, t: S):
    def array(value):
        if not isinstance(value, torch.Tensor):
            return value
        return to_numpy(value, dtype) if value.is_floating_point() else value.numpy()

    return reference.mamba2_step(**{k: array(v) for k, v in arguments.items()}, dtype=dtype, store=store)


def float32_baselines(arguments, count):
    """[(y, pool of states)] of float32 computations that differ in the order of the sums over dstate and over taps.

    Where such a sum cancels, a norm of few features magnifies its error: several orders measure what one is worth.
    """
    N, width, batch = arguments["state"].shape[-1], arguments["conv_weight"].shape[1], len(arguments["zxbcdt"])
    inner, conv_dim = arguments["norm_weight"].shape[0], arguments["conv_weight"].shape[0]
    rows = arguments.get("slots", torch.arange(batch)).long()
    runs = []
    for k in range(count):
        order = torch.arange(N).roll(5 * k)
        channels = torch.arange(conv_dim)
        channels[inner:] = inner + torch.arange(conv_dim - inner).view(-1, N)[:, order].flatten()
        zxbcdt, pool = arguments["zxbcdt"].double(), arguments["conv_state"].double()
        first = pool.shape[2] - (width - 1)
        window = torch.cat([pool[rows, :, first:], zxbcdt[:, inner : inner + conv_dim, None]], 2)
        window = window.roll(k, 2)[:, channels]
        pool[rows, :, first:] = window[:, :, :-1]
        zxbcdt[:, inner : inner + conv_dim] = window[:, :, -1]
        moved = dict(
            zxbcdt=zxbcdt,
            conv_state=pool,
            state=arguments["state"][..., order],
            conv_weight=arguments["conv_weight"].roll(k, 1)[channels],
        )
        if "conv_bias" in arguments:
            moved["conv_bias"] = arguments["conv_bias"][channels]
        y, _, states = oracle(arguments | moved, np.float32)
        runs.append((y, states[..., order.argsort().numpy()]))
    return runs


def for_cuda(case):
    """The nearest case that the CUDA kernel takes."""
    return case | dict(
        headdim={8: 64, 24: 80}[case["headdim"]],
        dstate={16: 64, 20: 128}[case["dstate"]],
        width=min(max(case["width"], 2), 4),
        spare=0,
        norm="group" if case["norm"] == "head" else case["norm"],
    )


def check_step(case, impl, device="cpu"):
    arguments = problem(case)
    ref, ref_windows, ref_states = oracle(arguments, np.float64)
    runs = float32_baselines(arguments, 6 if case["dtype"] == torch.float32 else 1)
    given = {k: to_device(v, device) for k, v in arguments.items()}
    out = None
    if case["out"] == "fresh":
        out = torch.full(ref.shape, float("nan"), dtype=case["dtype"], device=device)
    y = hybrid_ops.mamba2_step(**given, out=out, impl=impl)
    assert out is None or y is out

    inner, size = ref.shape[1], group_size(case)
    groups = (len(ref), inner // size, size)  # of the norm
    assert_within_all("y", y.view(groups), ref.reshape(groups), [run[0].reshape(groups) for run in runs], case["dtype"])
    slots, nslots = arguments.get("slots"), len(ref_states)
    written = range(len(ref)) if slots is None else [s for s in slots.tolist() if s != NULL]
    written, others = sorted(written), [s for s in range(nslots) if s not in written]
    before = {k: arguments[k].double() for k in ("conv_state", "state")}
    after = {k: given[k].cpu().double() for k in before}
    for name in before:
        assert torch.equal(after[name][others], before[name][others])
    exact = torch.from_numpy(ref_windows)[written].to(case["conv_state_dtype"]).double()
    assert torch.equal(after["conv_state"][written], exact)
    width = max(case["dtype"], case["state_dtype"], key=lambda d: torch.finfo(d).eps)
    states = [run[1][written] for run in runs]  # by head
    assert_within_all("state", after["state"][written], ref_states[written], states, width)


def assert_within_all(name, got, ref, baselines, dtype):
    """By slices of axis 1, against the error of all baselines together."""
    times = len(baselines)
    assert_within(
        name, torch.cat([got] * times), np.concatenate([ref] * times), np.concatenate(baselines), dtype, axis=1
    )
