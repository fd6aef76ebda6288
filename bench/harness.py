"""`hybrid-ops bench`: measure cases, check what the timed replays left behind, print a table, write JSON.

An implementation whose results are outside the error budget is not timed. Times are cold: inputs rotate through sets
that together are larger than three times the L2 cache, and results never share memory. `warm` is the same with one set.
They are those of bursts, at the boost clock; `sustained` is of load without rests, at the clock that its power allows.
"""

import dataclasses
import importlib
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hybrid_ops

from . import peers
from .cases import Case, Tensors, dtype_name, matches
from .check import check, right_results
from .machine import sm_mhz
from .results import Row
from .session import Session
from .table import list_cases, print_finished
from .timing import Graph, host_us, summary, wall_samples, wall_us

FAMILIES = ("conv1d", "ssd", "norm", "mamba2_step", "moe_router", "grouped_gemm", "moe", "quant", "gemm")
FIGURES = (
    *("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm", "gpu_us_sustained", "sm_mhz_sustained"),
    *("host_us", "host_us_p10", "host_us_p90", "error_ratio"),
)


class Skipped(Exception):
    """Why a case is not measured here, which is no failure."""


def run(
    families: Sequence[str],
    json_path: str | Path | None = None,
    device: str | torch.device | None = None,
    only: Collection[str] | None = None,
    console: Console | None = None,
    every: bool = False,
    html_path: str | Path | None = None,
    compare_path: str | Path | None = None,
    fail_above: float | None = None,
    against: Collection[str] | None = None,
) -> list[Row]:
    """Measure the cases of `families`, or those whose name matches a pattern in `only`, and print a table.

    Peers are all that are installed, or those named in `against`.

    With `every` the cases are all shapes of the real models, which takes hours; without a GPU they stay small.

    With `json_path` the rows are merged into that file: it holds the newest row for each (op, case, dtype, impl). With
    `html_path` a report of them is drawn. With `compare_path` each is compared with the row of an older file.

    Raises:
        ValueError: an unknown family, no such case, or a file that is missing or holds no rows or another GPU's.
        RuntimeError: a result was outside its error budget, or one is slower than in the older file by more than its
            spread and `fail_above` percent; all rows have been printed and written by then.
        KeyboardInterrupt: it was stopped; the rows of the cases before have been printed and written.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = list(select(families, device, only, every and device.type == "cuda"))
    if not chosen:
        raise ValueError(f"only must name a case of {', '.join(families)}, with * and ?, got {', '.join(only or ())}")
    session = Session(device, console, json_path, html_path, compare_path, fail_above)
    console = session.console
    if against is not None:
        chosen = [(family, _against(case, against)) for family, case in chosen]
    elif missing := peers.missing():
        console.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)

    rows: list[Row] = []
    skipped: list[str] = []
    with session.stoppable(rows, skipped):
        for number, (family, case) in enumerate(chosen, 1):
            name = f"{case.op} {case.name} {dtype_name(case.dtype)}"
            done: list[Row] = []
            with console.status(f"{number} of {len(chosen)}: {name}"):
                try:
                    done = measure_case(family, case, device, session.report)
                except Skipped as reason:
                    skipped.append(f"{name}: {reason}")
                    torch.cuda.empty_cache()  # what did not fit is in pieces
            rows += done
            print_finished(console, f"{number} of {len(chosen)}: {name}", done)
            session.write(rows)
    session.finish(rows, skipped)
    return rows


def _against(case: Case, names: Collection[str]) -> Case:
    return dataclasses.replace(case, peers={name: call for name, call in case.peers.items() if name in names})


def select(
    families: Sequence[str], device: torch.device, only: Collection[str] | None, every: bool = False
) -> Iterator[tuple[str, Case]]:
    """Each family's cases, or those of them whose name matches a pattern in `only`, with * and ?.

    With `every` the sweep over the models' shapes too, which is for GPUs.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for family in families:
        module = importlib.import_module(f"{__package__}.{family}")
        cases = itertools.chain(module.cases(on_gpu=device.type == "cuda"), module.sweep() if every else ())
        named = {(case.op, case.name, case.dtype): case for case in cases}  # the sweep repeats some of the others
        yield from ((family, case) for case in named.values() if matches(case.name, only))


def show_list(
    families: Sequence[str], only: Collection[str] | None = None, every: bool = False, console: Console | None = None
) -> None:
    """Print the cases with their bytes and FLOPs: those of this machine or, with `every`, of any GPU."""
    device = torch.device("cuda" if every or torch.cuda.is_available() else "cpu")
    list_cases(console or Console(), select(families, device, only, every))


def visit(case: Case, device: torch.device) -> None:
    """Call every implementation once, so that its kernels are compiled."""
    tensors = case.make(device, torch.Generator(device).manual_seed(0))
    for impl in impls(case, device):
        case.call(tensors, impl)


def measure_case(family: str, case: Case, device: torch.device, report: Mapping[str, Any]) -> list[Row]:
    """A row for each implementation of the case that this machine has.

    Raises:
        Skipped: no implementation takes it, or it needs more memory than there is.
    """
    found = impls(case, device)
    if not found:
        raise Skipped("no kernel here takes it")
    try:
        sets = input_sets(case, device)
        rows = [_row(family, case, impl, sets, device, report) for impl in found]
    except torch.OutOfMemoryError as error:
        raise Skipped(f"needs more memory than this GPU has: {error}") from None
    if any(row["check"] == "passed" for row in rows):
        peer_us = {name: _time_peer(name, call, sets, device) for name, call in case.peers.items()}
        rows = [{**row, "peers": peer_us} if row["check"] == "passed" else row for row in rows]
    return rows


def _row(
    family: str, case: Case, impl: str, sets: Sequence[Tensors], device: torch.device, report: Mapping[str, Any]
) -> Row:
    row: Row = {"family": family, "op": case.op, "case": case.name, "dtype": dtype_name(case.dtype), "impl": impl}
    row |= dict.fromkeys(FIGURES)
    row |= {"bytes": case.bytes, "flops": case.flops, "floor_us": floor_us(case, report["ceilings"])}
    row |= {"peers": {}, "commit": report["commit"], "date": report["date"]}
    try:
        measure(case, impl, sets, row, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # one broken case must not cost the figures of all others
        row["check"] = f"{type(error).__name__}: {error}"
    return row


def floor_us(case: Case, ceilings: Mapping[str, float | None]) -> float | None:
    """The larger of bytes over copy bandwidth and FLOPs over matrix rate."""
    copy_tbs, tflops = ceilings["copy_tbs"], ceilings[case.rate]
    if copy_tbs is None or tflops is None:
        return None
    return max(case.bytes / copy_tbs, case.flops / tflops) / 1e6


def input_sets(case: Case, device: torch.device) -> list[Tensors]:
    """So many sets of inputs that together they are larger than three times the L2 cache.

    Raises:
        Skipped: with the float32 copies that the check makes of one set they do not fit into the GPU's memory.
    """
    count = 1
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        count = max(2, min(200, math.ceil(3 * gpu.L2_cache_size / max(case.bytes, 1)) + 1))
        needed = (count + 2) * case.bytes
        if needed > gpu.total_memory:
            raise Skipped(f"needs {needed / 1e9:.0f} GB at least, this GPU has {gpu.total_memory / 1e9:.0f}")
    generator = torch.Generator(device).manual_seed(0)
    return [case.make(device, generator) for _ in range(count)]


def impls(case: Case, device: torch.device) -> list[str]:
    """The kernels that take the case on this machine; without a GPU, torch."""
    if device.type != "cuda":
        return ["torch"]
    found = []
    for impl in case.impls:
        try:
            hybrid_ops.explain(case.public, device="cuda", impl=impl, dtype=case.dtype, **case.problem)
        except RuntimeError:
            continue
        found.append(impl)
    return found


def measure(case: Case, impl: str, sets: Sequence[Tensors], row: Row, device: torch.device) -> list[float]:
    """Check one call, time it, check what the timed replays left, and fill the row.

    Returns the samples of the time that is the figure, in microseconds; none where a check failed.
    """
    right = right_results(case, sets[0])  # before the call, which may update a state in place
    row["error_ratio"], row["check"] = check(case, *right, case.call(sets[0], impl))
    if row["check"] != "passed":
        return []
    if device.type != "cuda":
        samples = wall_samples(lambda: case.call(sets[0], impl))
        row["host_us"], row["host_us_p10"], row["host_us_p90"] = summary(samples)
        return samples
    cold = Graph([lambda tensors=tensors: case.call(tensors, impl) for tensors in sets])
    for results in cold.results:
        for name, result in results.items():
            if name not in case.in_place:
                result.fill_(math.nan if result.is_floating_point() else 255)
    samples = cold.samples()
    sustained = cold.sustained(lambda: sm_mhz(device))
    for index in (0, len(sets) - 1):
        right = right_results(case, sets[index])
        left = case.call(sets[index], impl) if case.moves else cold.results[index]
        error, row["check"] = check(case, *right, left)
        row["error_ratio"] = max(row["error_ratio"], error)
        if row["check"] != "passed":
            return []
    if not all(bool(result.isfinite().all()) for results in cold.results for result in results.values()):
        row["check"] = "a replay left values that are not finite"
        return []
    del cold
    row["gpu_us"], row["gpu_us_p10"], row["gpu_us_p90"] = summary(samples)
    row["gpu_us_sustained"], row["sm_mhz_sustained"] = sustained
    row["gpu_us_warm"] = Graph([lambda: case.call(sets[0], impl)], keep_results=False).time().median
    row["host_us"] = host_us(lambda: case.call(sets[0], impl))
    return samples


def _time_peer(
    name: str, call: Callable[[Tensors], object], sets: Sequence[Tensors], device: torch.device
) -> float | None:
    """The same clock for everyone: cold graph replay, or the wall clock without a GPU. None where the call fails."""
    try:
        if device.type != "cuda":
            return wall_us(lambda: call(sets[0])).median
        return Graph([lambda tensors=tensors: call(tensors) for tensors in sets]).time().median
    except Exception as error:  # another library's limits are not ours
        warnings.warn(f"{name} failed: {type(error).__name__}: {error}", stacklevel=2)
        return None
