"""The router: logits, then the choice of experts with their weights; the sort of the choices is in `moe_sort`.

A token's bits depend on no other token. So hidden is cut into chunks at the same places however many tokens there are:
with many tokens a program adds its chunks up itself, with few each chunk has a program of its own and the next kernel
adds them up, in the same order. For the same reason every tile multiplies at least 64 rows (fewer would be other
instructions), and a sum over a token's experts or choices has one order, or none that matters.

Letters: T tokens, E experts and K of hidden in a program. All arithmetic is float32.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, next_power_of_2, on_device, plan, rows, traits
from .moe_sort import MAX_ROWS, block_tokens, sort

LEAST: tl.constexpr = tl.constexpr(-(2**31))  # below the order of every number and of NaN


class LogitsConfig(NamedTuple):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_K: int
    CHUNK: int  # of hidden, the same for all numbers of tokens
    SPLITS: int  # programs that share a tile, a chunk each; 1: one program takes all
    num_warps: int
    num_stages: int


class ChoiceConfig(NamedTuple):
    BLOCK_T: int
    BLOCK_E: int
    COUNT: bool  # whether the sort takes more than one block, and so needs each block's counts
    num_warps: int


@functools.cache
def logits_config(tokens: int, hidden: int, num_experts: int, half: bool) -> LogitsConfig:
    """Large tiles where they fill the machine. `half`: both operands are the same 16-bit type.

    Other operands are three TF32 products, whose terms pass through registers: one stage, for the loop to wait for
    each product before it overwrites them.
    """
    chunk = 512
    block_e = min(128 if half else 64, max(16, next_power_of_2(num_experts)))
    large = half and cdiv(tokens, 128) * cdiv(num_experts, block_e) >= 128
    block_t = 128 if large else 64
    few = cdiv(tokens, block_t) * cdiv(num_experts, block_e) <= 32
    if few:
        block_e = min(block_e, 32)
    splits = max(1, cdiv(hidden, chunk)) if few else 1
    warps = 8 if large else 4
    return LogitsConfig(block_t, block_e, 64 if half else 32, chunk, splits, warps, 3 if half else 1)


@functools.cache
def choice_config(tokens: int, num_experts: int, topk: int) -> ChoiceConfig:
    """Where choices are counted, the tokens of a program are those of a block of the sort; else it has one token.

    16 scores a thread. Up to 128 experts (512 where nothing is counted) a warp has whole tokens, and finds the largest
    without waiting for others.
    """
    count = tokens * topk > MAX_ROWS
    block_t = block_tokens(tokens, topk, num_experts) if count else 1
    block_e = max(16, next_power_of_2(num_experts))
    return ChoiceConfig(block_t, block_e, count, num_warps=min(8, max(1, block_t * block_e // 512)))


# the number of tokens changes from call to call and is not specialised: one kernel for all
@triton.jit(do_not_specialize=["tokens"])
def logits_kernel(
    x_ptr,
    weight_ptr,
    partial_ptr,
    tokens,
    hidden,
    num_experts,
    x_stride,
    weight_stride,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partial (splits, T, E), or logits (T, E): x @ weight^T over one chunk of hidden, or over all of them."""
    tiles = tl.cdiv(num_experts, BLOCK_E)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    e = (tl.program_id(0) % tiles) * BLOCK_E + tl.arange(0, BLOCK_E)  # [E]
    k = tl.arange(0, BLOCK_K)
    # rows behind the last are read as the last, so that loads need no mask
    x_ptr += tl.minimum(t, tokens - 1)[:, None] * x_stride + k[None, :]  # [T, K]
    weight_ptr += tl.minimum(e, num_experts - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]  # [K, E]

    begin, end = 0, hidden
    if SPLIT:
        begin = tl.program_id(1) * CHUNK
        end = tl.minimum(begin + CHUNK, hidden)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for chunk in range(begin, end, CHUNK):
        partial = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for step in range(chunk, tl.minimum(chunk + CHUNK, end), BLOCK_K):
            if EVEN:
                x, weight = tl.load(x_ptr + step), tl.load(weight_ptr + step)
            else:
                x = tl.load(x_ptr + step, step + k[None, :] < hidden, other=0.0)
                weight = tl.load(weight_ptr + step, step + k[:, None] < hidden, other=0.0)
            if x.dtype != weight.dtype:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            partial = tl.dot(x, weight, partial, input_precision="tf32x3")
        total += partial
    partial_ptr += (tl.program_id(1) * tokens.to(tl.int64) + t)[:, None] * num_experts + e[None, :]
    tl.store(partial_ptr, total, (t[:, None] < tokens) & (e[None, :] < num_experts))


@triton.jit
def _exp(x):
    """exp of x <= 0 to about an ulp: exp2 of the hardware is exact for integers, but x * log2(e) is not.

    exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where the terms left out of exp(r) are below r^8 / 8! < 2^-27.
    """
    x = tl.where(x < -150.0, -150.0, x)  # 0 all the same, and no inf - inf; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469057e-4  # ln(2) in two parts: the first product is exact
    p = r * (1.0 / 5040) + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    return (p * r + 1.0) * tl.exp2(n)


@triton.jit
def _sum_in_any_order(values):
    """[rows]: sums of numbers from 0 to 1, the same bits however threads share them: integers, in units of 2^-44.

    What is cut off is below 2^-34 of the sum of up to 1024 numbers of which one is 1. NaN stays NaN.
    """
    nan = values != values
    units = (tl.where(nan, 0.0, values) * 17592186044416.0).to(tl.int64)
    total = tl.sum(units, 1).to(tl.float32) * 5.684341886080802e-14
    return tl.where(tl.max(nan.to(tl.int32), 1) > 0, float("nan"), total)


@triton.jit
def _order(values):
    """Integers in the order of the floats: NaN below every number, above LEAST; -0 equals 0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, -2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _load_logits(partial_ptr, t, e, mask, tokens, partial_stride, SPLITS: tl.constexpr):
    """logits[t, e], from as many partial sums."""
    logits = tl.load(partial_ptr + t * partial_stride + e, mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        row = split * tokens.to(tl.int64) + t
        logits += tl.load(partial_ptr + row * partial_stride + e, mask, other=0.0)
    return logits


@triton.jit
def _scores(logits, largest, total, SOFTMAX: tl.constexpr):
    """softmax of the row with this largest logit and this sum of exp(logits - largest), or sigmoid."""
    if SOFTMAX:
        return tl.div_rn(_exp(logits - largest), total)
    small = _exp(-tl.abs(logits))
    return tl.div_rn(tl.where(logits >= 0.0, 1.0, small), 1.0 + small)


@triton.jit
def _in_chosen_groups(
    sel,
    e,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """[T, E]: whether the expert's group is one of the TOPK_GROUPS whose two largest sum highest."""
    group_of, g = e // GROUP_SIZE, tl.arange(0, BLOCK_G)[None, :]
    numbers = tl.where(sel != sel, float("-inf"), sel)
    sums = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    for group in range(NUM_GROUPS):
        members = tl.where(group_of == group, numbers, float("-inf"))
        best = tl.max(members, 1)
        if GROUP_SIZE > 1:
            at = tl.min(tl.where((group_of == group) & (members == best[:, None]), e, BLOCK_E), 1)
            best += tl.max(tl.where(e == at[:, None], float("-inf"), members), 1)
        sums = tl.where(g == group, best[:, None], sums)
    order = tl.where(g < NUM_GROUPS, _order(sums), LEAST)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for _ in range(TOPK_GROUPS):
        largest = tl.max(order, 1)[:, None]
        place = tl.min(tl.where(order == largest, g, BLOCK_G), 1)[:, None]
        order = tl.where(g == place, LEAST, order)
        chosen = chosen | (group_of == place)
    return chosen


@triton.jit(do_not_specialize=["tokens"])
def choice_kernel(
    partial_ptr,
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    tokens,
    num_experts,
    partial_stride,
    bias_stride,
    scaling_factor,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOPK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """weights, ids (T, TOPK); counts (blocks, E) with COUNT; logits with SPLITS > 1, from as many partial sums."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    e = tl.arange(0, BLOCK_E)[None, :]  # [1, E]
    mask = (t < tokens) & (e < num_experts)

    logits = _load_logits(partial_ptr, t, e, mask, tokens, partial_stride, SPLITS)
    if SPLITS > 1:
        tl.store(logits_ptr + t * num_experts + e, logits, mask)

    largest, total = 0.0, 1.0
    if SOFTMAX:
        largest = tl.max(tl.where(e < num_experts, logits, float("-inf")), 1)[:, None]
        total = _sum_in_any_order(tl.where(e < num_experts, _exp(logits - largest), 0.0))[:, None]
    sel = _scores(logits, largest, total, SOFTMAX)
    if HAS_BIAS:
        sel += tl.load(bias_ptr + e * bias_stride, e < num_experts, other=0.0).to(tl.float32)
    candidate = e < num_experts
    if TOPK_GROUPS < NUM_GROUPS:
        candidate &= _in_chosen_groups(sel, e, NUM_GROUPS, TOPK_GROUPS, GROUP_SIZE, BLOCK_T, BLOCK_E, BLOCK_G)
    order = tl.where(candidate, _order(sel), LEAST)

    j = tl.arange(0, BLOCK_J)[None, :]  # [1, J]
    ids = tl.zeros([BLOCK_T, BLOCK_J], tl.int32)
    for place in range(TOPK):
        best = tl.max(order, 1)[:, None]
        expert = tl.min(tl.where(order == best, e, BLOCK_E), 1)[:, None]  # of equals the lower
        order = tl.where(e == expert, LEAST, order)
        ids = tl.where(j == place, expert, ids)

    kept = (t < tokens) & (j < TOPK)
    weights = _scores(_load_logits(partial_ptr, t, ids, kept, tokens, partial_stride, SPLITS), largest, total, SOFTMAX)
    weights = tl.where(kept & (weights == weights), weights, 0.0)
    if RENORMALIZE:
        chosen = tl.zeros([BLOCK_T], tl.float64)  # in float32, 32 equal weights end 3 ulp off
        for place in range(TOPK):  # in this order however threads share the weights
            chosen += tl.sum(tl.where(j == place, weights, 0.0), 1).to(tl.float64)
        weights = tl.div_rn(weights, (chosen[:, None] + 1e-20).to(tl.float32))
    weights *= scaling_factor
    tl.store(ids_ptr + t * TOPK + j, ids, kept)
    tl.store(weights_ptr + t * TOPK + j, weights, kept)
    if COUNT:
        e = tl.arange(0, BLOCK_E)
        taken = candidate & (order == LEAST) & (t < tokens)
        counts = tl.sum(taken.to(tl.int32), 0)
        tl.store(counts_ptr + block * num_experts + e, counts, e < num_experts)


def moe_router_fwd(
    x: Tensor,
    weight: Tensor | None,
    correction_bias: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    score: str,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scaling_factor: float,
    counts: Tensor,
    offs: Tensor,
    token_index: Tensor,
    sorted_weights: Tensor,
    row_index: Tensor,
) -> None:
    """Fill everything from `logits` to row_index; without a weight x are the logits."""
    tokens, num_experts = ids.shape[0], len(counts)
    if tokens == 0:
        counts.zero_()
        offs.zero_()
        return
    x, weight = rows(x), None if weight is None else rows(weight)
    tensors = (x, weight, correction_bias, logits, weights, ids)
    options = (num_experts, score, num_groups, topk_groups, renormalize, scaling_factor)
    p = plan(("moe_router", options, traits(*tensors)), lambda: make_plan(*tensors, *options), x.device)
    partial = x if weight is None else logits
    if p.partial_shape is not None:
        partial = logits.new_empty(p.partial_shape)
    block_counts = None if p.block_counts_shape is None else ids.new_empty(p.block_counts_shape)
    with on_device(x):
        if p.logits is not None:
            p.logits(x, weight, partial)
        p.choice(partial, logits, correction_bias, weights, ids, block_counts)
    sort(ids, weights, 0, counts, offs, token_index, sorted_weights, row_index, block_counts)


class RouterPlan(NamedTuple):
    logits: Launch | None  # x are the logits
    partial_shape: tuple[int, ...] | None  # no partial sums: the first launch makes the logits
    choice: Launch
    block_counts_shape: tuple[int, ...] | None  # the sort takes one block


def make_plan(
    x: Tensor,
    weight: Tensor | None,
    correction_bias: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    num_experts: int,
    score: str,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scaling_factor: float,
) -> RouterPlan:
    tokens, topk = ids.shape
    block_t, block_e, count, num_warps = choice_config(tokens, num_experts, topk)
    blocks = cdiv(tokens, block_t)
    first, splits = (None, 1) if weight is None else logits_launch(x, weight, tokens, num_experts)
    choice = Launch(
        choice_kernel,
        blocks,
        (
            tokens,
            num_experts,
            x.stride(0) if weight is None else num_experts,
            0 if correction_bias is None else correction_bias.stride(0),
            scaling_factor,
        ),
        SPLITS=splits,
        HAS_BIAS=correction_bias is not None,
        SOFTMAX=score == "softmax",
        NUM_GROUPS=num_groups,
        TOPK_GROUPS=topk_groups,
        GROUP_SIZE=num_experts // num_groups,
        RENORMALIZE=renormalize,
        TOPK=topk,
        COUNT=count,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_G=next_power_of_2(num_groups),
        BLOCK_J=next_power_of_2(topk),
        num_warps=num_warps,
    )
    partial_shape = None if splits == 1 else (splits, tokens, num_experts)
    return RouterPlan(first, partial_shape, choice, (blocks, num_experts) if count else None)


def logits_launch(x: Tensor, weight: Tensor, tokens: int, num_experts: int) -> tuple[Launch, int]:
    """The launch that fills the logits, or partial sums of them (splits, T, E), and how many."""
    hidden = x.shape[1]  # where it is 0, `rows` have no other sizes
    cfg = logits_config(tokens, hidden, num_experts, x.dtype == weight.dtype != torch.float32)
    launch = Launch(
        logits_kernel,
        (cdiv(tokens, cfg.BLOCK_T) * cdiv(num_experts, cfg.BLOCK_E), cfg.SPLITS),
        (tokens, hidden, num_experts, x.stride(0), weight.stride(0)),
        SPLIT=cfg.SPLITS > 1,
        EVEN=hidden % cfg.BLOCK_K == 0,
        BLOCK_T=cfg.BLOCK_T,
        BLOCK_E=cfg.BLOCK_E,
        BLOCK_K=cfg.BLOCK_K,
        CHUNK=cfg.CHUNK,
        num_warps=cfg.num_warps,
        num_stages=cfg.num_stages,
    )
    return launch, cfg.SPLITS
