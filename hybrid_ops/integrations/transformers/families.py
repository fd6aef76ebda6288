"""What is replaced in each family, by the name of its modelling file and of the class in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .mamba2 import mixer_forward, scaled_mixer_forward, unfit_mixer
from .moe import experts_forward, router_forward, unfit_experts, unfit_router
from .norm import either_order_norm_forward, gated_norm_forward, rms_norm_forward


class Replacement(NamedTuple):
    """A forward for a class of modules; `unfit` says why it cannot be that of one of them."""

    kind: str
    forward: Callable[..., Any]
    unfit: Callable[[Any], str | None] = lambda module: None


MIXER = Replacement("Mamba-2 mixer", mixer_forward, unfit_mixer)
SCALED_MIXER = Replacement("Mamba-2 mixer", scaled_mixer_forward, unfit_mixer)
RMS_NORM = Replacement("RMSNorm", rms_norm_forward)
GATED_NORM = Replacement("gated RMSNorm", gated_norm_forward)
EITHER_ORDER_NORM = Replacement("gated RMSNorm", either_order_norm_forward)
ROUTER = Replacement("MoE router", router_forward, unfit_router)
EXPERTS = Replacement("MoE experts", experts_forward, unfit_experts)

# reasons to leave a class as it is
ATTENTION = "attention is chosen by attn_implementation"
DENSE = "plain matrix products"
GRANITE_ROUTER = "a product and a top-k whose results come in an order that depends on transformers' version"

FAMILIES: dict[str, dict[str, Replacement | str]] = {
    "nemotron_h": {
        "NemotronHMamba2Mixer": MIXER,
        "NemotronHRMSNormGated": GATED_NORM,
        "NemotronHRMSNorm": RMS_NORM,
        "NemotronHTopkRouter": ROUTER,
        "NemotronHExperts": EXPERTS,
        "NemotronHAttention": ATTENTION,
        "NemotronHMLP": DENSE,
    },
    "mamba2": {
        "Mamba2Mixer": MIXER,
        "MambaRMSNormGated": GATED_NORM,
        "Mamba2RMSNorm": RMS_NORM,
    },
    "bamba": {
        "BambaMixer": MIXER,
        "BambaRMSNormGated": GATED_NORM,
        "BambaRMSNorm": RMS_NORM,
        "BambaAttention": ATTENTION,
        "BambaMLP": DENSE,
    },
    "zamba2": {
        "Zamba2MambaMixer": MIXER,
        "Zamba2RMSNormGated": GATED_NORM,
        "Zamba2RMSNorm": RMS_NORM,
        "Zamba2Attention": ATTENTION,
        "Zamba2MLP": DENSE,
    },
    "falcon_h1": {
        "FalconH1Mixer": SCALED_MIXER,
        "FalconH1RMSNormGated": EITHER_ORDER_NORM,
        "FalconH1RMSNorm": RMS_NORM,
        "FalconH1Attention": ATTENTION,
        "FalconH1MLP": DENSE,
    },
    "granitemoehybrid": {
        "GraniteMoeHybridMambaLayer": MIXER,
        "GraniteMoeHybridRMSNormGated": GATED_NORM,
        "GraniteMoeHybridRMSNorm": RMS_NORM,
        "GraniteMoeHybridExperts": EXPERTS,
        "GraniteMoeHybridTopKRouter": GRANITE_ROUTER,
        "GraniteMoeHybridAttention": ATTENTION,
        "GraniteMoeHybridMLP": DENSE,
    },
}
FORWARDS = {r.forward for family in FAMILIES.values() for r in family.values() if isinstance(r, Replacement)}


def entry(module: nn.Module) -> Replacement | str | None:
    """What the table says of this module; None for a class that is not in it.

    Only transformers' own classes: models that bring their code along give other classes the same names.
    """
    package, _, file = type(module).__module__.rpartition(".")
    family = package.removeprefix("transformers.models.")
    if package == family or file != f"modeling_{family}":
        return None
    return FAMILIES.get(family, {}).get(type(module).__name__)
