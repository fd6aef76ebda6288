"""`quantize_checkpoint`: a bfloat16 Hugging Face folder to NVFP4 or FP8, as NVIDIA's ModelOpt writes it."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from .checkpoint import _by_expert, _compare, _places
from .config import NemotronHConfig, _read_json
from .nemotron_h import NemotronHForCausalLM
from .quantization_metadata import CONFIG, FP8, NVFP4_WEIGHTS, QUANT_CONFIG, write_metadata
from .quantize_matrices import BLOCK, Quantizer, Source
from .quantize_report import Errors, QuantizationReport
from .quantize_rules import KEEP, family, formats
from .shard_writer import ShardWriter
from .shards import CheckpointError, _entries, _Entry

# What a tokenizer and a chat need. Never code, and not the model card, which describes another checkpoint.
COPIED = (".json", ".txt", ".jinja", ".model")
# Nothing is calibrated, so activations have no scales: NVFP4 matrices are multiplied with bfloat16 activations.
_ALGORITHMS = {"nvfp4": NVFP4_WEIGHTS, "fp8": FP8}
_QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "U8", "I8", "F4")


def quantize_checkpoint(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "nvfp4",
    rules: Sequence[tuple[str, str]] = (),
    four_over_six: str | None = None,
    input_scale: float | None = None,
    max_shard_bytes: int = 5 * 10**9,
    device: torch.device | str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizationReport:
    """Write a quantised copy of a Hugging Face folder of `nemotron_h`, in ModelOpt's names and metadata.

    For a matrix W (N, K)::

        nvfp4   weight          uint8 (N, K / 2), element 2 i in the low half of byte i
                weight_scale    float8_e4m3fn (N, K / 16), linear
                weight_scale_2  float32 ()                          W ≈ code * weight_scale * weight_scale_2
        fp8     weight          float8_e4m3fn (N, K)
                weight_scale    float32 ()                          W ≈ weight * weight_scale

    the bytes being those of `nvfp4_quantize(W, mode="modelopt")` and `fp8_quantize(W, "tensor")`. Everything else keeps
    its dtype. Tensors get the published names: `backbone.`, a tensor for each expert. Which matrices are quantised is a
    table in `quantize_rules.py`, by family of model; `rules` override it.

    One matrix at a time is in memory, whatever the size of the checkpoint. All that can be known from the headers is
    checked before anything is written; `config.json` is written last.

    Args:
        folder: `config.json` and safetensors, one file or sharded, in float32, bfloat16 or float16.
        output: made if it is not there; must be empty, or see `force`.
        format: "nvfp4" (routed experts, and what else the family's recipe has in NVFP4) or "fp8".
        rules: (glob, "nvfp4" | "fp8" | "keep"), on module names as `backbone.layers.3.mixer.in_proj`; the last counts.
        four_over_six: None, "mse" or "mae", see `nvfp4_quantize`: the recipe of Nemotron 3 Ultra is "mse".
        input_scale: written with every FP8 matrix as the scale of its activations. None writes none: nothing is
            calibrated here. vLLM's reader wants one; for this library and TensorRT-LLM its absence
            means dynamic scaling.
        max_shard_bytes: above this size the tensors are spread over several files with an index.
        device: where matrices are quantised; None is the CPU. The bytes do not depend on it.
        force: replace the checkpoint that `output` holds.
        progress: called with (bytes of the source done, all of them) after each tensor.

    Returns:
        What was done, and the error ||W - W'|| / ||W|| of each layer.

    Raises:
        FileNotFoundError: no folder, no config, no safetensors.
        FileExistsError: `output` is not empty.
        CheckpointError (a ValueError): a corrupt or already quantised checkpoint, or one that does not fit its
            configuration; K not a multiple of 16 for NVFP4; a weight that is not finite. It names file and tensor.
        ValueError: another argument that is not the one expected.
    """
    folder, output = os.fspath(folder), os.fspath(output)
    if input_scale is not None and not 0 < input_scale < float("inf"):
        raise ValueError(f"input_scale must be positive and finite, got {input_scale}")
    if four_over_six not in (None, "mse", "mae"):
        raise ValueError(f"four_over_six must be None, 'mse' or 'mae', got {four_over_six!r}")
    _check_output(folder, output, force)
    config = NemotronHConfig.from_pretrained(folder)
    sources = _sources(folder, config)
    chosen = formats((source.module for source in sources), config, format, rules)
    _check_used(chosen, four_over_six, input_scale)
    _check_blocks(folder, sources, chosen)
    quantizer = Quantizer(sources, chosen, device=device or "cpu", four_over_six=four_over_six, input_scale=input_scale)
    writer = ShardWriter(output, [quantizer.announce(source) for source in sources], max_shard_bytes)
    _make_way(output)
    errors, done, total = Errors(), 0, sum(source.nbytes for source in sources)
    try:
        for source in sources:
            writer.write(quantizer.convert(source, errors))  # no name for what must not outlive its turn
            done += source.nbytes
            if progress is not None:
                progress(done, total)
        writer.finish()
        copied = _copy_files(folder, output)
        values = _read_json(os.path.join(folder, CONFIG))
        values.pop("auto_map", None)  # names Python files, which are not copied
        write_metadata(output, values, _algorithms(sources, chosen))
    except BaseException:
        writer.discard()
        raise
    return QuantizationReport(
        output=output,
        recipe=family(config),
        rows=errors.rows(),
        kept=sum(chosen.get(source.module, KEEP) == KEEP for source in sources),
        bytes_before=total,
        bytes_after=writer.total_size,
        files=tuple(writer.files),
        copied=copied,
        dynamic_fp8=input_scale is None and "fp8" in chosen.values(),
    )


def _check_output(folder: str, output: str, force: bool) -> None:
    inside = os.path.join(os.path.realpath(output), "").startswith(os.path.join(os.path.realpath(folder), ""))
    if inside:
        raise ValueError(f"output must not be in the folder that is read, got {output}")
    if os.path.exists(output) and not os.path.isdir(output):
        raise FileExistsError(f"output must be a folder, got the file {output}")
    if os.path.isdir(output) and os.listdir(output) and not force:
        raise FileExistsError(f"output must be empty, got {output}; force (--force) replaces the checkpoint in it")


def _sources(folder: str, config: NemotronHConfig) -> list[Source]:
    """Every tensor of the checkpoint, experts one by one, after comparing all of them with the configuration."""
    entries = _entries(folder)
    _refuse_quantized(folder, entries.values())
    model = NemotronHForCausalLM(config, device="meta")
    needed = {name: e for name, e in entries.items() if config.num_nextn_predict_layers or not name.startswith("mtp.")}
    places = _places(model, needed)
    _compare(folder, places, needed)
    sources = []
    for name, entry in entries.items():
        if ".experts." in name and len(entry.shape) == 3:  # all of a layer in one tensor, as transformers 5 has them
            prefix, projection = name.rsplit(".", 1)
            for expert in range(entry.shape[0]):
                sources.append(Source(f"{prefix}.{expert}.{projection}.weight", entry, expert, entry.shape[1:]))
        else:
            sources.append(Source(name, entry, None, entry.shape))
    return sources


def _refuse_quantized(folder: str, entries: Iterable[_Entry]) -> None:
    for file in (CONFIG, QUANT_CONFIG):
        path = os.path.join(folder, file)
        values = _read_json(path) if os.path.exists(path) else {}
        for key in ("quantization", "quantization_config", "compression_config"):
            if values.get(key):
                raise CheckpointError(f"{path} must be of a checkpoint that is not quantised, got {key}")
    for entry in entries:
        if entry.dtype in _QUANTIZED_DTYPES or entry.stored_name.endswith(("_scale", "_scale_2")):
            raise CheckpointError(
                f"{entry.path} must not be quantised already, got {entry.stored_name} of {entry.dtype} {entry.shape}"
            )


def _check_used(chosen: Mapping[str, str], four_over_six: str | None, input_scale: float | None) -> None:
    used = set(chosen.values())
    if used <= {KEEP}:
        raise ValueError("rules must leave a matrix to quantise, got none")
    if four_over_six is not None and "nvfp4" not in used:
        raise ValueError(f"four_over_six must be None where no matrix becomes NVFP4, got {four_over_six!r}")
    if input_scale is not None and "fp8" not in used:
        raise ValueError(f"input_scale must be None where no matrix becomes FP8, got {input_scale}")


def _check_blocks(folder: str, sources: Sequence[Source], chosen: Mapping[str, str]) -> None:
    wrong = [
        (source.name, f" in {os.path.basename(source.entry.path)}: {source.shape}")
        for source in sources
        if chosen.get(source.module) == "nvfp4" and source.shape[-1] % BLOCK
    ]
    if wrong:
        lines = "".join(f"\n    {line}" for line in _by_expert(wrong)[:8])
        raise CheckpointError(
            f"{folder}: NVFP4 needs the last dimension to be a multiple of {BLOCK}, got{lines}\n"
            "  keep these matrices (--keep) or make them FP8 (--rule) by rules"
        )


def _make_way(output: str) -> None:
    """The folder, without the checkpoint that it may hold: what is not whole yet must not look whole."""
    os.makedirs(output, exist_ok=True)
    for file in os.listdir(output):
        if file.endswith(".safetensors") or _written_anew(file):
            os.remove(os.path.join(output, file))


def _written_anew(file: str) -> bool:
    return file in (CONFIG, QUANT_CONFIG) or file.endswith(".index.json")


def _copy_files(folder: str, output: str) -> tuple[str, ...]:
    names = [
        name
        for name in sorted(os.listdir(folder))
        if name.endswith(COPIED) and not _written_anew(name) and os.path.isfile(os.path.join(folder, name))
    ]
    for name in names:
        shutil.copyfile(os.path.join(folder, name), os.path.join(output, name))
    return tuple(names)


def _algorithms(sources: Sequence[Source], chosen: Mapping[str, str]) -> dict[str, str | None]:
    """Of every module that has a matrix, convolution or router, as readers ask for it."""
    matrices = (s for s in sources if s.name.endswith(".weight") and len(s.shape) > 1 and ".embeddings" not in s.name)
    return {source.module: _ALGORITHMS.get(chosen.get(source.module, KEEP)) for source in matrices}
