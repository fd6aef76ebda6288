"""Mixture-of-experts layers: `moe_combine`, LatentMoE's projections, and the layers `moe_mlp` and `latent_moe`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._library import Choice, define, explains
from ._torch import moe as _torch_moe
from ._torch.norm import compute_dtype
from .expert_weights import ExpertWeight, check_expert_weight, expert_product
from .grouped_gemm import ACTIVATIONS, index_sum_op
from .moe_router import MoERouting, moe_router

WEIGHTS = (torch.float32, torch.float64)


def moe_combine(
    y: Tensor,
    row_index: Tensor,
    weights: Tensor | None = None,
    *,
    scaling_factor: float = 1.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Bring the rows of the experts back to the tokens: each token's weighted sum.

    ``out[t] = scaling_factor * sum_j weights[t, j] * y[row_index[t, j]] + residual[t]``, summed with j ascending: the
    same bits from run to run.

    Args:
        y: (R, D), the experts' results, any strides.
        row_index: (T, k) int32, the rows of a token; -1 is skipped: an expert that is not here. So is, on a GPU, where
            values are not read, any row out of range.
        weights: (T, k) float32 (float64 on the CPU); None is 1.
        scaling_factor: multiplies the sum.
        residual: (T, D), any strides and dtype: a shared expert's output for instance.
        out_dtype: of the result; None is y's.
        out: the result is written here, (T, D) in out_dtype. Not y's memory, and not where a gradient is needed.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, D).

    float32, bfloat16, float16 (float64 on the CPU). Sums are float32 and cast once. Differentiable in y, weights and
    residual.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or index that is not the one expected.

    Source: Gale et al. 2022, "MegaBlocks", section 5.2.

    >>> row_index = torch.tensor([[1, 0], [2, -1]], dtype=torch.int32)
    >>> out = hybrid_ops.moe_combine(torch.randn(3, 8), row_index, torch.rand(2, 2))
    """
    _device.check_impl(impl)
    _checks.rank("y", y, (2,), "(R, D)")
    _checks.tensor("y", y, (None, None))
    _checks.rank("row_index", row_index, (2,), "(T, k)")
    _checks.tensor("row_index", row_index, (None, None), dtype=torch.int32, device=y.device)
    if _checks.readable(row_index):
        bad = row_index[(row_index < -1) | (row_index >= y.shape[0])]
        if bad.numel():
            raise ValueError(f"row_index must be in [-1, {y.shape[0]}), got {int(bad[0])}")
    if weights is not None:
        _checks.tensor("weights", weights, row_index.shape, dtype=WEIGHTS, device=y.device)
    shape = (row_index.shape[0], y.shape[1])
    if residual is not None:
        _checks.tensor("residual", residual, shape, device=y.device)
    out_dtype = y.dtype if out_dtype is None else out_dtype
    _checks.one_of("out_dtype", out_dtype, _checks.FLOATS)
    needs_grad = _checks.needs_grad(y, weights, residual)
    if out is not None:
        _checks.out(out, y.new_empty(1, dtype=out_dtype).expand(shape), needs_grad)
    scaling_factor = float(scaling_factor)
    if needs_grad:
        return _MoECombine.apply(y, weights, residual, row_index, scaling_factor, out_dtype, impl)
    result = y.new_empty(shape, dtype=out_dtype) if out is None else out
    _moe_combine_op(y, row_index, weights, residual, result, scaling_factor, impl)
    return result


def latent_down_proj(
    x: Tensor, fc1_weight: Tensor, gate_weight: Tensor | None = None, *, out: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """The two products that begin a LatentMoE layer, from one reading of x.

    ``latent = x @ fc1_weight^T`` is what travels to the experts; ``logits = x @ gate_weight^T`` chooses them.

    Args:
        x: (T, d), any strides.
        fc1_weight: (l, d), in x's dtype.
        gate_weight: (E, d), any floating dtype; None for no logits.
        out: the latent is written here, (T, l). Not where a gradient is needed.
        impl: "auto", "triton" or "torch".

    Returns:
        (latent (T, l) in x's dtype, logits (T, E) float32 (float64 for float64 x) or None).

    float32, bfloat16, float16 (float64 on the CPU). Sums are float32 and cast once; a float32 tensor among the two
    is multiplied in float32, not TF32. Differentiable in all arguments, from both results.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that is not the one expected.

    Source: NVIDIA 2025, "NVIDIA Nemotron 3", section 2.2 (LatentMoE).

    >>> latent, logits = hybrid_ops.latent_down_proj(torch.randn(3, 16), torch.randn(4, 16), torch.randn(8, 16))
    """
    _device.check_impl(impl)
    _check_projection("x", x, "fc1_weight", fc1_weight)
    if gate_weight is not None:
        _checks.rank("gate_weight", gate_weight, (2,), "(E, d)")
        _checks.tensor("gate_weight", gate_weight, (None, x.shape[1]), device=x.device)
    needs_grad = _checks.needs_grad(x, fc1_weight, gate_weight)
    if out is not None:
        _checks.out(out, x.new_empty(1).expand(x.shape[0], fc1_weight.shape[0]), needs_grad)
    if needs_grad:
        return _LatentProj.apply(x, fc1_weight, gate_weight, None, impl)
    return _latent_proj(x, fc1_weight, gate_weight, None, out, impl)


def latent_up_proj(
    r: Tensor, fc2_weight: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The product that ends a LatentMoE layer: ``r @ fc2_weight^T + residual``, added before the one cast.

    Args:
        r: (T, l), the combined results of the experts, any strides.
        fc2_weight: (d, l), in r's dtype.
        residual: (T, d), any strides and dtype: the shared expert's output.
        out: the result is written here, (T, d). Not where a gradient is needed.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, d), in r's dtype.

    float32, bfloat16, float16 (float64 on the CPU). Differentiable in all arguments.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that is not the one expected.

    Source: NVIDIA 2025, "NVIDIA Nemotron 3", section 2.2 (LatentMoE).

    >>> out = hybrid_ops.latent_up_proj(torch.randn(3, 4), torch.randn(16, 4), residual=torch.randn(3, 16))
    """
    _device.check_impl(impl)
    _check_projection("r", r, "fc2_weight", fc2_weight)
    shape = (r.shape[0], fc2_weight.shape[0])
    if residual is not None:
        _checks.tensor("residual", residual, shape, device=r.device)
    needs_grad = _checks.needs_grad(r, fc2_weight, residual)
    if out is not None:
        _checks.out(out, r.new_empty(1).expand(shape), needs_grad)
    if needs_grad:
        return _LatentProj.apply(r, fc2_weight, None, residual, impl)[0]
    return _latent_proj(r, fc2_weight, None, residual, out, impl)[0]


def moe_mlp(
    x: Tensor,
    up_weight: ExpertWeight,
    down_weight: ExpertWeight,
    routing: MoERouting,
    *,
    activation: str | None = "relu2",
    weight_on: str = "output",
    scaling_factor: float = 1.0,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The routed experts of a layer: two grouped products and the weighted sum.

    ``out[t] = scaling_factor * sum_j w_tj * down[e_tj] @ activation(up[e_tj] @ x[t]) + residual[t]``, where e and w are
    the routing's ids and weights. Experts that are not here (`moe_sort` with an expert_range) contribute nothing.

    Args:
        x: (T, D), any strides.
        up_weight: (E, I, D), with "silu_gated" (E, 2 I, D): a tensor in x's dtype, an Fp8Tensor, an Nvfp4Tensor or an
            Nvfp4Packed.
        down_weight: (E, D, I), in any of these formats.
        routing: of `moe_router` or `moe_sort`, over E experts.
        activation: None, "relu2" or "silu_gated", as in `grouped_gemm`.
        weight_on: "output": w multiplies what an expert returns, in the sum; "hidden": what goes into its second
            matrix (Megatron's order). The same but for rounding.
        scaling_factor: multiplies the sum; 1.0 where the router's weights have it already.
        residual: (T, D), added before the one cast.
        batch_invariant: as in `grouped_gemm`.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, D), in x's dtype.

    Made of `grouped_gemm` and `moe_combine`: the dtypes, arithmetic and gradients are theirs. Differentiable in x, the
    weights, the routing's weights and residual. With NVFP4 weights the products are `nvfp4_grouped_gemm`; with FP8
    weights rows are quantised ("1x128" for scales of 1x128 and 128x128, "mx" for "mx", else "row") before each
    `fp8_grouped_gemm`. Such products are not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or index that is not the one expected.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 1.

    >>> routing = hybrid_ops.moe_router(torch.randn(5, 4), None, 2)
    >>> out = hybrid_ops.moe_mlp(torch.randn(5, 8), torch.randn(4, 6, 8), torch.randn(4, 8, 6), routing)
    """
    _device.check_impl(impl)
    _checks.rank("x", x, (2,), "(T, D)")
    _checks.tensor("x", x, (None, None))
    _check_routing(routing, x)
    _checks.one_of("activation", activation, ACTIVATIONS)
    _checks.one_of("weight_on", weight_on, ("output", "hidden"))
    _check_experts(x, x.shape[1], up_weight, down_weight, routing.offs.shape[0], activation)
    if residual is not None:
        _checks.tensor("residual", residual, x.shape, device=x.device)
    on_hidden = weight_on == "hidden"
    y = _expert(
        x,
        up_weight,
        down_weight,
        routing.offs,
        dict(batch_invariant=batch_invariant, impl=impl),
        gather=routing.token_index,
        activation=activation,
        row_scale=routing.sorted_weights if on_hidden else None,
    )
    return moe_combine(
        y,
        routing.row_index,
        None if on_hidden else routing.weights,
        scaling_factor=scaling_factor,
        residual=residual,
        impl=impl,
    )


def latent_moe(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: ExpertWeight,
    down_weight: ExpertWeight,
    topk: int,
    *,
    fc1_weight: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    shared_up_weight: Tensor | None = None,
    shared_down_weight: Tensor | None = None,
    activation: str | None = "relu2",
    correction_bias: Tensor | None = None,
    score: str = "sigmoid",
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    return_routing: bool = False,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, MoERouting]:
    """A whole mixture-of-experts layer, plain or latent.

    ``out = fc2 @ sum_j w_j * E_j(fc1 @ x) + shared(x)``: the router and the shared expert see x, the routed experts its
    projection, between the decision where a token goes and its way back. Without fc1 and fc2 that is the plain mixture.
    An expert is ``down @ activation(up @ u)``, the shared one too.

    Args:
        x: (T, d), any strides.
        gate_weight: (E, d), the router's, any floating dtype.
        up_weight: (E, I, l), with "silu_gated" (E, 2 I, l); l is d without fc1.
        down_weight: (E, l, I). Both in any of the formats of `moe_mlp`.
        topk: how many experts each token goes to.
        fc1_weight: (l, d), and
        fc2_weight: (d, l): both or neither.
        shared_up_weight: (S, d), with "silu_gated" (2 S, d), and
        shared_down_weight: (d, S): both or neither.
        activation: None, "relu2" or "silu_gated".
        correction_bias, score, num_groups, topk_groups, renormalize: as in `moe_router`.
        scaling_factor: multiplies the routed experts' sum; it is in the routing's weights.
        return_routing: also return the routing.
        batch_invariant: the bits of a token do not depend on the others, on a GPU.
        impl: "auto", "triton" or "torch".

    Returns:
        out (T, d) in x's dtype, or (out, MoERouting).

    Made of `latent_down_proj`, `moe_router`, `moe_mlp` (with the shared expert's output as its residual), and
    `latent_up_proj`: the dtypes, arithmetic and gradients are theirs. Differentiable in x and all weights, from out and
    the routing's logits and weights.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that is not the one expected.

    Source: NVIDIA 2025, "NVIDIA Nemotron 3", section 2.2 (LatentMoE); DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 2.1.2 (the router and the shared expert).

    >>> up, down = torch.randn(4, 6, 8), torch.randn(4, 8, 6)
    >>> out = hybrid_ops.latent_moe(torch.randn(5, 8), torch.randn(4, 8), up, down, 2)
    """
    _device.check_impl(impl)
    _checks.rank("x", x, (2,), "(T, d)")
    _checks.tensor("x", x, (None, None))
    _checks.rank("gate_weight", gate_weight, (2,), "(E, d)")
    _checks.tensor("gate_weight", gate_weight, (None, x.shape[1]), device=x.device)
    _checks.one_of("activation", activation, ACTIVATIONS)
    width = _check_latent(x, fc1_weight, fc2_weight)
    _check_experts(x, width, up_weight, down_weight, gate_weight.shape[0], activation)
    _check_shared(x, shared_up_weight, shared_down_weight, activation)
    routed = dict(
        correction_bias=correction_bias,
        score=score,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
        impl=impl,
    )
    experts = dict(batch_invariant=batch_invariant, impl=impl)
    shared = None
    if shared_up_weight is not None and shared_down_weight is not None:
        every = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
        shared = _expert(x, shared_up_weight[None], shared_down_weight[None], every, experts, activation=activation)
    if fc1_weight is None or fc2_weight is None:
        routing = moe_router(x, gate_weight, topk, **routed)  # type: ignore[arg-type]
        out = moe_mlp(x, up_weight, down_weight, routing, activation=activation, residual=shared, **experts)  # type: ignore[arg-type]
    else:
        latent, logits = latent_down_proj(x, fc1_weight, gate_weight, impl=impl)
        assert logits is not None
        routing = moe_router(logits, None, topk, **routed)  # type: ignore[arg-type]
        r = moe_mlp(latent, up_weight, down_weight, routing, activation=activation, **experts)  # type: ignore[arg-type]
        out = latent_up_proj(r, fc2_weight, residual=shared, impl=impl)
    return (out, routing) if return_routing else out


def _expert(
    x: Tensor, up: ExpertWeight, down: ExpertWeight, offs: Tensor, options: dict[str, Any], **first: Any
) -> Tensor:
    """down @ activation(up @ x), each row with the matrices of its expert."""
    hidden = expert_product(x, up, offs, **first, **options)
    return expert_product(hidden, down, offs, **options)


def _check_projection(x_name: str, x: Tensor, name: str, weight: Tensor) -> None:
    _checks.rank(x_name, x, (2,), "(T, features)")
    _checks.tensor(x_name, x, (None, None))
    _checks.rank(name, weight, (2,), "(features, features)")
    _checks.tensor(name, weight, (None, x.shape[1]), dtype=x.dtype, device=x.device)


def _check_routing(routing: MoERouting, x: Tensor) -> None:
    if not isinstance(routing, MoERouting):
        raise TypeError(f"routing must be a MoERouting, got {type(routing).__name__}")
    tokens = routing.row_index.shape[0]
    if tokens != x.shape[0]:
        raise ValueError(f"routing must be of the {x.shape[0]} tokens of x, got {tokens}")


def _check_experts(
    x: Tensor, width: int, up: ExpertWeight, down: ExpertWeight, experts: int, activation: str | None
) -> None:
    """Experts for rows of `width` features, of x's dtype and device."""
    halves = 2 if activation == "silu_gated" else 1
    inner = check_expert_weight("down_weight", down, (experts, width, None), "(E, D, I)", x)[2]
    check_expert_weight("up_weight", up, (experts, halves * inner, width), "(E, I, D)", x)


def _check_latent(x: Tensor, fc1: Tensor | None, fc2: Tensor | None) -> int:
    """The size of what the routed experts see."""
    _both_or_neither(fc1_weight=fc1, fc2_weight=fc2)
    if fc1 is None:
        return x.shape[1]
    _check_projection("x", x, "fc1_weight", fc1)
    _checks.tensor("fc2_weight", fc2, (x.shape[1], fc1.shape[0]), dtype=x.dtype, device=x.device)  # type: ignore[arg-type]
    return fc1.shape[0]


def _check_shared(x: Tensor, up: Tensor | None, down: Tensor | None, activation: str | None) -> None:
    _both_or_neither(shared_up_weight=up, shared_down_weight=down)
    if up is None or down is None:
        return
    halves = 2 if activation == "silu_gated" else 1
    _checks.rank("shared_down_weight", down, (2,), "(d, S)")
    _checks.tensor("shared_down_weight", down, (x.shape[1], None), dtype=x.dtype, device=x.device)
    shape = (halves * down.shape[1], x.shape[1])
    _checks.tensor("shared_up_weight", up, shape, dtype=x.dtype, device=x.device)


def _both_or_neither(**pair: Tensor | None) -> None:
    missing = [name for name, value in pair.items() if value is None]
    if len(missing) == 1:
        raise ValueError(f"{' and '.join(pair)} must both be given or both be None, got {missing[0]}=None")


@explains("moe_combine")
def _choose_combine(
    *, device: str = "cuda", impl: str = "auto", tokens: int = 8192, features: int = 2688, **_: Any
) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import moe as kernels

    return Choice(chosen, kernels.combine_config(features)._asdict(), reason)


@explains("latent_down_proj")
@explains("latent_up_proj")
def _choose_proj(*, device: str = "cuda", impl: str = "auto", dtype: torch.dtype = torch.bfloat16, **_: Any) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    if chosen != "triton":
        return Choice(chosen, {}, reason)
    from .triton_kernels import moe as kernels

    return Choice(chosen, kernels.proj_config(dtype.itemsize)._asdict(), reason)


@explains("moe_mlp")
@explains("latent_moe")
def _choose_layer(*, device: str = "cuda", impl: str = "auto", **_: Any) -> Choice:
    chosen, reason = _device.choose(impl, torch.device(device))
    return Choice(chosen, {}, f"made of other ops; {reason}")


def _moe_combine_fwd(
    y: Tensor,
    row_index: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    scaling_factor: float,
    impl: str,
) -> None:
    if _device.choose(impl, y.device)[0] == "triton":
        from .triton_kernels import moe as kernels

        kernels.moe_combine(y, row_index, weights, residual, out, scaling_factor)
    else:
        _torch_moe.moe_combine_fwd(y, row_index, weights, residual, out, scaling_factor)


_moe_combine_op = define(
    "moe_combine_fwd(Tensor y, Tensor row_index, Tensor? weights, Tensor? residual, Tensor(a!) out, "
    "float scaling_factor, str impl)",
    _moe_combine_fwd,
)


def _combine_weights_grad(
    dout: Tensor, y: Tensor, row_index: Tensor, dweights: Tensor, scaling_factor: float, impl: str
) -> None:
    if _device.choose(impl, y.device)[0] == "triton":
        from .triton_kernels import moe as kernels

        kernels.combine_weights_grad(dout, y, row_index, dweights, scaling_factor)
    else:
        _torch_moe.combine_weights_grad(dout, y, row_index, dweights, scaling_factor)


_combine_weights_grad_op = define(
    "moe_combine_weights_grad(Tensor dout, Tensor y, Tensor row_index, Tensor(a!) dweights, float scaling_factor, "
    "str impl)",
    _combine_weights_grad,
)


def _latent_proj_fwd(
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    logits: Tensor | None,
    impl: str,
) -> None:
    if _device.choose(impl, x.device)[0] == "triton":
        from .triton_kernels import moe as kernels

        kernels.latent_proj(x, weight, gate_weight, residual, out, logits)
    else:
        _torch_moe.latent_proj_fwd(x, weight, gate_weight, residual, out, logits)


_latent_proj_op = define(
    "latent_proj_fwd(Tensor x, Tensor weight, Tensor? gate_weight, Tensor? residual, Tensor(a!) out, "
    "Tensor(b!)? logits, str impl)",
    _latent_proj_fwd,
)


def _latent_proj(
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    result = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    logits = None
    if gate_weight is not None:
        logits = x.new_empty((x.shape[0], gate_weight.shape[0]), dtype=compute_dtype(x))
    _latent_proj_op(x, weight, gate_weight, residual, result, logits, impl)
    return result, logits


class _MoECombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, residual, row_index, scaling_factor, out_dtype, impl):  # type: ignore[override]
        out = y.new_empty((row_index.shape[0], y.shape[1]), dtype=out_dtype)
        _moe_combine_op(y, row_index, weights, residual, out, scaling_factor, impl)
        ctx.save_for_backward(y, weights, row_index)
        ctx.options = scaling_factor, impl, None if residual is None else residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        y, weights, row_index = ctx.saved_tensors
        scaling_factor, impl, residual_dtype = ctx.options
        needs_y, needs_weights, needs_residual = ctx.needs_input_grad[:3]
        dy = dweights = None
        if needs_y:
            dy = y.new_empty(y.shape)
            flat = None if weights is None else weights.flatten()
            index_sum_op(dout, row_index.flatten(), flat, dy, row_index.shape[1], scaling_factor, impl)
        if needs_weights:
            dweights = weights.new_empty(weights.shape)
            _combine_weights_grad_op(dout, y, row_index, dweights, scaling_factor, impl)
        return dy, dweights, dout.to(residual_dtype) if needs_residual else None, *(None,) * 4


class _LatentProj(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate_weight, residual, impl):  # type: ignore[override]
        ctx.save_for_backward(x, weight, gate_weight)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return _latent_proj(x, weight, gate_weight, residual, None, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlogits):  # type: ignore[override]
        x, weight, gate_weight = ctx.saved_tensors
        dx, dweight, dgate = _torch_moe.latent_proj_bwd(dout, dlogits, x, weight, gate_weight, ctx.needs_input_grad)
        dresidual = dout.to(ctx.residual_dtype) if dout is not None and ctx.needs_input_grad[3] else None
        return dx, dweight, dgate, dresidual, None
