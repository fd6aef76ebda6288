"""`hybrid-ops bench model`: whole models with random weights, prefill and decoding, beside `transformers`.

A time is that of a whole call, from an idle GPU to an idle GPU, Python included: by CUDA events (`gpu_us`) and by the
wall clock (`host_us`). Each step is waited for, as a server that sends every token on does.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from hybrid_ops.models import NemotronHForCausalLM

from .cases import decode, dtype_name, prefill
from .harness import floor_us
from .model_check import Right, decided_routing, distance, right
from .model_runners import Captured, Ours, Theirs, transformers_model, versions, why_no_transformers
from .model_size import Size, Work, available, gigabytes, preset, size
from .results import Row
from .session import Session
from .table import print_finished
from .timing import Clock, summary

WARM_STEPS = 2  # which load and compile what a graph must find ready
CHECKED_STEPS = 8
CHECKED_ROWS = 4
ENOUGH_S, FEWEST, MOST = 1.0, 5, 30  # a prompt is read for so long, and so often
GRAPHS = {"cuda": (False, True), "cpu": (False,)}
DTYPES = {"cuda": ("bfloat16", "float16"), "cpu": ("float32", "bfloat16")}


class Defaults(NamedTuple):
    preset: str
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    new_tokens: int


ON_GPU = Defaults("nemotron-3-nano-30b", (2048, 8192), (1, 16, 64), 256, 32)
ON_CPU = Defaults("tiny-moe", (64, 256), (1, 4), 32, 8)


class Measured(NamedTuple):
    """Of one call."""

    clock: Clock
    peak: int | None  # bytes on the GPU, the weights included

    @property
    def samples(self) -> list[float]:
        """Of the time that is the figure."""
        return self.clock.gpu or self.clock.host


class Wrong(Exception):
    """Results that are not the model's."""


def run(
    name: str | None = None,
    layers: int | str | None = None,
    prompts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    context: int | None = None,
    new_tokens: int | None = None,
    dtype: str | None = None,
    peers: bool = True,
    device: str | torch.device | None = None,
    console: Console | None = None,
    **session_options: Any,
) -> list[Row]:
    """Measure one model and print a table; `layers` is a number, "fit" or None for all.

    Raises:
        ValueError: an option that cannot be, or a model that does not fit.
        RuntimeError: logits were wrong, or a row is slower than `fail_above` allows.
        KeyboardInterrupt: it was stopped; the rows of the cases before have been printed and written.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = ON_GPU if device.type == "cuda" else ON_CPU
    prompts, batches = list(prompts or default.prompts), list(batches or default.batches)
    context = default.context if context is None else context
    new_tokens = default.new_tokens if new_tokens is None else new_tokens
    dtype = dtype or DTYPES[device.type][0]
    _check_options(prompts, batches, context, new_tokens, dtype, device)
    name = preset(name or default.preset)
    room = context + new_tokens
    needs = [(1, seqlen) for seqlen in prompts] + [(batch, context) for batch in batches]

    def needed(model: Size) -> int:
        return model.needed(needs, max(batches), room)

    model_size = _fitting(name, layers, getattr(torch, dtype), device, needed)
    session = Session(device, console, **session_options)
    say = session.console
    say.print(f"{model_size.describe()}; random weights", highlight=False)
    say.print(
        f"needs {gigabytes(needed(model_size))} with caches and workspace, by estimate, of "
        f"{gigabytes(available(device))} that are free: fits",
        highlight=False,
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    rows: list[Row] = []
    with (
        session.stoppable(rows),
        torch.no_grad(),
        Progress(*columns, console=say, transient=True, disable=not say.is_terminal) as progress,
    ):
        task = progress.add_task("building the model", total=None)
        bench = Bench(model_size, device, session, peers, lambda text: progress.update(task, description=text))
        bench.prepare(prompts, batches, room)
        works = [*(bench.prefill(n) for n in prompts), *(bench.decode(n, context, new_tokens) for n in batches)]
        progress.update(task, total=len(works))
        for number, work in enumerate(works, 1):
            done = work()
            rows += done
            print_finished(say, f"{number} of {len(works)}: {done[0]['op']} {done[0]['case']}", done)
            session.write(rows)
            progress.advance(task)
        for work in bench.late:  # what may end CUDA for this process: there is nothing to lose behind it
            work()
            session.write(rows)
    session.finish(rows)
    return rows


def _check_options(
    prompts: list[int], batches: list[int], context: int, new_tokens: int, dtype: str, device: torch.device
) -> None:
    for option, numbers in {"prompt": prompts, "batch": batches, "new_tokens": [new_tokens]}.items():
        if min(numbers) < 1:
            raise ValueError(f"{option} must be at least 1, got {min(numbers)}")
    least = WARM_STEPS + CHECKED_STEPS + 1
    if context < least:
        raise ValueError(f"context must be at least {least}, whose last tokens are the check, got {context}")
    if dtype not in DTYPES[device.type]:
        raise ValueError(
            f"dtype must be {' or '.join(DTYPES[device.type])} on {device.type}, where wider arithmetic checks it, "
            f"got {dtype}"
        )


def _fitting(
    name: str, layers: int | str | None, dtype: torch.dtype, device: torch.device, needed: Callable[[Size], int]
) -> Size:
    """The model of so many layers.

    Raises:
        ValueError: it does not fit.
    """
    free = available(device)
    whole = size(name, None, dtype)
    wanted = whole if layers in (None, "fit") else size(name, int(layers), dtype)  # type: ignore[arg-type]
    if needed(wanted) <= free:
        return wanted
    kinds = len(set(whole.config.hybrid_override_pattern))
    fewer = (size(name, n, dtype) for n in range(wanted.config.num_hidden_layers - 1, kinds - 1, -1))
    fitting = next((model for model in fewer if needed(model) <= free), None)
    if layers == "fit" and fitting is not None:
        return fitting
    hint = "not even one layer of each kind fits: try a smaller --preset, --prompt or --batch"
    if fitting is not None:
        hint = f"--layers {fitting.config.num_hidden_layers} fits"
    raise ValueError(
        f"{wanted.describe()}. It needs {gigabytes(needed(wanted))} with caches and workspace, and "
        f"{gigabytes(free)} are free: {hint}"
    )


class Bench:
    """One model and everyone who runs it."""

    def __init__(
        self, size: Size, device: torch.device, session: Session, peers: bool, say: Callable[[str], None]
    ) -> None:
        self.size, self.device, self.say = size, device, say
        self.console, self.report = session.console, session.report
        torch.manual_seed(0)
        self.model = NemotronHForCausalLM(size.config, device=device, dtype=size.dtype).eval().requires_grad_(False)
        graphs = GRAPHS[device.type]
        self.ours = [Ours(self.model, graph=graph) for graph in graphs]
        self.peers: list[Theirs] = []
        self.ratios: dict[str, float] = {}  # error / budget of all who run eagerly
        self.wrong: dict[str, str] = {}  # why a runner has no times
        self.late: list[Callable[[], None]] = []
        self.dead: str | None = None  # why nothing more can run
        notes = [] if device.type == "cuda" else ["no GPU: no CUDA graphs, no peak memory"]
        if peers and (reason := why_no_transformers()) is not None:
            notes.append(f"not compared: transformers {reason}")
        elif peers:
            theirs = transformers_model(self.model)
            self.peers = [Theirs(theirs, patch=patch, graph=graph) for graph in graphs for patch in (False, True)]
            notes.append(f"beside it {versions()}, on the same tensors; patch: by hybrid_ops.integrations.transformers")
        for note in notes:
            self.console.print(note, highlight=False, markup=False, soft_wrap=True)

    def prepare(self, prompts: Sequence[int], batches: Sequence[int], room: int) -> None:
        """Compile on all cores what Triton will need, then compare the logits of all who run eagerly."""
        eager = [runner for runner in (*self.ours, *self.peers) if not runner.graph]
        if self.device.type == "cuda":
            self.say("compiling kernels")
            self._compile([runner for runner in eager if runner.name != "transformers"], prompts, batches, room)
        self.say("comparing logits")
        with decided_routing(self.model):
            self.right = right(self.model)
            for runner in eager:
                error = self._attempt(runner, lambda runner=runner: _check(runner, self.right))
                if isinstance(error, str):
                    self.wrong[runner.name] = error
                else:
                    self.ratios[runner.name] = error
        ratios = ", ".join(f"{'hybrid-ops' if name == 'eager' else name} {r:.2f}" for name, r in self.ratios.items())
        self.console.print(f"logits, error / budget: {ratios or 'none'}", highlight=False)

    def _compile(
        self, runners: Sequence[Ours | Theirs], prompts: Sequence[int], batches: Sequence[int], room: int
    ) -> None:
        from hybrid_ops.triton_kernels.launch import compile_only

        with compile_only():
            right(self.model)
            for runner in runners:
                with runner.active():
                    for seqlen in prompts:
                        runner.prefill(self._ids(1, seqlen))
                    for batch in batches:
                        ids = self._ids(batch, room)
                        runner.start(ids[:, 1:], room)[1](ids[:, :1])

    def prefill(self, seqlen: int) -> Callable[[], list[Row]]:
        ids = self._ids(1, seqlen)

        def measure(runner: Ours | Theirs) -> Measured:
            for _ in range(2):
                if not bool(runner.prefill(ids).isfinite().all()):
                    raise Wrong("logits are not finite")
            with self._peak() as peak:
                clock, end = Clock(self.device), time.perf_counter() + ENOUGH_S
                while len(clock.host) < FEWEST or (len(clock.host) < MOST and time.perf_counter() < end):
                    clock.time(lambda: runner.prefill(ids))
            return Measured(clock, *peak)

        case, work = prefill(self.size.name, seqlen, 1), self.size.prefill(1, seqlen)
        return lambda: self._rows("prefill", case, work, seqlen, measure)

    def decode(self, batch: int, context: int, new_tokens: int) -> Callable[[], list[Row]]:
        """Steps that read given tokens, the same for everyone, and choose the likeliest next ones."""
        room, first = context + new_tokens, context - WARM_STEPS - CHECKED_STEPS
        ids = self._ids(batch, room)
        expected: list[Tensor] = []  # logits of the eager step, which comes first

        def measure(runner: Ours | Theirs) -> Measured:
            columns = ids[:, first:].split(1, dim=1)
            checked = columns[WARM_STEPS : WARM_STEPS + CHECKED_STEPS]
            with decided_routing(self.model):
                _, step = runner.start(ids[:, :first], room, quick=True)
                for tokens in columns[:WARM_STEPS]:
                    step(tokens)
            clock = Clock(self.device)
            with self._peak() as peak:
                with decided_routing(self.model):
                    if runner.graph:
                        step = Captured(step, columns[0])
                    got = torch.cat([step(tokens)[:CHECKED_ROWS].clone() for tokens in checked], dim=1)
                for tokens in columns[WARM_STEPS + CHECKED_STEPS :]:
                    clock.time(lambda tokens=tokens: step(tokens).argmax(-1))
            expected[:] = expected or [got]
            if not (off := distance(got, expected[0]) / self.right.budget) <= 2:  # each within its own budget
                raise Wrong(f"logits: {off:.3g} budgets away from those of the eager step")
            return Measured(clock, *peak)

        case, work = decode(self.size.name, batch, f"c{context}"), self.size.decode(batch, context)
        return lambda: self._rows("decode", case, work, batch, measure)

    def _rows(
        self, op: str, case: str, work: Work, tokens: int, measure: Callable[[Ours | Theirs], Measured]
    ) -> list[Row]:
        """A row for each way in which this library runs the call, which all have the same peers."""
        shared: Row = {"family": "model", "op": op, "case": case, "dtype": dtype_name(self.size.dtype)}
        shared |= {"bytes": work.bytes, "flops": work.flops, "floor_us": floor_us(work, self.report["ceilings"])}
        shared |= {"tokens": tokens, "peers": {}, "peers_peak_bytes": {}, "peers_why": {}}
        shared |= {"commit": self.report["commit"], "date": self.report["date"]}
        rows: list[Row] = []
        wrong = self.wrong.get("eager")  # then no one is timed: there is nothing to compare with

        def run(runner: Ours | Theirs) -> None:
            self.say(f"{op} {case}: {runner.name}")
            result = wrong or self.wrong.get(runner.name) or self._attempt(runner, lambda: measure(runner))
            if isinstance(runner, Ours):
                rows.append({**shared, "impl": runner.name, **self._figures(result)})
            elif isinstance(result, str):
                shared["peers"][runner.name], shared["peers_why"][runner.name] = None, result
            else:
                shared["peers"][runner.name] = summary(result.samples).median
                shared["peers_peak_bytes"][runner.name] = result.peak

        for runner in self.ours if wrong else (*self.ours, *self.peers):
            if not runner.graph or (op == "decode" and isinstance(runner, Ours)):
                run(runner)
            elif op == "decode":  # after a capture that failed CUDA may refuse everything, or worse
                self.late.append(lambda runner=runner: run(runner))
        return rows

    def _figures(self, result: Measured | str) -> Row:
        row: Row = {"error_ratio": self.ratios.get("eager"), "check": "passed", "peak_bytes": None}
        row |= dict.fromkeys(("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm"))
        row |= dict.fromkeys(("host_us", "host_us_p10", "host_us_p90"))
        if isinstance(result, str):
            return {**row, "check": result}
        row["host_us"], row["host_us_p10"], row["host_us_p90"] = summary(result.clock.host)
        if result.clock.gpu:
            row["gpu_us"], row["gpu_us_p10"], row["gpu_us_p90"] = summary(result.clock.gpu)
            row["gpu_us_warm"] = row["gpu_us"]  # nothing else runs between two calls
        return {**row, "peak_bytes": result.peak}

    def _attempt(self, runner: Ours | Theirs, call: Callable[[], Any]) -> Any:
        """What the call returns, or why it fails: it must not cost the figures of all others."""
        if self.dead is not None:
            return self.dead
        try:
            with runner.active():
                return call()
        except torch.OutOfMemoryError:
            return "needs more memory than is free"
        except Wrong as error:
            return str(error)
        except Exception as error:
            while runner.graph and error.__context__ is not None:  # why a capture failed, not that it did
                error = error.__context__  # type: ignore[assignment]
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        finally:
            self._clean_up(runner)

    def _clean_up(self, runner: Ours | Theirs) -> None:
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # an assertion on the device is the end of CUDA in this process
            self.dead = f"CUDA ended with {runner.name}: {str(error).strip().splitlines()[0]}"

    @contextlib.contextmanager
    def _peak(self) -> Iterator[list[int | None]]:
        """Bytes that were in use at once inside: a list that has them behind."""
        peak: list[int | None] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None)

    def _ids(self, batch: int, seqlen: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(batch * seqlen)
        return torch.randint(self.size.config.vocab_size, (batch, seqlen), generator=generator, device=self.device)


def _check(runner: Ours | Theirs, right: Right) -> float:
    """Error / budget of a prompt's last logits and of tokens that are decoded one by one behind it.

    Raises:
        Wrong: it is above 1.
    """
    steps = right.logits.shape[1] - 1
    last, step = runner.start(right.ids[:, :-steps], right.ids.shape[1])
    logits = torch.cat([last, *(step(tokens) for tokens in right.ids[:, -steps:].split(1, dim=1))], dim=1)
    ratio = right.excess(logits)
    if not ratio <= 1:
        raise Wrong(f"logits: {ratio:.3g} times as far from the right ones as rounding explains")
    return ratio
