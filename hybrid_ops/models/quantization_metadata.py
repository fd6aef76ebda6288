"""How ModelOpt declares what is quantised: `hf_quant_config.json`, and `quantization_config` in `config.json`."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from .._version import __version__
from ..quant_nvfp4 import BLOCK
from .config import _read_json
from .quantize_rules import fused_with
from .shards import CheckpointError

CONFIG, QUANT_CONFIG = "config.json", "hf_quant_config.json"

# ModelOpt's names of the formats; of NVFP4 without scales of activations: they are bfloat16
FP8, FP8_ROWS, NVFP4, NVFP4_WEIGHTS = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4"
_MIXED = "MIXED_PRECISION"
_ALGORITHMS = (FP8, FP8_ROWS, NVFP4, NVFP4_WEIGHTS, _MIXED)
_EIGHT_BITS = {"dynamic": False, "num_bits": 8, "type": "float"}
_FOUR_BITS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
_GROUPS: dict[str, dict[str, Any]] = {
    FP8: {"input_activations": _EIGHT_BITS, "weights": _EIGHT_BITS},
    FP8_ROWS: {"input_activations": _EIGHT_BITS, "weights": _EIGHT_BITS | {"strategy": "channel"}},
    NVFP4: {"input_activations": _FOUR_BITS, "weights": _FOUR_BITS},
    NVFP4_WEIGHTS: {"weights": _FOUR_BITS},
}


def write_metadata(folder: str, config: Mapping[str, Any], algorithms: Mapping[str, str | None]) -> None:
    """Write both files, `config.json` with `config` last: a folder without it is no checkpoint.

    `algorithms` has every module with a matrix, convolution or router: ModelOpt's name for the format of its weight,
    None where it is not quantised. Where none is, `config` alone is written.
    """
    path = os.path.join(folder, QUANT_CONFIG)
    if any(algorithms.values()):
        declared = _hf_quant_config(algorithms)
        _write_json(path, declared)
        config = {**config, "quantization_config": _quantization_config(declared, algorithms)}
    elif os.path.exists(path):  # of an earlier checkpoint
        os.remove(path)
    _write_json(os.path.join(folder, CONFIG), config)


def _hf_quant_config(algorithms: Mapping[str, str | None]) -> dict[str, Any]:
    layers = {module: _layer(name) for module, name in sorted(algorithms.items()) if name is not None}
    used = {layer["quant_algo"]: layer for layer in layers.values()}
    quantization: dict[str, Any] = {"quant_algo": _MIXED, "kv_cache_quant_algo": None}
    if len(used) == 1:
        quantization |= used.popitem()[1]
    else:
        quantization["quantized_layers"] = layers
    quantization["exclude_modules"] = _excluded(algorithms)
    return {"producer": {"name": "hybrid-ops", "version": __version__}, "quantization": quantization}


def _layer(algorithm: str) -> dict[str, Any]:
    return {"quant_algo": algorithm} | ({"group_size": BLOCK} if algorithm in (NVFP4, NVFP4_WEIGHTS) else {})


def _quantization_config(declared: Mapping[str, Any], algorithms: Mapping[str, str | None]) -> dict[str, Any]:
    """The same as `config.json` has it."""
    quantization = declared["quantization"]
    mixed = quantization.get("quantized_layers")
    groups: dict[str, dict[str, Any]] = {}
    for index, algorithm in enumerate(sorted({name for name in algorithms.values() if name is not None})):
        targets = sorted(m for m, name in algorithms.items() if name == algorithm) if mixed else ["Linear"]
        groups[f"group_{index}"] = _GROUPS[algorithm] | {"targets": targets}
    return {
        "config_groups": groups,
        **({"quantized_layers": mixed} if mixed else {}),
        "ignore": quantization["exclude_modules"],
        "quant_algo": quantization["quant_algo"],
        "producer": declared["producer"],
        "quant_method": "modelopt",
    }


def _excluded(algorithms: Mapping[str, str | None]) -> list[str]:
    """The modules that are not quantised; readers ask for a layer's experts as a whole, and for the head as a whole."""
    kept = {module for module, name in algorithms.items() if name is None}
    quantized_products = {fused_with(module) for module in algorithms.keys() - kept}
    head = {module for module in algorithms if module.startswith("mtp.")}
    names = set()
    if head and head <= kept:
        kept -= head
        names.add("mtp*")
    for module in kept:
        product = fused_with(module)
        whole = product is not None and product.endswith(".experts") and product not in quantized_products
        names.add(f"{product}*" if whole else module)
    return sorted(names)


def _write_json(path: str, values: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def check_metadata(folder: str) -> None:
    """Refuse a quantisation that is not FP8 or NVFP4. Which module has which is not read here: the tensors show it.

    Raises:
        CheckpointError: `config.json` or `hf_quant_config.json` names another one.
    """
    for file, field in ((CONFIG, "quantization_config"), (QUANT_CONFIG, "quantization")):
        path = os.path.join(folder, file)
        said = _read_json(path).get(field) if os.path.exists(path) else None
        if said is None:
            continue
        if not isinstance(said, dict):
            raise CheckpointError(f"{path}: {field} must be an object, got {said!r}")
        method = said.get("quant_method", "modelopt")
        if method == "compressed-tensors":
            unknown = _unknown_groups(said)
        elif str(method).startswith("modelopt"):
            unknown = _unknown_algorithms(said)
        else:
            unknown = iter([f"quant_method must be 'modelopt' or 'compressed-tensors', got {method!r}"])
        if (problem := next(unknown, None)) is not None:
            raise CheckpointError(f"{path}: {field}: {problem}: this quantisation is not supported")


def _unknown_algorithms(said: dict[str, Any]) -> Iterator[str]:
    """Of ModelOpt, for the model and for single layers."""
    layers = said.get("quantized_layers") or {}
    for name, layer in {"": said, **layers}.items():
        of_layer = f" of {name}" if name else ""
        algorithm, group = layer.get("quant_algo"), layer.get("group_size")
        if algorithm is not None and algorithm not in _ALGORITHMS:
            yield f"quant_algo{of_layer} must be one of {', '.join(_ALGORITHMS)}, got {algorithm!r}"
        if algorithm in (NVFP4, NVFP4_WEIGHTS) and group not in (None, BLOCK):
            yield f"group_size{of_layer} must be {BLOCK}, got {group!r}"


def _unknown_groups(said: dict[str, Any]) -> Iterator[str]:
    """Of compressed-tensors, whose groups describe weights by their bits."""
    for name, group in (said.get("config_groups") or {}).items():
        weights = (group or {}).get("weights")
        if weights is None:
            continue
        kind = tuple(weights.get(field) for field in ("type", "num_bits", "strategy"))
        known = kind in (("float", 8, "tensor"), ("float", 8, "channel"), ("float", 4, "tensor_group"))
        if not known or (kind[1] == 4 and weights.get("group_size", BLOCK) != BLOCK):
            yield (
                f"weights of {name} must be float with 8 bits and a scale per tensor or channel, or with 4 bits in "
                f"groups of {BLOCK}, got {weights!r}"
            )
