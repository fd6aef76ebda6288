"""`hybrid-ops bench`: measure cases, check what the timed replays left behind, print a table, write JSON.

An implementation whose results are outside the error budget is not timed. Times are cold: inputs rotate through sets
that together are larger than three times the L2 cache, and results never share memory. `warm` is the same with one set.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hybrid_ops
from hybrid_ops import budget

from . import machine, peers
from .cases import Case, Tensors, matches
from .compare import Comparison
from .report import show
from .results import Report, Row, read_same_gpu, write
from .table import print_head, wide
from .timing import Graph, host_us, summary, wall_samples, wall_us

FAMILIES = ("conv1d", "ssd", "norm", "moe_router", "grouped_gemm", "moe", "quant", "gemm")
TIMES = ("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm", "host_us", "host_us_p10", "host_us_p90")
SAMPLE = 2**22  # elements of a large result that are compared with the expected one


def run(
    families: Sequence[str],
    json_path: str | Path | None = None,
    device: str | torch.device | None = None,
    only: Collection[str] | None = None,
    console: Console | None = None,
    html_path: str | Path | None = None,
    compare_path: str | Path | None = None,
    fail_above: float | None = None,
) -> list[Row]:
    """Measure every case of `families`, or those whose name matches a pattern in `only`, and print a table.

    With `json_path` the rows are merged into that file: it holds the newest row for each (op, case, dtype, impl). With
    `html_path` a report of them is drawn. With `compare_path` each is compared with the row of an older file.

    Raises:
        ValueError: an unknown family, no such case, or a file that is missing or holds no rows or another GPU's.
        RuntimeError: a result was outside its error budget, or one is slower than in the older file by more than its
            spread and `fail_above` percent; all rows have been printed and written by then.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = list(select(families, device, only))
    if not chosen:
        raise ValueError(f"only must name a case of {', '.join(families)}, with * and ?, got {', '.join(only or ())}")
    console = wide(console or Console())
    report: Report = {"machine": machine.describe(device)}
    gpu = report["machine"]["gpu"]
    previous = []
    if json_path is not None and Path(json_path).exists():
        previous = read_same_gpu("json_path", json_path, gpu)["rows"]
    comparison = None if compare_path is None else Comparison(read_same_gpu("compare_path", compare_path, gpu))
    before = machine.clocks(device)
    report |= {"ceilings": machine.ceilings(device), "commit": machine.commit(), "date": machine.now()}
    print_head(console, report)
    if missing := peers.missing():
        console.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)

    rows: list[Row] = []
    for family, case in chosen:
        with console.status(f"{case.op} {case.name}"):
            rows += measure_case(family, case, device, report)
    if before is not None:
        report["machine"]["clocks"] = {"before": before, "after": machine.clocks(device)}
    if json_path is not None:
        write(json_path, report, previous, rows)
    show({**report, "rows": rows}, console, html_path, comparison, fail_above)
    return rows


def select(families: Sequence[str], device: torch.device, only: Collection[str] | None) -> Iterator[tuple[str, Case]]:
    """Each family's cases, or those of them whose name matches a pattern in `only`, with * and ?."""
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for family in families:
        for case in importlib.import_module(f"{__package__}.{family}").cases(on_gpu=device.type == "cuda"):
            if matches(case.name, only):
                yield family, case


def visit(case: Case, device: torch.device) -> None:
    """Call every implementation once, so that its kernels are compiled."""
    tensors = case.make(device, torch.Generator(device).manual_seed(0))
    for impl in impls(case, device):
        case.call(tensors, impl)


def measure_case(family: str, case: Case, device: torch.device, report: Mapping[str, Any]) -> list[Row]:
    """A row for each implementation of the case that this machine has."""
    sets = input_sets(case, device)
    peer_us: dict[str, float | None] | None = None
    rows = []
    for impl in impls(case, device):
        row: Row = {"family": family, "op": case.op, "case": case.name, "dtype": dtype_name(case.dtype), "impl": impl}
        row |= dict.fromkeys((*TIMES, "error_ratio"))
        row |= {"bytes": case.bytes, "flops": case.flops, "floor_us": floor_us(case, report["ceilings"])}
        row |= {"peers": {}, "commit": report["commit"], "date": report["date"]}
        try:
            measure(case, impl, sets, row, device)
        except Exception as error:  # one broken case must not cost the figures of all others
            row["check"] = f"{type(error).__name__}: {error}"
        if row["check"] == "passed":
            if peer_us is None:
                peer_us = {name: _time_peer(name, call, sets, device) for name, call in case.peers.items()}
            row["peers"] = peer_us
        rows.append(row)
    return rows


def floor_us(case: Case, ceilings: Mapping[str, float | None]) -> float | None:
    """The larger of bytes over copy bandwidth and FLOPs over matrix rate."""
    copy_tbs, tflops = ceilings["copy_tbs"], ceilings[case.rate]
    if copy_tbs is None or tflops is None:
        return None
    return max(case.bytes / copy_tbs, case.flops / tflops) / 1e6


def input_sets(case: Case, device: torch.device) -> list[Tensors]:
    """So many sets of inputs that together they are larger than three times the L2 cache."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(2, min(200, math.ceil(3 * cache / max(case.bytes, 1)) + 1))
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
    right = _right(case, sets[0])  # before the call, which may update a state in place
    row["error_ratio"], row["check"] = _check(case, *right, case.call(sets[0], impl))
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
    for index in (0, len(sets) - 1):
        error, row["check"] = _check(case, *_right(case, sets[index]), cold.results[index])
        row["error_ratio"] = max(row["error_ratio"], error)
        if row["check"] != "passed":
            return []
    if not all(bool(result.isfinite().all()) for results in cold.results for result in results.values()):
        row["check"] = "a replay left values that are not finite"
        return []
    del cold
    row["gpu_us"], row["gpu_us_p10"], row["gpu_us_p90"] = summary(samples)
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


def _right(case: Case, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The expected results, and those of the computation whose error is the budget's measure."""
    expected = case.expected(tensors)
    return expected, expected if case.baseline is None else case.baseline(tensors)


def _check(case: Case, expected: Tensors, baseline: Tensors, results: Tensors) -> tuple[float, str]:
    """Error / budget of the worst result, and "passed" or what is wrong.

    The reference is the float32 torch implementation, itself held to float64 by the tests. Of large results SAMPLE
    elements are compared, of the first tokens, the last and evenly spread ones.
    """
    worst = 0.0
    for name, want in expected.items():
        got, base = results[name], baseline[name]
        if not want.is_floating_point():  # bytes, each of which is specified
            wrong = int((got != want).sum())
            if wrong:
                return math.inf, f"{name}: {wrong} of {want.numel()} bytes differ"
            continue
        if got.shape == want.shape and got.numel() > SAMPLE:
            length = got.shape[case.tokens]
            quarter = max(2, SAMPLE * length // got.numel() // 4)
            spread = torch.linspace(0, length - 1, 2 * quarter, device=got.device).long()
            edge = torch.arange(quarter, device=got.device)
            sample = torch.cat([edge, spread, length - 1 - edge])
            got, want, base = (t.index_select(case.tokens, sample) for t in (got, want, base))
        ref, base = (t.double().cpu().numpy() for t in (want, base))
        ratio, complaint = budget.measure(name, got, ref, base, case.budget_dtype, axis=case.axis[name])
        worst = max(worst, ratio)
        if complaint is not None:
            return worst, complaint
    return worst, "passed"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
