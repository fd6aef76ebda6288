"""The forward of routers and experts. The layer around them, with its shared expert, stays transformers' own."""

from typing import Any

import torch
from torch import Tensor

from ... import moe_mlp, moe_router, moe_sort

ACTIVATIONS = {"ReLUSquaredActivation": "relu2", "SiLUActivation": "silu_gated", "SiLU": "silu_gated"}


def router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NemotronH's: logits, weights (T, k) and ids (T, k), int64 for whoever indexes with them."""
    routing = moe_router(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        self.weight,
        self.top_k,
        correction_bias=self.e_score_correction_bias,
        num_groups=self.num_group,
        topk_groups=self.topk_group,
        renormalize=self.norm_topk_prob,
        scaling_factor=self.routed_scaling_factor,
    )
    assert routing.logits is not None
    return routing.logits, routing.weights, routing.ids.long()


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All routed experts, in the signature of transformers' `ExpertsInterface`."""
    up = self.gate_up_proj if self.has_gate else self.up_proj
    routing = moe_sort(top_k_index.to(torch.int32), top_k_weights.float(), self.num_experts)
    x = hidden_states.to(up.dtype)  # differs under autocast
    y = moe_mlp(x, up, self.down_proj, routing, activation=ACTIVATIONS[type(self.act_fn).__name__])
    return y.to(hidden_states.dtype)


def unfit_router(self: Any) -> str | None:
    """Why the operators cannot take this router."""
    if self.num_experts > 1024 or self.top_k > 32:
        return f"it chooses {self.top_k} of {self.num_experts} experts, the operators take at most 32 of 1024"
    return None


def unfit_experts(self: Any) -> str | None:
    """Why the operators cannot take these experts."""
    name = type(self.act_fn).__name__
    if ACTIVATIONS.get(name) != ("silu_gated" if self.has_gate else "relu2"):
        return f"their activation is {name}, the operators know relu2 and, gated, silu"
    if self.num_experts > 1024:
        return f"they are {self.num_experts}, the operators take at most 1024"
    return None
