"""Plain PyTorch for the tests of `hybrid_ops.compat`: what the other libraries document, token by token, in float64."""

import inspect

import torch
import torch.nn.functional as F

from .tensors import int32

DOUBLE = dict(dtype=torch.float64)
BATCH, SEQLEN, NHEADS, HEADDIM, NGROUPS, DSTATE = 2, 9, 4, 3, 2, 5


def signature(function):
    """Names, order and defaults as they stand in a `def`, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
    return str(inspect.Signature(bare))[1:-1]


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **(DOUBLE | options))


def scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    initial=None,
    idx=None,
):
    """(y, the state after every token) of (batch, seqlen, ...) tensors; where idx changes the state starts from 0."""
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial is None else initial
    states, ys = [], []
    for t in range(x.shape[1]):
        if idx is not None and t:
            state = state * (idx[:, t] == idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        states.append(state)
        ys.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return y if z is None else y * F.silu(z), torch.stack(states, 1)


def conv(x, weight, bias=None, silu=False, history=None):
    """(batch, dim, seqlen) behind a history (batch, dim, width - 1), by default zeros."""
    history = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if history is None else history
    if x.shape[2] == 0:
        return x
    y = F.conv1d(torch.cat([history, x], -1), weight[:, None], bias, groups=len(weight))
    return F.silu(y) if silu else y


def norm(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True, rms=True):
    gate = 1.0 if z is None else F.silu(z)
    u = (x if norm_before_gate else x * gate).unflatten(-1, (-1, group_size or x.shape[-1]))
    u = u if rms else u - u.mean(-1, keepdim=True)
    y = (u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * gate if norm_before_gate else y


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def differ(a, b):
    """The argument under test matters: who ignored it would not pass."""
    assert (a - b).abs().max() > 1e-3


def scan_inputs(batch=BATCH, seqlen=SEQLEN):
    x, dt = randn(batch, seqlen, NHEADS, HEADDIM, seed=1), randn(batch, seqlen, NHEADS, seed=2)
    B, C = randn(2, batch, seqlen, NGROUPS, DSTATE, seed=3)
    return x, dt, -randn(NHEADS, seed=4).exp(), B, C


def packed(lengths):
    """Inputs of one row with those sequences, boundaries, seq_idx."""
    idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int()[None]
    return scan_inputs(1, sum(lengths)), int32(0, *lengths).cumsum(0), idx


def step_inputs(rows=BATCH):
    """As Mamba-2 calls it: what a head has is expanded to its channels."""
    x, dt, A, B, C = (t[:, 0] if t.dim() > 1 else t for t in scan_inputs())
    return dict(
        state=randn(rows, NHEADS, HEADDIM, DSTATE, seed=5),
        x=x,
        dt=dt[..., None].expand(-1, -1, HEADDIM),
        A=A[:, None, None].expand(-1, HEADDIM, DSTATE),
        B=B,
        C=C,
    )


def step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """(y, the next state), each channel for itself."""
    heads = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads, 1)[:, :, None] for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt.clamp(min=0))[..., None]
    state = state * torch.exp(dt * A) + dt * B * x[..., None]
    y = (state * C).sum(-1) + (0 if D is None else D * x)
    return y if z is None else y * F.silu(z), state


STEP_ARGUMENTS = {
    "D": dict(D=randn(NHEADS)[:, None].expand(-1, HEADDIM)),
    "D by feature": dict(D=randn(NHEADS, HEADDIM)),
    "z": dict(z=randn(BATCH, NHEADS, HEADDIM)),
    "dt_bias": dict(dt_bias=randn(NHEADS)[:, None].expand(-1, HEADDIM)),
    "dt_bias by feature": dict(dt_bias=randn(NHEADS, HEADDIM)),
    "dt by feature": dict(dt=randn(BATCH, NHEADS, HEADDIM)),
    "A by feature": dict(A=(-randn(NHEADS, HEADDIM).exp())[..., None].expand(-1, -1, DSTATE)),
    "all by feature": dict(
        dt=randn(BATCH, NHEADS, HEADDIM), D=randn(NHEADS, HEADDIM), z=randn(BATCH, NHEADS, HEADDIM), dt_softplus=True
    ),
    "dt_softplus": dict(dt_softplus=True),
}
