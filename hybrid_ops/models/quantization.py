"""Quantised checkpoints: the modules that take their tensors, and what these are called."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..nn import Experts, Fp8Linear, Fp8Weight, Gate, Nvfp4Linear, Nvfp4Weight
from ..nn.quantized import QuantizedWeight
from ..quant_nvfp4 import BLOCK
from .quantization_metadata import FP8, FP8_ROWS, NVFP4, NVFP4_WEIGHTS
from .shards import CheckpointError, _Entry

_FP8_DTYPE, _NVFP4_DTYPE = "F8_E4M3", "U8"  # as safetensors calls them
_LINEAR: dict[str, Callable[..., nn.Module]] = {_FP8_DTYPE: Fp8Linear, _NVFP4_DTYPE: Nvfp4Linear}
_STACK: dict[str, Callable[..., nn.Module]] = {_FP8_DTYPE: Fp8Weight, _NVFP4_DTYPE: Nvfp4Weight}


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


def algorithms(model: nn.Module) -> dict[str, str | None]:
    """What `write_metadata` takes: ModelOpt's name for the format of each weight under the name a checkpoint has."""
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            found |= dict.fromkeys(_stored_names(name, module.shape), _algorithm(module))
        elif isinstance(module, nn.Linear | nn.Conv1d | Gate):
            found[name] = None
        elif isinstance(module, Experts):
            for projection, matrices in module.named_parameters(recurse=False):
                found |= dict.fromkeys(_stored_names(f"{name}.{projection}", matrices.shape))
    return found


def _algorithm(weight: QuantizedWeight) -> str:
    if isinstance(weight, Fp8Weight):
        return FP8 if weight.scaling == "tensor" else FP8_ROWS
    return NVFP4_WEIGHTS if weight.input_scale is None else NVFP4


def _stored_names(name: str, shape: Sequence[int]) -> list[str]:
    """A module's own name, or those of a layer's experts one by one."""
    layer, dot, projection = name.partition(".experts.")
    return [f"{layer}.experts.{expert}.{projection}" for expert in range(shape[0])] if dot else [name]
