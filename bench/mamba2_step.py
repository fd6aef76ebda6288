"""A decoding step of a Mamba-2 mixer between its projections, beside the three operators that it is made of."""

import itertools
from collections.abc import Iterator

import torch

import hybrid_ops

from . import peers
from .cases import DECODE, MIXERS, SHARDS, Case, Tensors, decode, float32, mixer_of, randn, sharded, time_steps

FLOATS = ("zxbcdt", "conv_state", "state", "conv_weight", "conv_bias", "norm_weight")


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield mamba2_step("tiny", 4)
        return
    for model in ("nano3", "super"):
        for batch in (1, 16, 64, 256, 512):
            yield mamba2_step(model, batch)
    for batch in (1, 64):
        yield mamba2_step("nano2", batch)


def sweep() -> Iterator[Case]:
    for model, tp in itertools.product(MIXERS, SHARDS):
        for batch in DECODE:
            yield mamba2_step(model, batch, tp)


def mamba2_step(model: str, batch: int, tp: int = 1) -> Case:
    """Both pools as they are after many steps with the same token, so that every replay leaves the same."""
    mixer = mixer_of(model, tp)
    inner, groups, group_size = mixer.inner, mixer.ngroups * mixer.dstate, mixer.inner // mixer.ngroups

    def split(t: Tensors) -> tuple[torch.Tensor, ...]:
        """z, xBC, dt."""
        return t["zxbcdt"].split([inner, mixer.conv_dim, mixer.nheads], 1)

    def scan_inputs(t: Tensors, xBC: torch.Tensor) -> Tensors:
        x, B, C = xBC.split([inner, groups, groups], 1)
        x, B, C = (x.unflatten(1, (mixer.nheads, -1)), *(s.unflatten(1, (mixer.ngroups, -1)) for s in (B, C)))
        return {"x": x, "dt": split(t)[2], "A": t["A"], "B": B, "C": C, "D": t["D"], "dt_bias": t["dt_bias"]}

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        dt, A, dt_bias = time_steps(generator, batch, mixer.nheads)
        t = {
            "zxbcdt": torch.cat([randn(generator, batch, inner + mixer.conv_dim), dt], 1),
            "conv_weight": randn(generator, mixer.conv_dim, mixer.width) * 0.5,
            "conv_bias": randn(generator, mixer.conv_dim) * 0.5,
            "A": A,
            "D": torch.ones_like(A),
            "dt_bias": dt_bias,
            "norm_weight": 1 + randn(generator, inner) * 0.1,
            "slots": torch.randperm(batch, generator=generator, device=device).to(torch.int32),
        }
        slots, window = t["slots"].long(), split(t)[1][:, :, None].expand(-1, -1, mixer.width)
        t["conv_state"] = torch.empty_like(window[:, :, 1:], memory_format=torch.contiguous_format)
        t["conv_state"][slots] = window[:, :, 1:]
        xBC = (window.float() * t["conv_weight"].float()).sum(2) + t["conv_bias"].float()
        scan = scan_inputs(t, torch.nn.functional.silu(xBC))
        steps = torch.nn.functional.softplus(dt.float() + dt_bias)
        inputs = (steps / -torch.expm1(steps * A))[..., None] * scan["x"]  # of all tokens so far
        B = scan["B"].repeat_interleave(mixer.nheads // mixer.ngroups, 1)
        t["state"] = torch.empty(batch, mixer.nheads, mixer.headdim, mixer.dstate, device=device)
        t["state"][slots] = inputs[..., None] * B[:, :, None]
        return t

    def call(t: Tensors, impl: str) -> Tensors:
        y = hybrid_ops.mamba2_step(**t, group_size=group_size, impl=impl)
        return {"y": y, "conv_state": t["conv_state"], "state": t["state"]}

    def three_ops(t: Tensors) -> object:
        z, xBC, _ = split(t)
        conv = (t["conv_state"], t["conv_weight"], t["conv_bias"])
        xBC = hybrid_ops.causal_conv1d_update(xBC, *conv, activation="silu", slots=t["slots"])
        scan = scan_inputs(t, xBC)
        y = hybrid_ops.ssd_state_update(t["state"], **scan, dt_softplus=True, read_slots=t["slots"])
        return hybrid_ops.gated_rms_norm(y.flatten(1), z, t["norm_weight"], group_size=group_size)

    rows = 2 * (2 * inner + mixer.conv_dim + mixer.nheads + 2 * mixer.conv_dim * (mixer.width - 1))
    return Case(
        op="mamba2_step",
        public="mamba2_step",
        name=decode(model, batch, *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call({**t, **float32(t, *FLOATS)}, "torch"),
        axis={"y": 0, "conv_state": -2, "state": -3},
        bytes=batch * (8 * inner * mixer.dstate + rows) + 2 * (mixer.conv_dim * (mixer.width + 1) + inner),
        flops=0,
        in_place=("conv_state", "state"),
        problem={
            "batch": batch,
            "nheads": mixer.nheads,
            "headdim": mixer.headdim,
            "ngroups": mixer.ngroups,
            "dstate": mixer.dstate,
        },
        peers={"three ops": three_ops, **peers.mamba2_step(split, scan_inputs, group_size)},
    )
