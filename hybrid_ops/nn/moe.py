"""The mixture-of-experts layer, plain or latent, with a shared expert."""

import torch
from torch import Tensor, nn

from ..moe import latent_moe
from .mlp import MLP


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
    """All routed experts: up_proj (E, intermediate, features) and down_proj (E, features, intermediate)."""

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
        out, routing = latent_moe(
            x.reshape(-1, x.shape[-1]),
            self.gate.weight,
            self.experts.up_proj,
            self.experts.down_proj,
            self.topk,
            fc1_weight=None if self.fc1_latent_proj is None else self.fc1_latent_proj.weight,
            fc2_weight=None if self.fc2_latent_proj is None else self.fc2_latent_proj.weight,
            shared_up_weight=self.shared_experts.up_proj.weight,
            shared_down_weight=self.shared_experts.down_proj.weight,
            correction_bias=self.gate.e_score_correction_bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
            return_routing=True,
        )
        if self.training and torch.is_grad_enabled():
            self.load += routing.counts
        return out.view(x.shape)

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
