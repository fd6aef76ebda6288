"""Small models whose every parameter matters: at a usual initialisation even the whole state moves logits by 1e-5."""

import math

import torch

_SMALL = dict(
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=2,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=80,
    moe_latent_size=None,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
# head_dim 80; twelve heads per group; one group, biases, attention wider than the model and in front, window of 3;
# mixtures of experts: plain; experts of an odd width, weights as they are; chosen among groups; latent
CONFIGS = {
    "head-dim-80": dict(
        hybrid_override_pattern="M*-M",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=80,
        ssm_state_size=16,
        n_groups=2,
    ),
    "twelve-heads-per-group": dict(
        hybrid_override_pattern="MM*-",
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        mamba_num_heads=24,
        mamba_head_dim=8,
        ssm_state_size=32,
        n_groups=2,
    ),
    "biases": dict(
        hybrid_override_pattern="*M-M",
        hidden_size=40,
        intermediate_size=56,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=24,
        mamba_num_heads=3,
        mamba_head_dim=16,
        ssm_state_size=24,
        n_groups=1,
        conv_kernel=3,
        use_bias=True,
        mlp_bias=True,
    ),
    "moe": _SMALL | dict(hybrid_override_pattern="ME*-"),
    "moe-odd-experts": _SMALL | dict(hybrid_override_pattern="EM*", moe_intermediate_size=36, norm_topk_prob=False),
    "moe-groups": _SMALL | dict(hybrid_override_pattern="MEE*", n_routed_experts=12, n_group=4, topk_group=2),
    "moe-latent": _SMALL
    | dict(hybrid_override_pattern="ME*E", moe_latent_size=24, n_routed_experts=16, num_experts_per_tok=5),
}
# with a multi-token prediction head, which transformers does not have; and layers that differ
MTP_CONFIGS = {
    "mtp": _SMALL | dict(hybrid_override_pattern="ME*M", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E"),
    "mtp-latent": CONFIGS["moe-latent"] | dict(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E-"),
    "puzzle": _SMALL
    | dict(
        hybrid_override_pattern="MEE*",
        block_configs=(
            {},
            dict(moe_intermediate_size=40, num_experts_per_tok=2),
            dict(n_routed_experts=6, moe_latent_size=24, routed_scaling_factor=1.0),
            {},
        ),
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*E",
        mtp_block_configs=({}, dict(moe_intermediate_size=24, num_experts_per_tok=4)),
    ),
}
COMMON = dict(vocab_size=96, chunk_size=16, eos_token_id=None, pad_token_id=0)


@torch.no_grad()
def redraw(model, seed=0):
    """Draw every parameter and floating buffer of a hybrid model, ours or transformers', by its name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t, std, mean=0.0):
        t.copy_(mean + std * torch.randn(t.shape, generator=generator, dtype=torch.float64))

    def uniform(t, low, high):
        t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator, dtype=torch.float64))

    names = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    for name, t in sorted(names.items(), key=lambda item: item[0].split(".", 1)[-1]):
        if name.endswith("inv_freq"):
            pass  # frequencies of rotary embeddings are no weights
        elif name.endswith("A_log"):
            uniform(t, math.log(0.05), math.log(8))  # from states that last to states that are gone at once
        elif name.endswith("dt_bias"):
            uniform(t, -9, 1)  # dt below time_step_min too
        elif name.endswith(("norm.weight", "norm_f.weight", "mup_vector")):
            uniform(t, 0.5, 1.5)
        elif name.endswith(".D"):
            normal(t, 1)
        elif name.endswith(("bias", "conv1d.weight")):
            normal(t, 0.5)
        elif "embed" in name:
            normal(t, 1)
        else:
            normal(t, max(0.1, (2 if "lm_head" in name else 1) / math.sqrt(t.shape[-1])))
    return model
