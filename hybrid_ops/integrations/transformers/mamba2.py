"""The forward of Mamba-2 mixers, one for all families: they share the names of their attributes."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import causal_conv1d, causal_conv1d_update, ssd_chunk_scan, ssd_state_update

NO_LIMIT = (0.0, float("inf"))


def mixer_forward(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The mixer of NemotronH, Mamba2, Bamba, Zamba2 and GraniteMoeHybrid."""
    projected = self.in_proj(_without_padding(hidden_states, attention_mask))
    return self.out_proj(_mix(self, projected, cache_params, attention_mask, kwargs).to(hidden_states.dtype))


def scaled_mixer_forward(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The mixer of FalconH1, with multipliers before and behind the projection."""
    projected = self.in_proj(_without_padding(hidden_states, attention_mask) * self.ssm_in_multiplier)
    y = _mix(self, projected * self.mup_vector, cache_params, attention_mask, kwargs)
    return self.out_proj(y.to(hidden_states.dtype))


def unfit_mixer(self: Any) -> str | None:
    """Why the operators cannot take this mixer."""
    if self.activation not in ("silu", "swish"):
        return f"its activation is {self.activation!r}, the operators know silu"
    if self.conv_kernel_size > 8:
        return f"its convolution is {self.conv_kernel_size} wide, the operators take at most 8"
    return None


def _mix(self: Any, projected: Tensor, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Everything between the projections: (batch, seqlen, z | x, B, C | dt) -> (batch, seqlen, heads * headdim)."""
    packing = _packing(cache, kwargs)
    gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    layer = cache.layers[self.layer_idx] if cache is not None and cache.has_previous_state(self.layer_idx) else None
    state = None if layer is None else layer.recurrent_states[0]  # before the convolution calls it a previous one
    xBC = _without_padding(_convolve(self, xBC, cache, layer, packing), mask)
    groups = self.n_groups * self.ssm_state_size
    x, B, C = xBC.split([self.intermediate_size, groups, groups], dim=-1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
    gated_by_norm = not isinstance(self.norm, nn.Identity)
    z = None if gated_by_norm else gate.unflatten(-1, (self.num_heads, self.head_dim))
    y = _scan(self, x, dt, B, C, z, cache, state, packing).flatten(-2)
    return self.norm(y, gate) if gated_by_norm else y


def _packing(cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Boundaries of sequences inside a row, as the operators take them."""
    for name in ("seq_idx", "cu_seqlens"):
        if (value := kwargs.get(name)) is not None:
            if cache is not None:
                raise ValueError(f"{name} must be None with a cache, got a tensor: pass use_cache=False")
            return {name: value.to(torch.int32)}
    return {}


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def _convolve(self: Any, xBC: Tensor, cache: Any, layer: Any, packing: dict[str, Any]) -> Tensor:
    weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
    seqlen = xBC.shape[1]
    # the update has no gradient, and moves the state on where a layer that records keeps every column of it
    if layer is not None and seqlen == 1 and not layer.record_past and not torch.is_grad_enabled():
        return causal_conv1d_update(xBC, layer.conv_states[0], weight, bias, activation="silu")
    if cache is not None:  # what comes back is longer: with the history in front
        columns = cache.update_conv_state(xBC.mT, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        xBC = columns.mT
    y = causal_conv1d(xBC, weight, bias, activation="silu", **packing)
    return y[:, -seqlen:]  # type: ignore[call-overload]


def _scan(
    self: Any,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    cache: Any,
    state: Tensor | None,
    packing: dict[str, Any],
) -> Tensor:
    A = -torch.exp(self.A_log.float())
    options: dict[str, Any] = dict(D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True)
    decoding = state is not None and x.shape[1] == 1
    if state is not None and torch.is_grad_enabled():
        state = state.clone()  # kept for the backward pass, while the cache's own is overwritten below
    elif state is not None and decoding:
        return ssd_state_update(state, x, dt, A, B, C, **options)
    # as in transformers, steps are clamped in prefill alone
    limit = NO_LIMIT if decoding else tuple(self.time_step_limit)
    y, final = ssd_chunk_scan(
        x, dt, A, B, C, dt_limit=limit, initial_states=state, return_final_states=True, **options, **packing
    )
    if cache is not None:
        cache.update_recurrent_state(final, layer_idx=self.layer_idx)
    return y
