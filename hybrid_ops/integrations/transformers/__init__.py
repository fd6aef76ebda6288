"""Models of `transformers` that run on this library's operators: `patch`, `unpatch`, `patched`."""

from .patching import patch, patched, unpatch
from .report import Report

__all__ = ["Report", "patch", "patched", "unpatch"]
