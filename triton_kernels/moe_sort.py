"""The sort of a router's choices by expert, then token: a counting sort in which no order of execution matters.

The choices are cut into blocks of a few tokens. Each block counts its choices of each expert; running sums of the
counts over the blocks say where a block's first row of an expert is; and within a block a choice comes after the equal
ones before it. Few choices are one block and one launch.

Letters: N choices of a block, E experts, B blocks.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, on_device

MAX_ROWS = 512  # choices of a block: each is compared with all


@functools.cache
def block_tokens(tokens: int, topk: int, num_experts: int) -> int:
    """Tokens of a block: a few hundred blocks, of at most MAX_ROWS choices, and 4096 scores where a router chooses."""
    most = min(MAX_ROWS // topk, max(1, 4096 // max(16, next_power_of_2(num_experts))))
    block = max(4, next_power_of_2(cdiv(tokens, 256)))
    while block > most:
        block //= 2
    return block


# what changes from call to call is not specialised: one kernel for all
@triton.jit(do_not_specialize=["num_rows", "first_expert"])
def count_kernel(
    ids_ptr,
    counts_ptr,
    num_rows,
    first_expert,
    num_experts,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """counts (blocks, E): how often each block chose each expert."""
    block = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    mask = (n < ROWS) & (block * ROWS + n < num_rows)
    expert = tl.load(ids_ptr + block * ROWS + n, mask, other=-1) - first_expert
    local = mask & (expert >= 0) & (expert < num_experts)
    e = tl.arange(0, BLOCK_E)
    counts = tl.histogram(tl.where(local, expert, 0), BLOCK_E, mask=local)
    tl.store(counts_ptr + block * num_experts + e, counts, e < num_experts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts_ptr, total_ptr, blocks, num_experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts (blocks, E) become the sums over the blocks before; total (E,) over all."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]  # [1, E]
    before = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)[:, None].to(tl.int64)  # [B, 1]
        mask = (b < blocks) & (e < num_experts)
        counts = tl.load(counts_ptr + b * num_experts + e, mask, other=0)
        tl.store(counts_ptr + b * num_experts + e, before[None, :] + tl.cumsum(counts, 0) - counts, mask)
        before += tl.sum(counts, 0)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(total_ptr + e, before, e < num_experts)


@triton.jit(do_not_specialize=["num_rows", "first_expert"])
def scatter_kernel(
    ids_ptr,
    weights_ptr,
    before_ptr,
    counts_ptr,
    offs_ptr,
    token_index_ptr,
    sorted_weights_ptr,
    row_index_ptr,
    num_rows,
    topk,
    first_expert,
    num_experts,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The rows of one block's choices. The first block writes offs, and the only one counts too."""
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    n = block * ROWS + i
    mask = (i < ROWS) & (n < num_rows)
    expert = tl.load(ids_ptr + n, mask, other=-1) - first_expert
    local = mask & (expert >= 0) & (expert < num_experts)
    place = tl.where(local, expert, 0)

    e = tl.arange(0, BLOCK_E)
    if ONE_BLOCK:
        counts = tl.histogram(place, BLOCK_E, mask=local)
        tl.store(counts_ptr + e, counts, e < num_experts)
    else:
        counts = tl.load(counts_ptr + e, e < num_experts, other=0)
    ends = tl.cumsum(counts, 0)
    if block == 0:
        tl.store(offs_ptr + e, ends, e < num_experts)

    row = tl.gather(ends - counts, place, 0)
    if not ONE_BLOCK:
        row += tl.load(before_ptr + block * num_experts + place, local, other=0)
    for first in range(0, ROWS, BLOCK_M):  # equal choices before this one, in the block
        m = first + tl.arange(0, BLOCK_M)
        other = tl.load(ids_ptr + block * ROWS + m, (m < ROWS) & (block * ROWS + m < num_rows), other=-1)
        equal = (other[None, :] - first_expert == expert[:, None]) & (m[None, :] < i[:, None])
        row += tl.sum(equal.to(tl.int32), 1)

    tl.store(row_index_ptr + n, tl.where(local, row, -1), mask)
    tl.store(token_index_ptr + row, (n // topk).to(tl.int32), local)
    tl.store(sorted_weights_ptr + row, tl.load(weights_ptr + n, mask, other=0.0), local)
    behind = mask & (n >= tl.sum(counts, 0))  # rows that no choice here has
    tl.store(token_index_ptr + n, tl.zeros([BLOCK_N], tl.int32), behind)
    tl.store(sorted_weights_ptr + n, tl.zeros([BLOCK_N], sorted_weights_ptr.dtype.element_ty), behind)


def sort(
    ids: Tensor,
    weights: Tensor,
    first_expert: int,
    counts: Tensor,
    offs: Tensor,
    token_index: Tensor,
    sorted_weights: Tensor,
    row_index: Tensor,
    block_counts: Tensor | None = None,
) -> None:
    """Fill counts to row_index for as many experts as counts has, from `first_expert` on.

    `block_counts` (blocks, E) of blocks of `block_tokens` tokens, where the router has them already; overwritten.
    """
    num_rows, topk, num_experts = ids.numel(), ids.shape[1], len(counts)
    if num_rows == 0:
        counts.zero_()
        offs.zero_()
        return
    ids, weights = ids.contiguous(), weights.contiguous()
    one_block = num_rows <= MAX_ROWS
    per_block = topk * block_tokens(len(ids), topk, num_experts)
    if one_block:
        per_block = max(16, next_power_of_2(num_rows))
    blocks = cdiv(num_rows, per_block)
    block_n, block_e = (max(16, next_power_of_2(size)) for size in (per_block, num_experts))
    sizes = dict(ROWS=per_block, BLOCK_N=block_n, BLOCK_E=block_e)
    with on_device(ids):
        if not one_block:
            if block_counts is None:
                block_counts = ids.new_empty(blocks, num_experts)
                launch(count_kernel, blocks, (ids, block_counts), (num_rows, first_expert, num_experts), **sizes)
            tensors = (block_counts, counts)
            launch(scan_kernel, cdiv(num_experts, 16), tensors, (blocks, num_experts), BLOCK_B=128, BLOCK_E=16)
        launch(
            scatter_kernel,
            blocks,
            (ids, weights, block_counts, counts, offs, token_index, sorted_weights, row_index),
            (num_rows, topk, first_expert, num_experts),
            **sizes,
            ONE_BLOCK=one_block,
            BLOCK_M=16,
            num_warps=8 if block_n > 256 else 4,
        )
