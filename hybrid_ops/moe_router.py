"""`moe_router`: which experts each token goes to, with which weight, and the order of rows that the experts work in;
`moe_sort`: that order alone, for a choice made elsewhere."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import moe_router as _torch_moe_router
from ._torch.norm import compute_dtype

MAX_TOPK = 32
MAX_EXPERTS = 1024
SCORES = ("sigmoid", "softmax")


class MoERouting(NamedTuple):
    """The experts of each token, and the rows of their work: one for each choice, sorted by expert, then by token.

    With T tokens, k choices and E experts (those of `expert_range`); rows from offs[-1] on belong to no expert here.
    """

    weights: Tensor  # (T, k) float32
    ids: Tensor  # (T, k) int32, experts
    logits: Tensor | None  # (T, E) float32; None from `moe_sort`
    counts: Tensor  # (E,) int32, rows of each expert
    offs: Tensor  # (E,) int32, where each expert's rows end
    token_index: Tensor  # (T * k,) int32, the token of each row
    sorted_weights: Tensor  # (T * k,), the weight of each row
    row_index: Tensor  # (T, k) int32, the row of each choice; -1 where its expert is not here


def moe_router(
    x: Tensor,
    weight: Tensor | None,
    topk: int,
    *,
    correction_bias: Tensor | None = None,
    score: str = "sigmoid",
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    impl: str = "auto",
) -> MoERouting:
    """Choose `topk` experts for each token and sort the choices by expert.

    ``s = sigmoid(x @ weight^T)`` (or softmax over the experts); the choice is the `topk` largest of
    ``s + correction_bias``, and ``weights = s[ids] / (sum(s[ids]) + 1e-20) * scaling_factor``: the bias decides who is
    chosen, never the weight.

    Args:
        x: (T, d), any strides; or, with weight None, the logits (T, E), float32.
        weight: (E, d), E at most 1024, of any dtype; None: x are the logits.
        topk: how many experts each token goes to, at most 32.
        correction_bias: (E,), added to the scores for the choice alone. It has no gradient.
        score: "sigmoid" or "softmax".
        num_groups: E / num_groups neighbouring experts are a group.
        topk_groups: experts are chosen from so many groups, those whose two largest biased scores sum highest.
        renormalize: divide the weights of a token by their sum.
        scaling_factor: multiplies the weights last.
        impl: "auto", "triton" or "torch".

    Returns:
        MoERouting. Ties go to the lower expert (or group). A NaN is chosen after every number and has weight 0, so
        ids are distinct and in range whatever comes in. Nothing is read on the host.

    x float32, bfloat16, float16. Products of 16-bit tensors are exact; with a float32 tensor among the two they are
    float32's, in the Triton kernel three TF32 products each. Sums, scores and weights are float32; all is float64 for
    float64 x, on the CPU. In the Triton kernels a token's results depend on no other token, to the bit. Differentiable
    in x and weight, through weights, sorted_weights and logits; the choice is a constant.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that is not the one expected.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2.

    >>> routing = hybrid_ops.moe_router(torch.tensor([[0.0, 2.0, 1.0]]), None, 2, score="softmax")
    >>> routing.ids, routing.offs
    (tensor([[1, 2]], dtype=torch.int32), tensor([0, 1, 2], dtype=torch.int32))
    """
    _device.check_impl(impl)
    num_experts = _check_logits(x, weight)
    _check_integer("topk", topk, 1, min(MAX_TOPK, num_experts))
    _check_rows(x.shape[0], topk)
    if correction_bias is not None:
        _checks.tensor("correction_bias", correction_bias, (num_experts,), device=x.device)
    _checks.one_of("score", score, SCORES)
    _check_groups(num_experts, topk, num_groups, topk_groups)
    options = _Options(score, num_groups, topk_groups, bool(renormalize), float(scaling_factor), impl)
    if _checks.needs_grad(x, weight):
        results = _MoERouter.apply(x, weight, correction_bias, topk, options)
    else:
        results = _moe_router(x, weight, correction_bias, topk, options)
    weights, ids, logits, *permutation = results
    return MoERouting(weights, ids, x if weight is None else logits, *permutation)


def moe_sort(
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    *,
    expert_range: tuple[int, int] | None = None,
    impl: str = "auto",
) -> MoERouting:
    """Sort the choices of a router by expert, then by token.

    Args:
        ids: (T, k) int32, each in [0, num_experts), k from 1 to 32. On a GPU, where values are not read, any other id
            is an expert that is not here.
        weights: (T, k) float32 (float64 on the CPU).
        num_experts: how many experts there are, at most 1024.
        expert_range: (begin, end), the experts that are here, as on one rank of expert parallelism; None is all.
        impl: "auto", "triton" or "torch".

    Returns:
        MoERouting, with ids and weights as they came and logits None. counts and offs are those of the experts in the
        range. Choices of other experts have row_index -1; token_index and sorted_weights keep T * k rows, which are 0
        from offs[-1] on. Nothing is read on the host.

    Differentiable in weights, through sorted_weights.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name, number or id that is not the one expected.

    >>> ids = torch.tensor([[2, 0], [0, 1]], dtype=torch.int32)
    >>> hybrid_ops.moe_sort(ids, torch.ones(2, 2), 3).row_index
    tensor([[3, 0],
            [1, 2]], dtype=torch.int32)
    """
    _device.check_impl(impl)
    _checks.rank("ids", ids, (2,), "(T, k)")
    _checks.tensor("ids", ids, (None, None), dtype=torch.int32)
    if not 1 <= ids.shape[1] <= MAX_TOPK:
        raise ValueError(f"ids must have shape (T, k) with k from 1 to {MAX_TOPK}, got {tuple(ids.shape)}")
    _checks.tensor("weights", weights, ids.shape, dtype=(torch.float32, torch.float64), device=ids.device)
    _check_integer("num_experts", num_experts, 1, MAX_EXPERTS)
    _check_rows(*ids.shape)
    begin, end = _check_range(expert_range, num_experts)
    if _checks.readable(ids) and ids.numel():
        least, most = (int(value) for value in ids.aminmax())
        if least < 0 or most >= num_experts:
            raise ValueError(f"ids must be in [0, {num_experts}), got {least if least < 0 else most}")
    if _checks.needs_grad(weights):
        permutation = _MoESort.apply(ids, weights, begin, end, impl)
    else:
        permutation = _moe_sort(ids, weights, begin, end, impl)
    return MoERouting(weights, ids, None, *permutation)


def _check_logits(x: Tensor, weight: Tensor | None) -> int:
    """The number of experts."""
    if weight is None:
        _checks.rank("x", x, (2,), "(T, E), logits, with weight None")
        _checks.tensor("x", x, (None, None), dtype=(torch.float32, torch.float64))
        if not 1 <= x.shape[1] <= MAX_EXPERTS:
            raise ValueError(f"x must have shape (T, E) with E from 1 to {MAX_EXPERTS}, got {tuple(x.shape)}")
        return x.shape[1]
    _checks.rank("x", x, (2,), "(T, d)")
    _checks.tensor("x", x, (None, None))
    _checks.rank("weight", weight, (2,), "(E, d)")
    _checks.tensor("weight", weight, (None, x.shape[1]), device=x.device)
    if not 1 <= weight.shape[0] <= MAX_EXPERTS:
        raise ValueError(f"weight must have shape (E, d) with E from 1 to {MAX_EXPERTS}, got {tuple(weight.shape)}")
    return weight.shape[0]


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value}")


def _check_rows(tokens: int, topk: int) -> None:
    """Rows are counted in int32."""
    if tokens * topk >= 2**31:
        raise ValueError(f"tokens x choices must be less than 2^31, got {tokens} x {topk}")


def _check_groups(num_experts: int, topk: int, num_groups: int, topk_groups: int) -> None:
    _check_integer("num_groups", num_groups, 1, num_experts)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts, {num_experts}, got {num_groups}")
    _check_integer("topk_groups", topk_groups, 1, num_groups)
    most = topk_groups * (num_experts // num_groups)
    if topk > most:
        raise ValueError(
            f"topk must be at most {most}, the experts of {topk_groups} of {num_groups} groups, got {topk}"
        )


def _check_range(expert_range: tuple[int, int] | None, num_experts: int) -> tuple[int, int]:
    if expert_range is None:
        return 0, num_experts
    if not isinstance(expert_range, (tuple, list)) or len(expert_range) != 2:
        raise TypeError(f"expert_range must be None or (begin, end), got {expert_range!r}")
    begin, end = expert_range
    if not 0 <= begin <= end <= num_experts:
        raise ValueError(f"expert_range must be (begin, end) within (0, {num_experts}), got {(begin, end)}")
    return begin, end


class _Options(NamedTuple):
    score: str
    num_groups: int
    topk_groups: int
    renormalize: bool
    scaling_factor: float
    impl: str


@explains("moe_router")
def _choose_router(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 8192,
    hidden: int = 2688,
    num_experts: int = 128,
    topk: int = 6,
    **_: Any,
) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import moe_router as kernels

    logits = kernels.logits_config(tokens, hidden, num_experts, dtype != torch.float32)._asdict()
    choice = kernels.choice_config(tokens, num_experts, topk)
    return Choice(chosen, {**logits, "CHOICE_BLOCK_T": choice.BLOCK_T, "CHOICE_BLOCK_E": choice.BLOCK_E}, reason)


@explains("moe_sort")
def _choose_sort(
    *,
    device: str = "cuda",
    impl: str = "auto",
    tokens: int = 8192,
    num_experts: int = 128,
    topk: int = 6,
    **_: Any,
) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import moe_sort as kernels

    return Choice(chosen, {"block_tokens": kernels.block_tokens(tokens, topk, num_experts)}, reason)


def _moe_router_fwd(
    x: Tensor,
    weight: Tensor | None,
    correction_bias: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    counts: Tensor,
    offs: Tensor,
    token_index: Tensor,
    sorted_weights: Tensor,
    row_index: Tensor,
    score: str,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scaling_factor: float,
    impl: str,
) -> None:
    choice = (weights, ids, score, num_groups, topk_groups, renormalize, scaling_factor)
    permutation = (counts, offs, token_index, sorted_weights, row_index)
    if _device.choose(impl, x.device)[0] == "triton":
        from .triton_kernels import moe_router as kernels

        kernels.moe_router_fwd(x, weight, correction_bias, logits, *choice, *permutation)
    else:
        _torch_moe_router.moe_router_fwd(x, weight, correction_bias, logits, *choice)
        _torch_moe_router.moe_sort(ids, weights, 0, *permutation)


def _moe_sort_fwd(
    ids: Tensor,
    weights: Tensor,
    counts: Tensor,
    offs: Tensor,
    token_index: Tensor,
    sorted_weights: Tensor,
    row_index: Tensor,
    first_expert: int,
    impl: str,
) -> None:
    permutation = (counts, offs, token_index, sorted_weights, row_index)
    if _device.choose(impl, ids.device)[0] == "triton":
        from .triton_kernels import moe_sort as kernels

        kernels.sort(ids, weights, first_expert, *permutation)
    else:
        _torch_moe_router.moe_sort(ids, weights, first_expert, *permutation)


_moe_router_op = define(
    "moe_router_fwd(Tensor x, Tensor? weight, Tensor? correction_bias, Tensor(a!)? logits, Tensor(b!) weights, "
    "Tensor(c!) ids, Tensor(d!) counts, Tensor(e!) offs, Tensor(f!) token_index, Tensor(g!) sorted_weights, "
    "Tensor(h!) row_index, str score, int num_groups, int topk_groups, bool renormalize, float scaling_factor, "
    "str impl)",
    _moe_router_fwd,
)
_moe_sort_op = define(
    "moe_sort_fwd(Tensor ids, Tensor weights, Tensor(a!) counts, Tensor(b!) offs, Tensor(c!) token_index, "
    "Tensor(d!) sorted_weights, Tensor(e!) row_index, int first_expert, str impl)",
    _moe_sort_fwd,
)


def _empty_permutation(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """counts, offs, token_index, sorted_weights and row_index, to be filled."""
    counts, offs = ids.new_empty(num_experts), ids.new_empty(num_experts)
    rows = ids.shape[0] * ids.shape[1]
    return counts, offs, ids.new_empty(rows), weights.new_empty(rows), ids.new_empty(ids.shape)


def _moe_router(
    x: Tensor, weight: Tensor | None, correction_bias: Tensor | None, topk: int, options: _Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of MoERouting, logits None where x are the logits."""
    dtype, tokens = compute_dtype(x), x.shape[0]
    logits = None if weight is None else x.new_empty((tokens, weight.shape[0]), dtype=dtype)
    weights, ids = x.new_empty((tokens, topk), dtype=dtype), x.new_empty((tokens, topk), dtype=torch.int32)
    permutation = _empty_permutation(ids, weights, x.shape[1] if weight is None else weight.shape[0])
    _moe_router_op(x, weight, correction_bias, logits, weights, ids, *permutation, *options)
    return weights, ids, logits, *permutation


def _moe_sort(
    ids: Tensor, weights: Tensor, begin: int, end: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    permutation = _empty_permutation(ids, weights, end - begin)
    _moe_sort_op(ids, weights, *permutation, begin, impl)
    return permutation


class _MoERouter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, correction_bias, topk, options):  # type: ignore[override]
        results = _moe_router(x, weight, correction_bias, topk, options)
        _, ids, logits, counts, offs, token_index, _, row_index = results
        ctx.save_for_backward(x, weight, logits, ids, row_index)
        ctx.mark_non_differentiable(ids, counts, offs, token_index, row_index)
        ctx.options = options
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _ids, dlogits, _counts, _offs, _token_index, dsorted, _row_index):  # type: ignore[override]
        x, weight, logits, ids, row_index = ctx.saved_tensors
        dweights = dweights + _torch_moe_router.moe_sort_bwd(dsorted, row_index)
        options = ctx.options
        dlogits = _torch_moe_router.moe_router_bwd(
            dweights,
            None if weight is None else dlogits,
            x if weight is None else logits,
            ids,
            options.score,
            options.renormalize,
            options.scaling_factor,
        )
        if weight is None:
            return dlogits, None, None, None, None
        dx, dweight = _torch_moe_router.moe_router_bwd_products(dlogits, x, weight)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None


class _MoESort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weights, begin, end, impl):  # type: ignore[override]
        permutation = _moe_sort(ids, weights, begin, end, impl)
        counts, offs, token_index, _, row_index = permutation
        ctx.save_for_backward(row_index)
        ctx.mark_non_differentiable(counts, offs, token_index, row_index)
        return permutation

    @staticmethod
    @once_differentiable
    def backward(ctx, _counts, _offs, _token_index, dsorted, _row_index):  # type: ignore[override]
        (row_index,) = ctx.saved_tensors
        return None, _torch_moe_router.moe_sort_bwd(dsorted, row_index), None, None, None
