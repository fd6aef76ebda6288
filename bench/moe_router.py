"""The router, and the sort of choices that were made elsewhere."""

import itertools
from collections.abc import Iterator

import torch

import hybrid_ops

from . import peers
from .cases import MOE_LAYERS, MOES, TOKENS, Case, Tensors, float32, layer

# The axis of sorted_weights: one slice. Its values are those of weights, which are held to their budget token by token,
# and only have to be found in the right order: one in a wrong place is off by far more than a rounding. Each as a slice
# of its own, some would be over: what they are compared with has been rounded too.
ORDER = None


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield router("tiny", 256)
        yield sort("tiny", 256)
        return
    for model in ("nano3", "super"):
        for tokens in (8192, 1024, 64, 1):
            yield router(model, tokens)
        yield sort(model, 8192)


def sweep() -> Iterator[Case]:
    for model, tokens in itertools.product(MOES, TOKENS):
        yield router(model, tokens)
        yield sort(model, tokens)


def router(model: str, tokens: int) -> Case:
    moe = MOE_LAYERS[model]

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        """Small integers, so that every order of summation gives the same logits and, ties being decided, the same
        choice: among a million random logits some gaps are smaller than a rounding. The biases are 0 for that too."""

        def signs(*shape: int) -> torch.Tensor:
            return torch.randint(-1, 2, shape, generator=generator, device=device).bfloat16()

        return {
            "x": signs(tokens, moe.hidden),
            "weight": signs(moe.num_experts, moe.hidden) / 32,
            "correction_bias": torch.zeros(moe.num_experts, device=device),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        routing = hybrid_ops.moe_router(**t, topk=moe.topk, scaling_factor=moe.scaling_factor, impl=impl)
        return {name: getattr(routing, name) for name in ("logits", "weights", "sorted_weights")}

    def torch_router(t: Tensors) -> object:
        logits = torch.nn.functional.linear(t["x"].float(), t["weight"].float())
        s = logits.sigmoid()
        ids = (s + t["correction_bias"]).topk(moe.topk).indices
        weights = s.gather(1, ids)
        return logits, *_torch_sort(ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * moe.scaling_factor, moe)

    element, rows = torch.bfloat16.itemsize, tokens * moe.topk
    return Case(
        op="moe_router_fwd",
        public="moe_router",
        name=layer(model, tokens),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call({**t, **float32(t, "x", "weight")}, "torch"),
        axis={"logits": 0, "weights": 0, "sorted_weights": ORDER},
        bytes=element * (tokens + moe.num_experts) * moe.hidden + 4 * (tokens * moe.num_experts + 5 * rows),
        flops=2 * tokens * moe.num_experts * moe.hidden,
        budget_dtype=torch.float32,  # of logits and weights
        impls=("triton",),
        problem={"tokens": tokens, "hidden": moe.hidden, "num_experts": moe.num_experts, "topk": moe.topk},
        peers=peers.eager_and_compiled(torch_router, model),
    )


def sort(model: str, tokens: int) -> Case:
    """The choices of even loads, each weight another integer, so that a row in a wrong place is seen."""
    moe = MOE_LAYERS[model]

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        scores = torch.rand(tokens, moe.num_experts, generator=generator, device=device)
        weights = torch.arange(1, tokens * moe.topk + 1, device=device, dtype=torch.float32)
        return {"ids": scores.topk(moe.topk).indices.int(), "weights": weights.view(tokens, moe.topk)}

    def call(t: Tensors, impl: str) -> Tensors:
        return {"sorted_weights": hybrid_ops.moe_sort(**t, num_experts=moe.num_experts, impl=impl).sorted_weights}

    rows = tokens * moe.topk
    return Case(
        op="moe_sort_fwd",
        public="moe_sort",
        name=layer(model, tokens),
        dtype=torch.float32,
        make=make,
        call=call,
        expected=lambda t: call(t, "torch"),
        axis={"sorted_weights": ORDER},
        bytes=4 * 5 * rows,
        flops=0,
        budget_dtype=torch.float32,
        impls=("triton",),
        problem={"tokens": tokens, "num_experts": moe.num_experts, "topk": moe.topk},
        peers={"torch": lambda t: _torch_sort(t["ids"], t["weights"], moe)},
    )


def _torch_sort(ids: torch.Tensor, weights: torch.Tensor, moe: object) -> tuple[torch.Tensor, ...]:
    expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(1, moe.num_experts + 1, device=ids.device))
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    return weights, ids, ends, order // moe.topk, weights.flatten()[order], rows.view(ids.shape)
