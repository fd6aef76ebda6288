"""The whole hybrid model: Mamba-2, attention and MLP layers, as NVIDIA's Nemotron-H family arranges them.

    h = embeddings[ids];  h = h + mixer(norm(h)) for every layer;  logits = norm_f(h) lm_head^T

Weights are arrays under the names of Hugging Face's `nemotron_h` checkpoints (`backbone.layers.0.mixer.A_log`); the
configuration is any object with that format's field names. Nothing here knows about chunks, pools or packing.
"""

import numpy as np

from .conv1d import causal_conv1d
from .norm import gated_rms_norm, rms_norm
from .ssd import ssd_chunk_scan


def forward(weights, config, input_ids, *, states=None, dt_limit=None, dtype=np.float64):
    """Read input_ids (batch, seqlen), going on from `states`. Returns (logits (batch, seqlen, vocab), states).

    One call reads a prompt at once; several calls, each given the states that the one before returned, read it in
    pieces or token by token. `states` has an entry for each layer: (conv, ssm), (k, v) or None.
    """
    w = {name: np.asarray(array, dtype) for name, array in weights.items()}
    dt_limit = config.time_step_limit if dt_limit is None else dt_limit
    states = [None] * len(config.hybrid_override_pattern) if states is None else states
    after = []
    h = w["backbone.embeddings.weight"][np.asarray(input_ids)]
    for i, letter in enumerate(config.hybrid_override_pattern):
        prefix = f"backbone.layers.{i}."
        mixer = {name.removeprefix(prefix + "mixer."): a for name, a in w.items() if name.startswith(prefix + "mixer.")}
        u = rms_norm(h, w[prefix + "norm.weight"], eps=config.layer_norm_epsilon, dtype=dtype)
        if letter == "M":
            y, state = mamba2(mixer, config, u, states[i], dt_limit, dtype)
        elif letter == "*":
            y, state = attention(mixer, config, u, states[i])
        elif letter == "-":
            y, state = mlp(mixer, u), None
        else:
            raise ValueError(f"layer {i} of the pattern must be 'M', '*' or '-', got {letter!r}")
        h = h + y
        after.append(state)
    h = rms_norm(h, w["backbone.norm_f.weight"], eps=config.layer_norm_epsilon, dtype=dtype)
    return h @ w["lm_head.weight"].T, after


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


def linear(w, name, x):
    """x weight^T + bias, where there is one."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y
