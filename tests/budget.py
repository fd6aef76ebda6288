"""The measure of error lives in the package, where `hybrid-ops check` uses it too."""

from hybrid_ops.budget import assert_within, errors, measure, round_to, to_numpy

__all__ = ["assert_within", "errors", "measure", "round_to", "to_numpy"]
