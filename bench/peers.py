"""Other libraries; their calls take the same tensors as ours and are named after what one imports.

Each imports its library when it is called: one that has changed or does not load costs its own figure and nothing else.
Some write into their inputs, as they do in use; peers are timed last.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F

from .cases import Tensors

LIBRARIES = {
    "causal_conv1d": "causal-conv1d",
    "mamba_ssm": "mamba-ssm",
    "fla": "flash-linear-attention",
    "vllm": "vllm",
    "flashinfer": "flashinfer-python",
    "deep_gemm": "DeepGEMM",
}

Call = Callable[[Tensors], object]
Peers = Mapping[str, Call]


def present(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def missing() -> list[str]:
    return [package for library, package in LIBRARIES.items() if not present(library)]


def _present(**calls: Call) -> Peers:
    return {library: call for library, call in calls.items() if present(library)}


def own_torch(call: Callable[[Tensors, str], object], model: str) -> Peers:
    """Our torch implementation; without a GPU it is what is measured already."""
    return {} if model == "tiny" else {"torch": lambda t: call(t, "torch")}


def eager_and_compiled(call: Call, model: str) -> Peers:
    """A composition of torch's own ops. Compiled for GPUs only: without one it would take longer than all the rest."""
    return {"torch": call} if model == "tiny" else {"torch": call, "torch.compile": lambda t: _compiled(call)(t)}


@functools.lru_cache(maxsize=1)
def _compiled(call: Call) -> Call:
    """For one case's shapes: after a few cases of one function torch would compile no more, and run it eagerly."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


def conv1d() -> Peers:
    """silu after the convolution, channel-last x."""

    def causal_conv1d(t: Tensors) -> object:
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu")

    def fla(t: Tensors) -> object:
        from fla.modules.conv import causal_conv1d

        return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu")[0]

    return _present(causal_conv1d=causal_conv1d, fla=fla)


def conv1d_update() -> Peers:
    def causal_conv1d(t: Tensors) -> object:
        from causal_conv1d import causal_conv1d_update

        rest = t["weight"], t["bias"]
        return causal_conv1d_update(t["x"], t["conv_state"], *rest, activation="silu", conv_state_indices=t["slots"])

    def vllm(t: Tensors) -> object:
        """The result replaces x."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as update

        options = {"activation": "silu", "conv_state_indices": t["slots"], **_no_null_slot(update)}
        return update(t["x"], t["conv_state"], t["weight"], t["bias"], **options)

    return _present(causal_conv1d=causal_conv1d, vllm=vllm)


def ssd(chunk_size: int) -> Peers:
    def mamba_ssm(t: Tensors) -> object:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        options = {"D": t["D"], "dt_bias": t["dt_bias"], "dt_softplus": True}
        return mamba_chunk_scan_combined(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size, **options)

    def vllm(t: Tensors) -> object:
        """Its tables of chunks are made beforehand, as its scheduler does; the sequences are whole chunks."""
        from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

        batch, seqlen = t["x"].shape[:2]
        x, dt, B, C = (t[name].flatten(0, 1) for name in ("x", "dt", "B", "C"))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mamba_chunk_scan_combined_varlen(
            x, dt, t["A"], B, C, chunk_size, **_chunk_tables(batch, seqlen, chunk_size, x.device),
            out=out, D=t["D"], dt_bias=t["dt_bias"], dt_softplus=True,
        )  # fmt: skip
        return out.unflatten(0, (batch, seqlen))

    def fla(t: Tensors) -> object:
        """As simple GLA: q is C, k is dt B, v is x, the log of the gate is dt A. It knows no groups, dt_bias or D."""
        from fla.ops.simple_gla import chunk_simple_gla

        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        heads_per_group = t["x"].shape[2] // t["B"].shape[2]
        B, C = (t[name].repeat_interleave(heads_per_group, dim=2) for name in ("B", "C"))
        k = (B * dt[..., None]).to(B.dtype)
        y, _ = chunk_simple_gla(C, k, t["x"], dt * t["A"], scale=1.0)
        return y + (t["D"][:, None] * t["x"]).to(y.dtype)

    return _present(mamba_ssm=mamba_ssm, vllm=vllm, fla=fla)


@functools.lru_cache(maxsize=1)
def _chunk_tables(batch: int, seqlen: int, chunk_size: int, device: torch.device) -> Tensors:
    chunks = seqlen // chunk_size
    if chunks * chunk_size != seqlen:
        raise ValueError(f"seqlen must be a multiple of {chunk_size}, got {seqlen}")
    count = functools.partial(torch.arange, dtype=torch.int32, device=device)
    return {
        "cu_seqlens": count(batch + 1) * seqlen,
        "cu_chunk_seqlens": count(batch * chunks + 1) * chunk_size,
        "last_chunk_indices": (count(batch) + 1) * chunks - 1,
        "seq_idx": count(batch * chunks) // chunks,
    }


def ssd_update() -> Peers:
    """What is per head is broadcast by strides, the fast path of all three."""

    def broadcast(t: Tensors) -> tuple[Tensors, Tensors]:
        nheads, headdim, dstate = t["state"].shape[1:]
        dt = t["dt"][..., None].expand(-1, nheads, headdim)
        A = t["A"][:, None, None].expand(nheads, headdim, dstate)
        D, dt_bias = (t[name][:, None].expand(nheads, headdim) for name in ("D", "dt_bias"))
        return {"state": t["state"], "x": t["x"], "dt": dt, "A": A, "B": t["B"], "C": t["C"]}, {
            "D": D,
            "dt_bias": dt_bias,
            "dt_softplus": True,
        }

    def mamba_ssm(t: Tensors) -> object:
        """In place, in the slots that ours only writes."""
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        tensors, options = broadcast(t)
        return selective_state_update(**tensors, **options, state_batch_indices=t["write_slots"])

    def vllm(t: Tensors) -> object:
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

        tensors, options = broadcast(t)
        out = torch.empty(t["x"].shape, dtype=t["x"].dtype, device=t["x"].device)
        slots = {"state_batch_indices": t["read_slots"], "dst_state_batch_indices": t["write_slots"]}
        selective_state_update(**tensors, **options, **slots, out=out, **_no_null_slot(selective_state_update))
        return out

    def flashinfer(t: Tensors) -> object:
        """dt, D and dt_bias must have one dtype, so that dt is float32 too."""
        from flashinfer.mamba import selective_state_update

        tensors, options = broadcast({**t, "dt": t["dt"].float()})
        slots = {"state_batch_indices": t["read_slots"], "dst_state_batch_indices": t["write_slots"]}
        return selective_state_update(**tensors, **options, **slots)

    return _present(mamba_ssm=mamba_ssm, vllm=vllm, flashinfer=flashinfer)


def _no_null_slot(function: Callable[..., object]) -> dict[str, int]:
    """vLLM's kernels skip one slot, 0 in some versions: with -1 they do all of the work."""
    known = inspect.signature(function).parameters
    return {name: -1 for name in ("null_block_id", "pad_slot_id") if name in known}


def gated_norm(group_size: int) -> Peers:
    def mamba_ssm(t: Tensors) -> object:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        options = {"z": t["z"], "eps": 1e-5, "group_size": group_size, "norm_before_gate": False}
        return rmsnorm_fn(t["x"], t["weight"], None, **options)

    return _present(mamba_ssm=mamba_ssm)


def mamba2_step(
    split: Callable[[Tensors], tuple[torch.Tensor, ...]],
    scan_inputs: Callable[[Tensors, torch.Tensor], Tensors],
    group_size: int,
) -> Peers:
    """The three calls of causal_conv1d and mamba_ssm; `split` gives z, xBC, dt, `scan_inputs` what the scan takes."""
    if not present("causal_conv1d"):
        return {}

    def mamba_ssm(t: Tensors) -> object:
        z, xBC, _ = split(t)
        conv = {"x": xBC, "weight": t["conv_weight"], "bias": t["conv_bias"]}
        xBC = cast(torch.Tensor, conv1d_update()["causal_conv1d"]({**t, **conv}))
        y = cast(torch.Tensor, ssd_update()["mamba_ssm"]({**t, **scan_inputs(t, xBC), "write_slots": t["slots"]}))
        return gated_norm(group_size)["mamba_ssm"]({"x": y.flatten(1), "z": z, "weight": t["norm_weight"]})

    return _present(mamba_ssm=mamba_ssm)


def residual_norm() -> Peers:
    def mamba_ssm(t: Tensors) -> object:
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

        return rms_norm_fn(t["x"], t["weight"], None, residual=t["residual"], eps=1e-5, prenorm=True)

    def vllm(t: Tensors) -> object:
        """The results replace x and the residual."""
        from vllm import _custom_ops

        return _custom_ops.fused_add_rms_norm(t["x"], t["residual"], t["weight"], 1e-5)

    def flashinfer(t: Tensors) -> object:
        """The results replace x and the residual."""
        from flashinfer.norm import fused_add_rmsnorm

        return fused_add_rmsnorm(t["x"].flatten(0, -2), t["residual"].flatten(0, -2), t["weight"], 1e-5)

    return _present(mamba_ssm=mamba_ssm, vllm=vllm, flashinfer=flashinfer)


def fp8_row() -> Peers:
    def torch_scaled_mm(t: Tensors) -> object:
        scales = {"scale_a": t["a.scale"], "scale_b": t["b.scale"].T}
        return torch._scaled_mm(t["a.data"], t["b.data"].T, **scales, out_dtype=torch.bfloat16)

    return {"torch": torch_scaled_mm}


def fp8_block() -> Peers:
    """1x128 scales of a, 128x128 of b."""

    def deep_gemm(t: Tensors) -> object:
        from deep_gemm import fp8_gemm_nt

        a, b = t["a.data"], t["b.data"]
        out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
        fp8_gemm_nt((a, t["a.scale"]), (b, t["b.scale"]), out)
        return out

    return _present(deep_gemm=deep_gemm)
