"""What a benchmark case is, and the layers of the models that cases are named after."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    `call` returns its results by name; what it updates in place is in `in_place`, everything else is filled with NaN
    before the timed replays. `expected` recomputes the results from the same inputs in float32, by the torch
    implementation; `axis` says along which axis of a result the error is taken slice by slice (None: it is one slice).
    `tokens` is the axis that is long: large results are compared on a sample of it.
    """

    op: str
    public: str  # the public function that calls it
    name: str
    dtype: torch.dtype  # of the activations; for state updates that of the state
    make: Callable[[torch.device, torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensors]
    expected: Callable[[Tensors], Tensors]
    axis: Mapping[str, int | None]
    bytes: int  # that must move at least once
    flops: int  # of matrix products
    tokens: int = 0
    # what `expected` is with the roundings of a layer that keeps results between two products; None: it has none
    baseline: Callable[[Tensors], Tensors] | None = None
    rate: str = "bf16_tflops"  # the measured ceiling that flops are compared with
    budget_dtype: torch.dtype = torch.bfloat16  # of x
    in_place: tuple[str, ...] = ()
    moves: bool = False  # each call goes on from where the last one came to: after the replays one more call is checked
    impls: tuple[str, ...] = ("cuda", "triton")
    problem: Mapping[str, object] = field(default_factory=dict)  # what `hybrid_ops.explain` wants to know
    peers: Mapping[str, Callable[[Tensors], object]] = field(default_factory=dict)


class Mixer(NamedTuple):
    """The Mamba-2 layer of a model."""

    hidden: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int = 8
    width: int = 4

    def shard(self, ways: int) -> "Mixer":
        """What one GPU has of it under tensor parallelism: its part of the heads and groups, all of the features."""
        return self._replace(nheads=self.nheads // ways, ngroups=self.ngroups // ways)

    @property
    def inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.ngroups * self.dstate

    @property
    def in_proj(self) -> int:
        """Columns of in_proj's output, (z, xBC, dt); z comes first."""
        return self.inner + self.conv_dim + self.nheads


MODELS = {
    "h4b": Mixer(3072, 112, 64, 128),
    "h8b": Mixer(4096, 128, 64, 128),
    "h56b": Mixer(8192, 256, 64, 256),
    "nano2": Mixer(4480, 128, 80, 128),
    "nano12b": Mixer(5120, 128, 80, 128),
    "nano4b": Mixer(3136, 96, 80, 128),
    "nano3": Mixer(2688, 64, 64, 128),
    "super": Mixer(4096, 128, 64, 128),
    "ultra": Mixer(8192, 256, 64, 128),
    "tiny": Mixer(128, 8, 32, 32, ngroups=2),  # of the demo; the only one measured without a GPU
}


class MoELayer(NamedTuple):
    """The mixture of experts of a model. Experts work on `latent` features where there is such a size."""

    hidden: int
    num_experts: int
    topk: int
    expert: int  # intermediate size of a routed expert
    shared: int  # and of the shared one
    latent: int | None = None
    scaling_factor: float = 2.5

    def shard(self, ways: int) -> "MoELayer":
        """What one GPU has of it under tensor parallelism: its part of every expert's rows, all of the features."""
        return self._replace(expert=self.expert // ways, shared=self.shared // ways)


MOE_LAYERS = {
    "nano3": MoELayer(2688, 128, 6, 1856, 3712),
    "super": MoELayer(4096, 512, 22, 2688, 5376, 1024, 5.0),
    "ultra": MoELayer(8192, 512, 22, 5120, 10240, 2048, 5.0),
    "tiny": MoELayer(128, 16, 4, 64, 128, 64),  # of the demo; the only one measured without a GPU
}


# The shapes of `--all`, each once: h8b's mixer is super's, nano12b's is nano2's, H-47B's is h56b's; h56b's features are
# as many as ultra's, h8b's as super's.
MIXERS = ("nano3", "super", "ultra", "nano2", "nano4b", "h4b", "h56b")
WIDTHS = ("nano3", "super", "ultra", "nano2", "nano12b", "nano4b", "h4b")
MOES = ("nano3", "super", "ultra")
SHARDS = (1, 8)
PREFILL = (512, 2048, 8192, 32768, 131072)
DECODE = (1, 8, 32, 128, 512)
TOKENS = (1, 8, 64, 512, 2048, 8192, 32768, 131072)


def mixer_of(model: str, tp: int = 1) -> Mixer:
    return MODELS[model].shard(tp)


def moe_of(model: str, tp: int = 1) -> MoELayer:
    return MOE_LAYERS[model].shard(tp)


def sharded(tp: int) -> list[str]:
    """The suffix of a name."""
    return [f"tp{tp}"] if tp > 1 else []


def matches(name: str, patterns: Collection[str] | None) -> bool:
    """Whether one of the patterns, with * and ?, is the whole name; without patterns every name will do."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefill(model: str, seqlen: int, batch: int, *suffixes: str) -> str:
    return "-".join([f"{model}-L{seqlen}-b{batch}", *suffixes])


def layer(model: str, tokens: int, *suffixes: str) -> str:
    return "-".join([f"{model}-T{tokens}", *suffixes])


def decode(model: str, batch: int, *suffixes: str) -> str:
    return "-".join([f"{model}-b{batch}", *suffixes])


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def float32(tensors: Tensors, *names: str) -> Tensors:
    """Copies of those of `names` that are there, exactly, in float32."""
    return {name: tensors[name].to(torch.float32, copy=True) for name in names if name in tensors}


def time_steps(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """dt (*shape, nheads), A and dt_bias as a freshly made model has them.

    softplus(dt_bias) is log-uniform in [0.001, 0.1] and A uniform in [-16, -1] (Mamba-2's initialisation), so some
    heads forget within a few tokens and others hardly at all.
    """
    nheads = shape[-1]
    uniform = torch.rand(2, nheads, generator=generator, device=generator.device)
    step = torch.exp(uniform[0] * (torch.log(torch.tensor(0.1 / 0.001))) + torch.log(torch.tensor(0.001)))
    dt_bias = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    return randn(generator, *shape) * 0.5, -1 - 15 * uniform[1], dt_bias
