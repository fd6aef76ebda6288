"""`hybrid-ops bench`: measure cases, check what the timed replays left behind, print a table, write JSON.

An implementation whose results are outside the error budget is not timed. Times are cold: inputs rotate through sets
that together are larger than three times the L2 cache, and results never share memory. `warm` is the same with one set.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hybrid_ops
from hybrid_ops.budget import measure

from . import machine, peers
from .cases import Case, Tensors
from .timing import Graph, host_us, wall_us

FAMILIES = ("conv1d", "ssd", "norm", "moe_router", "grouped_gemm", "moe", "quant", "gemm")
SAMPLE = 2**22  # elements of a large result that are compared with the expected one

Row = dict[str, Any]


def run(
    families: Sequence[str],
    json_path: str | Path | None = None,
    device: str | torch.device | None = None,
    only: Collection[str] | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure every case of `families`, or those whose name is in `only`, and print a table.

    With `json_path` the rows are merged into that file: it holds the newest row for each (op, case, dtype, impl).

    Raises:
        ValueError: an unknown family, or a file of another GPU's figures.
        RuntimeError: a result was outside its error budget; the other rows have been printed and written by then.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = list(select(families, device, only))
    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a log has no edge to fold at
    report: dict[str, Any] = {"machine": machine.describe(device)}
    previous = _read(json_path, report["machine"]["gpu"])
    report |= {"ceilings": machine.ceilings(device), "commit": machine.commit(), "date": machine.now()}
    _print_head(console, report)

    rows: list[Row] = []
    for family, case in chosen:
        with console.status(f"{case.op} {case.name}"):
            rows += measure_case(family, case, device, report)
    console.print(_table(rows, device))
    if json_path is not None:
        _write(Path(json_path), report, previous, rows)
    failed = [row for row in rows if row["check"] != "passed"]
    if failed:
        lines = [f"{row['op']} {row['case']} {row['impl']}: {row['check']}" for row in failed]
        raise RuntimeError("\n".join([f"{len(failed)} of {len(rows)} were not timed, for they are wrong:", *lines]))
    return rows


def select(families: Sequence[str], device: torch.device, only: Collection[str] | None) -> Iterator[tuple[str, Case]]:
    """Each family's cases, or those of them whose name is in `only`."""
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for family in families:
        for case in importlib.import_module(f"{__package__}.{family}").cases(on_gpu=device.type == "cuda"):
            if only is None or case.name in only:
                yield family, case


def visit(case: Case, device: torch.device) -> None:
    """Call every implementation once, so that its kernels are compiled."""
    tensors = case.make(device, torch.Generator(device).manual_seed(0))
    for impl in _impls(case, device):
        case.call(tensors, impl)


def measure_case(family: str, case: Case, device: torch.device, report: Mapping[str, Any]) -> list[Row]:
    """A row for each implementation of the case that this machine has."""
    generator = torch.Generator(device).manual_seed(0)
    sets = [case.make(device, generator) for _ in range(_num_sets(case, device))]
    peer_us: dict[str, float | None] | None = None
    rows = []
    for impl in _impls(case, device):
        row: Row = {"family": family, "op": case.op, "case": case.name, "dtype": _name(case.dtype), "impl": impl}
        row |= dict.fromkeys(("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm", "host_us", "error_ratio"))
        row |= {"bytes": case.bytes, "flops": case.flops, "floor_us": floor_us(case, report["ceilings"])}
        row |= {"peers": {}, "commit": report["commit"], "date": report["date"]}
        try:
            _measure(case, impl, sets, row, device)
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


def _num_sets(case: Case, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(200, math.ceil(3 * cache / max(case.bytes, 1)) + 1))


def _impls(case: Case, device: torch.device) -> list[str]:
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


def _measure(case: Case, impl: str, sets: Sequence[Tensors], row: Row, device: torch.device) -> None:
    """Check one call, time it, and check what the timed replays left."""
    right = _right(case, sets[0])  # before the call, which may update a state in place
    row["error_ratio"], row["check"] = _check(case, *right, case.call(sets[0], impl))
    if row["check"] != "passed":
        return
    if device.type != "cuda":
        row["host_us"] = wall_us(lambda: case.call(sets[0], impl)).median
        return
    cold = Graph([lambda tensors=tensors: case.call(tensors, impl) for tensors in sets])
    for results in cold.results:
        for name, result in results.items():
            if name not in case.in_place:
                result.fill_(math.nan if result.is_floating_point() else 255)
    timing = cold.time()
    for index in (0, len(sets) - 1):
        error, row["check"] = _check(case, *_right(case, sets[index]), cold.results[index])
        row["error_ratio"] = max(row["error_ratio"], error)
        if row["check"] != "passed":
            return
    if not all(bool(result.isfinite().all()) for results in cold.results for result in results.values()):
        row["check"] = "a replay left values that are not finite"
        return
    del cold
    row["gpu_us"], row["gpu_us_p10"], row["gpu_us_p90"] = timing
    row["gpu_us_warm"] = Graph([lambda: case.call(sets[0], impl)], keep_results=False).time().median
    row["host_us"] = host_us(lambda: case.call(sets[0], impl))


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
        ratio, complaint = measure(name, got, ref, base, case.budget_dtype, axis=case.axis[name])
        worst = max(worst, ratio)
        if complaint is not None:
            return worst, complaint
    return worst, "passed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_head(console: Console, report: Mapping[str, Any]) -> None:
    facts, ceilings = report["machine"], report["ceilings"]
    versions = f"torch {facts['torch']}, Triton {facts['triton'] or 'not installed'}"
    if facts["gpu"] is None:
        console.print(f"no GPU here: small shapes on the CPU, by the wall clock; {versions}", highlight=False)
    else:
        fp8 = "" if ceilings["fp8_tflops"] is None else f", fp8 {ceilings['fp8_tflops']:.0f} TFLOP/s"
        console.print(
            f"{facts['gpu']}, driver {facts['driver']}, {versions}\nceilings measured now: copy "
            f"{ceilings['copy_tbs']:.2f} TB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s{fp8}",
            highlight=False,
        )
    if missing := peers.missing():
        console.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)


def _table(rows: Sequence[Row], device: torch.device) -> Table:
    table = Table(header_style="bold", box=None)
    gpu = device.type == "cuda"
    columns = ["µs", "p10-p90", "warm", "host", "floor", "of floor"] if gpu else ["µs, wall clock"]
    for column in ("op", "case", "dtype", "impl", *columns, "error/budget", "peers, µs"):
        text = column in ("op", "case", "dtype", "impl", "peers, µs")
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "peers, µs")
    for row in rows:
        name = (row["op"], row["case"], row["dtype"], row["impl"])
        if row["check"] != "passed":
            ratio = "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}"
            table.add_row(*name, *[""] * len(columns), f"[red]{ratio}[/]", escape(row["check"]))
            continue
        us = row["gpu_us"] if gpu else row["host_us"]
        figures = [f"{us:.1f}"]
        if gpu:
            figures += [f"{row['gpu_us_p10']:.1f}-{row['gpu_us_p90']:.1f}", f"{row['gpu_us_warm']:.1f}"]
            figures += [f"{row['host_us']:.0f}", f"{row['floor_us']:.1f}", f"{row['floor_us'] / us:.0%}"]
        theirs = ", ".join(
            f"{peer} failed" if t is None else f"{peer} {t:.1f} (x{t / us:.2f})" for peer, t in row["peers"].items()
        )
        table.add_row(*name, *figures, f"{row['error_ratio']:.2f}", theirs)
    return table


def _read(json_path: str | Path | None, gpu: str | None) -> list[Row]:
    if json_path is None or not Path(json_path).exists():
        return []
    report = json.loads(Path(json_path).read_text())
    if report["machine"]["gpu"] != gpu:
        raise ValueError(f"json_path must hold figures of this GPU, {gpu}, got {report['machine']['gpu']}: {json_path}")
    return report["rows"]


def _write(path: Path, report: Mapping[str, Any], previous: Sequence[Row], rows: Sequence[Row]) -> None:
    merged = {tuple(row[key] for key in ("op", "case", "dtype", "impl")): row for row in (*previous, *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "rows": list(merged.values())}, indent=1) + "\n")
