"""What `quantize_checkpoint` did: the error of each layer, layer by layer."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantize_rules import kind


@dataclass(frozen=True)
class Row:
    """The matrices of one kind in one layer; `error` is that of all of them together, `worst` the largest of one."""

    layer: str
    kind: str
    format: str
    matrices: int
    bytes_before: int
    bytes_after: int
    error: float
    worst: float


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `quantize_checkpoint`; errors are ||W - W'|| / ||W|| in the Frobenius norm, W' as it is read."""

    output: str
    recipe: str
    rows: tuple[Row, ...]
    kept: int
    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    copied: tuple[str, ...]
    dynamic_fp8: bool


class Errors:
    """Collects squared errors, grouped by layer, kind and format."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], _Group] = {}

    def add(self, module: str, format: str, before: int, after: int, weight: Tensor, restored: Tensor) -> None:
        """One matrix, and what a reader makes of its quantised form."""
        group = self._groups.setdefault((_layer(module), kind(module) or module, format), _Group())
        square = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        error = float(torch.linalg.vector_norm(restored - weight.float(), dtype=torch.float64)) ** 2
        group.matrices += 1
        group.before += before
        group.after += after
        group.square += square
        group.error += error
        group.worst = max(group.worst, _ratio(error, square))

    def rows(self) -> tuple[Row, ...]:
        """Layer by layer, the multi-token prediction head and lm_head behind."""
        return tuple(
            Row(*key, group.matrices, group.before, group.after, _ratio(group.error, group.square), group.worst)
            for key, group in sorted(self._groups.items(), key=lambda item: _order(item[0][0]))
        )


@dataclass
class _Group:
    matrices: int = 0
    before: int = 0
    after: int = 0
    square: float = 0.0
    error: float = 0.0
    worst: float = 0.0


def _ratio(error: float, square: float) -> float:
    return math.sqrt(error / square) if square else 0.0


def _layer(module: str) -> str:
    """ "12", "mtp 0", or "" where a matrix is in no layer."""
    match = re.match(r"(backbone|mtp)\.layers\.(\d+)\.", module)
    return "" if match is None else match[2] if match[1] == "backbone" else f"mtp {match[2]}"


def _order(layer: str) -> tuple[int, int]:
    return (2, 0) if not layer else (layer.startswith("mtp"), int(layer.removeprefix("mtp ")))
