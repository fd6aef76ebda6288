"""Do two implementations compute the same model? Their distance from the same weights in wider arithmetic says.

Rounding moves the logits of a deep model by percents, how many depends on its depth and sizes, so that no tolerance can
be set by hand. The measure is what rounding does to this very model: `exact` is each layer in wider arithmetic, and the
yardstick the same with every result that passes from one module to the next rounded to the model's dtype (in float32,
where sums round as much as results do, the layers as they are). The budget is twice the yardstick's distance, as
everywhere in this library: inside the modules an implementation rounds as often again, and independent roundings add up
as squares.

A distance is the median over tokens of the RMS over the vocabulary. Logits are compared inside `decided_routing`.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_ops.models import NemotronHForCausalLM
from hybrid_ops.nn import MoE, RMSNorm

BATCH = 4
STEPS = 8  # tokens that are decoded one by one, behind a prompt that is a chunk and a part of one


class Right(NamedTuple):
    """What the logits of `ids` should be, (batch, seqlen, vocab), and the distance from it that is allowed."""

    ids: Tensor
    logits: Tensor
    budget: float

    def excess(self, logits: Tensor) -> float:
        """Distance / budget of the last logits, (batch, n, vocab): up to 1 is right."""
        return distance(logits, self.logits[:, -logits.shape[1] :]) / self.budget


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean(-1).sqrt().median())


@contextlib.contextmanager
def decided_routing(model: NemotronHForCausalLM) -> Iterator[None]:
    """Every token goes to the same experts, by a bias against which scores, all below 1, do not count.

    Otherwise rounding would send half of the tokens to another expert somewhere in a deep model, whose logits then say
    nothing. The bias is that of transformers' model too, which shares its tensors; outside it is 0, and the load even.
    """
    biases = [module.gate.e_score_correction_bias for module in model.modules() if isinstance(module, MoE)]
    generator = torch.Generator(model.device).manual_seed(2)
    for bias in biases:
        bias.copy_(torch.randperm(bias.numel(), generator=generator, device=bias.device))
    try:
        yield
    finally:
        for bias in biases:
            bias.zero_()


@torch.no_grad()
def right(model: NemotronHForCausalLM) -> Right:
    config = model.config
    generator = torch.Generator(model.device).manual_seed(1)
    shape = (BATCH, config.chunk_size + config.chunk_size // 4 + STEPS)
    ids = torch.randint(config.vocab_size, shape, generator=generator, device=model.device)
    wide = torch.float64 if model.dtype == torch.float32 else torch.float32
    x = model.backbone.embeddings(ids)
    exact, rounded = [x.to(wide), None], [x if model.dtype == torch.float32 else x.to(wide), None]
    for layer, exactly in zip(model.backbone.layers, _widened(model.backbone.layers, wide), strict=True):
        exact = exactly(*exact, None, None, None, False)
        if model.dtype != torch.float32:
            layer = exactly
            _round_between_modules(layer, model.dtype)
        rounded = layer(*rounded, None, None, None, False)
    (norm,) = _widened([model.backbone.norm_f], wide)
    head = model.lm_head.weight.to(wide)
    logits, yardstick = (
        F.linear(norm.add(*(t.to(wide) for t in state))[0][:, -STEPS - 1 :], head) for state in (exact, rounded)
    )
    return Right(ids, logits, 2 * distance(yardstick, logits))


def _widened(layers: Any, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A copy of one layer at a time: there is no room for two."""
    for layer in layers:
        yield copy.deepcopy(layer).to(dtype)


def _round_between_modules(layer: nn.Module, dtype: torch.dtype) -> None:
    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(t.dtype)

    for module in layer.modules():
        if module is not layer and not isinstance(module, nn.Conv1d | nn.ModuleList):
            module.register_forward_hook(lambda module, args, output: rounded(output))
        if isinstance(module, RMSNorm):
            module.add = functools.partial(  # type: ignore[method-assign]
                lambda add, x, residual: tuple(map(rounded, add(x, residual))), module.add
            )
