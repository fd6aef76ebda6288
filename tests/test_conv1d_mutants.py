"""Wrong versions of causal_conv1d, by name, that the checks must reject."""

import pytest
import torch

from .conv1d_cases import CPU_DTYPES, PLAIN, check_conv1d, implementation

right = implementation("torch")


def history_dropped(*args, initial_states, **options):
    return right(*args, initial_states=torch.zeros_like(initial_states), **options)


def history_newest_first(*args, initial_states, **options):
    return right(*args, initial_states=initial_states.flip(2), **options)


def last_ragged_token_missing(*args, **options):
    y, final = right(*args, **options)
    y[:, -1] = 0
    return y, final


def neighbours_history_after_an_empty_sequence(*args, initial_states, cu_seqlens, **options):
    taken = (cu_seqlens.diff() > 0).cumsum(0).sub(1).clamp(min=0)  # counts the sequences that have tokens
    return right(*args, initial_states=initial_states[taken], cu_seqlens=cu_seqlens, **options)


def boundaries_ignored(x, *args, initial_states, cu_seqlens, **options):
    y, _ = right(x, *args, initial_states=initial_states[:1], **options)
    return y, right(x, *args, initial_states=initial_states, cu_seqlens=cu_seqlens, **options)[1]


def one_channel_zero(*args, **options):
    y, final = right(*args, **options)
    y[..., 3] = 0
    return y, final


def bias_ignored(x, weight, bias, **options):
    return right(x, weight, None, **options)


def activation_ignored(*args, activation, **options):
    return right(*args, **options)


def window_one_token_late(x, weight, bias, **options):
    return right(x, weight.roll(1, 1), bias, **options)


def state_one_token_early(x, weight, bias, **options):
    y, final = right(x, weight, bias, **options)
    return y, final.roll(1, 2)


def padding_takes_places(x, *args, seq_idx, **options):
    gaps = seq_idx.where(seq_idx >= 0, torch.zeros_like(seq_idx))
    y, final = right(x * (seq_idx >= 0)[..., None], *args, seq_idx=gaps, **options)
    return y * (seq_idx >= 0)[..., None], final


def padding_starts_a_sequence(x, *args, seq_idx, **options):
    y, final = right(x, *args, seq_idx=(seq_idx < 0).int().cumsum(1).int(), **options)
    return y * (seq_idx >= 0)[..., None], final


MUTANTS = {
    history_dropped: "dense",
    history_newest_first: "seq_idx",
    last_ragged_token_missing: "cu_seqlens",
    neighbours_history_after_an_empty_sequence: "cu_seqlens",
    boundaries_ignored: "cu_seqlens",
    one_channel_zero: "dense",
    bias_ignored: "dense",
    activation_ignored: "cu_seqlens",
    window_one_token_late: "dense",
    state_one_token_early: "dense",
    padding_takes_places: "seq_idx",
    padding_starts_a_sequence: "seq_idx",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_mutants_are_rejected(mutant, dtype):
    case = PLAIN | dict(form=MUTANTS[mutant], dtype=dtype, state_dtype=dtype)
    check_conv1d(case, right)
    with pytest.raises(AssertionError):
        check_conv1d(case, mutant)
