"""What becomes of rows: a table, one HTML file that needs nothing else, and a verdict."""

import importlib.resources
import json
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from .cases import matches
from .compare import Comparison
from .model_table import models_table
from .results import Report, finite, read, read_same_gpu
from .table import print_clocks, print_head, rows_table, wide


def show(
    report: Report,
    console: Console,
    html_path: str | Path | None = None,
    comparison: Comparison | None = None,
    fail_above: float | None = None,
) -> None:
    """Print the rows of a report and draw them.

    Raises:
        RuntimeError: a result was wrong, or a row is slower by more than its spread and `fail_above` percent.
    """
    models = [row for row in report["rows"] if row["family"] == "model"]
    others = [row for row in report["rows"] if row["family"] != "model"]
    if others or not models:
        console.print(rows_table({**report, "rows": others}, comparison))
    if models:
        console.print(models_table(models, comparison))
    print_clocks(console, report)
    if html_path is not None:
        Path(html_path).parent.mkdir(parents=True, exist_ok=True)
        Path(html_path).write_text(page(report, comparison), encoding="utf-8")
    rows = report["rows"]
    wrong = [f"{row['op']} {row['case']} {row['impl']}: {row['check']}" for row in rows if row["check"] != "passed"]
    if wrong:
        raise RuntimeError("\n".join([f"{len(wrong)} of {len(rows)} were not timed, for they are wrong:", *wrong]))
    if comparison is not None and fail_above is not None:
        slower = list(comparison.slower(rows, fail_above))
        if slower:
            raise RuntimeError(
                "\n".join([f"{len(slower)} of {len(rows)} are slower by over {fail_above:g}%:", *slower])
            )


def show_stored(
    path: str | Path,
    console: Console,
    families: Collection[str] = (),
    only: Collection[str] | None = None,
    html_path: str | Path | None = None,
    compare_path: str | Path | None = None,
    fail_above: float | None = None,
) -> None:
    """The same for the rows of a file, or those of them that are of `families` and match `only`.

    Raises:
        ValueError: a file is missing, or no file of rows; the older one has another GPU's figures; nothing is left.
    """
    report = read(path)
    rows = [
        row for row in report["rows"] if row["family"] in (families or [row["family"]]) and matches(row["case"], only)
    ]
    if not rows:
        raise ValueError(f"expected rows of these families and cases, got none: {path}")
    gpu = report["machine"]["gpu"]
    comparison = None if compare_path is None else Comparison(read_same_gpu("compare_path", compare_path, gpu))
    print_head(wide(console), report)
    show({**report, "rows": rows}, console, html_path, comparison, fail_above)


def page(report: Report, comparison: Comparison | None = None) -> str:
    """The HTML document of a report, with the changes since an older one: report.html's script draws the data in it."""
    rows = report["rows"]
    data = {key: report[key] for key in ("machine", "ceilings", "commit", "date")}
    data["old"] = None
    if comparison is not None:
        data["old"] = {key: comparison.old[key] for key in ("commit", "date")}
        rows = [{**row, "change": comparison.change(row)._asdict()} for row in rows]
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    text = json.dumps({**data, "rows": finite(rows)}, separators=(",", ":"), allow_nan=False)
    return template.replace("@@DATA@@", text.replace("<", "\\u003c"))
