"""vLLM's Mamba-2 operators (`vllm.model_executor.layers.mamba.ops`, 0.33), by their own names and signatures.

Packed sequences, caches in slots of a pool, speculative decoding. Differences: docs/compat.md. Nothing has gradients.
"""

from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .mamba_ssm import selective_state_update
from .ssd_combined import mamba_chunk_scan_combined_varlen

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined_varlen", "selective_state_update"]
