"""The weighted sum, LatentMoE's projections, the routed experts as a whole, and whole layers."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import hybrid_ops

from . import peers
from .cases import MOE_LAYERS, MOES, SHARDS, TOKENS, Case, MoELayer, Tensors, float32, layer, moe_of, randn, sharded
from .grouped_gemm import choices, touched, weight

Store = Callable[[torch.Tensor], torch.Tensor]  # how a layer keeps what passes from one product to the next


def _exact(t: torch.Tensor) -> torch.Tensor:
    return t


def _bfloat16(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16().float()


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        yield combine("tiny", 256)
        yield down_projection("tiny", 256)
        yield up_projection("tiny", 256)
        yield routed("tiny", 256)
        yield whole("tiny", 256)
        return
    for model in ("nano3", "super"):
        for tokens in (8192, 1024, 64, 1):
            yield routed(model, tokens)
            yield whole(model, tokens)
        yield combine(model, 8192)
    for tokens in (8192, 64):
        yield down_projection("super", tokens)
        yield up_projection("super", tokens)


def sweep() -> Iterator[Case]:
    for model, tokens in itertools.product(MOES, TOKENS):
        for tp in SHARDS:
            yield routed(model, tokens, tp)
            yield whole(model, tokens, tp)
        yield combine(model, tokens)
        if MOE_LAYERS[model].latent is not None:
            yield down_projection(model, tokens)
            yield up_projection(model, tokens)


def combine(model: str, tokens: int) -> Case:
    moe = MOE_LAYERS[model]
    width, rows = moe.latent or moe.hidden, tokens * moe.topk

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        routing = choices(generator, tokens, moe)
        return {"y": randn(generator, rows, width), "row_index": routing.row_index, "weights": routing.weights}

    def call(t: Tensors, impl: str) -> Tensors:
        return {"out": hybrid_ops.moe_combine(**t, scaling_factor=moe.scaling_factor, impl=impl)}

    def torch_combine(t: Tensors) -> object:
        mine = t["y"][t["row_index"]].float() * t["weights"][..., None]
        return (mine.sum(1) * moe.scaling_factor).to(t["y"].dtype)

    return Case(
        op="moe_combine_fwd",
        public="moe_combine",
        name=layer(model, tokens),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call({**t, **float32(t, "y")}, "torch"),
        axis={"out": 0},
        bytes=2 * (rows + tokens) * width + 8 * rows,
        flops=0,
        impls=("triton",),
        problem={"tokens": tokens, "features": width},
        peers=peers.eager_and_compiled(torch_combine, model),
    )


def down_projection(model: str, tokens: int) -> Case:
    moe = MOE_LAYERS[model]
    latent, columns = _latent(moe), _latent(moe) + moe.num_experts

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "x": randn(generator, tokens, moe.hidden),
            "fc1_weight": weight(generator, latent, moe.hidden),
            "gate_weight": weight(generator, moe.num_experts, moe.hidden),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        return dict(zip(("latent", "logits"), hybrid_ops.latent_down_proj(**t, impl=impl), strict=True))

    return Case(
        op="latent_proj_fwd",
        public="latent_down_proj",
        name=layer(model, tokens, "down"),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(float32(t, *t), "torch"),
        axis={"latent": 0, "logits": 0},
        bytes=2 * (tokens + columns) * moe.hidden + tokens * (2 * latent + 4 * moe.num_experts),
        flops=2 * tokens * columns * moe.hidden,
        impls=("triton",),
        peers={"torch": lambda t: (F.linear(t["x"], t["fc1_weight"]), F.linear(t["x"], t["gate_weight"]).float())},
    )


def up_projection(model: str, tokens: int) -> Case:
    """With the shared expert's output added."""
    moe = MOE_LAYERS[model]
    latent = _latent(moe)

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {
            "r": randn(generator, tokens, latent),
            "fc2_weight": weight(generator, moe.hidden, latent),
            "residual": randn(generator, tokens, moe.hidden),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        return {"out": hybrid_ops.latent_up_proj(**t, impl=impl)}

    return Case(
        op="latent_proj_fwd",
        public="latent_up_proj",
        name=layer(model, tokens, "up"),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(float32(t, *t), "torch"),
        axis={"out": 0},
        bytes=2 * (tokens * latent + moe.hidden * latent + 2 * tokens * moe.hidden),
        flops=2 * tokens * latent * moe.hidden,
        impls=("triton",),
        peers={"torch": lambda t: F.linear(t["r"], t["fc2_weight"]) + t["residual"]},
    )


def routed(model: str, tokens: int, tp: int = 1) -> Case:
    """From the choice of experts to the sum of their results: sort, two products, combine."""
    moe = moe_of(model, tp)
    width = moe.latent or moe.hidden

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        routing = choices(generator, tokens, moe)
        return {
            "x": randn(generator, tokens, width),
            "ids": routing.ids,
            "weights": routing.weights,
            **_experts(generator, moe),
        }

    def call(t: Tensors, impl: str) -> Tensors:
        routing = hybrid_ops.moe_sort(t["ids"], t["weights"], moe.num_experts, impl=impl)
        out = hybrid_ops.moe_mlp(
            t["x"], t["up_weight"], t["down_weight"], routing, scaling_factor=moe.scaling_factor, impl=impl
        )
        return {"out": out}

    def expected(t: Tensors, store: Store = _exact) -> Tensors:
        routing = hybrid_ops.moe_sort(t["ids"], t["weights"], moe.num_experts, impl="torch")
        return {"out": _routed_in_float32(t["x"], t["up_weight"], t["down_weight"], routing, moe.scaling_factor, store)}

    def torch_routed(t: Tensors) -> object:
        return _torch_routed(t["x"], t["up_weight"], t["down_weight"], t["ids"], t["weights"] * moe.scaling_factor)

    return Case(
        op="moe_mlp",
        public="moe_mlp",
        name=layer(model, tokens, *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=expected,
        baseline=lambda t: expected(t, _bfloat16),
        axis={"out": 0},
        bytes=_routed_bytes(tokens, moe),
        flops=4 * tokens * moe.topk * moe.expert * width,
        impls=("triton",),
        peers=peers.eager_and_compiled(torch_routed, model),
    )


def whole(model: str, tokens: int, tp: int = 1) -> Case:
    """Router, projections, routed and shared experts. The gate's weights are small integers over 32, so that every
    order of summation makes the same choice."""
    moe = moe_of(model, tp)
    width = moe.latent or moe.hidden

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        def signs(*shape: int) -> torch.Tensor:
            return torch.randint(-1, 2, shape, generator=generator, device=device).bfloat16()

        tensors = {
            "x": signs(tokens, moe.hidden),
            "gate_weight": signs(moe.num_experts, moe.hidden) / 32,
            **_experts(generator, moe),
            "shared_up_weight": weight(generator, moe.shared, moe.hidden),
            "shared_down_weight": weight(generator, moe.hidden, moe.shared),
        }
        if moe.latent is not None:
            tensors["fc1_weight"] = weight(generator, moe.latent, moe.hidden)
            tensors["fc2_weight"] = weight(generator, moe.hidden, moe.latent)
        return tensors

    def call(t: Tensors, impl: str) -> Tensors:
        return {"out": hybrid_ops.latent_moe(**t, topk=moe.topk, scaling_factor=moe.scaling_factor, impl=impl)}

    def expected(t: Tensors, store: Store = _exact) -> Tensors:
        wide = float32(t, *t)
        routing = hybrid_ops.moe_router(
            wide["x"], wide["gate_weight"], moe.topk, scaling_factor=moe.scaling_factor, impl="torch"
        )
        u = store(F.linear(wide["x"], wide["fc1_weight"])) if "fc1_weight" in wide else wide["x"]
        r = _routed_in_float32(u, wide["up_weight"], wide["down_weight"], routing, 1.0, store)
        out = F.linear(store(r), wide["fc2_weight"]) if "fc2_weight" in wide else r
        hidden = store(F.relu(F.linear(wide["x"], wide["shared_up_weight"])).square())
        return {"out": out + store(F.linear(hidden, wide["shared_down_weight"]))}

    def torch_whole(t: Tensors) -> object:
        s = F.linear(t["x"].float(), t["gate_weight"].float()).sigmoid()
        weights, ids = s.topk(moe.topk)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * moe.scaling_factor
        u = F.linear(t["x"], t["fc1_weight"]) if "fc1_weight" in t else t["x"]
        out = _torch_routed(u, t["up_weight"], t["down_weight"], ids, weights)
        out = F.linear(out, t["fc2_weight"]) if "fc2_weight" in t else out
        return out + F.linear(F.relu(F.linear(t["x"], t["shared_up_weight"])).square(), t["shared_down_weight"])

    dense = moe.num_experts + 2 * moe.shared + 2 * (moe.latent or 0)  # rows of matrices that all of x meets
    return Case(
        op="latent_moe",
        public="latent_moe",
        name=layer(model, tokens, *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=expected,
        baseline=lambda t: expected(t, _bfloat16),
        axis={"out": 0},
        bytes=_routed_bytes(tokens, moe) + 2 * moe.hidden * (dense + 2 * tokens),
        flops=2 * tokens * (2 * moe.topk * moe.expert * width + dense * moe.hidden),
        impls=("triton",),
        peers=peers.eager_and_compiled(torch_whole, model),
    )


def _latent(moe: MoELayer) -> int:
    assert moe.latent is not None
    return moe.latent


def _experts(generator: torch.Generator, moe: MoELayer) -> Tensors:
    width = moe.latent or moe.hidden
    return {
        "up_weight": weight(generator, moe.num_experts, moe.expert, width),
        "down_weight": weight(generator, moe.num_experts, width, moe.expert),
    }


def _routed_bytes(tokens: int, moe: MoELayer) -> int:
    """x and the result once, the weights of the experts that are hit; not what passes from kernel to kernel."""
    width = moe.latent or moe.hidden
    return 2 * (2 * tokens * width + 2 * touched(tokens, moe) * moe.expert * width) + 8 * tokens * moe.topk


def _routed_in_float32(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    routing: hybrid_ops.MoERouting,
    scaling_factor: float,
    store: Store,
) -> torch.Tensor:
    hidden = hybrid_ops.grouped_gemm(
        x.float(), up.float(), routing.offs, gather=routing.token_index, activation="relu2", impl="torch"
    )
    assert isinstance(hidden, torch.Tensor)
    y = hybrid_ops.grouped_gemm(store(hidden), down.float(), routing.offs, impl="torch")
    assert isinstance(y, torch.Tensor)
    return hybrid_ops.moe_combine(
        store(y), routing.row_index, routing.weights, scaling_factor=scaling_factor, impl="torch"
    )


def _torch_routed(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sort, gather, two grouped products with squared ReLU between them, weighted sum by index."""
    expert, order = ids.flatten().sort(stable=True)
    bounds = torch.arange(up.shape[0], device=ids.device, dtype=expert.dtype)
    offs = torch.searchsorted(expert, bounds, right=True, out_int32=True)
    token = order // ids.shape[1]
    h = F.relu(F.grouped_mm(x.index_select(0, token), up.transpose(1, 2), offs=offs)).square()
    y = F.grouped_mm(h, down.transpose(1, 2), offs=offs)
    return torch.zeros_like(x).index_add(0, token, (y * weights.flatten()[order, None]).to(x.dtype))
