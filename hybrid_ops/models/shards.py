"""The safetensors files of a Hugging Face folder: which there are, what they hold, and their tensors one by one."""

import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import _read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# the names that compressed-tensors has for what ModelOpt stores; its global scales are the reciprocals
_COMPRESSED = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
_KV_SCALE = re.compile(r".*\.(k_proj\.k_scale|v_proj\.v_scale|mixer\.[kv]_scale)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensors."""


class _Entry(NamedTuple):
    """One tensor of a file: the name there, its shape, and its dtype as safetensors calls it."""

    path: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def _canonical(name: str) -> str:
    """The model's own name for a stored tensor."""
    name = re.sub(r"^model\.", "backbone.", name.removeprefix("language_model."))
    module, dot, tensor = name.rpartition(".")
    return module + dot + _COMPRESSED.get(tensor, tensor)


def _entries(folder: str) -> dict[str, _Entry]:
    """Every tensor of the checkpoint under the model's name for it, but the scales of a quantised KV cache."""
    entries: dict[str, _Entry] = {}
    for path in _files(folder):
        for entry in _header(path):
            name = _canonical(entry.stored_name)
            if _KV_SCALE.fullmatch(name):
                continue
            if name in entries:
                raise CheckpointError(
                    f"{name} must be there once, got {entries[name].stored_name} in {entries[name].path} "
                    f"and {entry.stored_name} in {path}"
                )
            entries[name] = entry
    return entries


def _files(folder: str) -> list[str]:
    """The safetensors files that make up the checkpoint."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder")
    names = sorted(os.listdir(folder))
    if _INDEX in names:
        index = os.path.join(folder, _INDEX)
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} must have a weight_map of tensor names to file names")
        for tensor, file in weight_map.items():
            if os.path.basename(file) != file:
                raise CheckpointError(f"{index}: the file of {tensor} must be in the folder itself, got {file!r}")
            if file not in names:
                raise CheckpointError(f"{index} names {file} for {tensor}, but the folder has no such file")
        return [os.path.join(folder, file) for file in sorted(set(weight_map.values()))]
    found = [name for name in names if name.endswith(".safetensors")]
    if _SINGLE in found:
        found = [_SINGLE]
    if len(found) == 1:
        return [os.path.join(folder, found[0])]
    if found:
        raise FileNotFoundError(f"{folder} must have {_SINGLE} or {_INDEX}, got {', '.join(found)}")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise FileNotFoundError(
            f"{folder} must have safetensors, got only {', '.join(pickles)}: pickle files can run code and are not "
            "read; save the model as safetensors first"
        )
    raise FileNotFoundError(f"{folder} must have {_SINGLE} or {_INDEX}, got neither")


def _header(path: str) -> Iterator[_Entry]:
    """The tensors that a file announces, each checked to lie within the file.

    safetensors itself refuses a damaged file as a whole; this says which tensor is cut off.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(f"{path} is truncated or not safetensors: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            announced = [(name, *_announcement(fields)) for name, fields in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is corrupt or not safetensors: its header is not readable") from error
    for name, shape, dtype, (start, end) in announced:
        if end > size - 8 - length:
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {8 + length + end}, the file at byte {size}"
            )
        yield _Entry(path, name, shape, dtype, end - start)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error


def _announcement(fields: dict) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    start, end = map(int, fields["data_offsets"])
    return tuple(map(int, fields["shape"])), str(fields["dtype"]), (start, end)


def _read(entries: dict[str, _Entry]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), file by file."""
    by_path: dict[str, list[str]] = {}
    for name, entry in entries.items():
        by_path.setdefault(entry.path, []).append(name)
    for path, names in by_path.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                try:
                    tensor = file.get_tensor(entries[name].stored_name)
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: {entries[name].stored_name} cannot be read: {error}") from error
                yield name, tensor.reciprocal() if entries[name].stored_name.endswith("_global_scale") else tensor
