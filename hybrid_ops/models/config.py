"""`NemotronHConfig`: the sizes of a hybrid model, under the names of Hugging Face's `nemotron_h`."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from .presets import PRESETS

# The letters of a layer pattern, and the names that lists of layers use for them: transformers 5, then older ones.
LAYER_NAMES = {
    "M": ("linear_attention", "mamba", "mamba2"),
    "*": ("full_attention", "attention"),
    "-": ("mlp",),
    "E": ("moe",),
}
_LETTERS = {name: letter for letter, names in LAYER_NAMES.items() for name in names}
_BLOCK_TYPES = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # as `nemotron_h_puzzle` writes them

# Other names under which a field is found in a config.json.
_ALIASES = {
    "head_dim": ("attention_head_dim",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "use_conv_bias": ("mamba_conv_bias",),
    "time_step_min": ("mamba_dt_min",),
    "time_step_max": ("mamba_dt_max",),
    "time_step_floor": ("mamba_dt_init_floor",),
    "time_step_limit": ("mamba_dt_limit",),
    "n_routed_experts": ("num_local_experts",),
    "dtype": ("torch_dtype",),
}
# What a config.json may say and the model does not do: anything but this value is refused.
_ONLY = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "tie_word_embeddings": False,
    "n_shared_experts": 1,
    "sliding_window": None,
    "attention_dropout": 0,
    "hidden_dropout": 0,
}
# What a layer of a `nemotron_h_puzzle` may have of its own.
_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "M": ("ssm_state_size",),
    "*": (),
    "-": ("intermediate_size",),
    "E": (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
    ),
}


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig:
    """Sizes and options of a hybrid Mamba-2 / attention / MLP / mixture-of-experts model.

    Field names and defaults are those of Hugging Face's `nemotron_h`, with these differences: the layers are the
    string `hybrid_override_pattern` ("M" Mamba-2, "*" attention, "-" MLP, "E" mixture of experts; one letter is one
    layer with its own norm and residual), those of the multi-token prediction head `mtp_hybrid_override_pattern`;
    `expand` does not exist, the inner width is `mamba_num_heads * mamba_head_dim`; and two fields say where dt is
    clamped.

    Args:
        n_routed_experts, num_experts_per_tok: how many experts a layer "E" has, and how many of them a token goes to.
        moe_intermediate_size, moe_shared_expert_intermediate_size: width of a routed and of the shared expert.
        moe_latent_size: the routed experts read and write so many features (LatentMoE); None: all of hidden_size.
        n_group, topk_group: the router chooses among the experts of the topk_group best of n_group groups.
        norm_topk_prob, routed_scaling_factor: a token's weights are divided by their sum, then multiplied by this.
        num_nextn_predict_layers: 1 for a model with a multi-token prediction head, otherwise 0.
        block_configs: where layers differ (`nemotron_h_puzzle`), for each layer a dict of the fields of its own;
            `mtp_block_configs` for the layers of the head. `for_layer` puts them in.
        time_step_limit: dt is clamped to this interval everywhere; (0, inf) is no clamp.
        clamp_time_step_min: "never", "prefill" or "always": where dt is also raised to `time_step_min`. transformers
            raises it in prefill only, so that reading a prompt at once and token by token differ there.
        mamba_ssm_cache_dtype: dtype of the SSM states kept between calls: "float32", "bfloat16" or "float16".
        dtype: of the weights, as the checkpoint names it; None where it says nothing.

    Raises:
        ValueError: a pattern, size or option that the model cannot have, by name.

    >>> from hybrid_ops.models import NemotronHConfig
    >>> NemotronHConfig.preset("nemotron-h-8b").d_inner
    8192
    """

    hybrid_override_pattern: str
    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 21504
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    layer_norm_epsilon: float = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    residual_in_fp32: bool = False
    rescale_prenorm_residual: bool = True
    initializer_range: float = 0.02
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    clamp_time_step_min: str = "never"
    mamba_ssm_cache_dtype: str = "float32"
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = "*E"
    block_configs: tuple[dict[str, Any], ...] | None = None
    mtp_block_configs: tuple[dict[str, Any], ...] | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_step_limit", tuple(_unlimited(t) for t in self.time_step_limit))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_pattern("hybrid_override_pattern", self.hybrid_override_pattern, tuple(LAYER_NAMES))
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(
                "num_nextn_predict_layers must be 0 or 1, one block that predicts any number of tokens, "
                f"got {self.num_nextn_predict_layers!r}"
            )
        if self.num_nextn_predict_layers:  # the head keeps no state but keys and values
            _check_pattern("mtp_hybrid_override_pattern", self.mtp_hybrid_override_pattern, ("*", "-", "E"))
        else:
            object.__setattr__(self, "mtp_block_configs", None)
        for field in _SIZES:
            size = getattr(self, field)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{field} must be a positive integer, got {size!r}")
        for whole, part in (("mamba_num_heads", "n_groups"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} must divide {whole}={getattr(self, whole)}, got {getattr(self, part)}")
        if self.conv_kernel > 8:
            raise ValueError(f"conv_kernel must be at most 8, got {self.conv_kernel}")
        if len(self.time_step_limit) != 2 or not 0 <= self.time_step_limit[0] <= self.time_step_limit[1]:
            raise ValueError(f"time_step_limit must be (low, high) with 0 <= low <= high, got {self.time_step_limit}")
        if self.clamp_time_step_min not in ("never", "prefill", "always"):
            raise ValueError(
                f"clamp_time_step_min must be 'never', 'prefill' or 'always', got {self.clamp_time_step_min!r}"
            )
        if self.mamba_ssm_cache_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"mamba_ssm_cache_dtype must be 'float32', 'bfloat16' or 'float16', got {self.mamba_ssm_cache_dtype!r}"
            )
        for mtp, field in ((False, "block_configs"), (True, "mtp_block_configs")):
            pattern = self._pattern(mtp)
            if getattr(self, field) is not None and pattern:
                object.__setattr__(self, field, _own_fields(field, getattr(self, field), pattern))
                for index in range(len(pattern)):
                    try:
                        self.for_layer(index, mtp=mtp)
                    except ValueError as error:
                        raise ValueError(f"{field}[{index}]: {error}") from error
            elif "E" in pattern:
                self._check_experts()

    def _check_experts(self) -> None:
        for field in _EXPERT_SIZES:
            size = getattr(self, field)
            if (not isinstance(size, int) or size < 1) and not (field == "moe_latent_size" and size is None):
                raise ValueError(f"{field} must be a positive integer, got {size!r}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group must divide n_routed_experts={self.n_routed_experts}, got {self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group={self.n_group}, got {self.topk_group}")
        within_reach = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > within_reach:
            raise ValueError(
                f"num_experts_per_tok must be at most the {within_reach} experts of {self.topk_group} groups, "
                f"got {self.num_experts_per_tok}"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias must be False in a model with experts, got True")

    def _pattern(self, mtp: bool) -> str:
        if mtp:
            return self.mtp_hybrid_override_pattern if self.num_nextn_predict_layers else ""
        return self.hybrid_override_pattern

    def for_layer(self, index: int, *, mtp: bool = False) -> "NemotronHConfig":
        """The configuration of one layer, of the multi-token prediction head with `mtp`.

        Where `block_configs` says nothing, that is the model's own. Otherwise it is that of a model of this one layer.
        """
        blocks = self.mtp_block_configs if mtp else self.block_configs
        if blocks is None:
            return self
        alone = dict(
            hybrid_override_pattern=self._pattern(mtp)[index],
            num_nextn_predict_layers=0,
            block_configs=None,
            mtp_block_configs=None,
        )
        return dataclasses.replace(self, **alone | blocks[index])  # type: ignore[arg-type]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def d_inner(self) -> int:
        """Width of the Mamba-2 mixer: mamba_num_heads * mamba_head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, none, one or several."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def dt_limit(self, prefill: bool) -> tuple[float, float]:
        """The interval to which dt is clamped in prefill or in decoding."""
        low, high = self.time_step_limit
        if self.clamp_time_step_min == "always" or (prefill and self.clamp_time_step_min == "prefill"):
            low = max(low, self.time_step_min)
        return low, high

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "NemotronHConfig":
        """A published model's configuration (see `PRESETS`), with fields replaced by `changes`."""
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        return cls(**PRESETS[name] | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NemotronHConfig":
        """From the contents of a `config.json`, of transformers 4 or 5; fields without a use here are skipped.

        Raises:
            ValueError: a field that the model needs is absent or says what it cannot do, or two names of one disagree.
        """
        for field, only in _ONLY.items():
            if values.get(field, only) != only:
                raise ValueError(f"{field} must be {only!r}, got {values[field]!r}: anything else is not supported")
        fields = {f.name for f in dataclasses.fields(cls)}
        known = {field: _plain(value) for field, value in values.items() if field in fields}
        for field, aliases in _ALIASES.items():
            for alias in aliases:
                value = _plain(values.get(alias))
                if value is not None and known.setdefault(field, value) != value:
                    raise ValueError(f"{field} and {alias} must agree, got {known[field]!r} and {value!r}")
        known["hybrid_override_pattern"] = pattern = _pattern(values, "")
        if pattern is None:
            raise ValueError("hybrid_override_pattern or layers_block_type must be there, got neither")
        layers = values.get("num_hidden_layers", len(pattern))
        if layers != len(pattern):
            raise ValueError(f"num_hidden_layers must be the length of the pattern, {len(pattern)}, got {layers}")
        if known.get("num_nextn_predict_layers"):
            pattern = _pattern(values, "mtp_")
            known["mtp_hybrid_override_pattern"] = cls.mtp_hybrid_override_pattern if pattern is None else pattern
        else:
            known.pop("mtp_hybrid_override_pattern", None)
            known.pop("mtp_block_configs", None)
        if known.get("num_key_value_heads", 1) is None:
            known["num_key_value_heads"] = known.get("num_attention_heads", cls.num_attention_heads)
        return cls(**known)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **changes: Any) -> "NemotronHConfig":
        """From `config.json` of a Hugging Face folder, with fields replaced by `changes`.

        The end-of-text tokens are those of `generation_config.json` where the folder has one.

        Raises:
            FileNotFoundError: the folder has no `config.json`.
            ValueError: it is not JSON or not a configuration of this model, with the file's name.
        """
        path = os.path.join(folder, "config.json")
        values = _read_json(path)
        model_type = values.get("model_type", "nemotron_h")
        if model_type not in ("nemotron_h", "nemotron_h_puzzle"):
            raise ValueError(f"{path}: model_type must be 'nemotron_h' or 'nemotron_h_puzzle', got {model_type!r}")
        try:
            config = cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        generation = os.path.join(folder, "generation_config.json")
        if os.path.exists(generation) and "eos_token_id" in (values := _read_json(generation)):
            config = dataclasses.replace(config, eos_token_id=values["eos_token_id"])
        return dataclasses.replace(config, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers and this class read."""
        values = {field: value for field, value in dataclasses.asdict(self).items() if value is not None}
        if self.time_step_limit == (0.0, math.inf):
            del values["time_step_limit"]  # every reader's default; JSON has no infinity
        else:
            values["time_step_limit"] = [min(t, 1e308) for t in self.time_step_limit]
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if values["clamp_time_step_min"] == "never":
            del values["clamp_time_step_min"]
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values.setdefault(token, None)  # absent would mean the default
        if not self.num_nextn_predict_layers:
            del values["mtp_hybrid_override_pattern"]
        puzzle = False
        for mtp, field in ((False, "block_configs"), (True, "mtp_block_configs")):
            if field in values:
                puzzle = True
                values[field] = [
                    {"block_type": _BLOCK_TYPES[letter], **own}
                    for letter, own in zip(self._pattern(mtp), values[field], strict=True)
                ]
        return {
            "architectures": ["NemotronHPuzzleForCausalLM" if puzzle else "NemotronHForCausalLM"],
            "model_type": "nemotron_h_puzzle" if puzzle else "nemotron_h",
            "num_hidden_layers": self.num_hidden_layers,
            **values,
            **_ONLY,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` into the folder, which is made if it is not there."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2, allow_nan=False)
            file.write("\n")


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "chunk_size",
)
_EXPERT_SIZES = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_group",
    "topk_group",
)


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _plain(value: Any) -> Any:
    """transformers 5 writes an infinite float as {"__float__": "Infinity"}; lists become tuples."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _unlimited(limit: float) -> float:
    """Some configurations write 1e308 for infinity, because JSON has none."""
    return math.inf if limit >= 1e308 else float(limit)


def _check_pattern(field: str, pattern: str, letters: tuple[str, ...]) -> None:
    if not pattern:
        raise ValueError(f"{field} must name at least one layer, got an empty pattern")
    for index, letter in enumerate(pattern):
        if letter not in letters:
            raise ValueError(
                f"{field} must consist of {', '.join(map(repr, letters))}, got {letter!r} for layer {index}"
            )


def _own_fields(field: str, blocks: Any, pattern: str) -> tuple[dict[str, Any], ...]:
    """What each block says beside its type, which must be the pattern's."""
    if len(blocks) != len(pattern):
        raise ValueError(f"{field} must have an entry for each of the {len(pattern)} layers, got {len(blocks)}")
    if not all(isinstance(block, dict) for block in blocks):
        raise ValueError(f"{field} must be a list of objects, got {blocks!r}")
    fields = []
    for index, (block, letter) in enumerate(zip(blocks, pattern, strict=True)):
        kind = block.get("block_type", LAYER_NAMES[letter][0])
        if kind not in LAYER_NAMES[letter]:
            raise ValueError(f"{field}[{index}] must be of the pattern's type, {_BLOCK_TYPES[letter]!r}, got {kind!r}")
        own = {key: value for key, value in block.items() if value is not None and key != "block_type"}
        if unknown := sorted(set(own) - set(_OWN_FIELDS[letter])):
            allowed = ", ".join(_OWN_FIELDS[letter]) or "nothing"
            raise ValueError(f"{field}[{index}], {kind}, may set {allowed}, got {', '.join(unknown)}")
        fields.append(own)
    return tuple(fields)


def _pattern(values: dict[str, Any], prefix: str) -> str | None:
    """The layer pattern from any generation of configuration; where several are there, they must agree."""
    field = f"{prefix}hybrid_override_pattern"
    pattern = values.get(field)
    lists = {f"{prefix}{name}": values.get(f"{prefix}{name}") for name in ("layers_block_type", "layer_types")}
    blocks = values.get(f"{prefix}block_configs")
    if blocks is not None:
        lists[f"{prefix}block_configs"] = [
            block.get("block_type") if isinstance(block, dict) else block for block in blocks
        ]
    for other, names in lists.items():
        if names is None:
            continue
        if unknown := sorted({str(name) for name in names} - set(_LETTERS)):
            raise ValueError(f"{other} must consist of {', '.join(map(repr, _LETTERS))}, got {', '.join(unknown)}")
        letters = "".join(_LETTERS[name] for name in names)
        if pattern is not None and pattern != letters:
            raise ValueError(f"{field} and {other} must agree, got {pattern!r} and {letters!r}")
        pattern = letters
    return pattern
