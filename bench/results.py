"""Files of rows: what `--json` writes, and what is read again for later runs, comparisons and reports."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Report = dict[str, Any]  # machine, ceilings, commit, date, rows

NEEDED = {
    *("family", "op", "case", "dtype", "impl", "gpu_us", "host_us", "bytes", "flops", "floor_us", "peers"),
    *("error_ratio", "check"),
}


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "case", "dtype", "impl"))


def read(path: str | Path) -> Report:
    """A report that `write` wrote.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a file of benchmark rows, got {error.strerror}: {path}") from error
    except ValueError as error:
        raise ValueError(f"expected a file of benchmark rows, got no JSON ({error}): {path}") from error
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"expected a file of benchmark rows, got JSON without a list 'rows': {path}")
    if not isinstance(report.get("machine"), dict) or "gpu" not in report["machine"]:
        raise ValueError(f"expected a file of benchmark rows, got JSON without machine and gpu: {path}")
    for index, row in enumerate(report["rows"]):
        missing = NEEDED - set(row) if isinstance(row, dict) else NEEDED
        if missing:
            raise ValueError(f"rows[{index}] must have {', '.join(sorted(missing))}, got none: {path}")
    gpu = report["machine"]["gpu"] is not None
    _check_figures(report, gpu, path)
    machine = {**dict.fromkeys(("driver", "torch", "triton", "cuda", "clocks")), **report["machine"]}
    unmeasured = dict.fromkeys(("copy_tbs", "bf16_tflops", "fp8_tflops"))
    return {"ceilings": unmeasured, "commit": None, "date": None, **report, "machine": machine}


def _check_figures(report: Report, gpu: bool, path: str | Path) -> None:
    """What is drawn must be there: ceilings and floors on a GPU, and the time of every row that is right."""
    ceilings = report.get("ceilings") or {}
    if gpu and not all(isinstance(ceilings.get(name), float | int) for name in ("copy_tbs", "bf16_tflops")):
        raise ValueError(f"ceilings must have copy_tbs and bf16_tflops for a GPU, got {ceilings}: {path}")
    names = ("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm", "host_us", "floor_us") if gpu else ("host_us",)
    for index, row in enumerate(report["rows"]):
        unknown = [name for name in (*names, "error_ratio") if not isinstance(row.get(name), float | int)]
        if row["check"] == "passed" and unknown:
            raise ValueError(f"rows[{index}] passed and must have numbers for {', '.join(unknown)}, got none: {path}")


def read_same_gpu(name: str, path: str | Path, gpu: str | None) -> Report:
    """A report of this GPU's figures: others say nothing here. `name` is the argument's."""
    report = read(path)
    if report["machine"]["gpu"] != gpu:
        raise ValueError(f"{name} must hold figures of this GPU, {gpu}, got {report['machine']['gpu']}: {path}")
    return report


def write(path: str | Path, report: Mapping[str, Any], previous: Sequence[Row], rows: Sequence[Row]) -> None:
    """The newest row of each (op, case, dtype, impl)."""
    merged = {key(row): row for row in (*previous, *rows)}
    text = json.dumps({**report, "rows": finite(list(merged.values()))}, indent=1, allow_nan=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def finite(rows: Sequence[Row]) -> list[Row]:
    """JSON has no infinity: an error without bound is None."""
    return [{**row, "error_ratio": _finite(row["error_ratio"])} for row in rows]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
