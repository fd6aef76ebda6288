"""Wrong steps of a mixer, by name, that the error budget must reject; see test_mutants.py."""

import numpy as np
import pytest
import torch

from hybrid_ops.reference import conv1d_update, norm, ssd_update
from hybrid_ops.reference import mamba2_step as reference

from .budget import assert_within, round_to, to_numpy

HEADS, HEADDIM, GROUPS, DSTATE = 6, 8, 2, 16
INNER, SHARED = HEADS * HEADDIM, 2 * GROUPS * DSTATE


def problem(dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = dict(
        zxbcdt=randn(5, 2 * INNER + SHARED + HEADS),
        conv_state=randn(5, INNER + SHARED, 3),
        state=randn(5, HEADS, HEADDIM, DSTATE, dtype=torch.float32),
        conv_weight=randn(INNER + SHARED, 4),
        conv_bias=randn(INNER + SHARED),
        A=-torch.rand(HEADS, generator=generator) - 0.1,
        D=randn(HEADS),
        dt_bias=randn(HEADS, dtype=torch.float32),
        norm_weight=1 + 0.1 * randn(INNER),
    )
    return {name: to_numpy(t) for name, t in tensors.items()} | dict(
        group_size=INNER // GROUPS, dt_limit=(0.05, 2.0), eps=0.1
    )


def right(**p):
    return reference.mamba2_step(**p)


def without(name):
    def mutant(**p):
        return right(**{key: t for key, t in p.items() if key != name})

    mutant.__name__ = f"{name}_ignored"
    return mutant


def with_other(name, change):
    def mutant(**p):
        return right(**p | {name: change(p.get(name))})

    mutant.__name__ = f"other_{name}"
    return mutant


def B_and_C_exchanged(**p):
    def exchange(t, axis=-1):
        x, B, C = np.split(t, [INNER, INNER + SHARED // 2], axis)
        return np.concatenate([x, C, B], axis)

    z, xBC, dt = np.split(p["zxbcdt"], [INNER, 2 * INNER + SHARED], 1)
    moved = dict(zxbcdt=np.concatenate([z, exchange(xBC), dt], 1), conv_state=exchange(p["conv_state"], 1))
    return right(**p | moved | {name: exchange(p[name], 0) for name in ("conv_weight", "conv_bias")})


def window_of_the_next_token(**p):
    """The convolution reads a window that has moved on already, as another block may have written it."""
    return right(
        **p | dict(conv_state=np.concatenate([p["conv_state"][:, :, 1:], p["zxbcdt"][:, INNER:-HEADS, None]], 2))
    )


def windows_stand_still(**p):
    y, _, states = right(**p)
    return y, p["conv_state"], states


def states_stand_still(**p):
    y, windows, _ = right(**p)
    return y, windows, p["state"]


def sum_of_squares_of_half_a_group(**p):
    """A part of the cluster was not heard."""
    y, windows, states = right(**p | dict(eps=0.0))
    first = y.reshape(5, -1, 2, INNER // GROUPS // 2)
    squares = (first**2).sum(-1)
    return (first * np.sqrt(squares.sum(-1) / squares[..., 0] / 2)[..., None, None]).reshape(5, INNER), windows, states


def silu_of_B_and_C_missing(monkeypatch, **p):
    silu = norm.silu

    def of_x_alone(v):
        return np.concatenate([silu(v[..., :INNER]), v[..., INNER:]], -1) if v.shape[-1] == INNER + SHARED else silu(v)

    monkeypatch.setattr(conv1d_update, "silu", of_x_alone)
    return right(**p)


def skip_of_x_before_the_convolution(monkeypatch, **p):
    x = p["zxbcdt"][:, INNER : 2 * INNER].reshape(5, HEADS, HEADDIM)
    update = ssd_update.ssd_state_update

    def wrong(state, convolved, *rest, D, **options):
        y, states = update(state, convolved, *rest, D=None, **options)
        return y + D[:, None] * x, states

    monkeypatch.setattr(reference, "ssd_state_update", wrong)
    return right(**p)


MUTANTS = [
    *(without(name) for name in ("conv_bias", "D", "dt_bias", "dt_limit", "eps", "group_size")),
    with_other("conv_weight", lambda w: w[:, ::-1]),
    with_other("norm_weight", np.ones_like),
    with_other("A", lambda A: np.roll(A, 1)),
    with_other("norm_before_gate", lambda _: True),
    with_other("dt_softplus", lambda _: False),
    B_and_C_exchanged,
    window_of_the_next_token,
    windows_stand_still,
    states_stand_still,
    sum_of_squares_of_half_a_group,
    silu_of_B_and_C_missing,
    skip_of_x_before_the_convolution,
]


def measure(results, p, dtype):
    wide, narrow = right(**p), right(**p, dtype=np.float32)
    names = (("y", dtype), ("conv_state", dtype), ("state", torch.float32))
    for (name, kept), got, ref, base in zip(names, results, wide, narrow, strict=True):
        if name == "y":  # by group of the norm, the others by channel and head
            got, ref, base = (t.reshape(5, GROUPS, -1) for t in (got, ref, base))
        widest = max(dtype, kept, key=lambda d: torch.finfo(d).eps)
        assert_within(name, torch.from_numpy(round_to(got, kept)), ref, base, widest, axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_one_passes(dtype):
    p = problem(dtype)
    measure(right(**p), p, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_rejected(mutant, dtype, monkeypatch):
    p = problem(dtype)
    with monkeypatch.context() as patch:
        patched = dict(monkeypatch=patch) if "monkeypatch" in mutant.__code__.co_varnames else {}
        results = mutant(**patched, **p)
    with pytest.raises(AssertionError, match=r"error .* > budget"):
        measure(results, p, dtype)
