"""Modules of a hybrid model, each one layer's mixer, on the public functions of the library.

Parameters have the names and shapes of Hugging Face's `nemotron_h` checkpoints, quantised weights those of ModelOpt's.
"""

from .attention import Attention, KVCache
from .mamba2 import Drafts, Mamba2Mixer, MambaState
from .mlp import MLP
from .moe import Experts, Gate, MoE
from .norm import GatedRMSNorm, RMSNorm
from .quantized import Fp8Linear, Fp8Weight, Nvfp4Linear, Nvfp4Weight

__all__ = [
    "MLP",
    "Attention",
    "Drafts",
    "Experts",
    "Fp8Linear",
    "Fp8Weight",
    "Gate",
    "GatedRMSNorm",
    "KVCache",
    "Mamba2Mixer",
    "MambaState",
    "MoE",
    "Nvfp4Linear",
    "Nvfp4Weight",
    "RMSNorm",
]
