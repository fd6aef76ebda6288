"""Random streams for `ssd_replay_update`, and the check that every implementation passes."""

import math
import random

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import ssd_replay as reference
from hybrid_ops.reference.ssd_update import stochastic_store

from .budget import assert_within, to_numpy
from .tensors import to_device

NARROW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
NULL = 3  # a row of the pool that stands for padding, where slots are given
KEPT = ("x", "B", "dt", "ring")


def cases(dtypes, **sizes):
    # one draw seeds the rest: drawn one by one, choices repeat from example to example
    return st.integers(0, 2**64).map(lambda seed: random_case(seed, dtypes, **sizes))


def random_case(seed, dtypes, headdims=(8, 24), dstates=(16, 20, 48), max_groups=2, steps=4, float32_times=24):
    choose = random.Random(seed).choice
    dtype = choose(dtypes)
    capacity = choose([1, 3, 7, 16])
    max_tokens = choose(range(1, capacity + 1))
    return dict(
        seed=choose(range(2**31)),
        dtype=dtype,
        state_dtype=choose(dtypes),
        small_dtype=choose([torch.float32, dtype]),
        # float32 errors are those of a few roundings, of which a head of few tokens has more or less by chance
        batch=choose([0, 1, 2, 3]) * (float32_times if dtype == torch.float32 else 1),
        capacity=capacity,
        max_tokens=max_tokens,
        tokens=[choose([None, *range(1, max_tokens + 1)]) for _ in range(steps)],  # None: one, without the dimension
        begin=choose(range(capacity + 1)),  # tokens that are cached before
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
        slots=choose([False, True]),
        rollback=choose([False, True]),
        stochastic=choose([False, True]),
        strided=choose([False, True]),
        pool=choose(["contiguous", "transposed", "heads"]),
        out=choose([None, "fresh", "x"]),
    )


def for_cuda(case):
    """The nearest case that the CUDA kernel takes."""
    dstate = {16: 64, 20: 256}.get(case["dstate"], 128)
    return case | dict(dstate=dstate, pool={"transposed": "contiguous"}.get(case["pool"], case["pool"]))


class Stream:
    """A pool, a cache and the inputs of each step, on the CPU."""

    def __init__(self, case):
        self.case, self.generator = case, torch.Generator().manual_seed(case["seed"])
        H, P, N = case["ngroups"] * case["heads_per_group"], case["headdim"], case["dstate"]
        self.sizes = H, P, case["ngroups"], N
        nslots = case["batch"] + 5
        if case["pool"] == "transposed":
            self.state = self.randn(nslots, N, H, P).to(case["state_dtype"]).permute(0, 2, 3, 1)
        else:
            heads = 2 * H if case["pool"] == "heads" else H
            self.state = self.randn(nslots, heads, P, N).to(case["state_dtype"])[:, :: heads // H]
        self.A = -torch.exp(self.rand(H) * math.log(16))  # 1 to 16, as Mamba-2 initialises it
        room = dict(capacity=case["capacity"], max_tokens=case["max_tokens"])
        self.cache = hybrid_ops.ReplayCache.new(nslots, H, P, case["ngroups"], N, dtype=case["dtype"], **room)
        self.cache.x.normal_(generator=self.generator)
        self.cache.B.normal_(generator=self.generator)
        self.cache.dt.copy_(self.dt(*self.cache.dt.shape).clamp(*case["dt_limit"]))
        start = torch.randint(0, self.cache.x.shape[2], (nslots,), generator=self.generator)
        self.cache.ring.copy_(start + 256 * case["begin"])

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def rand(self, *shape):
        return torch.rand(*shape, generator=self.generator)

    def dt(self, *shape):
        case = self.case
        scale = {"usual": 0.2, "steep": 80 / 16, "zero": 0.0, "large": 40.0}[case["regime"]]
        return self.rand(*shape) * scale

    def index(self, options):
        """Slots and rollback, each where the case has it."""
        case, nslots = self.case, len(self.state)
        if case["slots"]:
            free = torch.tensor([s for s in range(nslots) if s != NULL])
            slots = free[torch.randperm(len(free), generator=self.generator)][: case["batch"]].int()
            slots[self.rand(case["batch"]) < 0.2] = NULL
            options |= dict(slots=slots, null_slot=NULL)
        if case["rollback"]:
            most = min(4, case["capacity"]) + 1
            options["rollback"] = torch.randint(0, most, (case["batch"],), generator=self.generator).int()
        if case["stochastic"] and case["state_dtype"] in NARROW:
            options |= dict(rounding="stochastic", seed=torch.randint(0, 2**60, (1,), generator=self.generator))
        return options

    def step(self, tokens):
        """(x, dt, B, C) and options; x, z, B, C, dt may be slices of one wider tensor."""
        case, (H, P, G, N) = self.case, self.sizes
        shape = (case["batch"],) if tokens is None else (case["batch"], tokens)
        sizes = [H * P, H * P, G * N, G * N]
        wide = self.randn(*shape, sum(sizes)).to(case["dtype"])
        parts = [part if case["strided"] else part.contiguous() for part in wide.split(sizes, -1)]
        x, z = (part.unflatten(-1, (H, P)) for part in parts[:2])
        B, C = (part.unflatten(-1, (G, N)) for part in parts[2:])
        dt = self.dt(*shape, H)
        if case["regime"] == "usual" and case["dt_softplus"]:
            dt = dt * 60 - 10  # softplus of it reaches down to 5e-5
        dt = dt.to(case["small_dtype"])
        if case["strided"]:
            dt = torch.cat([dt, dt], -1)[..., :H]
        options = dict(dt_softplus=case["dt_softplus"], dt_limit=case["dt_limit"])
        if case["D"]:
            options["D"] = self.randn(*((H,) if case["D"] == "head" else (H, P)))
        if case["z"]:
            options["z"] = z
        if case["dt_bias"]:
            options["dt_bias"] = self.randn(H).to(case["small_dtype"])
        return (x, dt, B, C), self.index(options)


def array(value, dtype=np.float64):
    if not isinstance(value, torch.Tensor):
        return value
    return to_numpy(value, dtype) if value.is_floating_point() else value.cpu().numpy()


def oracle(function, state, cache, arguments, options, dtype, store):
    arguments = [array(a, dtype) for a in arguments]
    named = {k: array(v, dtype) for k, v in options.items() if k not in ("rounding", "seed")}
    cache = tuple(array(part, dtype) for part in cache)
    return getattr(reference, function)(array(state, dtype), cache, *arguments, store=store, dtype=dtype, **named)


def check_stream(case, impl, device="cpu"):
    """Every step from where the implementation itself has come to, and at the end what its slots stand for."""
    stream = Stream(case)
    state = to_device(stream.state, device)
    cache = stream.cache._make(to_device(part, device) for part in stream.cache)
    A, ys = to_device(stream.A, device), []
    for tokens in case["tokens"]:
        (x, dt, B, C), options = stream.step(tokens)
        before = state.clone(), cache._make(p.clone() if isinstance(p, torch.Tensor) else p for p in cache)
        exact, singles = oracles("ssd_replay_update", *before, (x, dt, stream.A, B, C), options, case)
        x, dt, B, C = (to_device(t, device) for t in (x, dt, B, C))
        moved = {k: to_device(v, device) for k, v in options.items()}
        out = {"fresh": torch.full_like(x, float("nan")), "x": x}.get(case["out"])
        y = hybrid_ops.ssd_replay_update(state, cache, x, dt, A, B, C, out=out, impl=impl, **moved)
        assert out is None or y is out
        ys += [(y.clone().cpu(), exact[0], single[0]) for single in singles]
        check_kept(case, before, state, cache, exact[1:], singles[0][1:], options)
    got, ref, base = ([t.reshape(-1, *stream.sizes[:2]) for t in results] for results in zip(*ys, strict=True))
    # of all steps together: the errors of few tokens are larger or smaller than the baseline's by chance
    assert_within("y", torch.cat(got), np.concatenate(ref), np.concatenate(base), case["dtype"], axis=1)
    before = state.clone(), cache._make(p.clone() if isinstance(p, torch.Tensor) else p for p in cache)
    options = stream.index({})
    if case["slots"]:
        used = set(options["slots"].tolist())
        free = [s for s in range(len(state)) if s not in used and s != NULL]
        places = torch.tensor([*free, *[NULL] * case["batch"]], dtype=torch.int32)[: case["batch"]]
        if case["z"]:
            options["write_slots"] = places
    elif "rollback" in options:
        options["rollback"] = torch.zeros(len(state), dtype=torch.int32) + (1 if case["z"] else 0)
    exact, (single, *_) = oracles("ssd_replay_materialize", *before, (stream.A,), options, case)
    moved = {k: to_device(v, device) for k, v in options.items()}
    hybrid_ops.ssd_replay_materialize(state, cache, A, impl=impl, **moved)
    check_kept(case, before, state, cache, exact, single, options)


def oracles(function, state, cache, arguments, options, case):
    """The results in float64, and [those in float32], whose state is rounded as the implementation rounds.

    Where x is float32, several that differ in the order of the sum over dstate: one may be nearly exact by luck.
    """

    def keep(S, slot, t):
        return S

    rounded = keep
    if "seed" in options:
        rounded = stochastic_store(int(options["seed"]), NARROW[case["state_dtype"]])
    exact = oracle(function, state, cache, arguments, options, np.float64, keep)
    singles = [oracle(function, state, cache, arguments, options, np.float32, rounded)]
    if case["dtype"] == torch.float32 and function == "ssd_replay_update":
        x, dt, A, B, C = arguments
        for k in range(1, 6):
            order = torch.arange(B.shape[-1]).roll(5 * k)
            rolled = (
                state[..., order],
                cache._replace(B=cache.B[..., order]),
                (x, dt, A, B[..., order], C[..., order]),
            )
            singles.append(oracle(function, *rolled, options, np.float32, keep))
    return exact, singles


def check_kept(case, before, state, cache, exact, single, options):
    """The state within the budget where it was written, the tokens exactly, and everything else as it was."""
    old_state, (pool, kept) = before[0], exact
    changed = [s for s in range(len(pool)) if not np.array_equal(pool[s], array(old_state[s]))]
    same = [s for s in range(len(pool)) if s not in changed]
    if "seed" not in options:
        assert torch.equal(state[same], old_state[same])
    if changed:
        heads = (len(changed) * state.shape[1], *state.shape[2:])
        width = max(case["dtype"], case["state_dtype"], key=lambda d: torch.finfo(d).eps)
        got, ref, base = (array(a)[changed].reshape(heads) for a in (state, pool, single[0]))
        if "seed" in options:  # one step of the grid at most, by the same bits: rarely otherwise
            assert (np.abs(got - base) <= 2 * torch.finfo(case["state_dtype"]).eps * np.abs(base) + 1e-6).all()
            assert (got != base).mean() < 0.05
        else:
            assert_within("state", torch.from_numpy(got), ref, base, width, axis=0)
    for name, part, want in zip(KEPT, cache, kept, strict=False):
        if name == "dt":
            # float32: of softplus alone 3e-7 may be wrong, in any implementation
            np.testing.assert_allclose(array(part), want, rtol=2**-20, atol=1e-30, err_msg=name)
        else:
            np.testing.assert_array_equal(array(part), want, err_msg=name)
