"""Rows beside older ones of the same machine: what has changed by more than the spread."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .results import Report, Row, key


class Change(NamedTuple):
    """`percent` more time than before (less, where negative); None where there is nothing to compare."""

    verdict: str  # "faster", "slower", "same" (within the spread), "spread unknown", "new", "was wrong", "is wrong"
    percent: float | None = None
    before_us: float | None = None


class Comparison:
    """Looks up older rows by (op, case, dtype, impl)."""

    def __init__(self, old: Report) -> None:
        self.old = old
        self._rows = {key(row): row for row in old["rows"]}

    def change(self, row: Row) -> Change:
        """A change is one only if the spreads, 10th to 90th percentile, do not overlap."""
        before = self._rows.get(key(row))
        if before is None:
            return Change("new")
        if row["check"] != "passed":
            return Change("is wrong")
        if before["check"] != "passed":
            return Change("was wrong")
        now_us, low, high = _figure(row)
        before_us, before_low, before_high = _figure(before)
        percent = 100 * (now_us / before_us - 1)
        if None in (low, before_low):
            verdict = "spread unknown"
        elif high < before_low:
            verdict = "faster"
        else:
            verdict = "slower" if low > before_high else "same"
        return Change(verdict, percent, before_us)

    def slower(self, rows: Sequence[Row], percent: float) -> Iterator[str]:
        """A line for each row that is slower, and by more than so many percent."""
        for row in rows:
            change = self.change(row)
            if change.verdict == "slower" and change.percent is not None and change.percent > percent:
                yield f"{' '.join(key(row))}: {change.percent:+.1f}%"


def _figure(row: Row) -> tuple[float, float | None, float | None]:
    """The median, and the 10th and 90th percentile if known: on a GPU its time, elsewhere the wall clock's."""
    name = "host_us" if row["gpu_us"] is None else "gpu_us"
    return row[name], row.get(f"{name}_p10"), row.get(f"{name}_p90")
