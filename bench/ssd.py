"""The state-space scan: whole sequences (chunked), and a few tokens of each sequence."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

import hybrid_ops

from . import peers
from .cases import (
    DECODE,
    MIXERS,
    PREFILL,
    SHARDS,
    Case,
    Mixer,
    Tensors,
    decode,
    float32,
    mixer_of,
    prefill,
    randn,
    sharded,
    time_steps,
)

CHUNK = 128
SCAN_INPUTS = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield ssd("tiny", 256, 2)
        yield ssd_norm("tiny", 256, 2)
        yield ssd_update("tiny", 4, torch.float32)
        yield ssd_replay("tiny", 4, torch.float32, 2, 1)
        return
    yield ssd("super", 8192, 1)
    yield ssd("super", 512, 1)
    yield ssd("super", 65536, 1)
    yield ssd("super", 2048, 4)
    yield ssd("super", 8192, 4)
    yield ssd("super", 8192, 1, tp=8)
    yield ssd("nano3", 8192, 1)
    yield ssd("nano3", 2048, 8)
    yield ssd("nano2", 8192, 1)
    yield ssd("h56b", 8192, 1)
    for model, seqlen, batch in (("super", 8192, 1), ("super", 2048, 4), ("nano3", 8192, 1), ("nano2", 8192, 1)):
        yield ssd_norm(model, seqlen, batch)
    for batch in (1, 16, 64, 256):
        yield ssd_update("super", batch, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        yield ssd_update("super", 64, dtype)
    yield ssd_update("super", 64, torch.float16, stochastic=True)
    for batch in (1, 16, 64, 256):
        yield ssd_replay("super", batch, torch.float32)
    yield ssd_replay("super", 64, torch.bfloat16)
    for accepted in range(1, 5):
        yield ssd_replay("nano3", 64, torch.float32, 4, accepted)


def sweep() -> Iterator[Case]:
    for model, tp in itertools.product(MIXERS, SHARDS):
        for seqlen in PREFILL:
            yield ssd(model, seqlen, 1, tp)
        for batch in DECODE:
            yield ssd_update(model, batch, torch.float32, tp)
            yield ssd_update(model, batch, torch.bfloat16, tp)
    for model, batch, dtype in itertools.product(("nano3", "super"), DECODE, (torch.float32, torch.bfloat16)):
        yield ssd_replay(model, batch, dtype)
        for accepted in range(1, 5):
            yield ssd_replay(model, batch, dtype, 4, accepted)


def inputs(mixer: Mixer, generator: torch.Generator, *shape: int) -> Tensors:
    """x, B and C as slices of the convolution's output, as in the model."""
    conv = randn(generator, *shape, mixer.conv_dim)
    x, B, C = conv.split([mixer.inner, mixer.ngroups * mixer.dstate, mixer.ngroups * mixer.dstate], dim=-1)
    dt, A, dt_bias = time_steps(generator, *shape, mixer.nheads)
    return {
        "x": x.unflatten(-1, (mixer.nheads, mixer.headdim)),
        "dt": dt,
        "A": A,
        "B": B.unflatten(-1, (mixer.ngroups, mixer.dstate)),
        "C": C.unflatten(-1, (mixer.ngroups, mixer.dstate)),
        "D": torch.ones_like(A),
        "dt_bias": dt_bias,
    }


def ssd(model: str, seqlen: int, batch: int, tp: int = 1) -> Case:
    mixer = mixer_of(model, tp)

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.ssd_chunk_scan(**t, dt_softplus=True, chunk_size=CHUNK, impl=impl)}

    tokens, inner, state = batch * seqlen, mixer.inner, mixer.dstate
    groups = mixer.ngroups * state
    return Case(
        op="ssd_chunk_scan_fwd",
        public="ssd_chunk_scan",
        name=prefill(model, seqlen, batch, *sharded(tp)),
        dtype=torch.bfloat16,
        make=lambda device, generator: inputs(mixer, generator, batch, seqlen),
        call=call,
        expected=lambda t: call(float32(t, *SCAN_INPUTS), "torch"),
        axis={"y": -2},
        bytes=2 * tokens * (2 * inner + 2 * groups + mixer.nheads),
        # per token: the state's update and its product with C; C B^T and its product with x, causal half
        flops=tokens * (4 * inner * state + CHUNK * (inner + groups)),
        tokens=1,
        problem={"headdim": mixer.headdim, "dstate": mixer.dstate},
        peers={**peers.ssd(CHUNK), **peers.own_torch(call, model)},
    )


def ssd_norm(model: str, seqlen: int, batch: int) -> Case:
    """With the gate and the norm that follow in every Mamba-2 mixer here, beside the two operators."""
    mixer = mixer_of(model)
    inner, group_size = mixer.inner, mixer.inner // mixer.ngroups

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        """z as a slice of in_proj's output."""
        z = randn(generator, batch, seqlen, inner + mixer.conv_dim + mixer.nheads)[..., :inner]
        norm_weight = 1 + randn(generator, inner) * 0.1
        t = inputs(mixer, generator, batch, seqlen)
        return t | {"z": z.unflatten(-1, (mixer.nheads, mixer.headdim)), "norm_weight": norm_weight}

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.ssd_chunk_scan(**t, dt_softplus=True, chunk_size=CHUNK, impl=impl)}

    def apart(t: Tensors, impl: str = "auto", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        scan = {name: t[name] for name in SCAN_INPUTS}
        y = hybrid_ops.ssd_chunk_scan(**scan, dt_softplus=True, chunk_size=CHUNK, impl=impl).to(dtype).to(t["x"].dtype)
        z, weight = t["z"].flatten(2), t["norm_weight"]
        return hybrid_ops.gated_rms_norm(y.flatten(2), z, weight, group_size=group_size, impl=impl).view(t["x"].shape)

    def wide(t: Tensors) -> Tensors:
        return float32(t, *SCAN_INPUTS, "z", "norm_weight")

    tokens, groups = batch * seqlen, mixer.ngroups * mixer.dstate
    return replace(
        ssd(model, seqlen, batch),
        name=prefill(model, seqlen, batch, "normed"),
        make=make,
        call=call,
        expected=lambda t: {"y": apart(wide(t), "torch", torch.float32)},
        baseline=lambda t: {"y": apart(wide(t), "torch")},
        bytes=2 * (tokens * (3 * inner + 2 * groups + mixer.nheads) + inner),
        problem={"headdim": mixer.headdim, "dstate": mixer.dstate, "nheads": mixer.nheads, "norm": True},
        peers={"two ops": apart},
    )


def ssd_update(model: str, batch: int, state_dtype: torch.dtype, tp: int = 1, *, stochastic: bool = False) -> Case:
    """From one half of a pool into the other, so that every replay does and leaves the same. With stochastic rounding
    of states there is no peer that draws the same bits."""
    mixer = mixer_of(model, tp)

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        state = randn(generator, 2 * batch, mixer.nheads, mixer.headdim, mixer.dstate, dtype=state_dtype)
        slots = torch.randperm(batch, generator=generator, device=device).to(torch.int32)
        return {
            "state": state,
            **inputs(mixer, generator, batch),
            "read_slots": slots,
            "write_slots": slots + batch,
            **({"seed": torch.ones(1, dtype=torch.int64, device=device)} if stochastic else {}),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        rounding = "stochastic" if "seed" in t else "nearest"
        y = hybrid_ops.ssd_state_update(**t, dt_softplus=True, rounding=rounding, impl=impl)
        return {"y": y, "state": t["state"][batch:]}

    def torch_update(t: Tensors) -> torch.Tensor:
        B, C = (t[name].float().repeat_interleave(mixer.nheads // mixer.ngroups, dim=1)[:, :, None] for name in "BC")
        dt, x = F.softplus(t["dt"].float() + t["dt_bias"]), t["x"].float()
        state = t["state"].index_select(0, t["read_slots"]).float()
        state = state * (dt * t["A"]).exp()[..., None, None] + (dt[..., None] * x)[..., None] * B
        t["state"].index_copy_(0, t["write_slots"].long(), state.to(state_dtype))
        return ((state * C).sum(-1) + t["D"][:, None] * x).to(t["x"].dtype)

    slots = ("read_slots", "write_slots")
    inner, groups = mixer.inner, mixer.ngroups * mixer.dstate
    element = torch.finfo(state_dtype).bits // 8
    return Case(
        op="ssd_state_update",
        public="ssd_state_update",
        name=decode(model, batch, *(["stochastic"] if stochastic else []), *sharded(tp)),
        dtype=state_dtype,
        make=make,
        call=call,
        expected=lambda t: call({**float32(t, "state", *SCAN_INPUTS), **{s: t[s] for s in slots}}, "torch"),
        axis={"y": -2, "state": -3},
        bytes=batch * (2 * element * inner * mixer.dstate + 2 * (2 * inner + 2 * groups + mixer.nheads)),
        flops=0,
        problem={
            "batch": batch,
            "nheads": mixer.nheads,
            "headdim": mixer.headdim,
            "dstate": mixer.dstate,
            "state_dtype": state_dtype,
        },
        peers={} if stochastic else {**peers.ssd_update(), **peers.eager_and_compiled(torch_update, model)},
    )


def ssd_replay(model: str, batch: int, state_dtype: torch.dtype, tokens: int = 1, accepted: int = 1) -> Case:
    """A step of `tokens`, of which `accepted` stay. Sequences are at all stages from one flush to the next: each call
    has its share of flushes, and takes what the average over a whole period is."""
    mixer, capacity = mixer_of(model), hybrid_ops.ssd_replay.MAX_CAPACITY
    period = (capacity - tokens) // accepted + 1
    kept = ("cache_x", "cache_B", "cache_dt", "ring")

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        sizes = (mixer.nheads, mixer.headdim, mixer.ngroups, mixer.dstate)
        *parts, _ = hybrid_ops.ReplayCache.new(batch, *sizes, max_tokens=tokens, dtype=torch.bfloat16, device=device)
        offset = torch.randint(period, (1,), generator=generator, device=device)
        stage = (torch.arange(batch, device=device) * period // batch + offset) % period
        parts[3] += (256 * (tokens + accepted * stage)).int()
        tensors = {
            "state": randn(generator, batch, mixer.nheads, mixer.headdim, mixer.dstate, dtype=state_dtype),
            **dict(zip(kept, parts, strict=True)),
            **inputs(mixer, generator, *((batch,) if tokens == 1 else (batch, tokens))),
            "slots": torch.randperm(batch, generator=generator, device=device).to(torch.int32),
        }
        if tokens == 1:
            return tensors
        table = tensors["slots"][:, None] + batch * torch.arange(tokens, dtype=torch.int32, device=device)
        return tensors | {
            "rollback": torch.full_like(tensors["slots"], tokens - accepted),
            "drafts": tensors["state"].repeat(tokens, 1, 1, 1),  # of ssd_state_update: a state after each token
            "table": table,
            "num_accepted": torch.full_like(tensors["slots"], accepted),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        cache = hybrid_ops.ReplayCache(*(t[name] for name in kept), capacity)
        arguments = {name: t[name] for name in ("state", *SCAN_INPUTS, "slots", "rollback") if name in t}
        y = hybrid_ops.ssd_replay_update(**arguments, cache=cache, dt_softplus=True, impl=impl)
        return {"y": y, "state": t["state"]}

    def expected(t: Tensors) -> Tensors:
        index = {name: t[name].clone() for name in ("ring", "slots", "rollback") if name in t}
        return call({**float32(t, "state", *kept[:3], *SCAN_INPUTS), **index}, "torch")

    def ssd_state_update(t: Tensors) -> torch.Tensor:
        arguments = {name: t[name] for name in SCAN_INPUTS}
        if tokens == 1:
            options = {"state": t["state"], "read_slots": t["slots"]}
        else:
            table = t["table"]
            options = {"state": t["drafts"], "read_slots": table, "write_slots": table}
            options["num_accepted"] = t["num_accepted"]
        return hybrid_ops.ssd_state_update(**arguments, **options, dt_softplus=True)

    inner, groups = mixer.inner, mixer.ngroups * mixer.dstate
    element, cached = torch.finfo(state_dtype).bits // 8, accepted * (period + 1) / 2  # tokens, on average
    token = 2 * inner + 2 * groups + 4 * mixer.nheads  # bytes, in the cache
    new = 2 * (2 * inner + 2 * groups + mixer.nheads)
    states = element * inner * mixer.dstate * (1 + 1 / period)
    return Case(
        op="ssd_replay_update",
        public="ssd_replay_update",
        name=decode(model, batch, *([f"T{tokens}", f"a{accepted}"] if tokens > 1 else [])),
        dtype=state_dtype,
        make=make,
        call=call,
        expected=expected,
        axis={"y": -2, "state": -3},
        bytes=round(batch * (states + cached * token + tokens * (new + token))),
        flops=0,
        in_place=("state",),
        moves=True,
        problem={
            "batch": batch,
            "tokens": tokens,
            "nheads": mixer.nheads,
            "headdim": mixer.headdim,
            "ngroups": mixer.ngroups,
            "dstate": mixer.dstate,
            "state_dtype": state_dtype,
        },
        peers={"ssd_state_update": ssd_state_update},
    )
