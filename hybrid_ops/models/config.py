"""`NemotronHConfig`: the sizes of a hybrid model, under the names of Hugging Face's `nemotron_h`; and the presets."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any

# The letters of a layer pattern, and the names that lists of layers use for them: transformers 5, then older ones.
LAYER_NAMES = {
    "M": ("linear_attention", "mamba", "mamba2"),
    "*": ("full_attention", "attention"),
    "-": ("mlp",),
    "E": ("moe",),
}
SUPPORTED_LAYERS = ("M", "*", "-")

_LETTERS = {name: letter for letter, names in LAYER_NAMES.items() for name in names}

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
    "dtype": ("torch_dtype",),
}
# What a config.json may say and the model does not do: anything but this value is refused.
_ONLY = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "attention_dropout": 0,
    "hidden_dropout": 0,
}


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig:
    """Sizes and options of a hybrid Mamba-2 / attention / MLP model.

    Field names and defaults are those of Hugging Face's `nemotron_h`, with these differences: the layers are the
    string `hybrid_override_pattern` ("M" Mamba-2, "*" attention, "-" MLP; one letter is one layer with its own norm
    and residual); `expand` does not exist, the inner width is `mamba_num_heads * mamba_head_dim`; and two fields say
    where dt is clamped.

    Args:
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
    max_position_embeddings: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_step_limit", tuple(_unlimited(t) for t in self.time_step_limit))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if not self.hybrid_override_pattern:
            raise ValueError("hybrid_override_pattern must name at least one layer, got an empty pattern")
        for index, letter in enumerate(self.hybrid_override_pattern):
            if letter not in LAYER_NAMES:
                raise ValueError(
                    f"hybrid_override_pattern must consist of {', '.join(map(repr, LAYER_NAMES))}, "
                    f"got {letter!r} for layer {index}"
                )
            if letter not in SUPPORTED_LAYERS:
                raise ValueError(
                    f"layer {index} of hybrid_override_pattern is {letter!r} ({LAYER_NAMES[letter][0]}), "
                    "which is not supported yet"
                )
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
        known["hybrid_override_pattern"] = _pattern(values)
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
        if model_type != "nemotron_h":
            raise ValueError(f"{path}: model_type must be 'nemotron_h', got {model_type!r}")
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
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
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


def _pattern(values: dict[str, Any]) -> str:
    """The layer pattern from either generation of configuration; where both are there, they must agree."""
    pattern = values.get("hybrid_override_pattern")
    for field in ("layers_block_type", "layer_types"):
        names = values.get(field)
        if names is None:
            continue
        if unknown := sorted(set(names) - set(_LETTERS)):
            raise ValueError(f"{field} must consist of {', '.join(map(repr, _LETTERS))}, got {', '.join(unknown)}")
        letters = "".join(_LETTERS[name] for name in names)
        if pattern is not None and pattern != letters:
            raise ValueError(f"hybrid_override_pattern and {field} must agree, got {pattern!r} and {letters!r}")
        pattern = letters
    if pattern is None:
        raise ValueError("hybrid_override_pattern or layers_block_type must be there, got neither")
    layers = values.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise ValueError(f"num_hidden_layers must be the length of the pattern, {len(pattern)}, got {layers}")
    return pattern


_H_8B = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"

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
    "tiny": dict(
        hybrid_override_pattern="M-M*-M-",
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
    ),
}
