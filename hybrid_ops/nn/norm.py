"""Normalisation modules: `RMSNorm` before each layer and `GatedRMSNorm` inside the Mamba-2 mixer."""

import torch
from torch import Tensor, nn

from ..norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`hybrid_ops.rms_norm` with its weight, (hidden,)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., hidden)."""
        return rms_norm(x, self.weight, eps=self.eps)  # type: ignore[return-value]

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x): the sum in the residual's dtype, both in one kernel."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)  # type: ignore[return-value]


class GatedRMSNorm(nn.Module):
    """`hybrid_ops.gated_rms_norm` with its weight, (hidden,): the gate first, then a norm over each group."""

    def __init__(
        self,
        hidden_size: int,
        *,
        group_size: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """norm(x * silu(z)) * weight; x and z (..., hidden)."""
        return gated_rms_norm(x, z, self.weight, eps=self.eps, group_size=self.group_size)
