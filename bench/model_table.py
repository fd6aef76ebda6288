"""Rows of whole models as a table: a line for everyone who runs a call, ours first."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from .compare import Comparison
from .results import Row
from .table import change_cell

PLAIN = "transformers"  # the peer that all are compared with


def models_table(rows: Sequence[Row], comparison: Comparison | None = None) -> Table:
    table = Table(header_style="bold", box=None)
    gpu = any(row["gpu_us"] is not None for row in rows)
    columns = ["ms", "p10-p90", "wall ms"] if gpu else ["ms, wall clock", "p10-p90"]
    columns += ["tokens/s", *(["of floor", "peak GB"] if gpu else []), f"over {PLAIN}"]
    columns += [] if comparison is None else ["change"]
    for column in ("op", "case", "dtype", "run by", *columns, ""):
        left = column in ("op", "case", "dtype", "run by", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "")
    for index, row in enumerate(rows):
        name = (row["op"], row["case"], row["dtype"])
        change = [] if comparison is None else [change_cell(comparison.change(row))]
        who = f"hybrid-ops {row['impl']}"
        if row["check"] == "passed":
            table.add_row(*name, f"[bold]{who}[/]", *_figures(row, gpu), *change, "")
        else:
            table.add_row(*name, who, *[""] * len(columns), f"[red]{escape(row['check'])}[/]")
        following = rows[index + 1] if index + 1 < len(rows) else None
        if following is None or (following["op"], following["case"]) != (row["op"], row["case"]):
            for line in _peers(row, gpu):
                blank = [] if comparison is None else [""]
                table.add_row(*name, *line[:-1], *blank, line[-1])
    return table


def _figures(row: Row, gpu: bool) -> list[str]:
    us, low, high = (row[f"{'gpu' if gpu else 'host'}_us{part}"] for part in ("", "_p10", "_p90"))
    spread = f"{low / 1e3:.2f}-{high / 1e3:.2f}"
    rest = _rest(row, us, row["peak_bytes"], gpu)
    return [f"{us / 1e3:.2f}", spread, *([f"{row['host_us'] / 1e3:.2f}"] if gpu else []), *rest]


def _peers(row: Row, gpu: bool) -> Iterator[list[str]]:
    for peer, us in row["peers"].items():
        if us is None:
            yield [peer, "", "", *([""] * 3 if gpu else []), "", "", f"not timed: {escape(row['peers_why'][peer])}"]
        else:
            rest = _rest(row, us, row["peers_peak_bytes"][peer], gpu)
            yield [peer, f"{us / 1e3:.2f}", "", *([""] if gpu else []), *rest, ""]


def _rest(row: Row, us: float, peak: int | None, gpu: bool) -> list[str]:
    plain = row["peers"].get(PLAIN)
    speed = [f"{row['tokens'] / us * 1e6:,.0f}"]
    if gpu:
        speed += [f"{row['floor_us'] / us:.0%}", "" if peak is None else f"{peak / 1e9:.1f}"]
    return [*speed, "" if plain is None else f"x{plain / us:.2f}"]
