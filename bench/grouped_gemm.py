"""The two products of the routed experts, and their gradients."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import hybrid_ops

from .cases import MOES, SHARDS, TOKENS, Case, MoELayer, Tensors, float32, layer, moe_of, randn, sharded


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield up("tiny", 256)
        yield down("tiny", 256)
        return
    for model in ("nano3", "super"):
        for tokens in (8192, 1024, 64, 1):
            yield up(model, tokens)
            yield down(model, tokens)
        yield backward(model, 8192)


def sweep() -> Iterator[Case]:
    for model, tp in itertools.product(MOES, SHARDS):
        for tokens in TOKENS:
            yield up(model, tokens, tp)
            yield down(model, tokens, tp)
        yield backward(model, 8192, tp)


def choices(generator: torch.Generator, tokens: int, moe: MoELayer) -> hybrid_ops.MoERouting:
    """Even loads: every expert is as likely as any other."""
    scores = torch.rand(tokens, moe.num_experts, generator=generator, device=generator.device)
    weights, ids = scores.topk(moe.topk)
    return hybrid_ops.moe_sort(ids.int(), weights, moe.num_experts, impl="torch")


def touched(tokens: int, moe: MoELayer) -> int:
    """Experts that have a token, on average."""
    return round(moe.num_experts * (1 - (1 - moe.topk / moe.num_experts) ** tokens))


def weight(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Of results as large as what goes in."""
    return randn(generator, *shape) / shape[-1] ** 0.5


def up(model: str, tokens: int, tp: int = 1) -> Case:
    """Rows gathered from the tokens, squared ReLU behind."""
    moe = moe_of(model, tp)
    width, rows = moe.latent or moe.hidden, tokens * moe.topk

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        routing = choices(generator, tokens, moe)
        return {
            "a": randn(generator, tokens, width),
            "b": weight(generator, moe.num_experts, moe.expert, width),
            "offs": routing.offs,
            "gather": routing.token_index,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.grouped_gemm(**t, activation="relu2", impl=impl)}

    def torch_up(t: Tensors) -> object:
        h = F.grouped_mm(t["a"].index_select(0, t["gather"]), t["b"].transpose(1, 2), offs=t["offs"])
        return F.relu(h).square()

    return Case(
        op="grouped_gemm_fwd",
        public="grouped_gemm",
        name=layer(model, tokens, "up", *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call({**t, **float32(t, "a", "b")}, "torch"),
        axis={"y": 0},
        bytes=2 * (tokens * width + touched(tokens, moe) * moe.expert * width + rows * moe.expert),
        flops=2 * rows * moe.expert * width,
        impls=("triton",),
        problem={"rows": rows, "experts": moe.num_experts, "n": moe.expert, "k": width},
        peers={"torch": torch_up},
    )


def down(model: str, tokens: int, tp: int = 1) -> Case:
    moe = moe_of(model, tp)
    width, rows = moe.latent or moe.hidden, tokens * moe.topk

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "a": randn(generator, rows, moe.expert),
            "b": weight(generator, moe.num_experts, width, moe.expert),
            "offs": choices(generator, tokens, moe).offs,
        }

    def call(t: Tensors, impl: str) -> Tensors:
        return {"y": hybrid_ops.grouped_gemm(**t, impl=impl)}

    return Case(
        op="grouped_gemm_fwd",
        public="grouped_gemm",
        name=layer(model, tokens, "down", *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call({**t, **float32(t, "a", "b")}, "torch"),
        axis={"y": 0},
        bytes=2 * (rows * moe.expert + touched(tokens, moe) * moe.expert * width + rows * width),
        flops=2 * rows * moe.expert * width,
        impls=("triton",),
        problem={"rows": rows, "experts": moe.num_experts, "n": width, "k": moe.expert},
        peers={"torch": lambda t: F.grouped_mm(t["a"], t["b"].transpose(1, 2), offs=t["offs"])},
    )


def backward(model: str, tokens: int, tp: int = 1) -> Case:
    """Both gradients of the down product, which has neither gather nor activation."""
    moe = moe_of(model, tp)
    width, rows = moe.latent or moe.hidden, tokens * moe.topk

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "a": randn(generator, rows, moe.expert).requires_grad_(),
            "b": weight(generator, moe.num_experts, width, moe.expert).requires_grad_(),
            "offs": choices(generator, tokens, moe).offs,
            "dy": randn(generator, rows, width),
        }

    def gradients(product: Callable[..., torch.Tensor]) -> Callable[[Tensors], Tensors]:
        """The graph is made with the forward, which is in the time too."""

        def run(t: Tensors) -> Tensors:
            leaves = t["a"].detach().requires_grad_(), t["b"].detach().requires_grad_()
            da, db = torch.autograd.grad(product(*leaves, t["offs"]), leaves, t["dy"])
            return {"da": da, "db": db}

        return run

    def ours(impl: str) -> Callable[[Tensors], Tensors]:
        return gradients(lambda a, b, offs: hybrid_ops.grouped_gemm(a, b, offs, impl=impl))  # type: ignore[return-value]

    return Case(
        op="grouped_gemm_fwd_bwd",
        public="grouped_gemm",
        name=layer(model, tokens, "down", *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=lambda t, impl: ours(impl)(t),
        expected=lambda t: ours("torch")({**t, **float32(t, "a", "b", "dy")}),
        axis={"da": 0, "db": 0},
        bytes=2 * (2 * rows * moe.expert + 3 * moe.num_experts * moe.expert * width + 2 * rows * width),
        flops=6 * rows * moe.expert * width,
        impls=("triton",),
        problem={"rows": rows, "experts": moe.num_experts, "n": width, "k": moe.expert},
        peers={"torch": gradients(lambda a, b, offs: F.grouped_mm(a, b.transpose(1, 2), offs=offs))},
    )
