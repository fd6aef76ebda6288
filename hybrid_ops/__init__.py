"""Fused operators for hybrid Mamba-2 / Transformer models: a public function for each, kernels chosen per machine."""

from ._library import Choice, explain, ops
from ._version import __version__ as __version__
from .norm import gated_rms_norm, rms_norm

__all__ = ["Choice", "explain", "gated_rms_norm", "ops", "rms_norm"]
