"""The reference hybrid model: configuration, checkpoints, caches, forward and generation."""

from .cache import HybridCache
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import NemotronHConfig
from .generate import generate, sample, stream, warmup
from .mtp import MTP
from .nemotron_h import NemotronHForCausalLM
from .presets import PRESETS
from .quantize import quantize_checkpoint
from .quantize_report import QuantizationReport
from .speculative import Speculation, speculate

__all__ = [
    "MTP",
    "PRESETS",
    "CheckpointError",
    "HybridCache",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "QuantizationReport",
    "Speculation",
    "generate",
    "load_checkpoint",
    "quantize_checkpoint",
    "sample",
    "save_checkpoint",
    "speculate",
    "stream",
    "warmup",
]
