"""Rows of whole models as a table: a line for everyone who runs a call, ours first."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from .compare import Comparison
from .results import Row
from .table import change_cell

PLAIN = "transformers"  # the peer that all are compared with


def models_table(rows: Sequence[Row], comparison: Comparison | None = None) -> Table:
    gpu = any(row["gpu_us"] is not None for row in rows)
    columns = ["ms", "p10-p90", *(["wall ms"] if gpu else []), "tokens/s"]
    columns += [*(["of floor", "peak GB"] if gpu else []), f"over {PLAIN}"]
    columns += [] if comparison is None else ["change"]
    table = Table(header_style="bold", box=None)
    table.add_column("" if gpu else "by the wall clock", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    for case, ways in cases.items():
        table.add_row(f"[bold]{' '.join(case)}[/]")
        for row in ways:
            name = f"  hybrid-ops {row['impl']}"
            if row["check"] != "passed":
                table.add_row(name, *[""] * len(columns), f"[red]{escape(row['check'])}[/]")
                continue
            change = [] if comparison is None else [change_cell(comparison.change(row))]
            table.add_row(f"[bold]{name}[/]", *_ours(row, gpu), *change, "")
        for name, *figures, note in _peers(ways[-1], gpu):
            blank = [""] * (len(columns) - len(figures))
            table.add_row(f"  {name}", *figures, *blank, note)
    return table


def _ours(row: Row, gpu: bool) -> list[str]:
    us, low, high = (row[f"{'gpu' if gpu else 'host'}_us{part}"] for part in ("", "_p10", "_p90"))
    wall = [f"{row['host_us'] / 1e3:.2f}"] if gpu else []
    return [f"{us / 1e3:.2f}", f"{low / 1e3:.2f}-{high / 1e3:.2f}", *wall, *_rest(row, us, row["peak_bytes"], gpu)]


def _peers(row: Row, gpu: bool) -> Iterator[list[str]]:
    for peer, us in row["peers"].items():
        if us is None:
            yield [peer, f"not timed: {escape(row['peers_why'][peer])}"]
        else:
            no_wall = [""] if gpu else []
            yield [peer, f"{us / 1e3:.2f}", "", *no_wall, *_rest(row, us, row["peers_peak_bytes"][peer], gpu), ""]


def _rest(row: Row, us: float, peak: int | None, gpu: bool) -> list[str]:
    plain = row["peers"].get(PLAIN)
    figures = [f"{row['tokens'] / us * 1e6:,.0f}"]
    if gpu:
        figures += [f"{row['floor_us'] / us:.0%}", "" if peak is None else f"{peak / 1e9:.1f}"]
    return [*figures, "" if plain is None else f"x{plain / us:.2f}"]
