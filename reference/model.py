"""The whole hybrid model: Mamba-2, attention, MLP and mixture-of-experts layers, as in NVIDIA's Nemotron-H family.

    h = embeddings[ids];  h = h + mixer(norm(h)) for every layer;  logits = norm_f(h) lm_head^T

Weights are arrays under the names of Hugging Face's `nemotron_h` checkpoints (`backbone.layers.0.mixer.A_log`), those
of a layer's experts in one array (`mixer.experts.up_proj`); the configuration is any object with that format's field
names. Nothing here knows about chunks, pools or packing.
"""

import numpy as np

from .conv1d import causal_conv1d
from .moe import latent_moe
from .norm import gated_rms_norm, rms_norm
from .products import product
from .ssd import ssd_chunk_scan


def forward(weights, config, input_ids, *, states=None, dt_limit=None, dtype=np.float64):
    """Read input_ids (batch, seqlen), going on from `states`. Returns (logits (batch, seqlen, vocab), states).

    One call reads a prompt at once; several calls, each given the states that the one before returned, read it in
    pieces or token by token. `states` has an entry for each layer: (conv, ssm), (k, v) or None.
    """
    w = {name: np.asarray(array, dtype) for name, array in weights.items()}
    h, states = backbone(w, config, input_ids, states=states, dt_limit=dt_limit, dtype=dtype)
    return product(h, w["lm_head.weight"].T), states


def backbone(w, config, input_ids, *, states=None, dt_limit=None, dtype=np.float64):
    """Returns (h (batch, seqlen, hidden) behind the final norm, states)."""
    dt_limit = config.time_step_limit if dt_limit is None else dt_limit
    h = w["backbone.embeddings.weight"][np.asarray(input_ids)]
    h, states = layers(w, config, "backbone.", config.hybrid_override_pattern, h, states, dt_limit, dtype)
    return rms_norm(h, w["backbone.norm_f.weight"], eps=config.layer_norm_epsilon, dtype=dtype), states


def mtp(weights, config, hidden, next_ids, *, states=None, dtype=np.float64):
    """The multi-token prediction head (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2).

    hidden (batch, seqlen, hidden) is what the backbone, or this head one depth before, made of the tokens, next_ids
    (batch, seqlen) the token behind each. Returns (logits of the token behind that, the head's own hidden, states).
    """
    w = {name: np.asarray(array, dtype) for name, array in weights.items()}
    eps, pattern = config.layer_norm_epsilon, config.mtp_hybrid_override_pattern
    embedded = w["backbone.embeddings.weight"][np.asarray(next_ids)]
    e = rms_norm(embedded, w["mtp.layers.0.enorm.weight"], eps=eps, dtype=dtype)
    h = rms_norm(hidden, w["mtp.layers.0.hnorm.weight"], eps=eps, dtype=dtype)
    x = product(np.concatenate([e, h], axis=-1), w["mtp.layers.0.eh_proj.weight"].T)
    x, states = layers(w, config, "mtp.", pattern, x, states, None, dtype)
    o = rms_norm(x, w[f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"], eps=eps, dtype=dtype)
    return product(o, w["lm_head.weight"].T), o, states


def layers(w, config, module, pattern, h, states, dt_limit, dtype):
    """h = h + mixer(norm(h)) for every letter. Returns (h, states)."""
    states = [None] * len(pattern) if states is None else states
    blocks = getattr(config, "mtp_block_configs" if module == "mtp." else "block_configs", None)
    after = []
    for i, letter in enumerate(pattern):
        prefix = f"{module}layers.{i}."
        mixer = {name.removeprefix(prefix + "mixer."): a for name, a in w.items() if name.startswith(prefix + "mixer.")}
        u = rms_norm(h, w[prefix + "norm.weight"], eps=config.layer_norm_epsilon, dtype=dtype)
        if letter == "M":
            y, state = mamba2(mixer, config, u, states[i], dt_limit, dtype)
        elif letter == "*":
            y, state = attention(mixer, config, u, states[i])
        elif letter == "-":
            y, state = mlp(mixer, u), None
        elif letter == "E":
            own = blocks[i] if blocks else {}
            y, state = moe(mixer, vars(config) | own, u, dtype), None
        else:
            raise ValueError(f"layer {i} of the pattern must be 'M', '*', '-' or 'E', got {letter!r}")
        h = h + y
        after.append(state)
    return h, after


def mamba2(w, config, u, state, dt_limit, dtype):
    """Dao and Gu 2024, "Transformers are SSMs", section 7. u (batch, seqlen, hidden); state (conv, ssm) or None."""
    nheads, headdim = config.mamba_num_heads, config.mamba_head_dim
    ngroups, dstate = config.n_groups, config.ssm_state_size
    d_inner = nheads * headdim
    conv_state, ssm_state = (None, None) if state is None else state
    z, xBC, dt = np.split(linear(w, "in_proj", u), [d_inner, 2 * d_inner + 2 * ngroups * dstate], axis=-1)
    xBC, conv_state = causal_conv1d(
        xBC, w["conv1d.weight"][:, 0], w.get("conv1d.bias"), activation="silu", initial_states=conv_state, dtype=dtype
    )
    x, B, C = np.split(xBC, [d_inner, d_inner + ngroups * dstate], axis=-1)
    y, ssm_state, _ = ssd_chunk_scan(
        x.reshape(*x.shape[:2], nheads, headdim),
        dt,
        -np.exp(w["A_log"]),
        B.reshape(*B.shape[:2], ngroups, dstate),
        C.reshape(*C.shape[:2], ngroups, dstate),
        D=w["D"],
        dt_bias=w["dt_bias"],
        dt_softplus=True,
        dt_limit=dt_limit,
        initial_states=ssm_state,
        dtype=dtype,
    )
    y = gated_rms_norm(
        y.reshape(z.shape),
        z,
        w["norm.weight"],
        eps=config.layer_norm_epsilon,
        group_size=d_inner // ngroups,
        dtype=dtype,
    )
    return linear(w, "out_proj", y), (conv_state, ssm_state)


def attention(w, config, u, state):
    """Causal; query head h reads key head h // (heads / kv_heads). state (k, v): (batch, past, kv_heads, headdim)."""
    q, k, v = (linear(w, name, u) for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (a.reshape(*a.shape[:2], -1, config.head_dim) for a in (q, k, v))
    if state is not None:
        k, v = (np.concatenate([old, new], axis=1) for old, new in zip(state, (k, v), strict=True))
    per_key = config.num_attention_heads // config.num_key_value_heads
    keys, values = (np.repeat(a, per_key, axis=2) for a in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, keys) / np.sqrt(config.head_dim)
    seen = np.arange(k.shape[1])[None] <= np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), values)
    return linear(w, "o_proj", y.reshape(*u.shape[:2], -1)), (k, v)


def mlp(w, u):
    """down(relu(up(u))^2)."""
    return linear(w, "down_proj", np.maximum(linear(w, "up_proj", u), 0) ** 2)


def moe(w, config, u, dtype):
    """Mixture of experts; config is a dict, the layer's own values in it."""
    out = latent_moe(
        u.reshape(-1, u.shape[-1]),
        w["gate.weight"],
        w["experts.up_proj"],
        w["experts.down_proj"],
        config["num_experts_per_tok"],
        fc1_weight=w.get("fc1_latent_proj.weight"),
        fc2_weight=w.get("fc2_latent_proj.weight"),
        shared_up_weight=w["shared_experts.up_proj.weight"],
        shared_down_weight=w["shared_experts.down_proj.weight"],
        correction_bias=w["gate.e_score_correction_bias"],
        num_groups=config["n_group"],
        topk_groups=config["topk_group"],
        renormalize=config["norm_topk_prob"],
        scaling_factor=config["routed_scaling_factor"],
        dtype=dtype,
    )
    return out.reshape(u.shape)


def linear(w, name, x):
    """x weight^T + bias, where there is one."""
    y = product(x, w[f"{name}.weight"].T)
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y
