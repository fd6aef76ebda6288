"""What `hybrid-ops quantize` prints at the end."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .quantize_report import QuantizationReport, Row


def show(console: Console, report: QuantizationReport) -> None:
    """A line for each layer and kind of matrix, a line for each kind, and the sizes."""
    table = _table("error by layer: ||W - W'|| / ||W||", "layer", "kind", "format", "matrices", "error", "worst")
    for row in report.rows:
        errors = (f"{100 * row.error:.2f}%", f"{100 * row.worst:.2f}%")
        table.add_row(row.layer, row.kind, row.format, f"{row.matrices}", *errors)
    console.print(table)
    console.print()
    table = _table("size", "kind", "format", "matrices", "before", "after", "largest error")
    for (what, format), rows in _by_kind(report).items():
        sizes = (sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows))
        largest = max(rows, key=lambda row: row.error)
        where = f"{100 * largest.error:.2f}%" + (f", layer {largest.layer}" if largest.layer else "")
        table.add_row(what, format, f"{sum(row.matrices for row in rows):,}", *map(_size, sizes), where)
    rest = report.bytes_before - sum(row.bytes_before for row in report.rows)
    table.add_row("the rest", "kept", f"{report.kept:,}", _size(rest), _size(rest), "")
    console.print(table)
    share = report.bytes_after / report.bytes_before
    console.print(
        f"\n[bold]{_size(report.bytes_before)} became {_size(report.bytes_after)}[/] ({share:.0%}); "
        f"recipe of {report.recipe}; {report.kept:,} tensors as they were; "
        f"files copied: {escape(', '.join(report.copied) or 'none')}",
        highlight=False,
        soft_wrap=True,
    )
    if report.dynamic_fp8:
        console.print(
            "[yellow]FP8 without input_scale[/], for nothing was calibrated: this library and TensorRT-LLM scale "
            "activations as they come, vLLM's reader wants one in the checkpoint (--input-scale 1 writes it)",
            highlight=False,
            soft_wrap=True,
        )
    console.print(report.output, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None)
    for column in columns:
        table.add_column(column, justify="left" if column in ("kind", "format") else "right", no_wrap=True)
    return table


def _by_kind(report: QuantizationReport) -> dict[tuple[str, str], list[Row]]:
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        kinds.setdefault((row.kind, row.format), []).append(row)
    return kinds


def _size(nbytes: float) -> str:
    """Decimal units, as file sizes are published."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
