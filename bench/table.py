"""What `hybrid-ops bench` prints: the machine, and a line for every row."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import Case, dtype_name
from .compare import Change, Comparison
from .results import Report, Row

COLOURS = {"faster": "green", "slower": "red"}


def wide(console: Console) -> Console:
    """A log has no edge to fold at."""
    if not console.is_terminal:
        console.width = 200
    return console


def print_head(console: Console, report: Report) -> None:
    facts, ceilings = report["machine"], report["ceilings"]
    versions = f"torch {facts['torch']}, Triton {facts['triton'] or 'not installed'}"
    if facts["gpu"] is None:
        console.print(f"no GPU here: small shapes on the CPU, by the wall clock; {versions}", highlight=False)
        return
    fp8 = "" if ceilings["fp8_tflops"] is None else f", fp8 {ceilings['fp8_tflops']:.0f} TFLOP/s"
    console.print(
        f"{facts['gpu']}, driver {facts['driver']}, {versions}\nceilings measured: copy "
        f"{ceilings['copy_tbs']:.2f} TB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s{fp8}",
        highlight=False,
    )


def print_finished(console: Console, name: str, rows: Sequence[Row]) -> None:
    """A line for a case that is finished, where nobody sees a status line."""
    if not console.is_terminal:
        outcome = ", ".join(f"{row['impl']} {_figure(row)}" for row in rows) or "skipped"
        console.print(f"{name}: {outcome}", highlight=False, markup=False)


def _figure(row: Row) -> str:
    us = row["host_us"] if row["gpu_us"] is None else row["gpu_us"]
    return "wrong" if row["check"] != "passed" else f"{us:.1f} µs"


def list_cases(console: Console, chosen: Iterable[tuple[str, Case]]) -> None:
    """What would be measured, without measuring it."""
    table = Table(header_style="bold", box=None)
    for column in ("family", "op", "case", "dtype", "MB", "GFLOP", "peers"):
        table.add_column(column, justify="right" if column in ("MB", "GFLOP") else "left", no_wrap=True)
    for family, case in chosen:
        work = (f"{case.bytes / 1e6:,.1f}", f"{case.flops / 1e9:,.1f}" if case.flops else "")
        table.add_row(family, case.op, case.name, dtype_name(case.dtype), *work, ", ".join(case.peers))
    wide(console).print(table)
    console.print(f"{table.row_count} cases", highlight=False)


def print_clocks(console: Console, report: Report) -> None:
    clocks = report["machine"].get("clocks")
    if not clocks or not clocks.get("after"):  # without a GPU, or without nvidia-smi
        return
    before, after = clocks["before"], clocks["after"]
    console.print(
        f"SM clock {before['sm']} before, {after['sm']} after, at most {after['sm_max']}; "
        f"{before['celsius']} °C before, {after['celsius']} °C after",
        highlight=False,
    )


def rows_table(report: Report, comparison: Comparison | None) -> Table:
    table = Table(header_style="bold", box=None)
    gpu = report["machine"]["gpu"] is not None
    columns = ["µs", "p10-p90", "warm", "sustained", "host", "floor", "of floor"] if gpu else ["µs, wall clock"]
    columns += [] if comparison is None else ["change"]
    for column in ("op", "case", "dtype", "impl", *columns, "error/budget", "peers, µs"):
        text = column in ("op", "case", "dtype", "impl", "peers, µs")
        folds = column in ("sustained", "peers, µs")
        table.add_column(column, justify="left" if text else "right", no_wrap=not folds)
    for row in report["rows"]:
        name = (row["op"], row["case"], row["dtype"], row["impl"])
        if row["check"] != "passed":
            ratio = "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}"
            table.add_row(*name, *[""] * len(columns), f"[red]{ratio}[/]", escape(row["check"]))
            continue
        change = [] if comparison is None else [change_cell(comparison.change(row))]
        table.add_row(*name, *_times(row, gpu), *change, f"{row['error_ratio']:.2f}", _peers(row, gpu))
    return table


def _times(row: Row, gpu: bool) -> list[str]:
    if not gpu:
        return [f"{row['host_us']:.1f}"]
    us = row["gpu_us"]
    figures = [f"{us:.1f}", f"{row['gpu_us_p10']:.1f}-{row['gpu_us_p90']:.1f}", f"{row['gpu_us_warm']:.1f}"]
    return [*figures, _sustained(row), f"{row['host_us']:.0f}", f"{row['floor_us']:.1f}", f"{row['floor_us'] / us:.0%}"]


def _sustained(row: Row) -> str:
    us, mhz = row.get("gpu_us_sustained"), row.get("sm_mhz_sustained")
    if us is None:  # a row of an older version
        return ""
    return f"{us:.1f}" if mhz is None else f"{us:.1f} @ {mhz} MHz"


def _peers(row: Row, gpu: bool) -> str:
    us = row["gpu_us"] if gpu else row["host_us"]
    return ", ".join(
        f"{peer} failed" if theirs is None else f"{peer} {theirs:.1f} (x{theirs / us:.2f})"
        for peer, theirs in row["peers"].items()
    )


def change_cell(change: Change) -> str:
    if change.percent is None:
        return change.verdict
    colour = COLOURS.get(change.verdict, "dim")
    return f"[{colour}]{change.percent:+.1f}% {change.verdict}[/]"
