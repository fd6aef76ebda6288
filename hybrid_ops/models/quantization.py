"""Quantised checkpoints: their metadata, and the modules that take their tensors."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..nn import Experts, Fp8Linear, Fp8Weight, Gate, Nvfp4Linear, Nvfp4Weight
from ..nn.quantized import QuantizedWeight
from ..quant_nvfp4 import BLOCK
from .config import _read_json
from .shards import CheckpointError, _Entry

_CONFIG, _QUANT_CONFIG = "config.json", "hf_quant_config.json"
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", *_NVFP4, "MIXED_PRECISION")
_FP8_DTYPE, _NVFP4_DTYPE = "F8_E4M3", "U8"  # as safetensors calls them
_LINEAR: dict[str, Callable[..., nn.Module]] = {_FP8_DTYPE: Fp8Linear, _NVFP4_DTYPE: Nvfp4Linear}
_STACK: dict[str, Callable[..., nn.Module]] = {_FP8_DTYPE: Fp8Weight, _NVFP4_DTYPE: Nvfp4Weight}


def check_metadata(folder: str) -> None:
    """Refuse a quantisation that is not FP8 or NVFP4. Which module has which is not read here: the tensors show it.

    Raises:
        CheckpointError: `config.json` or `hf_quant_config.json` names another one.
    """
    for file, field in ((_CONFIG, "quantization_config"), (_QUANT_CONFIG, "quantization")):
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
        if algorithm in _NVFP4 and group not in (None, BLOCK):
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


def quantize_modules(model: nn.Module, entries: dict[str, _Entry]) -> bool:
    """Put modules for quantised weights where the checkpoint has such; returns whether it has any.

    Raises:
        CheckpointError: experts of one layer in different formats, or a matrix too narrow for its format.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (kind := _format(entries, [name], module.weight.shape)):
            options = dict(bias=module.bias is not None, dtype=module.weight.dtype)
            options |= _options(entries, [name], module.out_features, kind)
            found[name] = _LINEAR[kind](module.in_features, module.out_features, **options)
        elif isinstance(module, Experts):
            for projection, matrices in module.named_parameters():
                names = [f"{name}.{expert}.{projection}" for expert in range(matrices.shape[0])]
                if kind := _format(entries, names, matrices.shape):
                    options = _options(entries, names, matrices.shape[1], kind)
                    found[f"{name}.{projection}"] = _STACK[kind](tuple(matrices.shape), **options)
    for name, module in found.items():
        _replace(model, name, module)
    return bool(found)


def _format(entries: dict[str, _Entry], names: Sequence[str], shape: Sequence[int]) -> str | None:
    """In which format these weights, one matrix or that of each expert, are stored: a key of _LINEAR, or None."""
    stored = {name: entries[f"{name}.weight"] for name in names if f"{name}.weight" in entries}
    formats = {entry.dtype: name for name, entry in stored.items()}
    kind = next((dtype for dtype in _LINEAR if dtype in formats), None)
    if kind is None:
        return None
    path = stored[formats[kind]].path
    if len(formats) > 1:
        got = ", ".join(f"{dtype} for {name}.weight" for dtype, name in formats.items())
        raise CheckpointError(f"{path}: the experts of a layer must have one format, got {got}")
    if kind == _NVFP4_DTYPE and shape[-1] % BLOCK:
        raise CheckpointError(
            f"{path}: {names[0]}.weight must have K divisible by {BLOCK} to be NVFP4, got K = {shape[-1]}"
        )
    return kind


def _options(entries: dict[str, _Entry], names: Sequence[str], rows: int, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(input_scale=any(f"{name}.input_scale" in entries for name in names), device="meta")
    if kind == _FP8_DTYPE:
        scales = [entries[scale].shape for name in names if (scale := f"{name}.weight_scale") in entries]
        of_rows = rows > 1 and scales[:1] in ([(rows,)], [(rows, 1)])
        options["scaling"] = "row" if of_rows else "tensor"
    return options


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every quantised weight an ordinary parameter, one after the other: beside it only one is there twice."""
    for name in [name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]:
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedWeight)
        weight = nn.Parameter(module.dequantize(dtype))
        if not isinstance(module, Fp8Linear | Nvfp4Linear):
            _replace(model, name, weight)
            continue
        linear = nn.Linear(module.shape[1], module.shape[0], bias=False, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", None if module.bias is None else nn.Parameter(module.bias.detach()))
        _replace(model, name, linear)


def _replace(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    delattr(owner, own)  # a module cannot take a parameter's name otherwise
    setattr(owner, own, value)


def save_metadata(model: nn.Module, folder: str) -> None:
    """Write what ModelOpt says of such weights into `hf_quant_config.json` and `config.json`, if there are any."""
    path = os.path.join(folder, _QUANT_CONFIG)
    layers = dict(_algorithms(model))
    if not layers:
        if os.path.exists(path):  # of an earlier save
            os.remove(path)
        return
    producer = dict(name="hybrid_ops", version=__version__)
    kinds = {kind["quant_algo"]: kind for kind in layers.values()}
    said: dict[str, Any] = dict(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    if len(kinds) == 1:
        (said,) = kinds.values()
    others = sorted(_unquantized(model))
    _write_json(path, dict(producer=producer, quantization=dict(said, exclude_modules=others)))
    config = os.path.join(folder, _CONFIG)
    mine = dict(quant_method="modelopt", producer=producer, ignore=others, **said)
    _write_json(config, dict(_read_json(config), quantization_config=mine))


def _algorithms(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The quantised modules under the names that checkpoints have, with ModelOpt's name for the format."""
    for name, module in model.named_modules():
        if isinstance(module, Fp8Weight):
            said: dict[str, Any] = dict(quant_algo="FP8" if module.scaling == "tensor" else "FP8_PER_CHANNEL_PER_TOKEN")
        elif isinstance(module, Nvfp4Weight):
            said = dict(quant_algo=_NVFP4[module.input_scale is None], group_size=BLOCK)
        else:
            continue
        layer, dot, projection = name.partition(".experts.")
        names = [f"{layer}.experts.{expert}.{projection}" for expert in range(module.shape[0])] if dot else [name]
        yield from ((name, said) for name in names)


def _unquantized(model: nn.Module) -> Iterator[str]:
    """What readers would otherwise take for quantised; the experts of a layer as a whole."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | Gate):
            yield name
        elif isinstance(module, Experts) and list(module.parameters()):
            yield f"{name}*"


def _write_json(path: str, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, allow_nan=False)
        file.write("\n")
