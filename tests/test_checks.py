"""`_checks.remembered`; the checks themselves are tested with each op that makes them."""

import pytest
import torch

import hybrid_ops
from hybrid_ops import _checks


@pytest.fixture
def on_gpu(monkeypatch):
    """CPU tensors say that they are on a GPU, and no values are read, as there."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(_checks, "readable", lambda value: False)


@pytest.fixture
def check():
    calls = []

    @_checks.remembered
    def check(x, weight, bound):
        calls.append(bound)
        _checks.tensor("weight", weight, x.shape[-1:], dtype=x.dtype, device=x.device)
        return None if bound is None else max(bound)

    check.calls = calls
    return check


def test_once_for_each_signature(check, on_gpu):
    x, weight = torch.ones(2, 3), torch.ones(3)
    for _ in range(2):
        assert check(x, weight, (1, 2)) == 2
        assert check(x + 1, weight.clone(), (1, 5)) == 5
        assert check(x, weight, None) is None
        assert check(x.mT.contiguous().mT, weight, (1, 2)) == 2  # the same shape, other strides
        assert check(x.double(), weight.double(), (1, 2)) == 2
        assert check(torch.ones(7)[1:].view(2, 3), weight, (1, 2)) == 2  # not at a multiple of 16 bytes
    assert check.calls == [(1, 2), (1, 5), None, (1, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.ones(3, dtype=torch.float16), TypeError),
        (torch.ones(4), ValueError),
        (torch.ones(3, device="meta"), ValueError),
        (None, TypeError),
    ],
)
def test_refused_however_often(check, on_gpu, weight, error):
    x = torch.ones(2, 3)
    check(x, torch.ones(3), (1, 2))
    for _ in range(2):
        with pytest.raises(error, match="weight must"):
            check(x, weight, (1, 2))
    assert len(check.calls) == 3


def test_what_cannot_be_a_key(check, on_gpu):
    x, weight, bounds = torch.ones(2, 3), torch.ones(3), [1, 2]
    assert check(x, weight, bounds) == 2
    bounds.append(7)
    assert check(x, weight, bounds) == 7
    assert check(x, weight, bound=(3,)) == 3
    assert check(x, weight, bound=(4,)) == 4


def test_values_on_the_cpu(check):
    x, weight = torch.ones(2, 3), torch.ones(3)
    check(x, weight, (1, 2))
    check(x, weight, (1, 2))
    assert len(check.calls) == 2


def test_values_where_they_are_asked_for(check, on_gpu, monkeypatch):
    monkeypatch.setenv("HYBRID_OPS_CHECK", "1")
    test_values_on_the_cpu(check)


def conv1d_update():
    arguments = dict(x=torch.ones(2, 8), conv_state=torch.zeros(4, 8, 3), weight=torch.ones(8, 4), bias=torch.ones(8))
    return hybrid_ops.causal_conv1d_update, arguments | dict(slots=torch.tensor([2, 0], dtype=torch.int32))


def ssd_update():
    x, B = torch.ones(2, 4, 8), torch.ones(2, 1, 16)
    arguments = dict(state=torch.zeros(3, 4, 8, 16), x=x, dt=torch.ones(2, 4), A=-torch.ones(4), B=B, C=B, z=x)
    return hybrid_ops.ssd_state_update, arguments | dict(read_slots=torch.tensor([2, 0], dtype=torch.int32))


def ssd_replay():
    def run(cache_x, cache_B, cache_dt, ring, **arguments):
        cache = hybrid_ops.ReplayCache(cache_x, cache_B, cache_dt, ring, 4)
        return hybrid_ops.ssd_replay_update(cache=cache, **arguments)

    _, arguments = ssd_update()
    cache = hybrid_ops.ReplayCache.new(3, 4, 8, 1, 16, capacity=4)
    arguments |= dict(zip(("cache_x", "cache_B", "cache_dt", "ring"), cache, strict=False))
    return run, arguments | dict(slots=arguments.pop("read_slots"))


def mamba2_step():
    arguments = dict(zxbcdt=torch.ones(2, 100), conv_state=torch.zeros(3, 64, 3), state=torch.zeros(3, 4, 8, 16))
    arguments |= dict(conv_weight=torch.ones(64, 4), A=-torch.ones(4), norm_weight=torch.ones(32), D=torch.ones(4))
    return hybrid_ops.mamba2_step, arguments | dict(slots=torch.tensor([2, 0], dtype=torch.int32))


def ssd():
    x, B = torch.ones(1, 20, 4, 8), torch.ones(1, 20, 1, 16)
    arguments = dict(x=x, dt=torch.ones(1, 20, 4), A=-torch.ones(4), B=B, C=B, D=torch.ones(4), z=x)
    return hybrid_ops.ssd_chunk_scan, arguments | dict(cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))


def conv1d():
    arguments = dict(x=torch.ones(1, 20, 8), weight=torch.ones(8, 4), bias=torch.ones(8))
    pool = dict(conv_state=torch.zeros(4, 8, 3), read_slots=torch.tensor([2], dtype=torch.int32))
    return hybrid_ops.causal_conv1d, arguments | pool


def norm():
    return hybrid_ops.rms_norm, dict(x=torch.ones(3, 8), weight=torch.ones(8), residual=torch.ones(3, 8))


def gated_norm():
    return hybrid_ops.gated_rms_norm, dict(x=torch.ones(3, 8), z=torch.ones(3, 8), weight=torch.ones(8))


WITH_GRADIENT = (
    hybrid_ops.causal_conv1d,
    hybrid_ops.gated_rms_norm,
    hybrid_ops.rms_norm,
    hybrid_ops.ssd_chunk_scan,
)


@pytest.mark.parametrize("problem", [conv1d_update, ssd_update, ssd_replay, mamba2_step, ssd, conv1d, norm, gated_norm])
def test_operators(problem, on_gpu):
    """After a good call, each tensor of another dtype, shape or device is refused, and so is the gradient it lacks."""
    run, good = problem()
    for _ in range(2):
        run(**good)
    for name, tensor in good.items():
        for bad in (tensor.to(torch.int16), tensor.new_empty(*tensor.shape, 1, 1), tensor.to("meta")):
            with pytest.raises((TypeError, ValueError), match=" must "):
                run(**good | {name: bad})
        if tensor.is_floating_point() and run not in WITH_GRADIENT and not name.startswith("cache"):
            with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
                run(**good | {name: tensor.clone().requires_grad_()})


@pytest.mark.parametrize("problem", [conv1d_update, ssd_update, ssd, conv1d])
def test_numbers(problem, on_gpu):
    """A tensor has the signature of any other: its value must not be remembered."""
    run, good = problem()
    with pytest.raises(TypeError, match="null_slot must be a number"):
        run(**good, null_slot=torch.tensor(-1))


def test_eps_is_a_number(on_gpu):
    with pytest.raises(TypeError, match="eps must be a number"):
        hybrid_ops.rms_norm(torch.ones(3, 8), torch.ones(8), eps=torch.tensor(1e-5))


def test_transforms_are_not_looked_into(on_gpu):
    """Under vmap a tensor has no address to ask for; what cannot run there says so."""
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda x: hybrid_ops.rms_norm(x, torch.ones(8)))(torch.ones(2, 3, 8))
