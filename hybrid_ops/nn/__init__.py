"""Modules of a hybrid model, each one layer's mixer, on the public functions of the library.

Parameters have the names and shapes of Hugging Face's `nemotron_h` checkpoints.
"""

from .attention import Attention, KVCache
from .mamba2 import Drafts, Mamba2Mixer, MambaState
from .mlp import MLP
from .moe import Experts, Gate, MoE
from .norm import GatedRMSNorm, RMSNorm

__all__ = [
    "MLP",
    "Attention",
    "Drafts",
    "Experts",
    "Gate",
    "GatedRMSNorm",
    "KVCache",
    "Mamba2Mixer",
    "MambaState",
    "MoE",
    "RMSNorm",
]
