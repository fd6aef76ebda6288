"""Other libraries get the same problem: stand-ins with their documented signatures return what ours returns."""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import hybrid_ops
from hybrid_ops.bench import conv1d, gemm, harness, mamba2_step, norm, peers, ssd

CPU = torch.device("cpu")


@pytest.fixture
def library(monkeypatch):
    """Puts a module with these functions where `import` finds it, its parents too."""

    def put(name, **functions):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                module = types.ModuleType(path)
                module.__spec__ = importlib.machinery.ModuleSpec(path, loader=None)
                monkeypatch.setitem(sys.modules, path, module)
        for function, value in functions.items():
            monkeypatch.setattr(sys.modules[name], function, value, raising=False)

    return put


def tensors_of(case):
    return case.make(CPU, torch.Generator().manual_seed(0))


def copies(tensors):
    return {name: t.clone() for name, t in tensors.items()}


def close(got, want):
    """Translated rightly: a few roundings to bfloat16, 2^-8 each, apart; a wrong argument is off by more than 0.1."""
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_conv1d(library):
    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        assert activation == "silu"
        assert x.stride(1) == 1  # channel-last, without a copy
        return F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=x.shape[1]))

    def fla(x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None):
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2), None

    library("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    library("fla.modules.conv", causal_conv1d=fla)
    case = conv1d.conv1d("tiny", 40, 2, strided=True)
    tensors = tensors_of(case)
    ours = case.call(tensors, "torch")["y"]
    close(case.peers["causal_conv1d"](tensors).transpose(1, 2), ours)
    close(case.peers["torch"](tensors).transpose(1, 2), ours)
    close(case.peers["fla"](tensors), ours)


@pytest.mark.parametrize("null_slot", ["null_block_id", "pad_slot_id"])
def test_conv1d_update(null_slot, library):
    def update(x, conv_state, weight, bias, activation, conv_state_indices, **rest):
        assert rest in ({}, {null_slot: -1})  # every slot counts
        return hybrid_ops.causal_conv1d_update(
            x, conv_state, weight, bias, activation=activation, slots=conv_state_indices
        )

    with_null_slot = {
        "null_block_id": lambda x, state, w, b, activation, conv_state_indices, null_block_id=0: update(
            x, state, w, b, activation, conv_state_indices, null_block_id=null_block_id
        ),
        "pad_slot_id": lambda x, state, w, b, activation, conv_state_indices, pad_slot_id=-1: update(
            x, state, w, b, activation, conv_state_indices, pad_slot_id=pad_slot_id
        ),
    }[null_slot]
    library("causal_conv1d", causal_conv1d_update=update)
    library("vllm.model_executor.layers.mamba.ops.causal_conv1d", causal_conv1d_update=with_null_slot)
    case = conv1d.conv1d_update("tiny", 4)
    tensors = tensors_of(case)
    ours = case.call(copies(tensors), "torch")
    for name in ("causal_conv1d", "vllm", "torch"):
        theirs = copies(tensors)
        close(case.peers[name](theirs), ours["y"])
        close(theirs["conv_state"], ours["conv_state"])


def test_ssd(library):
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
        return hybrid_ops.ssd_chunk_scan(
            x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, chunk_size=chunk_size
        )

    def varlen(
        x, dt, A, B, C, chunk_size, cu_seqlens, cu_chunk_seqlens, last_chunk_indices, seq_idx, out,
        D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False,
    ):  # fmt: skip
        assert cu_seqlens.tolist() == [0, 256, 512]
        assert cu_chunk_seqlens.tolist() == [0, 128, 256, 384, 512]
        assert last_chunk_indices.tolist() == [1, 3]
        assert seq_idx.tolist() == [0, 0, 1, 1]
        packed = (t[None] for t in (x, dt))
        groups = (t[None] for t in (B, C))
        out.copy_(
            hybrid_ops.ssd_chunk_scan(
                *packed, A, *groups, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens
            )[0]
        )

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
        """h_t = exp(g_t) h_(t-1) + k_t v_t^T, o_t = scale q_t h_t."""
        q, k, v = (t.float() for t in (q, k, v))
        h, o = torch.zeros(*k.shape[::2], k.shape[3], v.shape[3]), torch.empty(v.shape)
        for t in range(q.shape[1]):
            h = h * g[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
            o[:, t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], h)
        return o.bfloat16(), None

    library("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    library("vllm.model_executor.layers.mamba.ops.ssd_combined", mamba_chunk_scan_combined_varlen=varlen)
    library("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    case = ssd.ssd("tiny", 256, 2)
    tensors = tensors_of(case)
    ours = case.call(tensors, "torch")["y"]
    for name in ("mamba_ssm", "vllm", "fla"):
        close(case.peers[name](tensors), ours)


def test_mamba2_step(library):
    def update(x, conv_state, weight, bias, activation, conv_state_indices):
        options = dict(activation=activation, slots=conv_state_indices)
        return hybrid_ops.causal_conv1d_update(x, conv_state, weight, bias, **options)

    def scan(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
        options = dict(D=D[:, 0], dt_bias=dt_bias[:, 0], dt_softplus=dt_softplus, read_slots=state_batch_indices)
        return hybrid_ops.ssd_state_update(state, x, dt[..., 0], A[:, 0, 0], B, C, **options)

    def norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        return hybrid_ops.gated_rms_norm(
            x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
        )

    library("causal_conv1d", causal_conv1d_update=update)
    library("mamba_ssm.ops.triton.selective_state_update", selective_state_update=scan)
    library("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=norm)
    case = mamba2_step.mamba2_step("tiny", 4)
    tensors = tensors_of(case)
    before = copies(tensors)
    ours = case.call(tensors, "torch")
    for name in ("conv_state", "state"):  # where every replay leaves the same
        torch.testing.assert_close(tensors[name], before[name])
    for name in ("three ops", "mamba_ssm"):
        theirs = copies(before)
        close(case.peers[name](theirs), ours["y"])
        close(theirs["state"], ours["state"])


def test_ssd_update(library):
    def ours_in_their_form(state, x, dt, A, B, C, D, dt_bias, dt_softplus, read_slots, write_slots):
        assert A.shape == state.shape[1:]
        assert dt.shape == x.shape
        assert D.shape == dt_bias.shape == x.shape[1:]
        assert (A.stride()[1:], dt.stride(-1), D.stride(-1), dt_bias.stride(-1)) == ((0, 0), 0, 0, 0)
        per_head = {"D": D[:, 0].float(), "dt_bias": dt_bias[:, 0].float()}
        slots = {"read_slots": read_slots, "write_slots": write_slots}
        return hybrid_ops.ssd_state_update(
            state, x, dt[..., 0], A[:, 0, 0], B, C, **per_head, dt_softplus=dt_softplus, **slots
        )

    def mamba_ssm(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
        slots = state_batch_indices, state_batch_indices
        return ours_in_their_form(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *slots)

    def vllm(
        state, x, dt, A, B, C, D, dt_bias, z=None, dt_softplus=False, state_batch_indices=None,
        dst_state_batch_indices=None, null_block_id=0, out=None,
    ):  # fmt: skip
        assert null_block_id == -1
        slots = state_batch_indices, dst_state_batch_indices
        out.copy_(ours_in_their_form(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *slots))

    def flashinfer(
        state, x, dt, A, B, C, D, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None,
        pad_slot_id=-1, dst_state_batch_indices=None,
    ):  # fmt: skip
        assert D.dtype == dt_bias.dtype == dt.dtype
        slots = state_batch_indices, dst_state_batch_indices
        return ours_in_their_form(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *slots)

    library("mamba_ssm.ops.triton.selective_state_update", selective_state_update=mamba_ssm)
    library("vllm.model_executor.layers.mamba.ops.mamba_ssm", selective_state_update=vllm)
    library("flashinfer.mamba", selective_state_update=flashinfer)
    case = ssd.ssd_update("tiny", 4, torch.float32)
    tensors = tensors_of(case)
    ours = case.call(copies(tensors), "torch")
    for name in ("vllm", "flashinfer", "torch"):
        theirs = copies(tensors)
        close(case.peers[name](theirs), ours["y"])
        close(theirs["state"][4:], ours["state"])
    in_place = copies(tensors)
    in_place["write_slots"] = in_place["read_slots"]
    close(case.peers["mamba_ssm"](in_place), ours["y"])


@pytest.mark.parametrize(("tokens", "accepted"), [(1, 1), (3, 2)])
def test_ssd_replay(tokens, accepted):
    """The tokens cached at first are zeros, so that both start from the same state."""
    case = ssd.ssd_replay("tiny", 5, torch.float32, tokens, accepted)
    tensors = tensors_of(case)
    assert len(tensors["ring"].unique()) == 5
    close(case.peers["ssd_state_update"](copies(tensors)), case.call(tensors, "torch")["y"])


def test_norms(library):
    def rms_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False):
        assert prenorm
        return hybrid_ops.rms_norm(x, weight, residual=residual, eps=eps)

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        return hybrid_ops.gated_rms_norm(
            x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
        )

    def in_place(x, residual, weight, eps=1e-6):
        y, h = hybrid_ops.rms_norm(x, weight, residual=residual, eps=eps)
        x.copy_(y)
        residual.copy_(h)

    def flat(x, residual, weight, eps=1e-6):
        assert x.dim() == residual.dim() == 2
        in_place(x, residual, weight, eps)

    library("mamba_ssm.ops.triton.layer_norm", rms_norm_fn=rms_norm_fn)
    library("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    library("vllm._custom_ops", fused_add_rms_norm=in_place)
    monkey = sys.modules["vllm"]
    monkey._custom_ops = sys.modules["vllm._custom_ops"]
    library("flashinfer.norm", fused_add_rmsnorm=flat)
    case = norm.residual_norm("tiny", 16, 2)
    tensors = tensors_of(case)
    ours = case.call(tensors, "torch")
    close(case.peers["mamba_ssm"](tensors)[0], ours["y"])
    close(case.peers["torch"](tensors)[0], ours["y"])
    for name in ("vllm", "flashinfer"):
        theirs = copies(tensors)
        case.peers[name](theirs)
        close(theirs["x"], ours["y"])
        close(theirs["residual"], ours["h"])
    gated = norm.gated_norm("tiny", 16, 2)
    tensors = tensors_of(gated)
    for name in ("mamba_ssm", "torch"):
        close(gated.peers[name](tensors), gated.call(tensors, "torch")["y"])


def test_fp8(library):
    def fp8_gemm_nt(a, b, d, c=None):
        (a, a_scale), (b, b_scale) = a, b
        a_wide = a.float() * a_scale.repeat_interleave(128, -1)
        b_wide = b.float() * b_scale.repeat_interleave(128, -1).repeat_interleave(128, 0)
        d.copy_(a_wide @ b_wide.T)

    library("deep_gemm", fp8_gemm_nt=fp8_gemm_nt)
    case = gemm.dense(256, 128, 256, gemm.FP8_BLOCK)
    tensors = tensors_of(case)
    close(case.peers["deep_gemm"](tensors), case.call(tensors, "torch")["y"])


def test_what_is_missing_is_named():
    assert set(peers.missing()) <= set(peers.LIBRARIES.values())
    assert not peers.present("no_such_library")


def test_a_library_without_the_function_costs_its_own_figure_only(library):
    library("fla")
    case = conv1d.conv1d("tiny", 40, 2)
    ceilings = dict.fromkeys(("copy_tbs", "bf16_tflops", "fp8_tflops"))
    with pytest.warns(UserWarning, match=r"fla failed: ModuleNotFoundError"):
        (row,) = harness.measure_case("conv1d", case, CPU, {"ceilings": ceilings, "commit": None, "date": ""})
    assert row["check"] == "passed"
    assert row["peers"]["fla"] is None
    assert row["peers"]["torch"] > 0


def test_a_composition_is_compiled_anew_for_every_case(monkeypatch):
    """Torch compiles one function for a few shapes and then runs it eagerly, which would be timed as compiled."""
    compiled, reset = [], []
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: compiled.append(dynamic) or call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(True))
    for _ in range(2):
        both = peers.eager_and_compiled(lambda t: t["x"] + 1, "super")
        for _ in range(3):
            assert both["torch.compile"]({"x": 1}) == 2
    assert compiled == [False, False]
    assert len(reset) == 2
