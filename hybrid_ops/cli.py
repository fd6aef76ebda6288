"""The command `hybrid-ops`: info, check, demo, bench, bench model, quantize."""

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ._version import __version__

_DESCRIPTION = """\
Fused operators for hybrid Mamba-2 / Transformer / MoE models, on this machine.

  hybrid-ops info        what is here, what is missing, and which implementation each operator uses
  hybrid-ops check       is every operator right on this machine? (seconds; exit status 1 if one is not)
  hybrid-ops demo        train a small hybrid model from nothing, let it write, prove it (three minutes on two cores)
  hybrid-ops bench       how fast are the operators, beside the speed of light of this GPU and other libraries
  hybrid-ops bench model how fast is a whole model, beside transformers with the same weights?
  hybrid-ops quantize    write an NVFP4 or FP8 copy of a Nemotron-H / Nemotron 3 checkpoint
"""

_CHECK = """\
Run every public operator in every implementation that this machine has (torch; Triton on the GPU, or in Triton's
interpreter; CUDA where it is built) and compare it with the NumPy reference in float64.

The numbers are error / budget: the budget is twice the error of the same formula in float32 arithmetic, rounded once to
the dtype. 0.5 is as good as rounding allows, up to 1 is right, above 1 is wrong.
"""

_DEMO = """\
Train a hybrid Mamba-2 / attention / LatentMoE model of 1.17 million parameters, byte by byte, on the help texts of
Python; hold out some of them; say how many bits it needs per unseen byte, beside zlib, xz, bz2 and an n-gram.
Then let it write, prove it against the NumPy reference, check every operator, and draw demo.html, which opens in a
browser. Nothing is downloaded. The seed is fixed. Exit status 1 if it learnt too little or anything is wrong.
"""

_BENCH = """\
Measure operator families on the GPU: time per call from CUDA-graph replay with cold L2, in bursts at the boost clock
and sustained, at the clock that the power limit leaves; the floor that this GPU's copy bandwidth and matrix rate set
(measured in the same run), and other libraries where they are installed. Without a terminal there is a line for every
case that is done. Ctrl-C ends with the table and the report of what was measured.

  hybrid-ops bench conv1d --json conv1d.json --html conv1d.html
  hybrid-ops bench conv1d --compare conv1d.json             what has changed since, by more than the spread
  hybrid-ops bench --from conv1d.json --html conv1d.html    draw stored rows, without measuring
  hybrid-ops bench model --help                             whole models, beside transformers
"""

_BENCH_MODEL = """\
Build a model with random weights and measure it end to end: reading a prompt (prefill), and making one token for each
sequence of a batch (decode) behind a context, eagerly and with the step in a CUDA graph. transformers, where it is
installed, does the same in the same run, with the very same tensors and token ids: as it is, with its step in a CUDA
graph over its static cache, and patched by hybrid_ops.integrations.transformers. Whose logits differ by more than
rounding explains is not timed.

  hybrid-ops bench model                                     Nemotron 3 Nano; without a GPU a tiny model
  hybrid-ops bench model --preset nemotron-3-nano --layers 12     12 of its 52 layers, the kinds in proportion
  hybrid-ops bench model --preset nemotron-3-super --layers fit   as many as fit on this GPU
  hybrid-ops bench model --prompt 8192 --batch 1 16 64 --context 1024 --json model.json --html model.html
  hybrid-ops bench model --compare model.json                     what has changed since, by more than the spread

Times are those of whole calls, Python included. The floor is what the GPU's copy bandwidth and matrix rate, measured in
the same run, allow at best: weights of the experts that are met, caches, and products.
"""

_QUANTIZE = """\
Write a quantised copy of a Hugging Face folder of nemotron_h (bfloat16, any number of files), with the names and
metadata of NVIDIA's ModelOpt. One matrix at a time is in memory, whatever the size of the checkpoint.

  hybrid-ops quantize Nemotron-3-Super-BF16                      writes Nemotron-3-Super-NVFP4 beside it
  hybrid-ops quantize Nemotron-3-Super-BF16 --format fp8
  hybrid-ops quantize FOLDER --four-over-six mse --keep 'backbone.layers.0.*' --rule '*.shared_experts.*=fp8'

What is quantised follows the published checkpoints, by the layers that a model has (--format nvfp4; with --format fp8
the same matrices become FP8):

                                        routed    shared    MLP       Mamba in/out
  Super, Ultra: a latent MoE            NVFP4     FP8       NVFP4     FP8
  Lightning: an MoE with MTP head       NVFP4     NVFP4     NVFP4     FP8
  Nano, and models without MoE          NVFP4     NVFP4     NVFP4     NVFP4, but right before attention kept

Attention, latent projections, router, convolutions, embeddings, lm_head and MTP head keep their dtype.
Nothing is calibrated: NVFP4 is weight-only (W4A16_NVFP4), FP8 has no input_scale unless you give one.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:2] == ["bench", "model"]:  # one command of two words: beside FAMILY argparse has no place for it
        arguments[:2] = ["bench model"]
    options = _parser().parse_args(arguments)
    # every command says by itself what it does without NumPy, a GPU or a newer driver
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        if getattr(options, "svg", None) is not None:
            return options.run(options, Console(record=True, width=100))
        return options.run(options, Console())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybrid-ops", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hybrid-ops {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="{info,check,demo,bench,quantize}", required=True)

    def add(name: str, run: object, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    add("info", _info, "what this machine has, what is missing, which implementation each operator uses")

    check = add("check", _check, "test every operator on this machine", _CHECK)
    check.add_argument("--json", metavar="FILE", type=Path, help="write the rows as JSON")

    demo = add("demo", _demo, "train a small hybrid model, let it write, prove it, draw a picture", _DEMO)
    demo.add_argument("--steps", type=int, metavar="N", help="training steps (380); fewer prove less and learn less")
    demo.add_argument("--html", metavar="FILE", type=Path, default=Path("demo.html"), help="the picture (demo.html)")
    demo.add_argument("--svg", metavar="FILE", type=Path, help="also write what was printed as an SVG")
    demo.add_argument("--cpu", action="store_true", help="do not use the GPU")

    bench = add("bench", _bench, "measure operator families on the GPU", _BENCH)
    bench.add_argument(
        "families",
        nargs="*",
        metavar="FAMILY",
        help="conv1d, ssd, norm, mamba2_step, moe_router, grouped_gemm, moe, quant, gemm; all of them if none is named",
    )
    bench.add_argument("--only", metavar="NAME", action="append", help="cases of this name, with * and ?; repeatable")
    bench.add_argument("--all", action="store_true", help="every shape of the real models, on a GPU: hours")
    bench.add_argument(
        "--list", action="store_true", help="print the cases with their bytes and FLOPs, measure nothing"
    )
    _add_rows(bench)
    _add_bench_model(add("bench model", _bench_model, "measure a whole model, beside transformers", _BENCH_MODEL))
    _add_quantize(add("quantize", _quantize, "write an NVFP4 or FP8 copy of a checkpoint", _QUANTIZE))
    return parser


def _add_rows(bench: argparse.ArgumentParser) -> None:
    """What to do with rows that were measured, or stored."""
    bench.add_argument("--json", metavar="FILE", type=Path, help="merge rows, machine and ceilings into FILE")
    bench.add_argument("--html", metavar="FILE", type=Path, help="draw a report that any browser opens, offline")
    bench.add_argument("--compare", metavar="FILE", type=Path, help="say what changed against these older rows")
    bench.add_argument(
        "--fail-above", metavar="PERCENT", type=float, help="with --compare: exit status 1 if a row is slower by more"
    )
    bench.add_argument("--from", metavar="FILE", dest="stored", type=Path, help="measure nothing, show these rows")


def _add_bench_model(model: argparse.ArgumentParser) -> None:
    model.add_argument(
        "--preset",
        metavar="NAME",
        help="a published model, as hybrid_ops.models.PRESETS names them: nemotron-h-4b, -8b, -47b, -56b; "
        "nemotron-nano-9b-v2, -12b-v2; nemotron-3-nano-4b, -nano-30b, -super-120b, -ultra-550b; "
        "nemotron-3.5-lightning-30b; tiny, tiny-moe (nemotron-3-nano-30b; without a GPU tiny-moe)",
    )
    model.add_argument(
        "--layers", metavar="N", type=_layers, help="so many of its layers, each kind in proportion; 'fit': what fits"
    )
    model.add_argument(
        "--prompt",
        metavar="TOKENS",
        type=int,
        nargs="+",
        help="lengths of one prompt to read (2048 8192; without a GPU 64 256)",
    )
    model.add_argument(
        "--batch", metavar="N", type=int, nargs="+", help="sequences to decode together (1 16 64; without a GPU 1 4)"
    )
    model.add_argument(
        "--context",
        metavar="TOKENS",
        type=int,
        help="that each has in its cache before the first step (256; without a GPU 32)",
    )
    model.add_argument(
        "--new-tokens", metavar="N", type=int, help="steps to time (32; without a GPU 8): the figure is their median"
    )
    model.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="(bfloat16; without a GPU float32)")
    model.add_argument("--no-peers", action="store_true", help="leave transformers out")
    _add_rows(model)


def _layers(text: str) -> int | str:
    if text == "fit":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number or 'fit', got {text!r}")
    return int(text)


def _add_quantize(quantize: argparse.ArgumentParser) -> None:
    quantize.add_argument("folder", metavar="FOLDER", type=Path, help="config.json and safetensors")
    quantize.add_argument("--format", choices=("nvfp4", "fp8"), default="nvfp4", help="see above (nvfp4)")
    quantize.add_argument("--output", metavar="FOLDER", type=Path, help="where to (beside FOLDER, -NVFP4 or -FP8)")
    quantize.add_argument("--force", action="store_true", help="replace the checkpoint that the output folder holds")
    # one list, for the last rule that matches counts
    quantize.add_argument(
        "--keep", metavar="GLOB", dest="rules", action="append", type=_keep, help="keep these matrices as they are"
    )
    quantize.add_argument(
        "--rule", metavar="GLOB=FORMAT", dest="rules", action="append", type=_rule, help="nvfp4, fp8 or keep for these"
    )
    quantize.add_argument(
        "--four-over-six",
        choices=("mse", "mae"),
        help="NVFP4: scale a block to 6 or to 4, by the error that is left",
    )
    quantize.add_argument(
        "--input-scale", metavar="SCALE", type=float, help="write this activation scale with every FP8 matrix (none)"
    )
    quantize.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, default=5 * 10**9, help="of a file, as 500MB or 5GB (5GB)"
    )
    quantize.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (the GPU if there is one)")
    quantize.add_argument("--json", metavar="FILE", type=Path, help="write the tables as JSON")


def _keep(text: str) -> tuple[str, str]:
    return text, "keep"


def _rule(text: str) -> tuple[str, str]:
    glob, equals, format = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected GLOB=FORMAT, got {text!r}")
    return glob, format


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size as 500MB or 5GB, got {text!r}")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def _info(options: argparse.Namespace, console: Console) -> int:
    from . import info

    info.show(console)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    import dataclasses

    import torch

    from . import selfcheck

    rows = []
    with console.status("checking") as status:
        for row in selfcheck.in_background("cuda") if torch.cuda.is_available() else selfcheck.rows():
            rows.append(row)
            status.update(f"{row.op}: {row.impl}")
    selfcheck.show(console, selfcheck.in_order(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    wrong = sum(not row.passed for row in rows)
    done = sum(row.skipped is None for row in rows)
    console.print(f"[red]{wrong} of {done} are wrong[/]" if wrong else f"[green]all {done} are within their budget[/]")
    return 1 if wrong else 0


def _demo(options: argparse.Namespace, console: Console) -> int:
    from .demo.run import run

    status = run(console, steps=options.steps, html=options.html, use_gpu=not options.cpu)
    if options.svg is not None:
        console.save_svg(str(options.svg), title="hybrid-ops demo")
    return status


def _bench(options: argparse.Namespace, console: Console) -> int:
    def measure(harness: Any, report: Any, rows: dict[str, Any]) -> None:
        families = options.families or harness.FAMILIES
        if options.list:
            harness.show_list(families, options.only, options.all, console)
        elif options.stored is not None:
            report.show_stored(options.stored, console, options.families, options.only, **rows)
        else:
            harness.run(families, options.json, only=options.only, every=options.all, **rows)

    return _measure("hybrid-ops bench", "harness", measure, options, console)


def _bench_model(options: argparse.Namespace, console: Console) -> int:
    def measure(model: Any, report: Any, rows: dict[str, Any]) -> None:
        if options.stored is not None:
            report.show_stored(options.stored, console, ["model"], **rows)
            return
        model.run(
            options.preset,
            layers=options.layers,
            prompts=options.prompt,
            batches=options.batch,
            context=options.context,
            new_tokens=options.new_tokens,
            dtype=options.dtype,
            peers=not options.no_peers,
            console=console,
            json_path=options.json,
            **rows,
        )

    return _measure("hybrid-ops bench model", "model", measure, options, console)


def _measure(
    command: str,
    module: str,
    measure: Callable[[Any, Any, dict[str, Any]], None],
    options: argparse.Namespace,
    console: Console,
) -> int:
    try:
        measuring, report = (importlib.import_module(f"hybrid_ops.bench.{name}") for name in (module, "report"))
    except ImportError as error:
        missing = error.name or str(error)
        console.print(f"{command} needs {missing}: pip install 'hybrid-ops[bench]'", highlight=False, markup=False)
        return 1
    rows = {"html_path": options.html, "compare_path": options.compare, "fail_above": options.fail_above}
    try:
        if options.fail_above is not None and options.compare is None:
            raise ValueError("--fail-above needs --compare FILE")
        if options.stored is not None and options.json is not None:
            raise ValueError("--from measures nothing, so that --json has nothing to write")
        measure(measuring, report, rows)
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"{command}: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    return 0


def _quantize(options: argparse.Namespace, console: Console) -> int:
    import dataclasses

    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .models.quantize import quantize_checkpoint
    from .models.quantize_tables import show

    folder = Path(os.path.abspath(options.folder))
    name = f"{folder.name.removesuffix('-BF16')}-{options.format.upper()}"
    columns = TextColumn("quantising"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("quantising", total=None)
            report = quantize_checkpoint(
                options.folder,
                options.output or folder.parent / name,
                format=options.format,
                rules=options.rules or (),
                four_over_six=options.four_over_six,
                input_scale=options.input_scale,
                max_shard_bytes=options.max_shard_size,
                device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
                force=options.force,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"hybrid-ops quantize: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    show(console, report)
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return 0
