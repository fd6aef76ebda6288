"""The short convolution: whole sequences, and one token of each sequence."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import hybrid_ops
from hybrid_ops.conv1d import _gradients

from . import peers
from .cases import DECODE, MIXERS, PREFILL, SHARDS, Case, Tensors, decode, float32, mixer_of, prefill, randn, sharded

WIDTH = 4


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield conv1d("tiny", 256, 2, strided=True)
        yield conv1d_bwd("tiny", 256, 2)
        yield conv1d_update("tiny", 4)
        return
    yield conv1d("super", 8192, 1, strided=True)
    yield conv1d("super", 8192, 1)
    yield conv1d("super", 65536, 1, strided=True)
    yield conv1d("super", 512, 1, strided=True)
    yield conv1d("super", 8192, 1, strided=True, sequences=16)
    yield conv1d("nano3", 2048, 8, strided=True)
    yield conv1d("nano2", 8192, 1, strided=True)
    yield conv1d_bwd("super", 8192, 1)
    yield conv1d_bwd("super", 8192, 1, strided=False)
    yield conv1d_bwd("super", 65536, 1)
    yield conv1d_bwd("nano3", 2048, 8)
    for batch in (1, 128, 512):
        yield conv1d_update("super", batch)
    for batch in (128, 512):
        yield conv1d_update("super", batch, channel_last=True)


def sweep() -> Iterator[Case]:
    for model, tp in itertools.product(MIXERS, SHARDS):
        for seqlen in PREFILL:
            yield conv1d(model, seqlen, 1, strided=True, tp=tp)
            yield conv1d_bwd(model, seqlen, 1, tp)
        for batch in DECODE:
            yield conv1d_update(model, batch, tp)


def conv1d(model: str, seqlen: int, batch: int, *, strided: bool = False, sequences: int = 0, tp: int = 1) -> Case:
    """`strided`: x is a slice of in_proj's output. `sequences`: so many of equal length, packed into the one row."""
    mixer, dtype = mixer_of(model, tp), torch.bfloat16
    dim = mixer.conv_dim

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        width = mixer.in_proj if strided else dim
        start = mixer.inner if strided else 0
        x = randn(generator, batch, seqlen, width)[..., start : start + dim]
        tensors = {"x": x, "weight": randn(generator, dim, WIDTH) * 0.5, "bias": randn(generator, dim) * 0.5}
        if sequences:
            bounds = torch.linspace(0, seqlen, sequences + 1, device=device)
            tensors["cu_seqlens"] = bounds.to(torch.int32)
        return tensors

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.causal_conv1d(**t, activation="silu", impl=impl)}

    def expected(t: Tensors) -> Tensors:
        exact = {**t, **float32(t, "x", "weight", "bias")}
        return {"y": hybrid_ops.causal_conv1d(**exact, activation="silu", impl="torch")}

    def torch_conv(t: Tensors) -> object:
        x = F.pad(t["x"].transpose(1, 2), (WIDTH - 1, 0))
        return F.silu(F.conv1d(x, t["weight"][:, None], t["bias"], groups=dim))

    suffixes = [*(["strided"] if strided else []), *([f"packed{sequences}"] if sequences else []), *sharded(tp)]
    element = torch.finfo(dtype).bits // 8
    return Case(
        op="conv1d_fwd",
        public="causal_conv1d",
        name=prefill(model, seqlen, batch, *suffixes),
        dtype=dtype,
        make=make,
        call=call,
        expected=expected,
        axis={"y": -1},
        bytes=element * (2 * batch * seqlen * dim + dim * (WIDTH + 1)),
        flops=0,  # not on the matrix units
        tokens=1,
        problem={"seqlen": seqlen, "dim": dim, "width": WIDTH},
        peers={} if sequences else {**peers.conv1d(), **peers.eager_and_compiled(torch_conv, model)},
    )


def conv1d_bwd(model: str, seqlen: int, batch: int, tp: int = 1, *, strided: bool = True) -> Case:
    """All gradients by the operator itself, without autograd. `strided`: x is a slice of in_proj's output."""
    mixer = mixer_of(model, tp)
    dim = mixer.conv_dim

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        width, start = (mixer.in_proj, mixer.inner) if strided else (dim, 0)
        return {
            "dy": randn(generator, batch, seqlen, dim),
            "x": randn(generator, batch, seqlen, width)[..., start : start + dim],
            "weight": randn(generator, dim, WIDTH) * 0.5,
            "bias": randn(generator, dim) * 0.5,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        dx, dweight, dbias, _ = _gradients(t["dy"], None, t["x"], t["weight"], t["bias"], None, None, None, True, impl)
        return {"dx": dx, "dweight": dweight, "dbias": dbias[None]}

    return Case(
        op="conv1d_bwd",
        public="causal_conv1d",
        name=prefill(model, seqlen, batch, *(["strided"] if strided else []), *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(float32(t, "dy", "x", "weight", "bias"), "torch"),
        axis={"dx": -1, "dweight": -1, "dbias": 0},
        bytes=2 * (3 * batch * seqlen * dim + 2 * dim * (WIDTH + 1)),
        flops=0,
        tokens=1,
        impls=("cuda",),
        problem={"seqlen": seqlen, "dim": dim, "width": WIDTH},
    )


def conv1d_update(model: str, batch: int, tp: int = 1, *, channel_last: bool = False) -> Case:
    """`channel_last`: in the pool of windows channels are neighbours, as in vLLM's; else a channel's tokens are."""
    dim, dtype = mixer_of(model, tp).conv_dim, torch.bfloat16

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        if channel_last:
            conv_state = randn(generator, batch, WIDTH - 1, dim).transpose(1, 2)
        else:
            conv_state = randn(generator, batch, dim, WIDTH - 1)
        return {
            "x": randn(generator, batch, dim),
            "conv_state": conv_state,
            "weight": randn(generator, dim, WIDTH) * 0.5,
            "bias": randn(generator, dim) * 0.5,
            "slots": torch.randperm(batch, generator=generator, device=device).to(torch.int32),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        y = hybrid_ops.causal_conv1d_update(**t, activation="silu", impl=impl)
        return {"y": y, "conv_state": t["conv_state"]}

    def expected(t: Tensors) -> Tensors:
        """After a few replays with the same x the windows hold nothing else, and a further call changes nothing."""
        exact = {**t, **float32(t, "x", "conv_state", "weight", "bias")}
        y = hybrid_ops.causal_conv1d_update(**exact, activation="silu", impl="torch")
        return {"y": y, "conv_state": exact["conv_state"]}

    def torch_update(t: Tensors) -> object:
        window = torch.cat([t["conv_state"].index_select(0, t["slots"]), t["x"][..., None]], dim=-1)
        t["conv_state"].index_copy_(0, t["slots"].long(), window[..., 1:])
        return F.silu((window * t["weight"]).sum(-1) + t["bias"])

    element = torch.finfo(dtype).bits // 8
    return Case(
        op="causal_conv1d_update",
        public="causal_conv1d_update",
        name=decode(model, batch, *sharded(tp), *(["channel-last"] if channel_last else [])),
        dtype=dtype,
        make=make,
        call=call,
        expected=expected,
        axis={"y": -1, "conv_state": -2},
        bytes=element * (batch * dim * (2 + 2 * (WIDTH - 1)) + dim * (WIDTH + 1)),
        flops=0,
        in_place=("conv_state",),
        problem={"batch": batch, "dim": dim},
        peers={**peers.conv1d_update(), **peers.eager_and_compiled(torch_update, model)},
    )
