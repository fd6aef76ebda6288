"""Rows of a pool of states, named by index tensors in which some entries are padding."""

import torch
from torch import Tensor

PAD_SLOT_ID = -1
NULL_BLOCK_ID = 0


def slots(indices: Tensor, null_slot: int = PAD_SLOT_ID) -> Tensor:
    """As ours are: int32, with one number for padding, where mamba_ssm and vLLM have any negative one."""
    return torch.where(indices < 0, null_slot, indices).to(torch.int32)


def write_rows(pool: Tensor, rows: Tensor, values: Tensor) -> None:
    """pool[rows[i]] = values[i] where there is such a row.

    To drop the others would need their number on the host: they repeat the first good write instead, or, where there is
    none, write back what row 0 holds.
    """
    if len(rows) == 0 or len(pool) == 0:
        return
    good = (rows >= 0) & (rows < len(pool))
    source = torch.arange(len(rows), device=rows.device).where(good, good.int().argmax(0, keepdim=True))
    target = rows[source].clamp(0, len(pool) - 1).long()
    pool.index_copy_(0, target, torch.where(good.any(), values[source].to(pool.dtype), pool[target]))
