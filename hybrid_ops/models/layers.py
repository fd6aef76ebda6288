"""The layers of a hybrid model: Mamba-2, attention, MLP and mixture of experts, each with its norm; `Backbone`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MLP, Attention, KVCache, Mamba2Mixer, MambaState, MoE, RMSNorm
from .cache import HybridCache
from .config import NemotronHConfig


def _mamba2(config: NemotronHConfig, **factory: Any) -> nn.Module:
    return Mamba2Mixer(
        config.hidden_size,
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        state_size=config.ssm_state_size,
        num_groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        chunk_size=config.chunk_size,
        bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        eps=config.layer_norm_epsilon,
        **factory,
    )


def _attention(config: NemotronHConfig, **factory: Any) -> nn.Module:
    return Attention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        **factory,
    )


def _mlp(config: NemotronHConfig, **factory: Any) -> nn.Module:
    return MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **factory)


def _moe(config: NemotronHConfig, **factory: Any) -> nn.Module:
    return MoE(
        config.hidden_size,
        num_experts=config.n_routed_experts,
        topk=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        shared_intermediate_size=config.moe_shared_expert_intermediate_size,
        latent_size=config.moe_latent_size,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        renormalize=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
        **factory,
    )


# The mixer behind each letter of a pattern; `Layer` calls it.
MIXERS: dict[str, Callable[..., nn.Module]] = {"M": _mamba2, "*": _attention, "-": _mlp, "E": _moe}


class Layer(nn.Module):
    """One letter of the pattern: a norm and a mixer.

    The sum `residual + x` is left to the norm of the next layer, which does both in one kernel.
    """

    def __init__(self, letter: str, config: NemotronHConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon, **factory)
        self.mixer = MIXERS[letter](config, **factory)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: MambaState | KVCache | None,
        cu_seqlens: Tensor | None,
        bounds: list[int] | None,
        decode: bool,
    ) -> tuple[Tensor, Tensor]:
        """(mixer(norm(residual + x)), residual + x), both (batch, seqlen, hidden); residual is None for the first."""
        if residual is None:
            in_fp32 = self.config.residual_in_fp32 and x.dtype != torch.float64
            x, residual = self.norm(x), x.float() if in_fp32 else x
        else:
            x, residual = self.norm.add(x, residual)
        if isinstance(self.mixer, Mamba2Mixer):
            limit = self.config.dt_limit(prefill=not decode)
            if decode:
                x = self.mixer.step(x, state, dt_limit=limit)  # type: ignore[arg-type]
            else:
                x = self.mixer(x, cu_seqlens=cu_seqlens, state=state, dt_limit=limit)
        elif isinstance(self.mixer, Attention):
            x = self.mixer(x, bounds=bounds, cache=state)
        else:
            x = self.mixer(x)
        return x, residual


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: NemotronHConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            [
                Layer(letter, config.for_layer(index), **factory)
                for index, letter in enumerate(config.hybrid_override_pattern)
            ]
        )
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon, **factory)

    def forward(
        self,
        input_ids: Tensor,
        cache: HybridCache | None,
        cu_seqlens: Tensor | None,
        bounds: list[int] | None,
        decode: bool,
    ) -> Tensor:
        """(batch, seqlen) -> (batch, seqlen, hidden); with `decode` through the update operators."""
        x, residual = self.embeddings(input_ids), None
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, None if cache is None else cache.layers[index], cu_seqlens, bounds, decode)
        return self.norm_f.add(x, residual)[0]  # type: ignore[arg-type]  # there is at least one layer
