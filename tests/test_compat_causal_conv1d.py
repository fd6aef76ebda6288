import pytest
import torch

from hybrid_ops.compat import causal_conv1d as compat

from .budget import assert_within, to_numpy
from .compat_cases import conv, differ, randn, same, signature
from .tensors import int32

BATCH, DIM, SEQLEN, WIDTH = 2, 6, 9, 4


def test_signatures():
    assert signature(compat.causal_conv1d_fn) == (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, "
        "activation=None"
    )
    assert signature(compat.causal_conv1d_update) == (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None"
    )
    assert signature(compat.causal_conv1d_varlen_states) == "x, cu_seqlens, state_len"


def inputs():
    return randn(BATCH, DIM, SEQLEN, seed=1), randn(DIM, WIDTH, seed=2)


@pytest.mark.parametrize("channel_last", [False, True])
def test_plain(channel_last):
    x, weight = inputs()
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = compat.causal_conv1d_fn(x, weight)
    same(y, conv(x, weight))
    assert y.stride() == x.stride()


def test_bias():
    x, weight = inputs()
    same(compat.causal_conv1d_fn(x, weight, randn(DIM)), conv(x, weight, randn(DIM)))


@pytest.mark.parametrize("activation", ["silu", "swish"])
def test_activation(activation):
    x, weight = inputs()
    same(compat.causal_conv1d_fn(x, weight, activation=activation), conv(x, weight, silu=True))
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'relu'"):
        compat.causal_conv1d_fn(x, weight, activation="relu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_seq_idx(dtype):
    x, weight = inputs()
    idx = torch.tensor([0] * 4 + [1] * 5 + [3] * 9, dtype=dtype).view(2, 9)
    y = compat.causal_conv1d_fn(x, weight, seq_idx=idx)
    same(y[:1, :, :4], conv(x[:1, :, :4], weight))
    same(y[:1, :, 4:], conv(x[:1, :, 4:], weight))
    same(y[1:], conv(x[1:], weight))
    idx[0, 2] = -1  # padding
    assert (compat.causal_conv1d_fn(x, weight, seq_idx=idx)[0, :, 2] == 0).all()


def test_initial_states():
    x, weight = inputs()
    history = randn(BATCH, DIM, WIDTH - 1)
    y, final = compat.causal_conv1d_fn(x, weight, initial_states=history, return_final_states=True)
    same(y, conv(x, weight, history=history))
    same(final, x[:, :, -3:])
    _, short = compat.causal_conv1d_fn(x[:, :, :2], weight, initial_states=history, return_final_states=True)
    same(short, torch.cat([history, x[:, :, :2]], 2)[:, :, -3:])


def test_final_states_out():
    x, weight = inputs()
    out = torch.empty(BATCH, WIDTH - 1, DIM, dtype=torch.float64).transpose(1, 2)
    _, final = compat.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out
    same(out, x[:, :, -3:])
    out.zero_()
    same(compat.causal_conv1d_fn(x, weight, final_states_out=out), conv(x, weight))
    same(out, x[:, :, -3:])


def test_gradients():
    x, weight = inputs()
    leaves = [t.requires_grad_() for t in (x, weight, randn(DIM), randn(BATCH, DIM, WIDTH - 1))]
    weights = randn(*x.shape, seed=5), randn(BATCH, DIM, WIDTH - 1, seed=6)
    y, final = compat.causal_conv1d_fn(
        *leaves[:3], initial_states=leaves[3], return_final_states=True, activation="silu"
    )
    expected = conv(*leaves[:3], silu=True, history=leaves[3])
    mine = torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)
    same(mine, torch.autograd.grad((expected * weights[0]).sum() + (x[:, :, -3:] * weights[1]).sum(), leaves))


# new tokens


def stream(conv_state, x):
    return torch.cat([conv_state, x if x.dim() == 3 else x[..., None]], -1)


@pytest.mark.parametrize("steps", [None, 1, 3, 7])
@pytest.mark.parametrize("state_len", [3, 5])
def test_update(state_len, steps):
    weight, bias = randn(DIM, WIDTH, seed=2), randn(DIM)
    x = randn(BATCH, DIM, seed=1) if steps is None else randn(BATCH, DIM, steps, seed=1)
    conv_state = randn(BATCH, DIM, state_len, seed=3)
    u = stream(conv_state, x)
    y = compat.causal_conv1d_update(x, conv_state, weight, bias, "swish")
    same(y.view(BATCH, DIM, -1), conv(u, weight, bias, silu=True)[..., state_len:])
    same(conv_state, u[..., -state_len:])
    assert y.shape == x.shape


def test_update_without_bias_and_activation():
    x, conv_state, weight = randn(BATCH, DIM), randn(BATCH, DIM, 3, seed=3), randn(DIM, WIDTH, seed=2)
    u = stream(conv_state, x)
    same(compat.causal_conv1d_update(x, conv_state, weight), conv(u, weight)[..., -1])
    with pytest.raises(ValueError, match="activation must be"):
        compat.causal_conv1d_update(x, conv_state, weight, activation="gelu")


def test_update_conv_state_indices():
    x, pool, weight = randn(3, DIM, seed=1), randn(5, DIM, 4, seed=3), randn(DIM, WIDTH, seed=2)
    before = pool.clone()
    y = compat.causal_conv1d_update(x, pool, weight, conv_state_indices=torch.tensor([4, -3, 1]))
    u = stream(before[[4, 1]], x[[0, 2]])
    same(y[[0, 2]], conv(u, weight)[..., -1])
    assert (y[1] == 0).all()
    same(pool[[4, 1]], u[..., -4:])
    assert pool[[0, 2, 3]].equal(before[[0, 2, 3]])


@pytest.mark.parametrize("steps", [None, 2, 4, 6])
def test_update_of_a_ring(steps):
    """Column c % state_len is the oldest, and the next to be overwritten."""
    weight, lengths = randn(DIM, WIDTH, seed=2), [7, 12]
    x = randn(BATCH, DIM, seed=1) if steps is None else randn(BATCH, DIM, steps, seed=1)
    ring = randn(BATCH, DIM, 4, seed=3)
    ordered = torch.stack([row.roll(-(n % 4), -1) for row, n in zip(ring, lengths, strict=True)])
    u = stream(ordered, x)
    y = compat.causal_conv1d_update(x, ring, weight, cache_seqlens=int32(*lengths))
    expected = conv(u, weight)[..., 4:]
    same(y.view(BATCH, DIM, -1), expected)
    differ(expected, conv(stream(ring, x), weight)[..., 4:])
    moved = [u[b, :, -4:].roll((n + (steps or 1)) % 4, -1) for b, n in enumerate(lengths)]
    same(ring, torch.stack(moved))


def test_update_of_a_ring_with_indices():
    x, ring, weight = randn(BATCH, DIM), randn(5, DIM, 4, seed=3), randn(DIM, WIDTH)
    before = ring.clone()
    with pytest.raises(ValueError, match=r"conv_state_indices must be None.*hybrid_ops.causal_conv1d_update"):
        compat.causal_conv1d_update(x, ring, weight, cache_seqlens=int32(1, 2), conv_state_indices=int32(1, 2))
    assert ring.equal(before)


def test_update_of_parameters():
    weight = torch.nn.Parameter(randn(DIM, WIDTH))
    assert not compat.causal_conv1d_update(randn(BATCH, DIM), randn(BATCH, DIM, 3), weight).requires_grad


# states of packed sequences


@pytest.mark.parametrize("state_len", [0, 1, 3, 6])
@pytest.mark.parametrize("lengths", [[4, 0, 2, 7], [1], []])
def test_varlen_states(lengths, state_len):
    x = randn(sum(lengths), DIM)
    states = compat.causal_conv1d_varlen_states(x, int32(0, *lengths).cumsum(0), state_len)
    assert states.shape == (len(lengths), DIM, state_len)
    for state, sequence in zip(states, x.split(lengths) if lengths else (), strict=True):
        padded = torch.cat([torch.zeros(state_len, DIM, dtype=torch.float64), sequence])
        assert state.equal(padded[len(padded) - state_len :].T)


def test_varlen_states_feed_the_update():
    x, weight, cu_seqlens = randn(9, DIM), randn(DIM, WIDTH), int32(0, 2, 9)
    states = compat.causal_conv1d_varlen_states(x[:-1], int32(0, 2, 8), WIDTH - 1)
    y = compat.causal_conv1d_update(x[-1:], states[1:], weight)
    same(y[0], conv(x[2:].T[None], weight)[0, :, -1])
    same(states[1], compat.causal_conv1d_varlen_states(x, cu_seqlens, WIDTH - 1)[1])


def test_varlen_states_bad_input():
    with pytest.raises(ValueError, match="x must have shape"):
        compat.causal_conv1d_varlen_states(randn(1, 9, DIM), int32(0, 9), 3)


# beside the original


@pytest.mark.gpu
def test_beside_causal_conv1d():
    theirs = pytest.importorskip("causal_conv1d")
    x, weight, bias = randn(2, 100, 64, seed=1), randn(64, 4, seed=2), randn(64)
    x, weight, bias = (t.to("cuda", torch.bfloat16) for t in (x, weight, bias))
    x = x.transpose(1, 2)
    history = randn(2, 3, 64).to("cuda", torch.bfloat16).transpose(1, 2)
    options = dict(initial_states=history, return_final_states=True, activation="silu")
    y, final = compat.causal_conv1d_fn(x, weight, bias, **options)
    other, other_final = theirs.causal_conv1d_fn(x, weight, bias, **options)
    ref, baseline = (
        to_numpy(conv(*(t.to("cpu", d) for t in (x, weight, bias)), True, history.to("cpu", d)))
        for d in (torch.float64, torch.float32)
    )
    assert_within("y", y, ref, baseline, y.dtype, axis=1)
    assert_within("theirs", other, ref, baseline, y.dtype, axis=1)
    assert final.equal(other_final)
    states = [history.clone(), history.clone()]
    mine, other = (
        f(x[..., 0], state, weight, bias, "silu")
        for f, state in zip((compat.causal_conv1d_update, theirs.causal_conv1d_update), states, strict=True)
    )
    torch.testing.assert_close(mine, other)
    assert states[0].equal(states[1])
