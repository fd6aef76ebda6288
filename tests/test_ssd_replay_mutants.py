"""Wrong replays, by name, that the error budget must reject; each in float64, so that only its mistake is measured."""

import math

import numpy as np
import pytest
import torch

import hybrid_ops
from hybrid_ops.reference import ssd_replay as reference

from .budget import assert_within, round_to, to_numpy

FLUSHED, APPENDED = 0, 1  # slots: of one the state takes its tokens in, the other has room for the new ones
LENGTHS, ROLLBACK, NEW, CAPACITY = (9, 6), (1, 2), 3, 10


def problem(dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def steps(*shape):
        """As Mamba-2 initialises them, 0.001 to 0.1."""
        return torch.exp(torch.rand(*shape, generator=generator) * math.log(100)) * 1e-3

    H, P, G, N = 6, 8, 2, 16
    cache = hybrid_ops.ReplayCache.new(2, H, P, G, N, capacity=CAPACITY, max_tokens=NEW, dtype=dtype)
    cache.x.copy_(randn(*cache.x.shape))
    cache.B.copy_(randn(*cache.B.shape))
    cache.dt.copy_(steps(*cache.dt.shape))
    cache.ring.copy_(torch.tensor([7, 11]) + 256 * torch.tensor(LENGTHS))
    x, B, C = (randn(2, NEW, *s).to(dtype) for s in ((H, P), (G, N), (G, N)))
    A = -1 - 15 * torch.rand(H, generator=generator)
    tensors = dict(state=randn(2, H, P, N), x=x, dt=steps(2, NEW, H), A=A, B=B, C=C)
    arrays = {name: to_numpy(t) for name, t in tensors.items()}
    kept = (*(to_numpy(part) for part in cache[:3]), cache.ring.numpy(), CAPACITY)
    return arrays | dict(cache=kept, rollback=np.array(ROLLBACK))


def right(dtype=np.float64, **p):
    """y and the states, after the step and written out."""
    y, state, cache = reference.ssd_replay_update(**p, dtype=dtype)
    return y, reference.ssd_replay_materialize(state, cache, p["A"], dtype=dtype)[0]


def changed(p, **parts):
    """The cache with other parts."""
    names = ("x", "B", "dt", "ring", "capacity")
    return p | dict(cache=tuple(parts.get(name, part) for name, part in zip(names, p["cache"], strict=True)))


def rejected_token_kept(**p):
    return right(**p | dict(rollback=p["rollback"] - [0, 1]))


def accepted_token_dropped(**p):
    return right(**p | dict(rollback=p["rollback"] + [0, 1]))


def flush_drops_the_oldest_token(**p):
    return right(**changed(p, ring=p["cache"][3] + [1 - 256, 0]))


def flush_leaves_its_tokens_in_the_cache(**p):
    """The state takes them in, and the next step meets them again."""
    y, state, cache = reference.ssd_replay_update(**p)
    cache[3][FLUSHED] = p["cache"][3][FLUSHED]
    return y, reference.ssd_replay_materialize(state, cache, p["A"])[0]


def ring_does_not_wrap(**p):
    """Tokens behind the last place are taken from it."""
    x, B, dt, *_ = p["cache"]
    x, B, dt = (part.copy() for part in (x, B, dt))
    for part in (x, B, dt):
        part[FLUSHED, :, : LENGTHS[FLUSHED] - (part.shape[2] - 7)] = part[FLUSHED, :, -1:]
    return right(**changed(p, x=x, B=B, dt=dt))


def decay_one_token_late(**p):
    """A token decays by its own step too."""
    x, _, dt, *_ = p["cache"]
    return right(**changed(p, x=x * np.exp(dt * p["A"][:, None])[..., None]))


def new_tokens_do_not_see_each_other(**p):
    y, state = right(**p)
    for t in range(1, NEW):
        alone = {name: p[name][:, t : t + 1] for name in ("x", "dt", "B", "C")}
        y[:, t : t + 1] = right(**p | alone)[0]
    return y, state


def state_does_not_decay(**p):
    still = right(**p | dict(state=np.zeros_like(p["state"])))
    return still[0] + np.einsum("bhpn,bthn->bthp", p["state"], np.repeat(p["C"], 3, 2)), still[1] + p["state"]


MUTANTS = [
    rejected_token_kept,
    accepted_token_dropped,
    flush_drops_the_oldest_token,
    flush_leaves_its_tokens_in_the_cache,
    ring_does_not_wrap,
    decay_one_token_late,
    new_tokens_do_not_see_each_other,
    state_does_not_decay,
]


def measure(results, p, dtype):
    wide, narrow = right(**p), right(**p, dtype=np.float32)
    for name, axis, got, ref, base in zip(("y", "state"), (-2, -3), results, wide, narrow, strict=True):
        assert_within(name, torch.from_numpy(round_to(got, dtype)), ref, base, dtype, axis=axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_one_passes(dtype):
    p = problem(dtype)
    measure(right(**p), p, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_rejected(mutant, dtype):
    p = problem(dtype)
    results = mutant(**p)
    with pytest.raises(AssertionError, match=r"error .* > budget"):
        measure(results, p, dtype)
