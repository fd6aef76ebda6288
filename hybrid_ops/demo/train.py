"""Train the demo's model on the text, and measure how many bits it needs for text it has not seen."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import NemotronHConfig, NemotronHForCausalLM
from ..nn import MoE


@dataclass(frozen=True)
class Recipe:
    """How the model is trained: `steps` of `batch` x `length` bytes, AdamW with a cosine from `peak` to nearly 0.

    The loss of the byte after the next, which the multi-token prediction head guesses, counts `draft_weight` times.
    """

    steps: int = 380
    batch: int = 8
    length: int = 256
    peak: float = 4e-3
    warmup: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0
    draft_weight: float = 0.3
    balance: float = 1e-3  # how far the bias of an expert moves in a step, towards even loads
    seed: int = 0

    @property
    def bytes_per_step(self) -> int:
        return self.batch * self.length

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup)
        return self.peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def config() -> NemotronHConfig:
    """1.17 million parameters over bytes: three Mamba-2 layers, two LatentMoE, an MLP, attention, and the MTP head."""
    # 0.02, right for wide models, leaves one of 128 features about 0.1 bits per byte worse
    return NemotronHConfig.preset("tiny-moe", initializer_range=0.05)


def new_model(recipe: Recipe, device: torch.device) -> NemotronHForCausalLM:
    """The same weights on every device: drawn on the CPU from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return NemotronHForCausalLM(config()).to(device)


def moe_layers(model: NemotronHForCausalLM) -> list[MoE]:
    """The mixtures of experts, the backbone's in order and then the head's."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def as_ids(text: bytes, device: torch.device) -> Tensor:
    """A byte is a token, (len(text),) int64."""
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64)).to(device)


def losses(model: NemotronHForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats of the next byte and of the byte after the next, for tokens (batch, length + 1)."""
    logits, (further,) = model(tokens[:, :-1], mtp_depth=1)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, F.cross_entropy(further.flatten(0, 1), tokens[:, 2:].flatten())


def visit(model: NemotronHForCausalLM, recipe: Recipe) -> None:
    """Call every kernel of a training step, of reading and of writing, with nothing learned: they are compiled then."""
    tokens = torch.zeros(recipe.batch, recipe.length + 1, dtype=torch.int64, device=model.device)
    sum(losses(model, tokens)).backward()  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    for layer in moe_layers(model):
        layer.load.zero_()
    with torch.no_grad():
        cache = model.new_cache(1)
        for length in (27, 1):  # a prompt, a byte
            model(tokens[:1, :length], cache=cache, last_only=True)
        model(tokens[:2, : recipe.length].reshape(1, -1))


def train(model: NemotronHForCausalLM, text: bytes, recipe: Recipe) -> Iterator[float]:
    """Take one step for each loss asked of the iterator: the mean loss of its bytes, in nats, before the step.

    On a GPU it takes the host longer to issue a step than the GPU to do it, so after a few steps one is captured in a
    CUDA graph, forward, backward and optimizer, and replayed with other bytes.
    """
    ids = as_ids(text, model.device)
    offsets = torch.Generator().manual_seed(recipe.seed + 1)
    window = torch.arange(recipe.length + 1, device=model.device)
    tokens = ids.new_empty(recipe.batch, recipe.length + 1)
    on_gpu = model.device.type == "cuda"
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    groups = [dict(params=matrices, weight_decay=recipe.weight_decay), dict(params=vectors, weight_decay=0.0)]
    experts = moe_layers(model)
    rate = torch.tensor(recipe.peak, device=model.device) if on_gpu else recipe.peak
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), capturable=on_gpu)

    def take_step() -> Tensor:
        loss, drafts = losses(model, tokens)
        optimizer.zero_grad(set_to_none=True)
        (loss + recipe.draft_weight * drafts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        for layer in experts:
            layer.balance(recipe.balance)
        return loss.detach()

    graph: torch.cuda.CUDAGraph | None = None
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            if on_gpu:
                group["lr"].fill_(recipe.learning_rate(step))
            else:
                group["lr"] = recipe.learning_rate(step)
        start = torch.randint(len(ids) - recipe.length, (recipe.batch, 1), generator=offsets)
        tokens.copy_(ids[start.to(ids.device) + window])
        if graph is not None:
            graph.replay()
        elif on_gpu and step == EAGER_STEPS:
            graph, loss = _captured(take_step)
            graph.replay()
        else:
            loss = take_step()
        yield loss.item()


EAGER_STEPS = 3  # until kernels are compiled and the optimizer has its state


def _captured(take_step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the step, and the loss that each replay fills."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss = take_step()
    return graph, loss


@torch.no_grad()
def surprise(model: NemotronHForCausalLM, text: bytes, *, stride: int = 256, context: int = 256) -> np.ndarray:
    """Bits that the model needs for each byte of `text`, (len(text),).

    The text is read in pieces of `stride` bytes, each after the `context` bytes before it; the first piece comes after
    a line feed, so that every byte counts.
    """
    ids = as_ids(b"\n" + text, model.device)
    bits = []
    for begin in range(0, len(text), stride):
        end = min(begin + stride, len(text))
        first = max(0, begin - context)
        logits = model(ids[None, first:end])[0, begin - first :]
        bits.append(F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none") / math.log(2))
    return torch.cat(bits).cpu().numpy()


def bits(nats: float) -> float:
    return nats / math.log(2)
