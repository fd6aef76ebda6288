"""The norms of `mamba_ssm.ops.triton.layernorm_gated`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norm import gated_rms_norm
from ._arguments import check_shape


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`hybrid_ops.gated_rms_norm` for mamba_ssm's function of this name: `layernorm_fn` with `is_rms_norm`.

    >>> rmsnorm_fn(torch.randn(2, 8), torch.ones(8), None, torch.randn(2, 8), group_size=4).shape
    torch.Size([2, 8])
    """
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """A norm over groups of the last dimension, gated by silu(z).

    Args:
        x, z: (..., hidden); z is None for no gate.
        weight, bias: (hidden,), any floating dtype; bias may be None.
        eps: added to the mean square or variance.
        group_size: a divisor of hidden; None is all of it.
        norm_before_gate: (norm(x) * weight + bias) * silu(z), else norm(x * silu(z)) * weight + bias.
        is_rms_norm: RMSNorm, else LayerNorm.

    An RMSNorm without bias, that of Mamba-2, is `hybrid_ops.gated_rms_norm`. The others are torch's own functions in
    float32, cast once.

    Returns:
        y, x's shape and dtype. Differentiable in x, weight, bias and z.

    Raises:
        ValueError, TypeError: an argument that is not the one expected.

    >>> layernorm_fn(torch.randn(2, 8), torch.ones(8), torch.zeros(8), group_size=4).shape
    torch.Size([2, 8])
    """
    if is_rms_norm and bias is None:
        return gated_rms_norm(x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    hidden = x.shape[-1]
    group_size = group_size or hidden
    if hidden % group_size:
        raise ValueError(f"group_size must divide the last dimension of x, {hidden}, got {group_size}")
    check_shape("weight", weight, (hidden,))
    if z is not None:
        check_shape("z", z, tuple(x.shape))
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = 1.0 if z is None else F.silu(z.to(wide))
    norm = F.rms_norm if is_rms_norm else F.layer_norm
    u = x.to(wide) if norm_before_gate else x.to(wide) * gate
    y = norm(u.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y * gate if norm_before_gate else y).to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with its weight, (hidden_size,); the same parameters as in mamba_ssm, so checkpoints load.

    >>> RMSNorm(8, group_size=4, norm_before_gate=False)(torch.randn(2, 8), torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
