"""Reading and writing Hugging Face folders: `config.json` and safetensors, one file or sharded. Never pickle."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import NemotronHConfig, _read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOW_PROGRESS_FROM = 10**9  # bytes
_MAX_NAMED = 8  # lines of one kind in an error
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensors."""


class _Place(NamedTuple):
    """Where a stored tensor belongs: a parameter, or one expert's matrix in it."""

    parameter: str
    expert: int | None
    shape: tuple[int, ...]


class _Entry(NamedTuple):
    """One tensor of a file: the name there, its shape, and its dtype as safetensors calls it."""

    path: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def load_checkpoint(
    build: Callable[..., Model],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: NemotronHConfig | None = None,
    progress: bool | None = None,
) -> Model:
    """Build a model from a Hugging Face folder and fill it tensor by tensor.

    Reads `config.json` (transformers 4's pattern string or transformers 5's list of layers) and `model.safetensors` or
    `model.safetensors.index.json` with its shards; tensor names may start with `backbone.`, `model.` or
    `language_model.`, and a layer's experts be a tensor each, as published, or one, as in transformers 5. Names, shapes
    and dtypes of all files are compared with the model before anything is read. Beside the model itself one tensor at a
    time is in memory: an expert is read straight into its place. `mtp.*` is not read where the configuration has no
    such head.

    Args:
        build: the model class.
        folder: the folder.
        dtype: of the parameters; None is the dtype of the checkpoint's embedding. A_log, D, dt_bias and the
            routers' correction bias are float32.
        device: where the parameters are made; None is the CPU.
        config: used instead of the folder's, for other options (its sizes must be those of the checkpoint).
        progress: draw a progress bar on stderr; None draws it for more than 1 GB on a terminal.

    Raises:
        FileNotFoundError: no folder, no config, no safetensors.
        CheckpointError (a ValueError): a corrupt or truncated file, or missing, surplus or wrong tensors, all named.
    """
    config = config or NemotronHConfig.from_pretrained(folder)
    entries = _entries(os.fspath(folder))
    if not config.num_nextn_predict_layers:
        entries = {name: entry for name, entry in entries.items() if not name.startswith("mtp.")}
    model = build(config, device="meta", dtype=dtype or _stored_dtype(entries))
    places = _places(model, entries)
    _compare(os.fspath(folder), places, entries)
    model.to_empty(device=device or "cpu")
    for buffer in model.buffers():  # counters, which no checkpoint has
        buffer.zero_()
    parameters = dict(model.named_parameters())
    total = sum(entry.nbytes for entry in entries.values())
    show = sys.stderr.isatty() and total > _SHOW_PROGRESS_FROM if progress is None else progress
    with torch.no_grad(), _progress_bar(show, total) as advance:
        for name, tensor in _read(entries):
            _at(parameters, places[name]).copy_(tensor)
            advance(entries[name].nbytes)
    return model


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `config.json` and safetensors under Hugging Face's names, which transformers and `from_pretrained` read.

    Each expert has tensors of its own, as in the published checkpoints.

    Args:
        model: its `config` and parameters are written, in the dtypes they have.
        folder: made if it is not there; a file of the same name is overwritten.
        max_shard_bytes: above this size the tensors are spread over several files with an index.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    config: NemotronHConfig = model.config  # type: ignore[assignment]
    config.save_pretrained(folder)
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    parameters = dict(model.named_parameters())
    for name, place in _places(model).items():
        parameter = _at(parameters, place)
        nbytes = parameter.numel() * parameter.element_size()
        if shards[-1] and sizes[-1] + nbytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = parameter.detach()
        sizes[-1] += nbytes
    single = len(shards) == 1
    files = [_SINGLE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for stale in (_SINGLE, _INDEX):  # of an earlier save: the reader would take either for the whole model
        if os.path.exists(path := os.path.join(folder, stale)):
            os.remove(path)
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})
    if not single:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        with open(os.path.join(folder, _INDEX), "w", encoding="utf-8") as index:
            json.dump({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, index, indent=2)


def _canonical(name: str) -> str:
    """The model's own name for a stored tensor."""
    name = name.removeprefix("language_model.")
    return re.sub(r"^model\.", "backbone.", name)


def _places(model: nn.Module, stored: Iterable[str] = ()) -> dict[str, _Place]:
    """Where each tensor of a checkpoint of this model belongs, by its canonical name.

    A parameter of all experts is one tensor there if `stored` has it so; otherwise each expert has its own.
    """
    places = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter.dim() == 3 and ".experts." in name and name not in stored:
            prefix, projection = name.rsplit(".", 1)
            for expert in range(shape[0]):
                places[f"{prefix}.{expert}.{projection}.weight"] = _Place(name, expert, shape[1:])
        else:
            places[name] = _Place(name, None, shape)
    return places


def _at(parameters: dict[str, nn.Parameter], place: _Place) -> Tensor:
    parameter = parameters[place.parameter]
    return parameter if place.expert is None else parameter[place.expert]


def _entries(folder: str) -> dict[str, _Entry]:
    """Every tensor of the checkpoint under the model's name for it."""
    entries: dict[str, _Entry] = {}
    for path in _files(folder):
        for entry in _header(path):
            name = _canonical(entry.stored_name)
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


def _stored_dtype(entries: dict[str, _Entry]) -> torch.dtype:
    embeddings = entries.get("backbone.embeddings.weight")
    return torch.float32 if embeddings is None else _DTYPES.get(embeddings.dtype, torch.float32)


def _compare(folder: str, places: dict[str, _Place], entries: dict[str, _Entry]) -> None:
    """Raise one error that names every missing, surplus and wrong tensor."""
    problems = []

    def report(kind: str, complaints: Iterable[tuple[str, str]]) -> None:
        complaints = list(complaints)
        if complaints:
            lines = _by_expert(complaints)
            more = f"\n    and {len(lines) - _MAX_NAMED} more" if len(lines) > _MAX_NAMED else ""
            problems.append(
                f"  {len(complaints)} {kind}:" + "".join(f"\n    {line}" for line in lines[:_MAX_NAMED]) + more
            )

    def file(name: str) -> str:
        return f" in {os.path.basename(entries[name].path)}"

    common = [name for name in places if name in entries]
    report("missing", ((name, "") for name in places if name not in entries))
    report("surplus", ((e.stored_name, file(name)) for name, e in entries.items() if name not in places))
    report(
        "of a wrong shape",
        (
            (name, f"{file(name)}: expected {places[name].shape}, got {entries[name].shape}")
            for name in common
            if places[name].shape != entries[name].shape
        ),
    )
    report(
        "of a dtype that is not supported",
        (
            (name, f"{file(name)}: expected {', '.join(_DTYPES)}, got {entries[name].dtype}")
            for name in common
            if entries[name].dtype not in _DTYPES
        ),
    )
    if problems:
        raise CheckpointError(f"{folder} does not fit its configuration:\n" + "\n".join(problems))


def _by_expert(complaints: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each (tensor, complaint); the same of several experts is one line, `experts.{0-3,7}.up_proj`."""
    experts: dict[tuple[str, str, str], list[int]] = {}
    for name, complaint in complaints:
        match = _EXPERT.fullmatch(name)
        before, number, after = match.groups() if match else (name, "", "")
        experts.setdefault((before, after, complaint), []).extend([int(number)] if number else [])
    return [f"{before}{_ranges(numbers)}{after}{end}" for (before, after, end), numbers in experts.items()]


def _ranges(numbers: list[int]) -> str:
    """[3] is "3", [0, 1, 2, 5] is "{0-2,5}", nothing is empty."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "}"


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
                yield name, tensor


@contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("loading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda nbytes: progress.advance(task, nbytes)
