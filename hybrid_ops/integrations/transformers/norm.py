"""The forward of RMSNorms and of the gated norms of Mamba-2 mixers."""

from typing import Any

from torch import Tensor

from ... import gated_rms_norm, rms_norm


def rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)  # type: ignore[return-value]


def gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """Gate first, then norm over groups; GraniteMoeHybrid's had no groups before transformers 5.23."""
    group_size = getattr(self, "group_size", None)
    return gated_rms_norm(hidden_states, gate, self.weight, eps=self.variance_epsilon, group_size=group_size)


def either_order_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """FalconH1's: the order of norm and gate is a choice."""
    return gated_rms_norm(
        hidden_states,
        gate,
        self.weight,
        eps=self.variance_epsilon,
        group_size=self.weight.shape[0] // self.n_groups,
        norm_before_gate=self.norm_before_gate,
    )
