"""`hybrid_ops.nn.MoE` as a module: what it counts, how its bias moves, how a model is initialised."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
from hybrid_ops.nn import MoE

SIZES = dict(num_experts=8, topk=3, intermediate_size=24, shared_intermediate_size=20)


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return MoE(16, **SIZES | changes, dtype=dtype)


def expected_load(moe, x):
    """By hand: the topk largest of sigmoid + bias."""
    scores = (x.flatten(0, -2) @ moe.gate.weight.T).sigmoid() + moe.gate.e_score_correction_bias
    return torch.bincount(scores.topk(moe.topk).indices.flatten(), minlength=len(scores.T))


def test_load():
    moe, x = build(), torch.randn(2, 50, 16)
    moe(x)
    once = expected_load(moe, x)
    assert moe.load.equal(once)
    moe(x)
    assert moe.load.equal(2 * once)
    assert "load" not in moe.state_dict()
    with torch.no_grad():
        moe(x)
    moe.eval()(x)
    assert moe.load.equal(2 * once)


@settings(max_examples=25)
@given(load=st.lists(st.integers(0, 5), min_size=8, max_size=8), rate=st.sampled_from([1e-3, 0.25]))
def test_balance(load, rate):
    """Each expert's bias goes a step up below the mean load, down above it, and stays at the mean."""
    moe = build()
    start = torch.randn(8)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.copy_(start)
    moe.load.copy_(torch.tensor(load))
    moe.balance(rate)
    steps = [rate if 8 * n < sum(load) else -rate if 8 * n > sum(load) else 0.0 for n in load]
    assert moe.gate.e_score_correction_bias.equal(start + torch.tensor(steps))
    assert not moe.load.any()
    assert not moe.gate.e_score_correction_bias.requires_grad


def test_balance_evens_the_loads():
    """Experts that nearly all tokens would choose lose them again."""
    moe, x = build(), torch.randn(400, 16).abs()
    with torch.no_grad():
        moe.gate.weight[:3] += 0.5

    def share():
        moe.load.zero_()
        moe(x)
        return moe.load.max().item() / moe.load.float().mean().item()

    assert share() > 2
    for _ in range(60):
        moe(x)
        moe.balance(rate=0.02)
    assert share() < 1.5


def test_the_bias_steers_the_choice_only():
    """A bias common to all experts changes nothing, one that excludes an expert sends it no token."""
    moe, x = build(torch.float64), torch.randn(30, 16, dtype=torch.float64)
    before = moe(x)
    with torch.no_grad():
        moe.gate.e_score_correction_bias += 0.5
    torch.testing.assert_close(moe(x), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        moe.gate.e_score_correction_bias[2] -= 10
    moe.load.zero_()
    moe(x)
    assert moe.load[2] == 0


def test_dtypes_and_shapes():
    for dtype, own in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        moe = build(dtype, latent_size=12)
        assert {n for n, p in moe.named_parameters() if p.dtype != dtype} == (
            {"gate.e_score_correction_bias"} if own != dtype else set()
        )
        assert moe.gate.e_score_correction_bias.dtype == own
        assert moe.experts.up_proj.shape == (8, 24, 12)
        for shape in ((16,), (0, 16), (2, 0, 16), (1, 16), (2, 3, 16)):
            y = moe(torch.randn(shape, dtype=dtype))
            assert (y.shape, y.dtype) == (shape, dtype)
    transposed = torch.randn(16, 5, dtype=torch.float64).T
    torch.testing.assert_close(moe(transposed), moe(transposed.contiguous()))


@pytest.mark.parametrize("latent", [None, 64])
def test_initialisation(latent):
    """Matrices that write to the residual stream are smaller by sqrt(layers): with latent experts, fc2's alone."""
    torch.manual_seed(0)
    config = NemotronHConfig.preset("tiny-moe", moe_latent_size=latent)
    model, std = NemotronHForCausalLM(config), config.initializer_range
    small = std / math.sqrt(len(config.hybrid_override_pattern))
    for moe in (model.backbone.layers[1].mixer, model.mtp.layers[1].mixer):
        for parameter, expected in (
            (moe.gate.weight, std),
            (moe.experts.up_proj, std),
            (moe.experts.down_proj, std if latent else small),
            (moe.shared_experts.up_proj.weight, std),
            (moe.shared_experts.down_proj.weight, small),
            *([(moe.fc1_latent_proj.weight, std), (moe.fc2_latent_proj.weight, small)] if latent else []),
        ):
            assert parameter.std().item() == pytest.approx(expected, rel=0.1)
        assert not moe.gate.e_score_correction_bias.any()
    assert model.mtp.layers[0].eh_proj.weight.std().item() == pytest.approx(std, rel=0.1)
    assert model.mtp.layers[0].mixer.o_proj.weight.std().item() == pytest.approx(small, rel=0.1)
