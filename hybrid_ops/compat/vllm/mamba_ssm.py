"""`selective_state_update` on a pool of states, as vLLM has it."""

from typing import Any

import torch
from torch import Tensor

from .._arguments import check_shape, must_be_none
from .._slots import NULL_BLOCK_ID, slots
from .._state_update import update


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_blackwell: bool = False,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
) -> None:
    """`hybrid_ops.ssd_state_update` for vLLM's function of this name: new tokens of each sequence, states in a pool.

    Args:
        state: (nslots, nheads, headdim, dstate), updated in place.
        x, dt, z: (batch, nheads, headdim), one token each; (total, ...) with cu_seqlens. dt before bias and softplus.
        A: (nheads, headdim, dstate), negative, its last dimension expanded.
        B, C: like x with (ngroups, dstate).
        D, dt_bias: (nheads, headdim) or None.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,) or (batch, W), the slot that a sequence starts from; of W, with
            num_accepted_tokens, that of the last accepted token, otherwise the first. None: sequence i has slot i.
        dst_state_batch_indices: like it, the slot that gets the state after the last token; with num_accepted_tokens
            one for each token. None: the same slots.
        null_block_id: the slot of padding: y = 0, no update. So is any negative one.
        out: y is written here, like x.
        num_accepted_tokens: (batch,), how many of the tokens of the last call were right (speculative decoding).
        cu_seqlens: (batch + 1,), boundaries of packed sequences.
        is_blackwell: of no consequence: the configuration is chosen for the device.
        enable_stochastic_rounding: of a float16 or bfloat16 state, with bits of a seed from torch's generator.
        cache_philox_rounds: of these bits: 0 (the default, 10) or 10.

    Without nheads and ngroups, and with dt, dt_bias or A for each channel, as in `compat.mamba_ssm`.

    Raises:
        ValueError, TypeError: as `hybrid_ops.ssd_state_update`.

    >>> state, x, B, slots = torch.zeros(3, 4, 8, 16), torch.ones(2, 4, 8), torch.ones(2, 1, 16), torch.tensor([2, 1])
    >>> dt, A = torch.ones(2, 4, 1).expand(2, 4, 8), (-torch.ones(4, 1, 1)).expand(4, 8, 16)
    >>> selective_state_update(state, x, dt, A, B, B, None, None, state_batch_indices=slots, out=x)
    >>> x[0, 0, 0]
    tensor(16.)
    """
    if out is None:
        raise ValueError("out must be a tensor like x, got None")
    check_shape("out", out, tuple(x.shape))
    if enable_stochastic_rounding and cache_philox_rounds not in (0, 10):
        raise ValueError(
            f"cache_philox_rounds must be 0 or 10, got {cache_philox_rounds}: "
            "hybrid_ops.ssd_state_update takes its bits from Philox4x32-10"
        )
    options: dict[str, Any] = dict(dt_softplus=dt_softplus, null_slot=null_block_id)
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens.to(torch.int32)
    batch = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    if state_batch_indices is None:
        needing = dict(dst_state_batch_indices=dst_state_batch_indices, num_accepted_tokens=num_accepted_tokens)
        must_be_none("it needs state_batch_indices", **needing)
    else:
        read = slots(_columns(state_batch_indices)[:batch], null_block_id)
        write = read
        if dst_state_batch_indices is not None:
            write = slots(_columns(dst_state_batch_indices)[:batch], null_block_id)
        if num_accepted_tokens is None:
            options |= dict(read_slots=read[:, 0], write_slots=write[:, 0])
        else:
            accepted = num_accepted_tokens.clamp(1, read.shape[1]).to(torch.int32)
            write = write[:, :1] if cu_seqlens is None else write
            options |= dict(read_slots=read, write_slots=write, num_accepted=accepted)
    if enable_stochastic_rounding:
        seed = torch.randint(2**32, (1,), device=state.device)
        options |= dict(rounding="stochastic", seed=seed)
    update(state, x, dt, A, B, C, D, z, dt_bias, out=out, **options)


def _columns(indices: Tensor) -> Tensor:
    return indices if indices.dim() == 2 else indices[:, None]
