"""`PRESETS`: the published models, and two small ones, as fields of `NemotronHConfig`."""

from typing import Any

_H_8B = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"

_NANO_30B: dict[str, Any] = dict(
    hybrid_override_pattern="MEMEM*E" * 5 + "MEMEMEM*E" + "MEMEMEME",
    hidden_size=2688,
    num_key_value_heads=2,
    mamba_num_heads=64,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
)

_TINY: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_groups=1,
    chunk_size=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)

PRESETS: dict[str, dict[str, Any]] = {
    "nemotron-h-4b": dict(
        hybrid_override_pattern=_H_8B, hidden_size=3072, intermediate_size=12288, mamba_num_heads=112
    ),
    "nemotron-h-8b": dict(hybrid_override_pattern=_H_8B),
    "nemotron-h-47b": dict(
        hybrid_override_pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        hidden_size=8192,
        intermediate_size=30720,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
    ),
    "nemotron-h-56b": dict(
        hybrid_override_pattern="M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
        hidden_size=8192,
        intermediate_size=32768,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
    ),
    "nemotron-nano-9b-v2": dict(
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        intermediate_size=15680,
        num_attention_heads=40,
        mamba_head_dim=80,
    ),
    "nemotron-nano-12b-v2": dict(
        hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        intermediate_size=20480,
        num_attention_heads=40,
        mamba_head_dim=80,
    ),
    "nemotron-3-nano-4b": dict(
        hybrid_override_pattern="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        hidden_size=3136,
        intermediate_size=12544,
        num_attention_heads=40,
        mamba_num_heads=96,
        mamba_head_dim=80,
        chunk_size=256,
    ),
    "nemotron-3-nano-30b": _NANO_30B,
    "nemotron-3.5-lightning-30b": _NANO_30B | dict(num_nextn_predict_layers=1),
    "nemotron-3-super-120b": dict(
        hybrid_override_pattern="MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME",
        num_key_value_heads=2,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_latent_size=1024,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
    ),
    "nemotron-3-ultra-550b": dict(
        hybrid_override_pattern="MEMEMEM*" + ("EMEMEM*" + "EMEMEMEM*" * 2) * 3 + "EMEMEM*" + "EMEMEMEM*" + "EMEMEMEME",
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=2,
        mamba_num_heads=256,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_latent_size=2048,
        moe_intermediate_size=5120,
        moe_shared_expert_intermediate_size=10240,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
    ),
    "tiny": _TINY | dict(hybrid_override_pattern="M-M*-M-"),
    "tiny-moe": _TINY
    | dict(
        hybrid_override_pattern="MEM*-ME",
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_latent_size=64,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=128,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
}
