"""A decoding step of a Mamba-2 mixer in plain torch: the three operators, with float32 (float64) between them."""

from torch import Tensor

from .conv1d_update import causal_conv1d_update
from .norm import compute_dtype, norm_fwd
from .ssd_update import ssd_state_update


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    slots: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    null_slot: int,
) -> None:
    """Fill y; both pools move on."""
    nslots, nheads, headdim, dstate = state.shape
    d_inner, dtype = nheads * headdim, compute_dtype(zxbcdt)
    z, xBC, dt = zxbcdt[:, None].split([d_inner, conv_state.shape[1], nheads], dim=-1)  # [batch, 1, ..]
    convolved = xBC.new_empty(xBC.shape, dtype=dtype)
    causal_conv1d_update(
        xBC, conv_state, conv_weight, conv_bias, slots, None, None, convolved, silu=True, null_slot=null_slot
    )
    groups = (conv_state.shape[1] - d_inner) // 2
    x, B, C = convolved.split([d_inner, groups, groups], dim=-1)
    x, B, C = x.unflatten(-1, (nheads, headdim)), B.unflatten(-1, (-1, dstate)), C.unflatten(-1, (-1, dstate))
    states = x.new_empty(x.shape)
    steps = (dt_softplus, dt_min, dt_max, True, null_slot)
    ssd_state_update(state, x, dt, A, B, C, D, None, dt_bias, slots, None, None, None, seed, None, states, *steps)
    norm_fwd(states.flatten(-2)[:, 0], z[:, 0], None, norm_weight, y, None, eps, group_size, norm_before_gate)
    if slots is not None:  # of padding, z may be anything
        y.masked_fill_(((slots < 0) | (slots >= nslots) | (slots == null_slot))[:, None], 0.0)
