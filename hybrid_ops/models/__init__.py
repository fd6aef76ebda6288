"""The reference hybrid model: configuration, checkpoints, caches, forward and generation."""

from .cache import HybridCache
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import NemotronHConfig
from .generate import generate, sample, stream, warmup
from .nemotron_h import NemotronHForCausalLM
from .presets import PRESETS

__all__ = [
    "PRESETS",
    "CheckpointError",
    "HybridCache",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "generate",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
    "stream",
    "warmup",
]
