"""Reading and writing Hugging Face folders: `config.json` and safetensors, one file or sharded. Never pickle."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .config import NemotronHConfig
from .quantization import algorithms, dequantize_modules, quantize_modules
from .quantization_metadata import check_metadata, write_metadata
from .shard_writer import ShardWriter, Spec
from .shards import _INDEX, _SINGLE, CheckpointError, _entries, _Entry, _read

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXACT = {torch.uint8: ("U8",), torch.float8_e4m3fn: ("F8_E4M3",)}  # what no other dtype is read into
_SHOW_PROGRESS_FROM = 10**9  # bytes
_MAX_NAMED = 8  # lines of one kind in an error
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")

Model = TypeVar("Model", bound=nn.Module)


class _Place(NamedTuple):
    """Where a stored tensor belongs: a parameter or buffer, or one expert's part of it."""

    name: str
    expert: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


def load_checkpoint(
    build: Callable[..., Model],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: NemotronHConfig | None = None,
    dequantize: bool = False,
    progress: bool | None = None,
) -> Model:
    """Build a model from a Hugging Face folder and fill it tensor by tensor.

    Reads `config.json` (transformers 4's pattern string or transformers 5's list of layers) and `model.safetensors` or
    `model.safetensors.index.json` with its shards; tensor names may start with `backbone.`, `model.` or
    `language_model.`, and a layer's experts be a tensor each, as published, or one, as in transformers 5. Names, shapes
    and dtypes of all files are compared with the model before anything is read. Beside the model itself one tensor at a
    time is in memory: an expert is read straight into its place. `mtp.*` is not read where the configuration has no
    such head.

    Weights in FP8 (E4M3, a scale for a matrix or for each row) and NVFP4 are recognised by their tensors, with the
    names of ModelOpt or compressed-tensors, and stay what they are: their modules become `hybrid_ops.nn.Fp8Linear`,
    `Nvfp4Linear` and, of routed experts, `Fp8Weight`, `Nvfp4Weight`. Such a model is for inference: its parameters
    require no gradients. Scales of a quantised KV cache are left out: the cache has the model's dtype.

    Args:
        build: the model class.
        folder: the folder.
        dtype: of what is not quantised; None is the dtype of the checkpoint's embedding. A_log, D, dt_bias and the
            routers' correction bias are float32.
        device: where the parameters are made; None is the CPU.
        config: used instead of the folder's, for other options (its sizes must be those of the checkpoint).
        dequantize: make quantised weights ordinary parameters in `dtype`, layer by layer after reading.
        progress: draw a progress bar on stderr; None draws it for more than 1 GB on a terminal.

    Raises:
        FileNotFoundError: no folder, no config, no safetensors.
        CheckpointError (a ValueError): a corrupt or truncated file; missing, surplus or wrong tensors, all named; a
            quantisation that is not one of these.
        ValueError: float64 for a quantised model that is not dequantised.
    """
    config = config or NemotronHConfig.from_pretrained(folder)
    check_metadata(os.fspath(folder))
    entries = _entries(os.fspath(folder))
    if not config.num_nextn_predict_layers:
        entries = {name: entry for name, entry in entries.items() if not name.startswith("mtp.")}
    dtype = dtype or _stored_dtype(entries)
    model = build(config, device="meta", dtype=dtype)
    quantized = quantize_modules(model, entries)
    if quantized and not dequantize and dtype == torch.float64:
        raise ValueError("dtype must be float32, bfloat16 or float16 for a quantised model, got float64")
    places = _places(model, entries)
    _compare(os.fspath(folder), places, entries)
    model.to_empty(device=device or "cpu")
    tensors = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name not in tensors:  # a counter, which no checkpoint has
            buffer.zero_()
    total = sum(entry.nbytes for entry in entries.values())
    show = sys.stderr.isatty() and total > _SHOW_PROGRESS_FROM if progress is None else progress
    with torch.no_grad(), _progress_bar(show, total) as advance:
        for name, tensor in _read(entries):
            _at(tensors, places[name]).copy_(tensor.reshape(places[name].shape))
            advance(entries[name].nbytes)
    if dequantize:
        del tensors  # holds what is freed layer by layer
        dequantize_modules(model, dtype)
    return model.requires_grad_(False) if quantized and not dequantize else model


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `config.json` and safetensors under Hugging Face's names, which transformers and `from_pretrained` read.

    Each expert has tensors of its own, as in the published checkpoints. A quantised model is written as ModelOpt's are,
    with `hf_quant_config.json` and the `quantization_config` of `config.json`. Tensors are written one by one and
    `config.json` last; a save that fails removes its shards.

    Args:
        model: its `config`, parameters and quantised weights are written, in the dtypes they have.
        folder: made if it is not there; a file of the same name is overwritten.
        max_shard_bytes: above this size the tensors are spread over several files with an index.
    """
    folder = os.fspath(folder)
    config: NemotronHConfig = model.config  # type: ignore[assignment]
    stored = model.state_dict()
    tensors = {name: _at(stored, place) for name, place in _places(model).items()}
    writer = ShardWriter(folder, [{name: Spec.of(tensor)} for name, tensor in tensors.items()], max_shard_bytes)
    os.makedirs(folder, exist_ok=True)
    for stale in (_SINGLE, _INDEX):  # of an earlier save: the reader would take either for the whole model
        if os.path.exists(path := os.path.join(folder, stale)):
            os.remove(path)
    try:
        for name, tensor in tensors.items():
            writer.write({name: tensor})
        writer.finish()
        write_metadata(folder, config.to_dict(), algorithms(model))
    except BaseException:
        writer.discard()
        raise


def _places(model: nn.Module, stored: Iterable[str] = ()) -> dict[str, _Place]:
    """Where each tensor of a checkpoint of this model belongs, by its canonical name.

    A tensor of all experts is one tensor there if `stored` has it so; otherwise each expert has its own.
    """
    places = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        layer, dot, of_experts = name.partition(".experts.")  # "up_proj", "down_proj.weight_scale"
        if dot and name not in stored:
            if "." not in of_experts:
                of_experts += ".weight"
            for expert in range(shape[0]):
                own = f"{layer}.experts.{expert}.{of_experts}"
                places[own] = _Place(name, expert, shape[1:], tensor.dtype)
        else:
            places[name] = _Place(name, None, shape, tensor.dtype)
    return places


def _at(tensors: Mapping[str, Tensor], place: _Place) -> Tensor:
    tensor = tensors[place.name]
    return tensor if place.expert is None else tensor[place.expert]


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
            if not _fits(name, entries[name].shape, places[name].shape)
        ),
    )
    report(
        "of a dtype that is not supported",
        (
            (name, f"{file(name)}: expected {', '.join(_readable(places[name]))}, got {entries[name].dtype}")
            for name in common
            if entries[name].dtype not in _readable(places[name])
        ),
    )
    if problems:
        raise CheckpointError(f"{folder} does not fit its configuration:\n" + "\n".join(problems))


def _fits(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A scale of a matrix may be stored as (1,), one of each row as (N, 1)."""
    scalelike = name.endswith(("_scale", "_scale_2")) and stored[-1:] == (1,)
    return stored == shape or (scalelike and stored[:-1] == shape)


def _readable(place: _Place) -> tuple[str, ...]:
    return _EXACT.get(place.dtype, tuple(_DTYPES))


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
