"""Which matrices of a checkpoint are quantised, and to what: the recipes of the published models, as a table."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from .config import NemotronHConfig

FORMATS = ("nvfp4", "fp8")
KEEP = "keep"

# What becomes of a matrix with format "nvfp4"; with "fp8", what is not kept is FP8. The last rule that matches counts.
# What none matches keeps its dtype: attention, latent projections, lm_head, and the multi-token prediction head.
FAMILIES = ("nano", "lightning", "super")
_BEFORE_ATTENTION = "Mamba layers right before attention"
RULES = (
    # matrices                                   nano      lightning  super
    ("backbone.layers.*.mixer.experts.*",        "nvfp4", "nvfp4",   "nvfp4"),
    ("backbone.layers.*.mixer.shared_experts.*", "nvfp4", "nvfp4",   "fp8"),
    ("backbone.layers.*.mixer.up_proj",          "nvfp4", "nvfp4",   "nvfp4"),
    ("backbone.layers.*.mixer.down_proj",        "nvfp4", "nvfp4",   "nvfp4"),
    ("backbone.layers.*.mixer.in_proj",          "nvfp4", "fp8",     "fp8"),
    ("backbone.layers.*.mixer.out_proj",         "nvfp4", "fp8",     "fp8"),
    (_BEFORE_ATTENTION,                          "keep",  "fp8",     "fp8"),
)  # fmt: skip

# The matrices that can be quantised, as a report calls them. Not the router: its scores are exact.
_MIXER = r"(?:backbone|mtp)\.layers\.\d+\.mixer\."
_KINDS = {
    "mamba": re.compile(_MIXER + r"(in|out)_proj"),
    "attention": re.compile(_MIXER + r"[qkvo]_proj"),
    "mlp": re.compile(_MIXER + r"(up|down)_proj"),
    "experts": re.compile(_MIXER + r"experts\.\d+\.(up|down)_proj"),
    "shared experts": re.compile(_MIXER + r"shared_experts\.(up|down)_proj"),
    "latent": re.compile(_MIXER + r"fc[12]_latent_proj"),
    "mtp input": re.compile(r"mtp\.layers\.\d+\.eh_proj"),
    "lm_head": re.compile(r"lm_head"),
}
# Readers fuse these into one product: they must share a format.
_FUSED = re.compile(r"(.*\.mixer\.)(?:(experts)\..*|([qkv])_proj)")


def kind(module: str) -> str | None:
    """What a matrix is, "experts" for one; None where it is none that can be quantised."""
    return next((kind for kind, names in _KINDS.items() if names.fullmatch(module)), None)


def fused_with(module: str) -> str | None:
    """The product that readers make of a matrix together with others, "….mixer.qkv" or "….mixer.experts"; or None."""
    match = _FUSED.fullmatch(module)
    return match and match[1] + (match[2] or "qkv")


def family(config: NemotronHConfig) -> str:
    """Whose recipe a model gets: that of the published model whose layers it has."""
    pattern = config.hybrid_override_pattern
    mixtures = [config.for_layer(index) for index, letter in enumerate(pattern) if letter == "E"]
    if any(layer.moe_latent_size for layer in mixtures):
        return "super"
    return "lightning" if mixtures and config.num_nextn_predict_layers else "nano"


def default_rules(config: NemotronHConfig, format: str) -> list[tuple[str, str]]:
    """(glob, format) pairs of the model's family."""
    column = 1 + FAMILIES.index(family(config))
    rules = []
    for row in RULES:
        chosen = "fp8" if format == "fp8" and row[column] != KEEP else row[column]
        rules += [(glob, chosen) for glob in _globs(row[0], config.hybrid_override_pattern)]
    return rules


def _globs(matrices: str, pattern: str) -> list[str]:
    if matrices != _BEFORE_ATTENTION:
        return [matrices]
    before = [index for index, two in enumerate(pairwise(pattern)) if two == ("M", "*")]
    return [f"backbone.layers.{index}.mixer.*" for index in before]


def formats(
    modules: Iterable[str], config: NemotronHConfig, format: str, rules: Sequence[tuple[str, str]] = ()
) -> dict[str, str]:
    """ "nvfp4", "fp8" or "keep" for each module that has a matrix; `rules` come after the family's.

    Raises:
        ValueError: a rule that matches nothing, an unknown format, or a fused product that rules split.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    matrices = [module for module in modules if kind(module)]
    for glob, chosen in rules:
        if chosen not in (*FORMATS, KEEP):
            raise ValueError(f"rule {glob!r} must choose 'nvfp4', 'fp8' or 'keep', got {chosen!r}")
        if not any(fnmatchcase(module, glob) for module in matrices):
            raise ValueError(
                f"rule {glob!r} must match a matrix that can be quantised, such as {matrices[0]}, got none "
                "(embeddings, routers, convolutions, norms and vectors always keep their dtype)"
            )
    backwards = [*default_rules(config, format), *rules][::-1]
    chosen_formats = {
        module: next((chosen for glob, chosen in backwards if fnmatchcase(module, glob)), KEEP) for module in matrices
    }
    _check_fused(chosen_formats)
    return chosen_formats


def _check_fused(chosen: Mapping[str, str]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for module, format in chosen.items():
        product = fused_with(module)
        if product is None:
            continue
        other, others = seen.setdefault(product, (module, format))
        if others != format:
            raise ValueError(
                f"rules must give all of {product} one format, for readers fuse them, "
                f"got {others!r} for {other} and {format!r} for {module}"
            )
