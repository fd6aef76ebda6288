"""`hybrid-ops demo`: train, compare, write, prove, draw."""

import dataclasses
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import info, selfcheck
from .._library import IMPLS
from ..models import NemotronHForCausalLM
from . import prove, report
from . import text as texts
from .report import Results
from .train import Recipe, bits, new_model, surprise, train, visit

LIMIT = 2.2  # bits per unseen byte; above it the run has failed
PROMPT = b"When a function is called, "
SAMPLES_AT = (0, 50, 150)  # steps; and at the end
POSITIONS = (100, 4000)
DRAFTS, DRAFTED_TEXTS, DRAFTED_BYTES = 3, 8, 64
SAMPLE_BYTES, WRITTEN_BYTES, TIMED_BYTES, PROVED_BYTES, WATCHED_BYTES = 180, 300, 64, 128, 256


LOAD_BYTES = 2048
BARS = "▁▂▃▄▅▆▇█"
BENCHED_FAMILIES = ("ssd", "conv1d", "norm")
BENCHED = ("super-L8192-b1", "super-L8192-b1-gated")


def run(console: Console, *, steps: int | None = None, html: Path = Path("demo.html"), use_gpu: bool = True) -> int:
    """Everything that `hybrid-ops demo` prints; returns the exit status. `steps` cuts the training short."""
    began = time.perf_counter()
    device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    recipe = Recipe() if steps is None else dataclasses.replace(Recipe(), steps=steps)
    corpus = texts.corpus()
    model = new_model(recipe, device)
    parameters = sum(p.numel() for p in model.parameters())
    pattern = model.config.hybrid_override_pattern
    results = Results(_machine(device), recipe, corpus, PROMPT, pattern, parameters)
    _introduce(console, results)

    # with a GPU there are cores to spare: the operators are checked, and the rivals measured, beside the training
    checking, rivals = None, None
    if device.type == "cuda":
        checking = selfcheck.in_background(device.type)
        rivals = ProcessPoolExecutor(1, get_context("spawn")).submit(texts.rivals, corpus)
        with console.status("compiling kernels"):
            _compile(model, recipe)
    _heading(console, "1", "Training")
    _train(console, model, results)
    _print_loads(console, model, results)
    threads = torch.get_num_threads()
    if checking is None:  # of two cores one checks the operators, one does the rest
        checking = selfcheck.in_background(device.type, processes=1)
        torch.set_num_threads(max(1, threads - 1))

    _heading(console, "2", "Bits for each byte of the text that it has not seen")
    with console.status("measuring"):
        results.surprise = surprise(model, corpus.held_out)
        results.compressors, results.ngram = texts.rivals(corpus) if rivals is None else rivals.result()
    console.print(_comparison(results))

    _heading(console, "3", "Writing, and what has to be remembered")
    _write(console, model, results)

    _heading(console, "4", "Is it right?")
    sample = corpus.held_out[:PROVED_BYTES]
    with console.status("asking NumPy"):
        assert results.drafting is not None
        results.proofs = [prove.against_reference(model, sample), *prove.ways_of_reading(model, sample)]
        results.proofs.append(results.drafting.proof)
        results.memory = prove.watch(model, corpus.held_out[:WATCHED_BYTES])
    _print_proofs(console, results)
    with console.status("checking every operator against NumPy") as status:
        for row in checking:
            results.ops.append(row)
            status.update(f"checking {row.op}, {row.impl}")
    torch.set_num_threads(threads)
    results.ops.sort(key=lambda row: IMPLS.index(row.impl), reverse=True)  # torch first
    selfcheck.show(console, results.ops)

    failed = failures(results)
    if device.type == "cuda" and not _bench(console, results):
        failed.append("a timed operator was wrong")
    results.seconds = time.perf_counter() - began
    html.write_text(report.page(results), encoding="utf-8")
    console.print()
    for failure in failed:
        console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
    done = "[green]All of it holds.[/] " if not failed else ""
    console.print(f"{done}{results.seconds:.0f} seconds. The picture, for a browser:")
    console.print(str(html), highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _compile(model: NemotronHForCausalLM, recipe: Recipe) -> None:
    """All of Triton's work in this run, many kernels at a time: one by one they take half a minute."""
    from ..bench import harness
    from ..triton_kernels.launch import compile_only

    with compile_only():
        visit(model, recipe)
        for _, case in harness.select(BENCHED_FAMILIES, model.device, BENCHED):
            harness.visit(case, model.device)


def failures(results: Results) -> list[str]:
    """Why the run has failed, if it has."""
    return [
        *([] if results.bits <= LIMIT else [f"{results.bits:.2f} bits per unseen byte, more than {LIMIT}"]),
        *(f"not so: {proof.claim}" for proof in results.proofs if not proof.holds),
        *(f"{row.op} ({row.impl}) is wrong" for row in results.ops if not row.passed),
    ]


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else info.processor()


def _introduce(console: Console, results: Results) -> None:
    recipe, corpus = results.recipe, results.corpus
    letters = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "LatentMoE"}
    layers = ", ".join(letters[letter] for letter in results.pattern)
    console.print(
        f"[bold]hybrid-ops demo[/] on {escape(results.machine)}\n\n"
        f"A hybrid model of {results.parameters / 1e6:.2f} million parameters ({layers};\n"
        "and a head that guesses the byte after the next)\n"
        f"learns from Python's own help texts: {len(corpus.train) / 1e3:.0f} kB, byte by byte, in "
        f"{recipe.steps} steps of {recipe.batch} x {recipe.length} bytes.\n"
        f"{len(corpus.held_out_topics)} topics ({len(corpus.held_out) / 1e3:.0f} kB) are kept from it; "
        f"{100 * corpus.shared:.0f}% of their lines occur in the rest.\n"
        "Then it is measured, it writes, it is proved against NumPy, and a picture is drawn.",
        highlight=False,
    )


def _heading(console: Console, number: str, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{title}[/]\n")


def _train(console: Console, model: NemotronHForCausalLM, results: Results) -> None:
    recipe, began = results.recipe, time.perf_counter()
    columns = (
        TextColumn("step {task.completed:3.0f}"),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]:.2f} nats, {task.fields[bits]:.2f} bits/byte"),
        TextColumn("{task.fields[speed]:.0f} kB/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=float("nan"), bits=float("nan"), speed=0.0)
        _sample(console, model, results, 0)
        for step, loss in enumerate(train(model, results.corpus.train, recipe), start=1):
            results.losses.append(loss)
            results.training_seconds = time.perf_counter() - began
            speed = step * recipe.bytes_per_step / results.training_seconds / 1e3
            progress.update(task, completed=step, loss=loss, bits=bits(loss), speed=speed)
            if step in SAMPLES_AT or step == recipe.steps:
                _sample(console, model, results, step)
    console.print(
        f"\n{results.losses[0]:.2f} nats at the start, {results.losses[-1]:.2f} at the end, "
        f"{results.training_seconds:.0f} s",
        highlight=False,
    )


def _print_loads(console: Console, model: NemotronHForCausalLM, results: Results) -> None:
    """A bar for each expert."""
    results.loads = prove.loads(model, results.corpus.held_out[:LOAD_BYTES])
    console.print("\nhow often each expert is chosen for a byte of text that it has not seen", highlight=False)
    layers = [index for index, letter in enumerate(results.pattern) if letter == "E"]
    for layer, load in zip(layers, results.loads, strict=True):
        bars = "".join(BARS[round(share / load.max() * (len(BARS) - 1))] for share in load)
        console.print(
            f"layer {layer}  [cyan]{bars}[/]  {load.min():.0%} to {load.max():.0%}, evenly {load.mean():.0%}",
            highlight=False,
        )


def _sample(console: Console, model: NemotronHForCausalLM, results: Results, step: int) -> None:
    """Continue the prompt, print it and keep it."""
    written = b"".join(prove.write(model, PROMPT, SAMPLE_BYTES))
    results.samples.append((step, written))
    line = " ".join(report.printable(written).split())
    console.print(f"[bold]after {step:3d} steps[/]  [dim]{PROMPT.decode()}[/]{escape(line)}", highlight=False)


def _comparison(results: Results) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("having read\nthe training text", justify="right")
    table.add_column("alone", justify="right")
    table.add_column("")
    entries = results.rivals | {"this model": results.bits}
    alone = {name: size.alone for name, size in results.compressors.items()}
    scale = 36 / max(*entries.values(), *alone.values())
    for name, value in sorted(entries.items(), key=lambda item: item[1]):
        more = alone.get(name, value) - value
        bar = f"[cyan]{'█' * round(scale * value)}[/][bright_black]{'█' * round(scale * more)}[/]"
        style = "bold" if name == "this model" else ""
        table.add_row(name, f"{value:.2f}", f"{alone[name]:.2f}" if name in alone else "", bar, style=style)
    return table


def _write(console: Console, model: NemotronHForCausalLM, results: Results) -> None:
    console.print(PROMPT.decode(), end="", style="dim", highlight=False)
    column = len(PROMPT)
    for byte in prove.write(model, PROMPT, WRITTEN_BYTES, temperature=0.5):
        results.written += byte
        end_of_line = byte == b"\n" or (byte == b" " and column > console.width - 12)
        column = 0 if end_of_line else column + 1
        letter = "\n" if end_of_line else report.printable(byte)
        console.print(letter, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    results.speeds = [prove.speed(model, results.corpus.train, position, TIMED_BYTES) for position in POSITIONS]
    table = Table(box=None, header_style="bold")
    for heading in ("at byte", "bytes/s", "Mamba-2 state", "keys and values", "were every mixer attention"):
        table.add_column(heading, justify="right")
    for speed in results.speeds:
        memory = (speed.fixed, speed.keys_values, speed.all_attention)
        table.add_row(str(speed.position), f"{speed.per_second:.0f}", *(f"{size / 1e3:,.0f} kB" for size in memory))
    console.print(table)
    with console.status("drafting"):
        results.drafting = prove.drafting(
            model, results.corpus.held_out, drafts=DRAFTS, prompts=DRAFTED_TEXTS, length=DRAFTED_BYTES
        )
    console.print(f"\nwith drafts of the next {DRAFTS} bytes, kept as far as they are what it would have written:")
    for position, accepted in enumerate(results.drafting.acceptance, start=1):
        console.print(
            f"draft {position}  {accepted:4.0%} right  [cyan]{'█' * round(36 * accepted)}[/]", highlight=False
        )
    console.print(f"{results.drafting.per_pass:.1f} bytes a pass", highlight=False)


def _print_proofs(console: Console, results: Results) -> None:
    for proof in results.proofs:
        mark = "[green]yes[/]" if proof.holds else "[red]no [/]"
        console.print(
            f"{mark}  {proof.claim}: logits differ by {proof.difference:.0e}; {proof.detail}", highlight=False
        )
    console.print()


def _bench(console: Console, results: Results) -> bool:
    """SSD, convolution and norm at Super's shape, their floors and peers; whether every timed result was right."""
    _heading(console, "5", "Speed at the shape of Nemotron 3 Super")
    from ..bench import harness

    try:
        results.bench = harness.run(BENCHED_FAMILIES, only=BENCHED, against=("torch",), console=console)
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False)
        return False
    return True
