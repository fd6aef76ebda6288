"""One token of each sequence through a Mamba-2 mixer, between its two projections.

    z, xBC, dt = split(zxbcdt)
    x, B, C    = split(silu(causal_conv1d_update(xBC)))
    y          = gated_rms_norm(ssd_state_update(x, dt, B, C), z)

Nothing is rounded in between; both pools are rounded where they are stored.
"""

import numpy as np

from .conv1d_update import causal_conv1d_update
from .norm import gated_rms_norm
from .ssd_update import ssd_state_update


def mamba2_step(
    zxbcdt,
    conv_state,
    state,
    conv_weight,
    A,
    norm_weight,
    *,
    conv_bias=None,
    D=None,
    dt_bias=None,
    dt_softplus=True,
    dt_limit=(0.0, np.inf),
    eps=1e-5,
    group_size=None,
    norm_before_gate=False,
    slots=None,
    null_slot=-1,
    store=lambda S, slot, t: S,
    dtype=np.float64,
):
    """Returns (y, the pool of windows, the pool of states). `store(S, slot, t)` rounds the state of a slot.

    zxbcdt (batch, 2 d_inner + 2 ngroups dstate + nheads); conv_state (nslots, d_inner + 2 ngroups dstate, state_len);
    state (nslots, nheads, headdim, dstate); slots (batch,). A sequence whose slot is null_slot or outside the pools has
    y = 0 and changes nothing.
    """
    _, nheads, headdim, dstate = np.shape(state)
    zxbcdt, d_inner = np.asarray(zxbcdt, dtype), nheads * headdim
    z, xBC, dt = np.split(zxbcdt, [d_inner, zxbcdt.shape[1] - nheads], axis=1)
    options = dict(slots=slots, null_slot=null_slot, dtype=dtype)
    xBC, windows = causal_conv1d_update(xBC, conv_state, conv_weight, conv_bias, activation="silu", **options)
    x, B, C = np.split(xBC, [d_inner, (d_inner + xBC.shape[1]) // 2], axis=1)
    y, states = ssd_state_update(
        state,
        x.reshape(len(x), nheads, headdim),
        dt,
        A,
        *(t.reshape(len(t), t.shape[1] // dstate, dstate) for t in (B, C)),
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        read_slots=slots,
        null_slot=null_slot,
        store=store,
        dtype=dtype,
    )
    options = dict(eps=eps, group_size=group_size, norm_before_gate=norm_before_gate, dtype=dtype)
    return gated_rms_norm(y.reshape(len(y), d_inner), z, norm_weight, **options), windows, states
