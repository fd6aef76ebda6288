"""Fused operators for hybrid Mamba-2 / Transformer models: a public function for each, kernels chosen per machine."""

from ._library import Choice, explain, ops
from ._version import __version__ as __version__
from .conv1d import causal_conv1d
from .conv1d_update import causal_conv1d_update
from .gemm_fp8 import fp8_gemm, fp8_grouped_gemm
from .gemm_nvfp4 import Nvfp4Packed, nvfp4_gemm, nvfp4_grouped_gemm, nvfp4_prepack, nvfp4_unpack
from .grouped_gemm import grouped_gemm
from .mamba2_step import mamba2_step
from .models import warmup
from .moe import latent_down_proj, latent_moe, latent_up_proj, moe_combine, moe_mlp
from .moe_router import MoERouting, moe_router, moe_sort
from .norm import gated_rms_norm, rms_norm
from .quant_fp8 import Fp8Tensor, fp8_dequantize, fp8_quantize
from .quant_nvfp4 import Nvfp4Tensor, nvfp4_dequantize, nvfp4_quantize, swizzle_scales, unswizzle_scales
from .ssd import ssd_chunk_scan
from .ssd_replay import ReplayCache, ssd_replay_materialize, ssd_replay_update
from .ssd_update import ssd_state_update

__all__ = [
    "Choice",
    "Fp8Tensor",
    "MoERouting",
    "Nvfp4Packed",
    "Nvfp4Tensor",
    "ReplayCache",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "fp8_dequantize",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_quantize",
    "gated_rms_norm",
    "grouped_gemm",
    "latent_down_proj",
    "latent_moe",
    "latent_up_proj",
    "mamba2_step",
    "moe_combine",
    "moe_mlp",
    "moe_router",
    "moe_sort",
    "nvfp4_dequantize",
    "nvfp4_gemm",
    "nvfp4_grouped_gemm",
    "nvfp4_prepack",
    "nvfp4_quantize",
    "nvfp4_unpack",
    "ops",
    "rms_norm",
    "ssd_chunk_scan",
    "ssd_replay_materialize",
    "ssd_replay_update",
    "ssd_state_update",
    "swizzle_scales",
    "unswizzle_scales",
    "warmup",
]
