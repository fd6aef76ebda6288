"""The one measure of error: a kernel may be at most twice as wrong as an honest low-precision computation.

Three values of one result meet here: `ref`, the float64 reference; `baseline`, the same formula from the same rounded
inputs with float32 arithmetic, rounded once to the dtype of x, the widest that a kernel's matrix operands have; and
`got`. RMS(got - ref) / RMS(ref) and max|got - ref| / max|ref| may each be twice the baseline's, plus 2^-22 for float32.
They are taken per slice along `axis` (the head, the channel group, the row), never over the whole tensor: a dead head
of small scale hides in any whole-tensor error.

A slice of few values can be lucky, its baseline nearly exact; so the baseline counts as no better than what one
rounding makes on average: with u the unit roundoff and mantissas spread evenly (log-uniform in [1, 2)), the error of
one value is 0.42 u in RMS and at most 0.72 u, the mean of 1/mantissa. Of a result that is rounded on its way too, by
all implementations, it counts as no better than so many roundings, sqrt(roundings) times as much.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0


class Measure(NamedTuple):
    """The largest error of a result in units of its budget, and what is wrong where that is more than 1."""

    ratio: float
    complaint: str | None


def to_numpy(tensor, dtype=np.float64):
    """Exact: every dtype of ours is a subset of float64."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64).numpy().astype(dtype)


def round_to(array, dtype):
    """Round a NumPy array once to a torch dtype; returns float64."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(torch.float64).numpy()


def errors(got, ref, axis):
    """(RMS ratio, max ratio), each an array with a value per slice along `axis` (None: one slice)."""
    got, ref = (np.asarray(a, np.float64) for a in (got, ref))
    if axis is None:
        got, ref, axis = got[None], ref[None], 0
    got = np.moveaxis(got, axis, 0).reshape(got.shape[axis], -1)
    ref = np.moveaxis(ref, axis, 0).reshape(ref.shape[axis], -1)
    tiny = np.finfo(np.float32).tiny
    difference = np.abs(got - ref)
    rms = np.sqrt((difference**2).mean(1)) / np.maximum(np.sqrt((ref**2).mean(1)), tiny)
    worst = difference.max(1) / np.maximum(np.abs(ref).max(1), tiny)
    return rms, worst


def measure(
    name: str,
    got: Tensor,
    ref: np.ndarray,
    baseline: np.ndarray,
    x_dtype: torch.dtype,
    *,
    axis: int | None = -1,
    roundings: int = 1,
) -> Measure:
    """How much of its budget the result `got` needs; `ref` and `baseline` have its shape."""
    if tuple(got.shape) != ref.shape:
        return Measure(np.inf, f"{name} has shape {tuple(got.shape)}, expected {ref.shape}")
    if got.numel() == 0:
        return Measure(0.0, None)
    value = to_numpy(got)
    if not np.isfinite(value).all() and np.isfinite(ref).all():
        return Measure(np.inf, f"{name} has values that are not finite")
    allowance = 2.0**-22 if x_dtype == torch.float32 else 0.0
    unit = torch.finfo(x_dtype).eps / 2 * roundings**0.5
    ratio, complaint = 0.0, None
    for kind, at_least, mine, theirs in zip(
        ("RMS", "max"),
        (0.42 * unit, 0.72 * unit),
        errors(value, ref, axis),
        errors(round_to(baseline, x_dtype), ref, axis),
        strict=True,
    ):
        budget = FACTOR * np.maximum(theirs, at_least) + allowance
        over = ~(mine <= budget)  # NaN is over
        ratio = max(ratio, float((mine / np.maximum(budget, 1e-300)).max()))
        if over.any() and complaint is None:
            complaint = (
                f"{name}: {kind} error {mine[over][0]:.3e} > budget {budget[over][0]:.3e} "
                f"in slice {int(np.flatnonzero(over)[0])} of axis {axis} ({int(over.sum())} of {over.size} slices)"
            )
    return Measure(ratio, complaint)


def assert_within(
    name: str,
    got: Tensor,
    ref: np.ndarray,
    baseline: np.ndarray,
    x_dtype: torch.dtype,
    *,
    axis: int | None = -1,
    roundings: int = 1,
) -> float:
    """Fail unless `got` is within the budget; returns the part of it that was needed."""
    ratio, complaint = measure(name, got, ref, baseline, x_dtype, axis=axis, roundings=roundings)
    if complaint is not None:
        raise AssertionError(complaint)
    return ratio
