"""The cases as tests of pytest-benchmark, which chooses (-k), stores (--benchmark-autosave) and compares them.

Its timer is a clock that moves by what the harness measured and by nothing else, so that its rounds are the replays of
a CUDA graph with a cold L2 (without a GPU, calls by the wall clock), never the wall time of an asynchronous launch.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch

from hybrid_ops.bench import harness
from hybrid_ops.bench.cases import Case, dtype_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_measured_seconds = 0.0


def measured_seconds() -> float:
    """The timer: what all rounds so far took together."""
    return _measured_seconds


def _advance(microseconds: float) -> None:
    global _measured_seconds
    _measured_seconds += microseconds / 1e6


def _parameters() -> Iterator[object]:
    for family, case in harness.select(harness.FAMILIES, DEVICE, only=None):
        for impl in harness.impls(case, DEVICE):
            name = f"{case.op}-{case.name}-{dtype_name(case.dtype)}-{impl}"
            yield pytest.param(family, case, impl, id=name)


@pytest.mark.benchmark(timer=measured_seconds)
@pytest.mark.parametrize(("family", "case", "impl"), _parameters())
def test_case(benchmark: object, family: str, case: Case, impl: str) -> None:
    row = {"error_ratio": None}
    replays = harness.measure(case, impl, harness.input_sets(case, DEVICE), row, DEVICE)
    assert row["check"] == "passed", row["check"]  # a wrong result has no time
    benchmark.group = family
    benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops, "error_ratio": row["error_ratio"]}
    each = itertools.cycle(replays)
    benchmark.pedantic(lambda: _advance(next(each)), rounds=len(replays))
