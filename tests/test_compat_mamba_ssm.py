import math

import pytest
import torch
import torch.nn.functional as F

from hybrid_ops.compat import mamba_ssm as compat

from .budget import assert_within, to_numpy
from .compat_cases import (
    BATCH,
    DSTATE,
    HEADDIM,
    NGROUPS,
    NHEADS,
    SEQLEN,
    STEP_ARGUMENTS,
    conv,
    differ,
    norm,
    packed,
    randn,
    same,
    scan,
    scan_inputs,
    signature,
    step,
    step_inputs,
)
from .tensors import int32

SCAN = {"dt_softplus": True}


def test_signatures():
    assert signature(compat.mamba_chunk_scan_combined) == (
        "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, "
        "dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, return_varlen_states=False, "
        "state_dtype=None"
    )
    assert signature(compat.mamba_split_conv1d_scan_combined) == (
        "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None, "
        "dt_limit=(0.0, inf), return_final_states=False, activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, "
        "outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None"
    )
    assert signature(compat.selective_state_update) == (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None"
    )
    norm = "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
    assert signature(compat.rmsnorm_fn) == norm
    assert signature(compat.layernorm_fn) == norm + ", is_rms_norm=False"
    assert signature(compat.RMSNorm.__init__) == (
        "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None"
    )
    assert signature(compat.RMSNorm.forward) == "x, z=None"


SCAN_ARGUMENTS = {
    "D": dict(D=randn(NHEADS)),
    "D by feature": dict(D=randn(NHEADS, HEADDIM)),
    "z": dict(z=randn(BATCH, SEQLEN, NHEADS, HEADDIM)),
    "dt_bias": dict(dt_bias=randn(NHEADS)),
    "dt_softplus": dict(dt_softplus=False),
    "dt_limit": dict(dt_limit=(0.3, 0.9)),
    "initial_states": dict(initial_states=randn(BATCH, NHEADS, HEADDIM, DSTATE)),
    "seq_idx": dict(seq_idx=int32(*[0] * 4, *[1] * 5, *[3] * 2, *[4] * 7).view(2, 9)),
}


@pytest.mark.parametrize("name", SCAN_ARGUMENTS)
def test_chunk_scan_argument(name):
    inputs, given = scan_inputs(), SCAN_ARGUMENTS[name]
    translated = {{"initial_states": "initial", "seq_idx": "idx"}.get(key, key): value for key, value in given.items()}
    y, final = compat.mamba_chunk_scan_combined(*inputs, 16, **(SCAN | given), return_final_states=True)
    expected, states = scan(*inputs, **(SCAN | translated))
    same(y, expected)
    same(final, states[:, -1])
    differ(expected, scan(*inputs, **SCAN)[0])
    assert y.equal(compat.mamba_chunk_scan_combined(*inputs, 16, **(SCAN | given)))


@pytest.mark.parametrize("chunk_size", [1, 8, 100, 256])
def test_chunk_size_has_no_meaning(chunk_size):
    inputs = scan_inputs()
    same(compat.mamba_chunk_scan_combined(*inputs, chunk_size), scan(*inputs)[0])


def test_cu_seqlens_keep_sequences_apart():
    """mamba_ssm does not read them without return_varlen_states, and mixes the sequences."""
    inputs, cu_seqlens, idx = packed([4, 3, 6])
    y = compat.mamba_chunk_scan_combined(*inputs, 16, cu_seqlens=cu_seqlens, **SCAN)
    expected, _ = scan(*inputs, idx=idx, **SCAN)
    same(y, expected)
    differ(expected, scan(*inputs, **SCAN)[0])
    same(compat.mamba_chunk_scan_combined(*inputs, 16, seq_idx=idx, cu_seqlens=cu_seqlens.long(), **SCAN), expected)


@pytest.mark.parametrize("lengths", [[4, 3, 6], [4, 0, 3, 0], [5]])
def test_return_varlen_states(lengths):
    inputs, cu_seqlens, idx = packed(lengths)
    options = dict(cu_seqlens=cu_seqlens, seq_idx=idx, return_varlen_states=True)
    y, varlen = compat.mamba_chunk_scan_combined(*inputs, 16, **options)
    expected, states = scan(*inputs, idx=idx)
    ends = [
        states[0, end - 1] if n else torch.zeros_like(states[0, 0])
        for end, n in zip(cu_seqlens[1:], lengths, strict=True)
    ]
    same(y, expected)
    same(varlen, torch.stack(ends))
    _, final, again = compat.mamba_chunk_scan_combined(*inputs, 16, **options, return_final_states=True)
    same(final, states[:, -1])  # of the last token, also where an empty sequence is behind it
    assert again.equal(varlen)


@pytest.mark.parametrize("each", [False, True], ids=["first", "each"])
def test_initial_states_of_packed_sequences(each):
    inputs, cu_seqlens, _ = packed([4, 3, 6])
    initial = randn(3 if each else 1, NHEADS, HEADDIM, DSTATE)
    y, varlen = compat.mamba_chunk_scan_combined(
        *inputs, 16, initial_states=initial, cu_seqlens=cu_seqlens, return_varlen_states=True
    )
    for b in range(3):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        x, dt, A, B, C = inputs
        own = initial[b : b + 1] if b < len(initial) else None
        expected, states = scan(x[:, rows], dt[:, rows], A, B[:, rows], C[:, rows], initial=own)
        same(y[:, rows], expected)
        same(varlen[b], states[0, -1])


def test_dtypes_of_states():
    x, dt, A, B, C = (t.float() for t in packed([4, 3])[0])
    x, B, C, cu_seqlens = x.bfloat16(), B.bfloat16(), C.bfloat16(), int32(0, 4, 7)
    options = dict(cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=True)
    y, final, varlen = compat.mamba_chunk_scan_combined(x, dt, A.bfloat16(), B, C, 16, **options)
    assert (y.dtype, final.dtype, varlen.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    _, final, varlen = compat.mamba_chunk_scan_combined(x, dt, A, B, C, 16, **options, state_dtype=torch.float16)
    assert (final.dtype, varlen.dtype) == (torch.float32, torch.float16)


def test_chunk_scan_gradients():
    x, dt, A, B, C = scan_inputs()
    given = dict(D=randn(NHEADS), z=randn(*x.shape, seed=7), dt_bias=randn(NHEADS, seed=8))
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, *given.values(), randn(BATCH, NHEADS, HEADDIM, DSTATE))]
    y, final = compat.mamba_chunk_scan_combined(
        *leaves[:5],
        16,
        **dict(zip(given, leaves[5:8], strict=True)),
        initial_states=leaves[8],
        **SCAN,
        return_final_states=True,
    )
    expected, states = scan(*leaves[:8], **SCAN, initial=leaves[8])
    weights = randn(*y.shape, seed=5), randn(*final.shape, seed=6)
    mine = torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights[0]).sum() + (states[:, -1] * weights[1]).sum(), leaves)
    same(mine, theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(chunk_size=0), "chunk_size must be a positive int, got 0"),
        (dict(return_varlen_states=True), "cu_seqlens must be given with return_varlen_states, got None"),
        (dict(cu_seqlens=int32(0, 9)), "x must have batch 1 with cu_seqlens"),
        (dict(dt_limit=(1.0, 0.0)), "dt_limit must be"),
    ],
)
def test_chunk_scan_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        compat.mamba_chunk_scan_combined(*scan_inputs(), **(dict(chunk_size=16) | wrong))


def test_compiles(compile_once):
    """The original breaks the graph."""
    _, _, A, _, _ = (t.float() for t in scan_inputs())

    def layer(x, dt, B, C):
        return compat.mamba_chunk_scan_combined(x, dt, A, B, C, 256, dt_softplus=True)

    compile_once(
        layer, "aot_eager", lambda n: [t.float() for i, t in enumerate(scan_inputs(1, n)) if i != 2], (6, 8, 11)
    )


# the mixer

DIM, CONV_DIM, WIDTH = NHEADS * HEADDIM, NHEADS * HEADDIM + 2 * NGROUPS * DSTATE, 4


def mixer_inputs(dmlp=0):
    """Everything that mamba_split_conv1d_scan_combined must be given, by name."""
    return dict(
        zxbcdt=randn(BATCH, SEQLEN, 2 * dmlp + DIM + CONV_DIM + NHEADS, seed=1),
        conv1d_weight=randn(CONV_DIM, WIDTH, seed=2),
        conv1d_bias=randn(CONV_DIM, seed=3),
        dt_bias=randn(NHEADS, seed=4),
        A=-randn(NHEADS, seed=5).exp(),
        D=randn(NHEADS, seed=6),
        chunk_size=16,
        headdim=HEADDIM,
        ngroups=NGROUPS,
    )


def mixer(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=(0.0, math.inf), activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
    outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
):  # fmt: skip
    dmlp = (zxbcdt.shape[-1] - DIM - CONV_DIM - NHEADS) // 2
    gate, up, z, xBC, dt = zxbcdt.split([dmlp, dmlp, DIM, CONV_DIM, NHEADS], -1)
    ids = torch.zeros(zxbcdt.shape[:2]).int() if seq_idx is None else seq_idx
    rows = []
    for row, index in zip(xBC, ids, strict=True):
        runs = row.split(index.unique_consecutive(return_counts=True)[1].tolist())
        rows.append(
            torch.cat([conv(run.T[None], conv1d_weight, conv1d_bias, activation is not None)[0].T for run in runs])
        )
    x, B, C = torch.stack(rows).split([DIM, NGROUPS * DSTATE, NGROUPS * DSTATE], -1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, NHEADS), (B, ngroups), (C, ngroups)))
    gated = z.view(x.shape) if rmsnorm_weight is None else None
    y, states = scan(x, dt, A, B, C, D, gated, dt_bias, True, dt_limit, initial_states, seq_idx)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = norm(y, rmsnorm_weight, None, z, rmsnorm_eps, DIM // ngroups, norm_before_gate)
    y = torch.cat([F.silu(gate) * up, y], -1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias), states[:, -1]


NORM = dict(rmsnorm_weight=randn(DIM, seed=11))
OUTPROJ = dict(outproj_weight=randn(7, DIM, seed=12))
# what is given, and what to compare with to see that it matters
MIXER_ARGUMENTS = {
    "conv1d_bias": (dict(conv1d_bias=None), {}),
    "dt_bias": (dict(dt_bias=None), {}),
    "D": (dict(D=None), {}),
    "D by feature": (dict(D=randn(NHEADS, HEADDIM), headdim=None), {}),
    "initial_states": (dict(initial_states=randn(BATCH, NHEADS, HEADDIM, DSTATE)), {}),
    "seq_idx": (dict(seq_idx=SCAN_ARGUMENTS["seq_idx"]["seq_idx"]), {}),
    "dt_limit": (dict(dt_limit=(0.3, 0.9)), {}),
    "activation": (dict(activation=None), {}),
    "rmsnorm_weight": (NORM, {}),
    "rmsnorm_eps": (NORM | dict(rmsnorm_eps=0.5), NORM),
    "norm_before_gate": (NORM | dict(norm_before_gate=False), NORM),
    "outproj_weight": (OUTPROJ, None),
    "outproj_bias": (OUTPROJ | dict(outproj_bias=randn(7)), OUTPROJ),
}


@pytest.mark.parametrize("name", MIXER_ARGUMENTS)
def test_mixer_argument(name):
    given, other = MIXER_ARGUMENTS[name]
    inputs = mixer_inputs()
    y, final = compat.mamba_split_conv1d_scan_combined(**(inputs | given), return_final_states=True)
    expected, expected_final = mixer(**(inputs | given))
    same(y, expected)
    same(final, expected_final)
    if other is not None:
        differ(expected, mixer(**(inputs | other))[0])
    assert y.equal(compat.mamba_split_conv1d_scan_combined(**(inputs | given)))


@pytest.mark.parametrize("given", [{}, NORM, NORM | dict(outproj_weight=randn(7, DIM + 2, seed=12))])
def test_mixer_with_mlp(given):
    inputs = mixer_inputs(dmlp=2) | given
    same(compat.mamba_split_conv1d_scan_combined(**inputs), mixer(**inputs)[0])


def test_mixer_of_one_group():
    """ngroups decides how conv1d_weight's channels are read: 4 states of one group, or 2 of each of two."""
    inputs = mixer_inputs() | dict(ngroups=1)
    same(compat.mamba_split_conv1d_scan_combined(**inputs), mixer(**inputs)[0])
    differ(mixer(**inputs)[0], mixer(**mixer_inputs())[0])


@pytest.mark.parametrize("given", [dict(chunk_size=256), dict(chunk_size=7), dict(state_dtype=torch.bfloat16)])
def test_mixer_argument_without_consequence(given):
    """They set how exact and how fast the original is."""
    inputs = mixer_inputs()
    same(compat.mamba_split_conv1d_scan_combined(**(inputs | given)), mixer(**inputs)[0])


def test_mixer_under_autocast():
    """The last linear layer runs in the dtype of autocast, whatever that of its weight."""
    inputs = mixer_inputs() | dict(outproj_weight=randn(7, DIM, seed=12), outproj_bias=randn(7))
    inputs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = mixer(**inputs)[0]
    inputs["zxbcdt"] = inputs["zxbcdt"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = compat.mamba_split_conv1d_scan_combined(**inputs)
    assert y.dtype == torch.bfloat16
    assert (y - exact).square().mean() < 0.02**2 * exact.square().mean()


def test_mixer_gradients():
    inputs = mixer_inputs(dmlp=2) | NORM | dict(outproj_weight=randn(7, DIM + 2), outproj_bias=randn(7))
    inputs["initial_states"] = randn(BATCH, NHEADS, HEADDIM, DSTATE)
    leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor)]
    weight = randn(BATCH, SEQLEN, 7, seed=9)
    mine = torch.autograd.grad((compat.mamba_split_conv1d_scan_combined(**inputs) * weight).sum(), leaves)
    same(mine, torch.autograd.grad((mixer(**inputs)[0] * weight).sum(), leaves))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(headdim=None), "headdim must be given unless D has shape"),
        (dict(headdim=HEADDIM + 1), "zxbcdt must have 2 \\* dmlp"),
        (dict(ngroups=3), "zxbcdt must have 2 \\* dmlp"),
        (dict(outproj_bias=randn(7)), "outproj_bias must be None without outproj_weight"),
        (dict(activation="gelu"), "activation must be None, 'silu' or 'swish', got 'gelu'"),
        (dict(state_dtype=torch.int32), "state_dtype must be a floating dtype"),
        (dict(chunk_size=-1), "chunk_size must be a positive int"),
    ],
)
def test_mixer_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        compat.mamba_split_conv1d_scan_combined(**(mixer_inputs() | wrong))


# decoding


@pytest.mark.parametrize("name", STEP_ARGUMENTS)
def test_state_update_argument(name):
    inputs = step_inputs()
    expected, next_state = step(**(inputs | STEP_ARGUMENTS[name]))
    differ(expected, step(**inputs)[0])
    state = inputs["state"]
    same(compat.selective_state_update(**(inputs | STEP_ARGUMENTS[name])), expected)
    same(state, next_state)


def test_state_batch_indices():
    inputs = step_inputs(rows=5)
    state, before = inputs["state"], inputs["state"].clone()
    y = compat.selective_state_update(**inputs, state_batch_indices=torch.tensor([3, -2]))
    expected, next_state = step(**(inputs | dict(state=before[[3, 0]])))
    same(y[0], expected[0])
    assert (y[1] == 0).all()
    same(state[3], next_state[0])
    assert state[[0, 1, 2, 4]].equal(before[[0, 1, 2, 4]])


def test_state_update_without_heads():
    """Mamba-1's shapes: (batch, dim), with one decay for the states of a channel."""
    inputs = step_inputs() | dict(
        dt=randn(BATCH, NHEADS, HEADDIM), D=randn(NHEADS, HEADDIM), dt_bias=randn(NHEADS, HEADDIM)
    )
    flat = {k: v[:, 0] if k in ("state", "x", "dt", "B", "C") else v[0] for k, v in inputs.items()}
    one = {k: v[:, :1] if k in ("state", "x", "dt", "B", "C") else v[:1] for k, v in inputs.items()}
    expected, next_state = step(**one)
    same(compat.selective_state_update(**flat), expected[:, 0])
    same(flat["state"], next_state[:, 0])


def test_state_update_of_bfloat16_decay():
    inputs = step_inputs()
    A = inputs["A"][:, :1, :1].bfloat16().expand(-1, HEADDIM, DSTATE)
    expected, _ = step(**(inputs | dict(A=A.double())))
    same(compat.selective_state_update(**(inputs | dict(A=A))), expected)


def test_state_update_of_parameters():
    """No gradient comes back from the original, nor does it complain."""
    inputs = step_inputs() | dict(D=torch.nn.Parameter(randn(NHEADS, HEADDIM)))
    assert not compat.selective_state_update(**inputs).requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(A=-randn(NHEADS, HEADDIM, DSTATE).exp()), "A must be expanded along dstate.*hybrid_ops.ssd_state_update"),
        (dict(dt=randn(BATCH, NHEADS)), "dt must have shape"),
        (dict(D=randn(NHEADS)), "D must have shape"),
        (dict(x=randn(BATCH, NHEADS, HEADDIM + 1)), "x must have shape"),
    ],
)
def test_state_update_bad_input(wrong, message):
    inputs = step_inputs() | wrong
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=message):
        compat.selective_state_update(**inputs)
    assert inputs["state"].equal(before)


# norms

NORM_ARGUMENTS = {
    "bias": dict(bias=randn(12)),
    "z": dict(z=randn(2, 5, 12)),
    "eps": dict(eps=0.5),
    "group_size": dict(group_size=4),
    "norm_before_gate": dict(norm_before_gate=False, z=randn(2, 5, 12)),
    "everything": dict(bias=randn(12), z=randn(2, 5, 12), group_size=3),
    "everything, gate first": dict(bias=randn(12), z=randn(2, 5, 12), group_size=3, norm_before_gate=False),
}


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("name", NORM_ARGUMENTS)
def test_norm_argument(name, is_rms_norm):
    x, weight, given = randn(2, 5, 12, seed=1), randn(12, seed=2), dict(bias=None) | NORM_ARGUMENTS[name]
    expected = norm(x, weight, **given, rms=is_rms_norm)
    other = dict(z=given["z"]) if name == "norm_before_gate" else {}
    differ(expected, norm(x, weight, **other, rms=is_rms_norm))
    same(compat.layernorm_fn(x, weight, **given, is_rms_norm=is_rms_norm), expected)
    if is_rms_norm:
        same(compat.rmsnorm_fn(x, weight, **given), expected)


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_norm_gradients(is_rms_norm):
    leaves = [t.requires_grad_() for t in (randn(2, 5, 12, seed=1), randn(12, seed=2), randn(12), randn(2, 5, 12))]
    mine = compat.layernorm_fn(*leaves, group_size=4, is_rms_norm=is_rms_norm)
    theirs = norm(*leaves, group_size=4, rms=is_rms_norm)
    weight = randn(2, 5, 12, seed=9)
    same(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (mine, theirs)))


def test_norm_bad_input():
    x, weight = randn(2, 12), randn(12)
    for is_rms_norm in (True, False):
        with pytest.raises(ValueError, match="group_size must divide the last dimension of x, 12, got 5"):
            compat.layernorm_fn(x, weight, None, group_size=5, is_rms_norm=is_rms_norm)
        with pytest.raises(ValueError, match="z must have shape"):
            compat.layernorm_fn(x, weight, None, x[:1], is_rms_norm=is_rms_norm)


def test_norm_rounds_once():
    """In float32, also where a bias is added."""
    x, weight, bias, z = (
        randn(*shape, seed=i).bfloat16() for i, shape in enumerate([(50, 12), (12,), (12,), (50, 12)])
    )
    exact = norm(*(t.double() for t in (x, weight, bias, z)), rms=False)
    torch.testing.assert_close(compat.layernorm_fn(x, weight, bias, z), exact.bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("given", [{}, dict(eps=0.5), dict(group_size=4), dict(norm_before_gate=False)])
def test_rms_norm_module(given):
    layer = compat.RMSNorm(12, dtype=torch.float64, **given)
    assert list(layer.state_dict()) == ["weight"]
    assert layer.weight.equal(torch.ones(12, dtype=torch.float64))
    layer.load_state_dict({"weight": randn(12)})
    x, z = randn(2, 5, 12, seed=1), randn(2, 5, 12, seed=2)
    same(layer(x, z), norm(x, randn(12), None, z, **(dict(eps=1e-5) | given)))
    if "norm_before_gate" not in given:
        same(layer(x), norm(x, randn(12), **(dict(eps=1e-5) | given)))
    assert compat.RMSNorm(12, device="meta").weight.device.type == "meta"


# beside the original


def on_gpu(inputs, dtype=torch.bfloat16, fp32=("A", "D", "dt_bias", "dt")):
    """float64 to what a GPU takes; expanded dimensions stay expanded."""
    cast = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            dense = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
            value = dense.to("cuda", torch.float32 if name in fp32 else dtype).expand(value.shape)
        cast[name] = value.cuda() if isinstance(value, torch.Tensor) else value
    return cast


def beside(ours, theirs, inputs, reference):
    """Both compute one thing: ours within the budget of errors, theirs within 2% of it (their states are bfloat16)."""
    copies = [{k: v.clone() if k == "state" else v for k, v in inputs.items()} for _ in range(2)]
    exact = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    ref, baseline = (
        to_numpy(
            reference(
                **{k: v.to(d) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in exact.items()}
            )
        )
        for d in (torch.float64, torch.float32)
    )
    got, other = ours(**copies[0]), theirs(**copies[1])
    assert_within("y", got, ref, baseline, got.dtype, axis=None)
    assert (got.float() - other.float()).square().mean().sqrt() < 0.02 * got.float().square().mean().sqrt()


@pytest.mark.gpu
def test_beside_mamba_ssm_scan():
    theirs = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    names = ("x", "dt", "A", "B", "C")
    inputs = dict(zip(names, scan_inputs(2, 100), strict=True)) | dict(
        D=randn(NHEADS), z=randn(2, 100, NHEADS, HEADDIM)
    )
    inputs = on_gpu(inputs | dict(dt_bias=randn(NHEADS), dt_softplus=True))
    ours = lambda **kw: compat.mamba_chunk_scan_combined(**kw, chunk_size=64)  # noqa: E731
    original = lambda **kw: theirs.mamba_chunk_scan_combined(**kw, chunk_size=64)  # noqa: E731
    beside(ours, original, inputs, lambda **kw: scan(**kw)[0])


@pytest.mark.gpu
def test_beside_mamba_ssm_update():
    theirs = pytest.importorskip("mamba_ssm.ops.triton.selective_state_update")
    inputs = on_gpu(step_inputs() | STEP_ARGUMENTS["D"] | STEP_ARGUMENTS["dt_bias"] | dict(dt_softplus=True))
    beside(compat.selective_state_update, theirs.selective_state_update, inputs, lambda **kw: step(**kw)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_beside_mamba_ssm_norm(norm_before_gate):
    theirs = pytest.importorskip("mamba_ssm.ops.triton.layernorm_gated")
    inputs = dict(x=randn(50, 12, seed=1), weight=randn(12), bias=None, z=randn(50, 12, seed=2), group_size=4)
    inputs = on_gpu(inputs | dict(norm_before_gate=norm_before_gate))
    beside(compat.rmsnorm_fn, theirs.rmsnorm_fn, inputs, norm)
