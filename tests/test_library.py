"""The library's own calls pass torch's dispatcher by only where it would do nothing."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import hybrid_ops
from hybrid_ops import _library


@pytest.fixture
def calls(monkeypatch):
    """How each call of an operator went."""
    went = []

    def call(self, *arguments, run=None):
        plain = _library._is_plain(arguments)
        went.append("directly" if plain else "dispatched")
        ((run or self._run) if plain else self._overload)(*arguments)

    monkeypatch.setattr(_library.Operator, "__call__", call)
    return went


def norm(x):
    return hybrid_ops.rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device))


def test_plain(calls):
    norm(torch.randn(2, 8))
    norm(torch.nn.Parameter(torch.randn(2, 8), requires_grad=False))
    assert calls == ["directly"] * 2


def test_profiler_sees_the_operator(calls):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(torch.randn(2, 8))
    assert calls == ["dispatched"]
    assert any(event.key.startswith("hybrid_ops::") for event in profile.key_averages())


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain(calls):
    norm(torch.randn(2, 8, device="meta"))
    norm(torch.randn(2, 8).as_subclass(Subclass))
    with FakeTensorMode():
        assert norm(torch.randn(2, 8)).shape == (2, 8)
    assert set(calls) == {"dispatched"}


def test_transforms_are_not_passed_by():
    inside = []
    torch.func.vmap(lambda x: (inside.append(_library._is_plain((x,))), x)[1])(torch.randn(2, 8))
    assert inside == [False]
    assert _library._is_plain((torch.randn(2),))
