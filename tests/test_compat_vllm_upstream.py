"""hybrid_ops.compat.vllm beside vLLM's own kernels, where they are installed."""

import pytest
import torch

from hybrid_ops.compat import vllm as compat

from .compat_cases import HEADDIM, NHEADS, randn
from .tensors import int32
from .test_compat_vllm import (
    BIAS,
    DIM,
    HAS,
    STATE,
    WEIGHT,
    conv_inputs,
    pool_of,
    several,
    update_inputs,
    varlen_inputs,
)


def both(ours, theirs, arguments, updated):
    """Results of two functions on copies of CUDA tensors: what they return or overwrite, then what they update."""
    results = []
    for function in (ours, theirs):
        copies = {k: v.clone(memory_format=torch.preserve_format) if k in updated else v for k, v in arguments.items()}
        function(**copies)
        results.append([copies[name] for name in updated])
    return zip(*results, strict=True)


@pytest.mark.gpu
def test_beside_vllm_scan():
    theirs = pytest.importorskip("vllm.model_executor.layers.mamba.ops.ssd_combined")
    lengths = [100, 5, 64]  # none empty: their metadata has no place for one
    inputs = varlen_inputs(lengths, 64) | dict(D=randn(NHEADS), z=randn(sum(lengths), NHEADS, HEADDIM))
    inputs |= dict(dt_bias=randn(NHEADS), initial_states=randn(len(lengths), *STATE))
    arguments = {}
    for name, value in inputs.items():
        # theirs reads initial states in the dtype of those it returns
        exact = name in ("A", "D", "dt", "dt_bias", "initial_states")
        dtype = torch.float32 if exact else torch.bfloat16
        arguments[name] = value
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to("cuda", dtype if value.is_floating_point() else value.dtype)
    options = dict(dt_softplus=True, return_intermediate_states=True, state_dtype=torch.float32)
    ys, states = [], []
    for function in (compat.mamba_chunk_scan_combined_varlen, theirs.mamba_chunk_scan_combined_varlen):
        out = torch.empty_like(arguments["out"])
        states.append(function(**(arguments | options | dict(out=out))))
        ys.append(out.float())
    for mine, other in (ys, states):  # within 2%: they round decays and what a chunk adds to its state to bfloat16
        assert mine.shape == other.shape
        assert (mine - other).square().mean().sqrt() < 0.02 * mine.square().mean().sqrt()


@pytest.mark.gpu
def test_beside_vllm_conv():
    theirs = pytest.importorskip("vllm.model_executor.layers.mamba.ops.causal_conv1d")
    inputs = {name: t.to("cuda", torch.float32) for name, t in conv_inputs().items() if name != "query_start_loc"}
    inputs |= dict(query_start_loc=int32(0, 5, 7, 7, 14).cuda(), has_initial_state=HAS.cuda())
    inputs |= dict(cache_indices=int32(4, 1, 5, 2).cuda())
    pool = inputs.pop("conv_states")
    pools = [pool.clone(), pool.clone()]
    y, other = (
        f(**inputs, conv_states=states)
        for f, states in zip((compat.causal_conv1d_fn, theirs.causal_conv1d_fn), pools, strict=True)
    )
    torch.testing.assert_close(y, other)
    assert pools[0].equal(pools[1])


@pytest.mark.gpu
def test_beside_vllm_conv_update():
    """In float32: they round the products of 16-bit tensors to 16 bits before they add them."""
    theirs = pytest.importorskip("vllm.model_executor.layers.mamba.ops.causal_conv1d")
    arguments = dict(x=randn(9, DIM, seed=1), conv_state=pool_of(6), weight=WEIGHT, bias=BIAS)
    arguments = {name: value.to("cuda", torch.float32) for name, value in arguments.items()} | dict(
        activation="silu",
        conv_state_indices=int32(4, 6, 2).cuda(),
        num_accepted_tokens=int32(1, 4, 2).cuda(),
        query_start_loc=int32(0, 4, 5, 9).cuda(),
        max_query_len=4,
    )
    names = ("x", "conv_state")
    (y, other), (window, other_window) = both(
        compat.causal_conv1d_update, theirs.causal_conv1d_update, arguments, names
    )
    torch.testing.assert_close(y, other)
    for row, columns in ((4, 6), (6, 3), (2, 6)):
        assert window[row, :, :columns].equal(other_window[row, :, :columns])


@pytest.mark.gpu
def test_beside_vllm_state_update():
    theirs = pytest.importorskip("vllm.model_executor.layers.mamba.ops.mamba_ssm")
    inputs = several(update_inputs(rows=14), [3, 1, 2])
    names = ("A", "dt", "dt_bias")
    small = {k: v[..., :1].float().cuda().expand(v.shape) for k, v in inputs.items() if k in ("dt", "dt_bias")}
    small["A"] = inputs["A"][:, :1, :1].float().cuda().expand(inputs["A"].shape)
    big = {k: v.float().cuda() for k, v in inputs.items() if k not in names and getattr(v, "is_floating_point", bool)()}
    table = int32(1, 2, 3, 4, 5, 6, 7, 8, 9).view(3, 3).cuda()
    arguments = inputs | big | small | dict(cu_seqlens=inputs["cu_seqlens"].cuda(), state_batch_indices=table)
    arguments |= dict(dst_state_batch_indices=table, num_accepted_tokens=int32(2, 1, 1).cuda())
    for mine, other in both(compat.selective_state_update, theirs.selective_state_update, arguments, ("out", "state")):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)  # their exp is an approximation
