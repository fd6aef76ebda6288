"""Wrong computations, by name, that the error budget must reject: a budget that lets one pass measures nothing.

Each mutant is computed in float64, so nothing but its mistake separates it from the reference.
"""

import math

import numpy as np
import pytest
import torch

from hybrid_ops.reference import ssd as reference

from .budget import assert_within, round_to, to_numpy

LENGTHS = (37, 0, 64)
TOKENS = ("x", "dt", "B", "C", "z")


def problem(dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    total, nheads, headdim, ngroups, dstate = sum(LENGTHS), 6, 8, 2, 16
    x = randn(1, total, nheads, headdim)
    x[:, :, 3] *= 1e-3  # a head of small scale
    z, B, C = randn(*x.shape), randn(1, total, ngroups, dstate), randn(1, total, ngroups, dstate)
    tensors = dict(x=x.to(dtype), B=B.to(dtype), C=C.to(dtype), z=z.to(dtype))
    # steps as Mamba-2 initialises them, 0.001 to 0.1, so that states live for many chunks
    tensors["dt"] = torch.exp(torch.rand(1, total, nheads, generator=generator) * math.log(100)) * 1e-3
    tensors["dt_bias"] = torch.rand(nheads, generator=generator) * 1e-2
    tensors["A"] = -1 - 15 * torch.rand(nheads, generator=generator)
    tensors["D"] = 1 + 0.1 * randn(nheads)
    tensors["initial_states"] = randn(len(LENGTHS), nheads, headdim, dstate)
    arrays = {name: to_numpy(t) for name, t in tensors.items()}
    return arrays | dict(cu_seqlens=np.cumsum((0, *LENGTHS)), dt_limit=(0.002, 0.08))


def right(**p):
    return reference.ssd_chunk_scan(**p)[:2]


def state_dropped_between_chunks(chunk=32, **p):
    """Every sequence in pieces, each from a state of zeros."""
    y, finals = np.zeros_like(p["x"]), p["initial_states"].copy()
    for b, begin in enumerate(p["cu_seqlens"][:-1]):
        for first in range(begin, p["cu_seqlens"][b + 1], chunk):
            piece = slice(first, min(first + chunk, p["cu_seqlens"][b + 1]))
            state = p["initial_states"][b] if first == begin else np.zeros_like(finals[b])
            part = {name: t[:, piece] if name in TOKENS else t for name, t in p.items()}
            part |= dict(cu_seqlens=None, initial_states=state[None])
            y[:, piece], finals[b : b + 1] = right(**part)
    return y, finals


def decay_one_token_late(monkeypatch, **p):
    tokens = reference._tokens

    def late(*arguments):
        now = tokens(*arguments)
        return now._replace(decay=np.concatenate([now.decay[:, :1], now.decay[:, :-1]], 1))

    monkeypatch.setattr(reference, "_tokens", late)
    return right(**p)


def last_ragged_token_missing(**p):
    last = p["cu_seqlens"][1] - 1
    x, dt = p["x"].copy(), p["dt"].copy()
    x[:, last], dt[:, last] = 0, 0
    return right(**p | dict(x=x, dt=dt, dt_limit=(0.0, p["dt_limit"][1])))


def group_by_remainder(monkeypatch, **p):
    """Head h reads group h % ngroups."""
    monkeypatch.setattr(reference, "_per_head", lambda t, nheads: np.tile(t, (nheads // t.shape[0], 1)))
    return right(**p)


def without(name):
    def mutant(**p):
        return right(**{key: t for key, t in p.items() if key != name})

    mutant.__name__ = f"{name}_ignored"
    return mutant


def one_head_zero(**p):
    y, finals = right(**p)
    y[:, :, 3] = 0
    return y, finals


def state_of_one_head_zero(**p):
    y, finals = right(**p)
    finals[:, 3] = 0
    return y, finals


def neighbours_state_after_an_empty_sequence(**p):
    y, finals = right(**p)
    finals[1] = finals[0]
    return y, finals


def next_sequence_starts_from_its_neighbour(**p):
    _, finals = right(**p)
    initial = p["initial_states"].copy()
    initial[2] = finals[0]
    return right(**p | dict(initial_states=initial))


MUTANTS = [
    state_dropped_between_chunks,
    decay_one_token_late,
    last_ragged_token_missing,
    group_by_remainder,
    *(without(name) for name in ("D", "z", "dt_bias", "dt_limit", "initial_states")),
    one_head_zero,
    state_of_one_head_zero,
    neighbours_state_after_an_empty_sequence,
    next_sequence_starts_from_its_neighbour,
]


def measure(results, p, dtype):
    """y and states, rounded as an implementation stores them, against the budget."""
    wide = reference.ssd_chunk_scan(**p)
    narrow = reference.ssd_chunk_scan(**p, dtype=np.float32)
    for name, axis, got, ref, base in zip(("y", "final_states"), (-2, -3), results, wide, narrow, strict=False):
        assert_within(name, torch.from_numpy(round_to(got, dtype)), ref, base, dtype, axis=axis)


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
