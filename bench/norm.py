"""RMSNorm with the residual add, and the gated norm of Mamba-2."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import hybrid_ops
from hybrid_ops.norm import _fill_gradients

from . import peers
from .cases import (
    DECODE,
    MIXERS,
    MODELS,
    PREFILL,
    SHARDS,
    WIDTHS,
    Case,
    Tensors,
    float32,
    mixer_of,
    prefill,
    randn,
    sharded,
)


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield residual_norm("tiny", 256, 2)
        yield gated_norm("tiny", 256, 2)
        yield gated_norm_bwd("tiny", 256, 2)
        return
    for model in ("super", "nano3", "nano2"):
        yield residual_norm(model, 8192, 1)
        yield gated_norm(model, 8192, 1)
        yield gated_norm_bwd(model, 8192, 1)
    yield residual_norm("super", 1, 64)


def sweep() -> Iterator[Case]:
    shapes = [*((seqlen, 1) for seqlen in PREFILL), *((1, batch) for batch in DECODE)]
    for seqlen, batch in shapes:
        for model in WIDTHS:
            yield residual_norm(model, seqlen, batch)
        for model, tp in itertools.product(MIXERS, SHARDS):
            yield gated_norm(model, seqlen, batch, tp)
            yield gated_norm_bwd(model, seqlen, batch, tp)


def residual_norm(model: str, seqlen: int, batch: int) -> Case:
    hidden = MODELS[model].hidden

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "x": randn(generator, batch, seqlen, hidden),
            "residual": randn(generator, batch, seqlen, hidden) * 8,
            "weight": 1 + randn(generator, hidden) * 0.1,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        y, h = hybrid_ops.rms_norm(**t, impl=impl)
        return {"y": y, "h": h}

    def expected(t: Tensors) -> Tensors:
        """y from the rounded stream, as the kernel must."""
        exact = float32(t, "x", "residual", "weight")
        h = exact["x"] + exact["residual"]
        y = hybrid_ops.rms_norm(h.to(t["residual"].dtype).float(), exact["weight"], impl="torch")
        return {"y": y, "h": h}

    def torch_norm(t: Tensors) -> object:
        h = t["x"] + t["residual"]
        return F.rms_norm(h, (hidden,), t["weight"], 1e-5), h

    return Case(
        op="norm_fwd",
        public="rms_norm",
        name=prefill(model, seqlen, batch, "residual"),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=expected,
        axis={"y": -2, "h": -2},
        bytes=2 * (4 * batch * seqlen * hidden + hidden),
        flops=0,
        tokens=1,
        problem={"group_size": hidden},
        peers={**peers.residual_norm(), **peers.eager_and_compiled(torch_norm, model)},
    )


def gated_norm(model: str, seqlen: int, batch: int, tp: int = 1) -> Case:
    """z is a slice of in_proj's output."""
    mixer = mixer_of(model, tp)
    group_size = mixer.inner // mixer.ngroups

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "x": randn(generator, batch, seqlen, mixer.inner),
            "z": randn(generator, batch, seqlen, mixer.in_proj)[..., : mixer.inner],
            "weight": 1 + randn(generator, mixer.inner) * 0.1,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.gated_rms_norm(**t, group_size=group_size, impl=impl)}

    def torch_norm(t: Tensors) -> object:
        gated = (t["x"] * F.silu(t["z"])).unflatten(-1, (mixer.ngroups, group_size))
        return F.rms_norm(gated, (group_size,), None, 1e-5).flatten(-2) * t["weight"]

    return Case(
        op="norm_fwd",
        public="gated_rms_norm",
        name=prefill(model, seqlen, batch, "gated", *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(float32(t, "x", "z", "weight"), "torch"),
        axis={"y": -2},
        bytes=2 * (3 * batch * seqlen * mixer.inner + mixer.inner),
        flops=0,
        tokens=1,
        problem={"group_size": group_size},
        peers={**peers.gated_norm(group_size), **peers.eager_and_compiled(torch_norm, model)},
    )


def gated_norm_bwd(model: str, seqlen: int, batch: int, tp: int = 1) -> Case:
    """All gradients by the operator itself, without autograd; z is a slice of in_proj's output."""
    mixer = mixer_of(model, tp)
    group_size = mixer.inner // mixer.ngroups

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "dy": randn(generator, batch, seqlen, mixer.inner),
            "x": randn(generator, batch, seqlen, mixer.inner),
            "z": randn(generator, batch, seqlen, mixer.in_proj)[..., : mixer.inner],
            "weight": 1 + randn(generator, mixer.inner) * 0.1,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        dx, dz, dweight = (t[name].new_empty(*t[name].shape) for name in ("dy", "dy", "weight"))
        _fill_gradients(  # as the library itself calls it, past the dispatcher
            t["dy"], t["x"], t["z"], t["weight"], None, dx, dz, None, dweight, 1e-5, group_size, False, impl
        )
        return {"dx": dx, "dz": dz, "dweight": dweight[None]}

    return Case(
        op="norm_bwd",
        public="gated_rms_norm",
        name=prefill(model, seqlen, batch, "gated", *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(float32(t, "dy", "x", "z", "weight"), "torch"),
        axis={"dx": -2, "dz": -2, "dweight": 0},
        bytes=2 * (5 * batch * seqlen * mixer.inner + 2 * mixer.inner),
        flops=0,
        tokens=1,
        problem={"group_size": group_size},
    )
