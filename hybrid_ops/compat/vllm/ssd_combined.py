"""`mamba_chunk_scan_combined_varlen`: the scan over packed sequences, as vLLM has it."""

from typing import Any

import torch
from torch import Tensor

from ...ssd import ssd_chunk_scan
from .._arguments import check_shape
from .._slots import write_rows


@torch.no_grad()
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor,
    cu_chunk_seqlens: Tensor,
    last_chunk_indices: Tensor,
    seq_idx: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
    final_states_out: Tensor | None = None,
    final_state_indices: Tensor | None = None,
) -> Tensor | None:
    """`hybrid_ops.ssd_chunk_scan` for vLLM's function of this name: packed sequences.

    Args:
        x, z: (total, nheads, headdim).
        dt: (total, nheads).
        A: (nheads,), negative.
        B, C: (total, ngroups, dstate).
        D: (nheads,) or (nheads, headdim).
        dt_bias: (nheads,).
        initial_states: (nseq, nheads, headdim, dstate).
        dt_softplus, dt_limit: as in `hybrid_ops.ssd_chunk_scan`.
        cu_seqlens: (nseq + 1,), boundaries of the sequences.
        chunk_size, cu_chunk_seqlens, last_chunk_indices, seq_idx: the chunks that vLLM cuts, (nchunks + 1,), (nseq,),
            (nchunks,); read for return_intermediate_states only. All but the first and the last of a sequence have
            chunk_size tokens, a power of two >= 16.
        out: y is written here, like x.
        return_intermediate_states: return the states after every chunk.
        state_dtype: of the returned states, else C's. States between tokens are float32.
        final_states_out: (nslots, nheads, headdim, dstate), a pool that gets the final states, with
        final_state_indices: (nseq,), the rows where; those outside the pool are skipped.

    Returns:
        The final states (nseq, nheads, headdim, dstate); None where a pool got them; with return_intermediate_states
        those after every chunk, (nchunks, ...).

    Raises:
        ValueError, TypeError: as `hybrid_ops.ssd_chunk_scan`.

    >>> x, dt, B = torch.randn(30, 4, 8), torch.rand(30, 4), torch.randn(30, 1, 16)
    >>> cu_seqlens = torch.tensor([0, 10, 30])
    >>> chunks = (torch.tensor([0, 10, 30]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    >>> A, y = -torch.ones(4), torch.empty_like(x)
    >>> mamba_chunk_scan_combined_varlen(x, dt, A, B, B, 256, cu_seqlens, *chunks, y).shape
    torch.Size([2, 4, 8, 16])
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    if (final_states_out is None) != (final_state_indices is None):
        raise ValueError("final_states_out and final_state_indices must come together, got one of them")
    if final_states_out is not None and final_state_indices is not None:
        check_shape("final_states_out", final_states_out, (len(final_states_out), *x.shape[1:], B.shape[2]))
        check_shape("final_state_indices", final_state_indices, (len(cu_seqlens) - 1,))
    nchunks = len(seq_idx)
    intermediate: dict[str, Any] = {}
    if return_intermediate_states and nchunks:
        first = torch.searchsorted(seq_idx, torch.arange(len(cu_seqlens) - 1, device=x.device).to(seq_idx.dtype))
        partial = cu_chunk_seqlens.diff()[first.clamp(max=nchunks - 1)]
        # so that chunks end at multiples of chunk_size; a sequence of one chunk needs no offset
        offsets = torch.where(first < last_chunk_indices, chunk_size - partial, 0).to(torch.int32)
        intermediate = dict(chunk_size=chunk_size, state_interval=chunk_size, seq_offsets=offsets)
    _, final, *kept = ssd_chunk_scan(
        *(x[None], dt[None], A.to(torch.promote_types(x.dtype, torch.float32)), B[None], C[None]),
        D=D,
        z=None if z is None else z[None],
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_states=initial_states,
        cu_seqlens=cu_seqlens.to(torch.int32),
        return_final_states=True,
        out=out[None],
        **intermediate,
    )
    if final_states_out is not None and final_state_indices is not None:
        write_rows(final_states_out, final_state_indices, final)
    dtype = state_dtype or C.dtype
    if not return_intermediate_states:
        return final.to(dtype) if final_states_out is None else None
    if not nchunks:
        return final.new_empty(0, *final.shape[1:], dtype=dtype)
    # a chunk's state is one that was kept, except that the last of a sequence may end anywhere
    seq = seq_idx.long()
    last = last_chunk_indices[seq] == torch.arange(nchunks, device=x.device)
    whole = ~last | ((offsets + cu_seqlens.diff())[seq] % chunk_size == 0)
    states = kept[0][whole.cumsum(0).sub(1).clamp(min=0)]
    return torch.where(last[:, None, None, None], final[seq], states).to(dtype)
