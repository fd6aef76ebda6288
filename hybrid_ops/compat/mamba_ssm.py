"""What models import from `mamba_ssm.ops.triton`, by its names and signatures (2.3.2; `state_dtype` is younger).

    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined     becomes
    from hybrid_ops.compat.mamba_ssm import mamba_chunk_scan_combined

Differences from the original are listed in docs/compat.md.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv1d import causal_conv1d
from ..norm import gated_rms_norm
from ..ssd import ssd_chunk_scan
from ._arguments import activation_name, int32
from ._gated_norm import RMSNorm, layernorm_fn, rmsnorm_fn
from ._slots import slots
from ._state_update import update

__all__ = [
    "RMSNorm",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_state_update",
]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`hybrid_ops.ssd_chunk_scan` for mamba_ssm's function of this name.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit: as there; A in any floating dtype.
        chunk_size: of no consequence, any positive number: the kernels choose theirs.
        initial_states: (batch, nheads, headdim, dstate), of the first sequence of each row; with cu_seqlens
            (nseq, ...) too, one for each.
        seq_idx: (batch, seqlen), the sequence of each token; negative is padding.
        cu_seqlens: (nseq + 1,), boundaries of sequences packed into one row: they are kept apart. seq_idx, which says
            the same, is not read then.
        return_final_states: also the states after the last token of each row, (batch, nheads, headdim, dstate) float32.
        return_varlen_states: also those after the last token of each sequence, (nseq, ...), with cu_seqlens.
        state_dtype: of the varlen states, else C's. States between tokens are float32.

    Returns:
        y, (y, final_states), (y, varlen_states) or (y, final_states, varlen_states).

    Raises:
        ValueError, TypeError: as `hybrid_ops.ssd_chunk_scan`.

    >>> x, dt, B = torch.randn(1, 30, 4, 8), torch.rand(1, 30, 4), torch.randn(1, 30, 1, 16)
    >>> mamba_chunk_scan_combined(x, dt, -torch.ones(4), B, B, chunk_size=256).shape
    torch.Size([1, 30, 4, 8])
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("cu_seqlens must be given with return_varlen_states, got None")
    if cu_seqlens is not None:
        seq_idx, cu_seqlens = None, cu_seqlens.to(torch.int32)
        nseq = cu_seqlens.shape[0] - 1
        if initial_states is not None and len(initial_states) == 1:
            others = initial_states.new_zeros(max(nseq - 1, 0), *initial_states.shape[1:])
            initial_states = torch.cat([initial_states, others])
    wanted = return_final_states or return_varlen_states
    results = ssd_chunk_scan(
        *(x, dt, _decay(A, x), B, C),
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=int32(seq_idx),
        cu_seqlens=cu_seqlens,
        return_final_states=wanted,
    )
    if not wanted:
        return results
    y, states = results
    varlen_states = (states.to(state_dtype or C.dtype),) if return_varlen_states else ()
    if not return_final_states:
        return y, *varlen_states
    if cu_seqlens is not None:
        # the sequence with the last token: those behind it are empty
        last = torch.searchsorted(cu_seqlens, cu_seqlens[-1:]).sub(1).clamp(min=0)
        states = states.index_select(0, last)
    return y, states, *varlen_states


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer behind its first projection: `causal_conv1d`, `ssd_chunk_scan`, `gated_rms_norm`, a linear layer.

    Args:
        zxbcdt: (batch, seqlen, 2 * dmlp + 2 * dim + 2 * ngroups * dstate + nheads), with dim = nheads * headdim: the
            halves of a gated MLP (dmlp is 0 in most models), z, the input of the convolution (x, B, C), and dt.
        conv1d_weight: (dim + 2 * ngroups * dstate, width).
        conv1d_bias: (dim + 2 * ngroups * dstate,) or None.
        dt_bias: (nheads,) or None. A softplus follows.
        A: (nheads,), negative.
        D: (nheads,), (nheads, headdim) or None.
        chunk_size: of no consequence, any positive number.
        initial_states: (batch, nheads, headdim, dstate).
        seq_idx: (batch, seqlen), the sequence of each token, for convolution and scan.
        dt_limit: bounds of dt after the softplus.
        return_final_states: also the states after the last token, float32.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (dim,), of the norm gated by z, over groups of dim / ngroups; None: z gates y, without a norm.
        rmsnorm_eps: of the norm.
        outproj_weight: (dmodel, dmlp + dim) of a linear layer at the end; None for none.
        outproj_bias: (dmodel,), of that layer.
        headdim: needed unless D is (nheads, headdim).
        ngroups: of B, C and the norm.
        norm_before_gate: norm(y) * silu(z), else norm(y * silu(z)).
        state_dtype: of no consequence: states between tokens are float32.

    Returns:
        (batch, seqlen, dmlp + dim or dmodel), the MLP's part first; with the final states behind it where asked for.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> zxbcdt, weight = torch.randn(1, 30, 2 * 32 + 2 * 16 + 4), torch.randn(32 + 2 * 16, 4)
    >>> A, D = -torch.ones(4), torch.ones(4)
    >>> mamba_split_conv1d_scan_combined(zxbcdt, weight, None, None, A, D, chunk_size=256, headdim=8).shape
    torch.Size([1, 30, 32])
    """
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise ValueError(f"state_dtype must be a floating dtype or None, got {state_dtype}")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias must be None without outproj_weight, got a tensor")
    nheads = A.shape[0]
    if D is not None and D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim must be given unless D has shape (nheads, headdim), got None")
    dim, conv_dim = nheads * headdim, conv1d_weight.shape[0]
    dmlp, odd = divmod(zxbcdt.shape[-1] - dim - conv_dim - nheads, 2)
    if dmlp < 0 or odd or conv_dim < dim or (conv_dim - dim) % (2 * ngroups):
        raise ValueError(
            f"zxbcdt must have 2 * dmlp + 2 * dim + 2 * ngroups * dstate + nheads features and conv1d_weight dim + 2 * "
            f"ngroups * dstate, for {dim=}, {nheads=} and {ngroups=}, got {zxbcdt.shape[-1]} and {conv_dim}"
        )
    mlp, z, xBC, dt = zxbcdt.split([2 * dmlp, dim, conv_dim, nheads], dim=-1)
    conv = activation_name(activation)
    xBC = cast(Tensor, causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation=conv, seq_idx=int32(seq_idx)))
    x, B, C = xBC.split([dim, *[(conv_dim - dim) // 2] * 2], dim=-1)
    y, states = mamba_chunk_scan_combined(
        *(x.unflatten(-1, (nheads, headdim)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_rms_norm(
            y, z, rmsnorm_weight, eps=rmsnorm_eps, group_size=dim // ngroups, norm_before_gate=norm_before_gate
        )
    if dmlp:
        gate, up = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * up, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`hybrid_ops.ssd_state_update` for mamba_ssm's function of this name: one token of each sequence, state in place.

    Args:
        state: (batch, nheads, headdim, dstate), or more rows with state_batch_indices; updated in place.
        x, dt, z: (batch, nheads, headdim); dt before bias and softplus.
        A: (nheads, headdim, dstate), negative, its last dimension expanded.
        B, C: (batch, ngroups, dstate).
        D, dt_bias: (nheads, headdim) or None.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,), the row of state that each sequence has; negative is padding: y = 0, no update.

    Everything without nheads and ngroups too, as in Mamba-1. What a head has for all its channels is expanded (stride
    0), as Mamba-2 does; a dt, dt_bias or A for each channel is honoured, but not a fast path.

    Returns:
        y, x's shape and dtype. No gradients, as in the original.

    Raises:
        ValueError, TypeError: A that differs along dstate, or as `hybrid_ops.ssd_state_update`.

    >>> state, x, B = torch.zeros(2, 4, 8, 16), torch.ones(2, 4, 8), torch.ones(2, 1, 16)
    >>> dt, A = torch.ones(2, 4, 1).expand(2, 4, 8), (-torch.ones(4, 1, 1)).expand(4, 8, 16)
    >>> selective_state_update(state, x, dt, A, B, B)[0, 0, 0]
    tensor(16.)
    """
    rows = None if state_batch_indices is None else slots(state_batch_indices)
    return update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, read_slots=rows)


def _decay(A: Tensor, x: Tensor) -> Tensor:
    """A in the dtype of the arithmetic, the only one that `ssd_chunk_scan` takes."""
    return A.to(torch.promote_types(x.dtype, torch.float32))
