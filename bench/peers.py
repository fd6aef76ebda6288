"""Other libraries, found by import; their calls take the same tensors as ours."""

import importlib.util
from collections.abc import Callable, Mapping

from .cases import Tensors

LIBRARIES = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}

Peers = Mapping[str, Callable[[Tensors], object]]


def present(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def missing() -> list[str]:
    return [package for library, package in LIBRARIES.items() if not present(library)]


def conv1d() -> Peers:
    """silu after the convolution, channel-last x."""
    if not present("causal_conv1d"):
        return {}
    from causal_conv1d import causal_conv1d_fn

    return {
        "causal_conv1d": lambda t: causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu")
    }


def conv1d_update() -> Peers:
    if not present("causal_conv1d"):
        return {}
    from causal_conv1d import causal_conv1d_update

    return {
        "causal_conv1d": lambda t: causal_conv1d_update(
            t["x"], t["conv_state"], t["weight"], t["bias"], activation="silu", conv_state_indices=t["slots"]
        )
    }


def ssd(chunk_size: int) -> Peers:
    if not present("mamba_ssm"):
        return {}
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return {
        "mamba_ssm": lambda t: mamba_chunk_scan_combined(
            t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size, D=t["D"], dt_bias=t["dt_bias"], dt_softplus=True
        )
    }


def ssd_update() -> Peers:
    """In place, in the slots that ours only writes; scalars per head are broadcast by strides, its fast path."""
    if not present("mamba_ssm"):
        return {}
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def call(t: Tensors) -> object:
        nheads, headdim, dstate = t["state"].shape[1:]
        per_head = [t[name][:, None].expand(nheads, headdim) for name in ("D", "dt_bias")]
        A = t["A"][:, None, None].expand(nheads, headdim, dstate)
        dt = t["dt"][..., None].expand(-1, nheads, headdim)
        return selective_state_update(
            t["state"], t["x"], dt, A, t["B"], t["C"], *per_head[:1], dt_bias=per_head[1], dt_softplus=True,
            state_batch_indices=t["write_slots"],
        )  # fmt: skip

    return {"mamba_ssm": call}


def gated_norm(group_size: int) -> Peers:
    if not present("mamba_ssm"):
        return {}
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return {
        "mamba_ssm": lambda t: rmsnorm_fn(
            t["x"], t["weight"], None, z=t["z"], eps=1e-5, group_size=group_size, norm_before_gate=False
        )
    }


def residual_norm() -> Peers:
    if not present("mamba_ssm"):
        return {}
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return {
        "mamba_ssm": lambda t: rms_norm_fn(t["x"], t["weight"], None, residual=t["residual"], eps=1e-5, prenorm=True)
    }
