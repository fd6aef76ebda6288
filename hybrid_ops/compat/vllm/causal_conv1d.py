"""`causal_conv1d_fn` and `causal_conv1d_update` on packed sequences and a pool of windows, as vLLM has them."""

from typing import Any

import torch
from torch import Tensor

from ... import conv1d, conv1d_update
from .._arguments import activation_name, must_be_none
from .._slots import NULL_BLOCK_ID, PAD_SLOT_ID, slots, write_rows


@torch.no_grad()
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    null_block_id: int = NULL_BLOCK_ID,
    block_idx_first_scheduled_token: Tensor | None = None,
    block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
    block_size_to_align: int = 0,
    metadata: Any = None,
    validate_data: bool = False,
) -> Tensor:
    """`hybrid_ops.causal_conv1d` for vLLM's function of this name: packed sequences, their windows in a pool.

    Args:
        x: (dim, total), any strides; a transposed (total, dim) is read fastest.
        weight: (dim, width), width 1 to 8.
        bias: (dim,) or None.
        conv_states: (nslots, dim, at least width - 1), updated in place; the first width - 1 columns are the window,
            newest last.
        query_start_loc: (nseq + 1,), boundaries of the sequences.
        cache_indices: (nseq,), the slot of each; None: sequence i has slot i.
        has_initial_state: (nseq,) bool, whether a sequence goes on from its slot, or starts from zeros; None: zeros.
        activation: None, "silu", "swish" or a bool.
        pad_slot_id, null_block_id: slots of padding: read as zeros, not written. So is any negative one.
        block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, num_computed_tokens,
        block_size_to_align: of prefix caching, which is not supported: None and 0.
        metadata, validate_data: of no consequence: no launch plan is needed, arguments are always checked.

    Returns:
        y, like x.

    Raises:
        ValueError, TypeError: as `hybrid_ops.causal_conv1d`.

    >>> conv_states, query_start_loc = torch.zeros(3, 8, 3), torch.tensor([0, 2, 5])
    >>> x, weight, slots = torch.ones(8, 5), torch.ones(8, 4), torch.tensor([2, 1])
    >>> y = causal_conv1d_fn(x, weight, None, conv_states, query_start_loc, cache_indices=slots)
    >>> conv_states[2, 0]
    tensor([0., 1., 1.])
    """
    must_be_none(
        "hybrid_ops.causal_conv1d has read_slots and write_slots, for one window before and one behind the tokens",
        block_idx_first_scheduled_token=block_idx_first_scheduled_token,
        block_idx_last_scheduled_token=block_idx_last_scheduled_token,
        initial_state_idx=initial_state_idx,
        num_computed_tokens=num_computed_tokens,
        block_size_to_align=block_size_to_align or None,
    )
    if cache_indices is None:
        rows = torch.arange(len(query_start_loc) - 1, dtype=torch.int32, device=x.device)
    else:
        rows = slots(_first_column(cache_indices), PAD_SLOT_ID)
        rows = torch.where((rows == pad_slot_id) | (rows == null_block_id), PAD_SLOT_ID, rows)
    y = conv1d.causal_conv1d(
        x.T[None],
        weight,
        bias,
        activation=activation_name(activation),
        cu_seqlens=query_start_loc.to(torch.int32),
        conv_state=conv_states[..., : weight.shape[1] - 1],
        read_slots=None if has_initial_state is None else torch.where(has_initial_state, rows, PAD_SLOT_ID),
        write_slots=rows,
        null_slot=PAD_SLOT_ID,
    )
    return y[0].T


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    max_query_len: int = -1,
    null_block_id: int = NULL_BLOCK_ID,
    block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
    validate_data: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`hybrid_ops.causal_conv1d_update` for vLLM's function of this name: new tokens, their windows in a pool.

    Args:
        x: (batch, dim), one token each; (batch, dim, T); or (total, dim), packed, with query_start_loc.
        conv_state: (nslots, dim, at least width - 1), updated in place. Its first width - 1 columns are the window,
            newest last; with num_accepted_tokens its first width - 2 are, and the drafts of the last call behind them.
        weight: (dim, width), width 2 to 8.
        bias: (dim,) or None.
        activation: None, "silu", "swish" or a bool.
        conv_state_indices: (batch,), the slot of each sequence; None: sequence i has slot i.
        num_accepted_tokens: (batch,), how many of the tokens of the last call were right (speculative decoding).
        query_start_loc: (batch + 1,), boundaries of packed sequences.
        max_query_len: the most tokens of a sequence, with query_start_loc.
        null_block_id: the slot of padding: y = 0, no update. So is any negative one.
        block_idx_last_scheduled_token, initial_state_idx: of prefix caching, which is not supported: None.
        validate_data: of no consequence: arguments are always checked.
        out: y is written here; None: it overwrites x.

    Returns:
        out, or x.

    Raises:
        ValueError, TypeError: as `hybrid_ops.causal_conv1d_update`.

    >>> conv_state, slots = torch.zeros(3, 8, 3), torch.tensor([2, 1])
    >>> y = causal_conv1d_update(torch.ones(2, 8), conv_state, torch.ones(8, 4), conv_state_indices=slots)
    >>> conv_state[2, 0]
    tensor([0., 0., 1.])
    """
    must_be_none(
        "hybrid_ops.causal_conv1d has read_slots and write_slots, for one window before and one behind the tokens",
        block_idx_last_scheduled_token=block_idx_last_scheduled_token,
        initial_state_idx=initial_state_idx,
    )
    width, columns = weight.shape[1], conv_state.shape[2]
    batched = query_start_loc is None and x.dim() == 3
    longest = 1 if query_start_loc is None else max(max_query_len, 1)
    steps = x.shape[2] if batched else longest
    room = columns - (width - 2)  # for drafts
    rollback = None
    lengths = torch.full((), steps, device=x.device) if query_start_loc is None else query_start_loc.diff()
    if num_accepted_tokens is None:
        window = conv_state[..., : width - 1]
    else:
        if steps > room:
            needed = f"{width - 2} + {steps} columns with num_accepted_tokens"
            raise ValueError(f"conv_state must have {needed}, got {tuple(conv_state.shape)}")
        window = conv_state
        rollback = (room - num_accepted_tokens.clamp(1, room)).where(lengths > 0, 0).to(torch.int32)
    rows = None if conv_state_indices is None else slots(_first_column(conv_state_indices), null_block_id)
    out = x if out is None else out
    conv1d_update.causal_conv1d_update(
        x.transpose(1, 2) if batched else x,
        window,
        weight,
        bias,
        activation=activation_name(activation),
        slots=rows,
        rollback=rollback,
        cu_seqlens=None if query_start_loc is None else query_start_loc.to(torch.int32),
        null_slot=null_block_id,
        out=out.transpose(1, 2) if batched else out,
    )
    if rollback is not None and (query_start_loc is not None or steps < room):
        _align_left(conv_state, rows, null_block_id, (room - lengths).where(lengths > 0, 0).expand(len(rollback)))
    return out


def _first_column(indices: Tensor) -> Tensor:
    """Of a table of blocks only the first is read without prefix caching."""
    return indices if indices.dim() == 1 else indices[:, 0]


def _align_left(conv_state: Tensor, rows: Tensor | None, null_slot: int, shift: Tensor) -> None:
    """Move columns of slots to the left. hybrid_ops has the newest in the last column, vLLM the oldest in the first."""
    nslots, dim, columns = conv_state.shape
    each = torch.arange(len(shift), device=shift.device)
    rows = each if rows is None else torch.where(rows == null_slot, -1, rows)
    places = (torch.arange(columns, device=shift.device) + shift[:, None]).clamp(max=columns - 1)
    moved = conv_state[rows.clamp(0, nslots - 1)].gather(2, places[:, None].expand(-1, dim, -1))
    write_rows(conv_state, rows, moved)
