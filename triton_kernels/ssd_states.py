"""Where the states of an SSD scan come from and go, as its launchers in Triton and in CUDA both need it."""

from torch import Tensor, zeros_like


def sources(
    initial_states: Tensor | None,
    final_states: Tensor | None,
    interval_states: Tensor | None,
    ssm_state: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    interval_slots: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where states are read from, where the last and where the kept ones go: the pool, wherever slots say so."""
    return (
        initial_states if read_slots is None else ssm_state,
        final_states if write_slots is None else ssm_state,
        interval_states if interval_slots is None else ssm_state,
    )


def first_interval(cu_seqlens: Tensor, seq_offsets: Tensor | None, state_interval: int) -> Tensor:
    """(nseq,) int32: the row of `interval_states` at which each packed sequence begins."""
    begin = zeros_like(cu_seqlens[1:]) if seq_offsets is None else seq_offsets
    count = (begin + cu_seqlens.diff()) // state_interval - begin // state_interval
    return (count.cumsum(0) - count).int()
