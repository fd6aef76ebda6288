"""A model before it is built: which preset, how many of its layers, what it weighs, what a step must at least do."""

import dataclasses
import functools
import math
import os
from typing import NamedTuple

import torch
from torch import nn

from hybrid_ops.models import PRESETS, NemotronHConfig, NemotronHForCausalLM

# presets, by the names of cases
NAMES = {
    "nemotron-h-4b": "h4b",
    "nemotron-h-8b": "h8b",
    "nemotron-h-47b": "h47b",
    "nemotron-h-56b": "h56b",
    "nemotron-nano-9b-v2": "nano2",
    "nemotron-nano-12b-v2": "nano12b",
    "nemotron-3-nano-4b": "nano4b",
    "nemotron-3-nano-30b": "nano3",
    "nemotron-3.5-lightning-30b": "lightning",
    "nemotron-3-super-120b": "super",
    "nemotron-3-ultra-550b": "ultra",
    "tiny": "tiny",
    "tiny-moe": "tiny-moe",
}
SHORT = {f"nemotron-3-{name}": f"nemotron-3-{name}-{size}" for name, size in
         (("nano", "30b"), ("super", "120b"), ("ultra", "550b"))}  # fmt: skip
KINDS = {"M": "Mamba-2", "E": "MoE", "*": "attention", "-": "MLP"}
SPARE = 2**30  # bytes: what the GPU's libraries and a caching allocator hold besides


class Work(NamedTuple):
    """Of one call: bytes that must move at least once, and FLOPs of matrix products."""

    bytes: int
    flops: int
    rate: str = "bf16_tflops"  # the measured ceiling that flops are compared with


@dataclasses.dataclass(frozen=True)
class Size:
    """A model on paper. It has no multi-token prediction head: neither prefill nor a decoding step passes one."""

    name: str  # in cases: nano3-52L
    config: NemotronHConfig
    dtype: torch.dtype
    parameters: int
    experts: int  # parameters of routed experts
    bytes: int
    largest_layer: int  # parameters

    @property
    def element(self) -> int:
        return torch.finfo(self.dtype).bits // 8

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: without the embedding, with its own experts only."""
        config = self.config
        rest = self.parameters - self.experts - config.vocab_size * config.hidden_size
        return rest + self.experts * config.num_experts_per_tok // config.n_routed_experts

    def count(self, letter: str) -> int:
        return self.config.hybrid_override_pattern.count(letter)

    def cache_bytes(self, length: int) -> int:
        """Of one sequence: Mamba states, in their own dtype, and keys and values."""
        config = self.config
        state = torch.finfo(getattr(torch, config.mamba_ssm_cache_dtype)).bits // 8
        mamba = state * config.d_inner * config.ssm_state_size + self.element * config.conv_dim * config.conv_kernel
        kv = 2 * self.element * config.num_key_value_heads * config.head_dim * length
        return self.count("M") * mamba + self.count("*") * kv

    def weights_read(self, tokens: int) -> int:
        """Bytes of the weights that so many tokens meet, if every expert is as likely as any other."""
        missed = (1 - self.config.num_experts_per_tok / self.config.n_routed_experts) ** tokens
        embedding = self.element * self.config.vocab_size * self.config.hidden_size
        return self.bytes - embedding - round(self.element * self.experts * missed)

    def prefill(self, batch: int, seqlen: int) -> Work:
        """Logits of the last tokens only."""
        config, tokens = self.config, batch * seqlen
        head = config.vocab_size * config.hidden_size
        flops = 2 * tokens * (self.active - head) + 2 * batch * head
        flops += self.count("*") * 2 * tokens * seqlen * config.num_attention_heads * config.head_dim  # causal half
        # as in ssd.py: the state's update and its product with C; C B^T and its product with x, causal half
        inner, groups = config.d_inner, config.n_groups * config.ssm_state_size
        scan = 4 * inner * config.ssm_state_size + min(config.chunk_size, seqlen) * (inner + groups)
        flops += self.count("M") * tokens * scan
        return Work(self.weights_read(tokens) + batch * self.cache_bytes(seqlen), flops)

    def decode(self, batch: int, context: int) -> Work:
        """One token for each sequence: states are read and written, keys and values read."""
        config = self.config
        flops = 2 * batch * self.active
        flops += self.count("*") * 4 * batch * context * config.num_attention_heads * config.head_dim
        flops += self.count("M") * 4 * batch * config.d_inner * config.ssm_state_size
        caches = self.cache_bytes(context) + self.cache_bytes(0)
        return Work(self.weights_read(batch) + batch * caches, flops)

    def needed(self, prompts: list[tuple[int, int]], batch: int, length: int) -> int:
        """Bytes for the weights and, by estimate, the largest of: a prompt (batch, seqlen) on its way; decoding.

        Beside the weights the check keeps the largest layer in wider arithmetic as well.
        """
        config, element = self.config, self.element
        features = config.moe_latent_size or config.hidden_size
        per_token = {
            "M": element * 4 * (config.d_inner + config.conv_dim)
            + 8 * config.d_inner * config.ssm_state_size // config.chunk_size,
            "E": element * config.num_experts_per_tok * (3 * features + 2 * config.moe_intermediate_size),
            "-": element * 3 * config.intermediate_size,
            "*": element * 4 * config.num_attention_heads * config.head_dim,
        }
        widest = max(per_token[letter] for letter in config.hybrid_override_pattern) + 8 * element * config.hidden_size
        calls = [b * (seqlen * widest + self.cache_bytes(seqlen)) for b, seqlen in prompts]
        calls.append(2 * batch * (self.cache_bytes(length) + 4 * config.vocab_size))
        wide = 8 if self.dtype == torch.float32 else 4
        return self.bytes + max(*calls, (element + wide) * self.largest_layer) + SPARE

    def describe(self) -> str:
        counts = ", ".join(f"{self.count(letter)} {KINDS[letter]}" for letter in KINDS if self.count(letter))
        return (
            f"{self.name}: {counts} layers; {_short(self.parameters)} parameters, {_short(self.active)} at work for a "
            f"token; {gigabytes(self.bytes)} in {str(self.dtype).removeprefix('torch.')}"
        )


def preset(name: str) -> str:
    """The preset that is meant: by its own name, a short one (nemotron-3-nano), or the one in cases (nano3).

    Raises:
        ValueError: none is.
    """
    known = {**{case: full for full, case in NAMES.items()}, **SHORT, **{full: full for full in PRESETS}}
    if name not in known:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return known[name]


def size(name: str, layers: int | None, dtype: torch.dtype) -> Size:
    """Of a preset, whole or with so many of its layers."""
    name = preset(name)
    config = NemotronHConfig.preset(name, num_nextn_predict_layers=0)
    # random weights that keep a layer's scale, in small models too: the 0.02 of the published ones is this at 2500
    config = dataclasses.replace(config, initializer_range=config.hidden_size**-0.5)
    if layers is not None:
        config = cut(config, layers)
    kinds, rest = _weights(name, dtype)
    pattern = [kinds[letter] for letter in config.hybrid_override_pattern]
    return Size(
        name=f"{NAMES[name]}-{config.num_hidden_layers}L",
        config=config,
        dtype=dtype,
        parameters=rest.parameters + sum(layer.parameters for layer in pattern),
        experts=sum(layer.experts for layer in pattern),
        bytes=rest.bytes + sum(layer.bytes for layer in pattern),
        largest_layer=max(layer.parameters for layer in pattern),
    )


class _Weights(NamedTuple):
    parameters: int
    experts: int
    bytes: int

    @classmethod
    def of(cls, *modules: nn.Module) -> "_Weights":
        tensors = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
        return cls(
            sum(p.numel() for p in tensors.values()),
            sum(p.numel() for name, p in tensors.items() if ".experts." in name),
            sum(p.numel() * p.element_size() for p in tensors.values()),
        )


@functools.cache
def _weights(name: str, dtype: torch.dtype) -> tuple[dict[str, _Weights], _Weights]:
    """Of a layer of each kind, by its letter; and of what is outside the layers."""
    config = NemotronHConfig.preset(name, num_nextn_predict_layers=0)
    config = cut(config, len(set(config.hybrid_override_pattern)))
    model = NemotronHForCausalLM(config, device="meta", dtype=dtype)
    layers = zip(config.hybrid_override_pattern, model.backbone.layers, strict=True)
    rest = _Weights.of(model.backbone.embeddings, model.backbone.norm_f, model.lm_head)
    return {letter: _Weights.of(layer) for letter, layer in layers}, rest


def cut(config: NemotronHConfig, layers: int) -> NemotronHConfig:
    """So many of the layers, in their order: each kind in proportion, evenly spread, and at least one of it.

    Raises:
        ValueError: more layers than there are, or fewer than kinds.
    """
    pattern = config.hybrid_override_pattern
    places = {letter: [i for i, other in enumerate(pattern) if other == letter] for letter in dict.fromkeys(pattern)}
    if not len(places) <= layers <= len(pattern):
        raise ValueError(
            f"layers must be {len(places)}, one of each kind, to {len(pattern)}, all that the model has, got {layers}"
        )
    share = {letter: layers * len(where) / len(pattern) for letter, where in places.items()}
    counts = {letter: max(1, math.floor(part)) for letter, part in share.items()}
    while sum(counts.values()) != layers:  # the kind that is furthest from its share gets one more, or gives one
        missing = sum(counts.values()) < layers
        candidates = [letter for letter in counts if missing or counts[letter] > 1]
        letter = max(candidates, key=lambda letter: (share[letter] - counts[letter]) * (1 if missing else -1))
        counts[letter] += 1 if missing else -1
    chosen = sorted(
        where[(2 * i + 1) * len(where) // (2 * counts[letter])]
        for letter, where in places.items()
        for i in range(counts[letter])
    )
    return dataclasses.replace(config, hybrid_override_pattern="".join(pattern[i] for i in chosen))


def available(device: torch.device) -> int:
    """Bytes that a model may take: what is free on the GPU, or in the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _short(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
