"""The mixture-of-experts layer, plain or latent, with a shared expert."""

from typing import Any

import torch
from torch import Tensor, nn

from ..expert_weights import ExpertWeight
from ..moe import latent_moe, moe_mlp
from ..moe_router import MoERouting, moe_router
from .mlp import MLP
from .quantized import QuantizedWeight


def _matrices(*shape: int, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """Uniform within 1 / sqrt(features) of 0, as `nn.Linear` draws them."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))


class Gate(nn.Module):
    """The router's weight (E, hidden), and the bias (E,) that its choice alone sees.

    The bias is no part of the loss: it has no gradient, and is float32 (float64 in a float64 module) whatever `dtype`
    is.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = _matrices(num_experts, hidden_size, device=device, dtype=dtype)
        bias = torch.zeros(num_experts, device=device, dtype=bias_dtype)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class Experts(nn.Module):
    """All routed experts: up_proj (E, intermediate, features) and down_proj (E, features, intermediate).

    Each is a parameter, or what a quantised checkpoint puts in its place, an `Fp8Weight` or `Nvfp4Weight`.
    """

    up_proj: nn.Parameter | QuantizedWeight
    down_proj: nn.Parameter | QuantizedWeight

    def __init__(
        self,
        num_experts: int,
        features: int,
        intermediate_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up_proj = _matrices(num_experts, intermediate_size, features, device=device, dtype=dtype)
        self.down_proj = _matrices(num_experts, features, intermediate_size, device=device, dtype=dtype)

    def weights(self) -> tuple[ExpertWeight, ExpertWeight]:
        """up_proj and down_proj as the operators take them."""
        up, down = (w.value if isinstance(w, QuantizedWeight) else w for w in (self.up_proj, self.down_proj))
        return up, down


class MoE(nn.Module):
    """``fc2(sum_e w_e E_e(fc1 x)) + shared_experts(x)``, over the `topk` experts that the gate chooses for a token.

    Each expert is ``down(relu(up u)^2)``. fc1 and fc2 are there with a `latent_size` alone: then the routed experts
    read and write so many features (LatentMoE), while the gate and the shared expert see all of x.

    `load` counts how many tokens each expert got while gradients were recorded in training mode, for `balance`.

    Args:
        hidden_size: features of x.
        num_experts, topk: of them, and how many a token goes to.
        intermediate_size, shared_intermediate_size: width of a routed and of the shared expert.
        latent_size: None is hidden_size, without fc1 and fc2.
        num_groups, topk_groups, renormalize, scaling_factor: of the choice and its weights, as in
            `hybrid_ops.moe_router`.

    Source: NVIDIA 2025, "NVIDIA Nemotron 3", section 2.2; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 2.1.2.

    >>> from hybrid_ops.nn import MoE
    >>> moe = MoE(32, num_experts=8, topk=2, intermediate_size=24, shared_intermediate_size=48, latent_size=16)
    >>> moe(torch.randn(2, 5, 32)).shape, moe.load.sum()
    (torch.Size([2, 5, 32]), tensor(20))
    """

    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        topk: int,
        intermediate_size: int,
        shared_intermediate_size: int,
        latent_size: int | None = None,
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.topk = topk
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.renormalize, self.scaling_factor = renormalize, scaling_factor
        self.gate = Gate(hidden_size, num_experts, device=device, dtype=dtype)
        self.experts = Experts(num_experts, latent_size or hidden_size, intermediate_size, device=device, dtype=dtype)
        self.shared_experts = MLP(hidden_size, shared_intermediate_size, device=device, dtype=dtype)
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if latent_size is not None:
            self.fc1_latent_proj = nn.Linear(hidden_size, latent_size, bias=False, device=device, dtype=dtype)
            self.fc2_latent_proj = nn.Linear(latent_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        tokens = x.reshape(-1, x.shape[-1])
        choice: dict[str, Any] = dict(
            correction_bias=self.gate.e_score_correction_bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
        )
        shared, fc1, fc2 = self.shared_experts, self.fc1_latent_proj, self.fc2_latent_proj
        if any(isinstance(layer, QuantizedWeight) for layer in (shared.up_proj, shared.down_proj, fc1, fc2)):
            out, routing = self._layer_by_layer(tokens, choice)
        else:
            out, routing = latent_moe(
                tokens,
                self.gate.weight,
                *self.experts.weights(),
                self.topk,
                fc1_weight=None if fc1 is None else fc1.weight,
                fc2_weight=None if fc2 is None else fc2.weight,
                shared_up_weight=shared.up_proj.weight,
                shared_down_weight=shared.down_proj.weight,
                return_routing=True,
                **choice,
            )
        if self.training and torch.is_grad_enabled():
            self.load += routing.counts
        return out.view(x.shape)

    def _layer_by_layer(self, x: Tensor, choice: dict[str, Any]) -> tuple[Tensor, MoERouting]:
        """`latent_moe` with a shared expert or latent projections that are quantised: these are called as modules."""
        shared = self.shared_experts(x)
        routing = moe_router(x, self.gate.weight, self.topk, **choice)
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return moe_mlp(x, *self.experts.weights(), routing, residual=shared), routing
        latent = moe_mlp(self.fc1_latent_proj(x), *self.experts.weights(), routing)
        return self.fc2_latent_proj(latent) + shared, routing

    @torch.no_grad()
    def balance(self, rate: float = 1e-3) -> None:
        """Move the bias towards even loads: ``bias += rate * sign(mean(load) - load)``; then count anew.

        For use after each optimizer step, instead of an auxiliary loss. Where several processes train together, sum
        `load` over them first.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
        """
        load = self.load.double()
        self.gate.e_score_correction_bias.add_((load.mean() - load).sign(), alpha=rate)
        self.load.zero_()
