"""What is around the rows of one run: the machine and its ceilings before, files and verdicts behind."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .compare import Comparison
from .report import show
from .results import Report, Row, read_same_gpu, write
from .table import print_head, wide


class Session:
    """Reads older rows first, so that a file of another GPU costs nothing but the message; then measures the ceilings.

    With `json_path` the rows are merged into that file. With `html_path` a report of them is drawn. With `compare_path`
    each is compared with the row of an older file.

    Raises:
        ValueError: a file is missing, or holds no rows or another GPU's.
    """

    def __init__(
        self,
        device: torch.device,
        console: Console | None = None,
        json_path: str | Path | None = None,
        html_path: str | Path | None = None,
        compare_path: str | Path | None = None,
        fail_above: float | None = None,
    ) -> None:
        self.console = wide(console or Console())
        self.report: Report = {"machine": machine.describe(device)}
        gpu = self.report["machine"]["gpu"]
        self._device, self._json_path, self._html_path, self._fail_above = device, json_path, html_path, fail_above
        self._previous: Sequence[Row] = []
        if json_path is not None and Path(json_path).exists():
            self._previous = read_same_gpu("json_path", json_path, gpu)["rows"]
        old = None if compare_path is None else read_same_gpu("compare_path", compare_path, gpu)
        self._comparison = None if old is None else Comparison(old)
        self._clocks = machine.clocks(device)
        self.report |= {"ceilings": machine.ceilings(device), "commit": machine.commit(), "date": machine.now()}
        print_head(self.console, self.report)

    def write(self, rows: Sequence[Row]) -> None:
        """After each case: who stops the run keeps what was measured."""
        if self._json_path is not None:
            write(self._json_path, self.report, self._previous, rows)

    @contextlib.contextmanager
    def stoppable(self, rows: Sequence[Row], skipped: Sequence[str] = ()) -> Iterator[None]:
        """Who stops the run inside with Ctrl-C sees what was measured, then the program ends as Python has it."""
        try:
            yield
        except KeyboardInterrupt:
            if rows:
                with contextlib.suppress(RuntimeError):  # what is wrong is in the table
                    self.finish(rows, skipped)
            raise

    def finish(self, rows: Sequence[Row], skipped: Sequence[str] = ()) -> None:
        """Print and draw everything.

        Raises:
            RuntimeError: a result was wrong, or a row is slower by more than its spread and `fail_above` percent.
        """
        if self._clocks is not None:
            self.report["machine"]["clocks"] = {"before": self._clocks, "after": machine.clocks(self._device)}
        self.write(rows)
        for line in skipped:
            self.console.print(f"skipped: {line}", highlight=False, markup=False)
        show({**self.report, "rows": rows}, self.console, self._html_path, self._comparison, self._fail_above)
