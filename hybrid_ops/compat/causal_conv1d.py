"""What models import from `causal_conv1d`, by its names and signatures (1.6, 1.7). Differences: docs/compat.md."""

from typing import cast

import torch
from torch import Tensor

from .. import conv1d, conv1d_update
from ._arguments import activation_name, int32, must_be_none
from ._slots import slots

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`hybrid_ops.causal_conv1d` for causal_conv1d's function of this name.

    Args:
        x: (batch, dim, seqlen), any strides; a transposed (batch, seqlen, dim) is read fastest.
        weight: (dim, width), width 1 to 8; the last column multiplies the newest token.
        bias: (dim,).
        seq_idx: (batch, seqlen), the sequence of each token; negative is padding.
        initial_states: (batch, dim, width - 1), the inputs before the first sequence of each row, oldest first.
        return_final_states: also return the last width - 1 inputs.
        final_states_out: they are written here, and this is returned.
        activation: None, "silu" or "swish".

    Returns:
        y, (batch, dim, seqlen) in x's order of strides; with return_final_states (y, final_states).

    Raises:
        ValueError, TypeError: as `hybrid_ops.causal_conv1d`.

    >>> causal_conv1d_fn(torch.randn(2, 8, 16), torch.randn(8, 4), activation="silu").shape
    torch.Size([2, 8, 16])
    """
    wanted = return_final_states or final_states_out is not None
    results = conv1d.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=activation_name(activation),
        initial_states=initial_states,
        seq_idx=int32(seq_idx),
        return_final_states=wanted,
    )
    if not wanted:
        return cast(Tensor, results).transpose(1, 2)
    y, states = results
    y = y.transpose(1, 2)
    if final_states_out is not None:
        states = final_states_out.copy_(states)
    return (y, states) if return_final_states else y


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`hybrid_ops.causal_conv1d_update` for causal_conv1d's function of this name: new tokens, state in place.

    Args:
        x: (batch, dim), one token each, or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len), state_len >= width - 1, or more rows with conv_state_indices: the last
            inputs, newest last; updated in place.
        weight: (dim, width), width 1 to 8.
        bias: (dim,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,), tokens before these: conv_state is a ring then, whose next place is
            cache_seqlens % state_len. Two more copies of it; not with conv_state_indices.
        conv_state_indices: (batch,), the row that each sequence has; negative is padding: y = 0, no update.

    Returns:
        y, x's shape and dtype. No gradients, as in the original.

    Raises:
        ValueError, TypeError: as `hybrid_ops.causal_conv1d_update`.

    >>> conv_state = torch.zeros(2, 8, 3)
    >>> y = causal_conv1d_update(torch.ones(2, 8), conv_state, torch.ones(8, 4))
    >>> conv_state[0, 0]
    tensor([0., 0., 1.])
    """
    tokens = x if x.dim() == 2 else x.transpose(1, 2)
    activation = activation_name(activation)
    if cache_seqlens is None:
        rows = None if conv_state_indices is None else slots(conv_state_indices)
        y = conv1d_update.causal_conv1d_update(tokens, conv_state, weight, bias, activation=activation, slots=rows)
    else:
        why = "hybrid_ops.causal_conv1d_update takes slots, with the newest input in the last column instead of a ring"
        must_be_none(why, conv_state_indices=conv_state_indices)
        steps = 1 if x.dim() == 2 else x.shape[2]
        ring = conv_state[: len(x)]
        window = ring.gather(2, _places(ring, cache_seqlens))
        y = conv1d_update.causal_conv1d_update(tokens, window, weight, bias, activation=activation)
        ring.scatter_(2, _places(ring, cache_seqlens + steps), window)
    return y if x.dim() == 2 else y.transpose(1, 2)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last state_len inputs of each sequence, as `causal_conv1d_update` wants them.

    Args:
        x: (total, dim), the sequences one behind the other.
        cu_seqlens: (nseq + 1,), their boundaries.
        state_len: how many.

    Returns:
        (nseq, dim, state_len), newest last, zeros before the first input of a shorter sequence.

    `hybrid_ops.causal_conv1d` writes these itself, with conv_state and write_slots, while it convolves.

    >>> causal_conv1d_varlen_states(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 3]), 2)[:, 0]
    tensor([[0., 1.],
            [2., 3.]])
    """
    if x.dim() != 2 or cu_seqlens.dim() != 1 or state_len < 0:
        raise ValueError(
            "x must have shape (total, dim), cu_seqlens (nseq + 1,) and state_len be >= 0, "
            f"got {tuple(x.shape)}, {tuple(cu_seqlens.shape)} and {state_len}"
        )
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = end - state_len + torch.arange(state_len, device=x.device)
    if len(x) == 0:
        return x.new_zeros(len(begin), x.shape[1], state_len)
    return x[token.clamp(0, len(x) - 1)].where((token >= begin)[..., None], 0).transpose(1, 2)


def _places(ring: Tensor, cache_seqlens: Tensor) -> Tensor:
    """Where the inputs of a ring are, oldest first: indices of its shape."""
    places = cache_seqlens.long()[:, None] + torch.arange(ring.shape[2], device=ring.device)
    return (places % ring.shape[2])[:, None].expand_as(ring)
