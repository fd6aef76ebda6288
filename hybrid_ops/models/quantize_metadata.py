"""How ModelOpt declares what is quantised: `hf_quant_config.json`, and `quantization_config` in `config.json`."""

from collections.abc import Mapping
from typing import Any

from .._version import __version__
from .quantize_rules import KEEP, fused_with

# Nothing is calibrated, so activations have no scales: NVFP4 matrices are multiplied with bfloat16 activations.
_LAYERS: dict[str, dict[str, Any]] = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "fp8": {"quant_algo": "FP8"},
}
_NVFP4_WEIGHTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_GROUPS: dict[str, dict[str, Any]] = {
    "nvfp4": {"weights": _NVFP4_WEIGHTS},
    "fp8": {"input_activations": _FP8, "weights": _FP8},
}


def hf_quant_config(formats: Mapping[str, str]) -> dict[str, Any]:
    """The contents of `hf_quant_config.json`; `formats` has every module with a matrix."""
    quantized = {module: format for module, format in formats.items() if format != KEEP}
    used = sorted(set(quantized.values()))
    quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    if len(used) == 1:
        quantization |= _LAYERS[used[0]]
    else:
        quantization["quantized_layers"] = {module: _LAYERS[format] for module, format in quantized.items()}
    quantization["exclude_modules"] = _excluded(formats)
    return {"producer": {"name": "hybrid-ops", "version": __version__}, "quantization": quantization}


def quantization_config(formats: Mapping[str, str]) -> dict[str, Any]:
    """The same as `config.json` has it."""
    declared = hf_quant_config(formats)
    quantization = declared["quantization"]
    groups: dict[str, dict[str, Any]] = {}
    mixed = quantization.get("quantized_layers")
    for index, format in enumerate(sorted(set(formats.values()) - {KEEP})):
        targets = sorted(m for m, chosen in formats.items() if chosen == format) if mixed else ["Linear"]
        groups[f"group_{index}"] = _GROUPS[format] | {"targets": targets}
    return {
        "config_groups": groups,
        **({"quantized_layers": mixed} if mixed else {}),
        "ignore": quantization["exclude_modules"],
        "quant_algo": quantization["quant_algo"],
        "producer": declared["producer"],
        "quant_method": "modelopt",
    }


def _excluded(formats: Mapping[str, str]) -> list[str]:
    """The modules that are not quantised; readers ask for a layer's experts as a whole, and for the head as a whole."""
    kept = {module for module, format in formats.items() if format == KEEP}
    head = {module for module in formats if module.startswith("mtp.")}
    names = set()
    if head and head <= kept:
        kept -= head
        names.add("mtp*")
    for module in kept:
        product = fused_with(module)
        names.add(f"{product}*" if product is not None and product.endswith(".experts") else module)
    return sorted(names)
