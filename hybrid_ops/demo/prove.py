"""What the demo shows of the trained model beside its loss: how it writes, what it remembers, and that it is right."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models import HybridCache, NemotronHForCausalLM, speculate
from ..reference import model as reference
from .train import as_ids, moe_layers

# Logits lie within +-30 or so: float32 through seven layers is off by 1e-5, a wrong operator by 1 or more.
LOGIT_TOLERANCE = 2e-4


def write(model: NemotronHForCausalLM, prompt: bytes, length: int, *, temperature: float = 0.7) -> Iterator[bytes]:
    """Continue the prompt byte by byte; the same every time for the same weights."""
    generator = torch.Generator(model.device).manual_seed(0)
    ids = as_ids(prompt, model.device)[None]
    for token in model.stream(ids, length, do_sample=True, temperature=temperature, generator=generator):
        yield bytes([int(token)])


class Speed(NamedTuple):
    """Generating at one position: bytes of text per second, and bytes of memory."""

    position: int
    per_second: float
    fixed: int  # convolution and SSM states
    keys_values: int  # of the attention layers that the model has
    all_attention: int  # what it would hold if its Mamba-2 layers were attention layers too


def speed(model: NemotronHForCausalLM, text: bytes, position: int, steps: int) -> Speed:
    """Read `position` bytes, then time `steps` more, one at a time, each chosen from the logits before it."""
    cache = model.new_cache(1, max_length=position + steps)
    with torch.no_grad():
        logits = model(as_ids(text[:position], model.device)[None], cache=cache, last_only=True)
        memory = cache.nbytes()
        for step in range(-4, steps):  # the first four warm up
            if step == 0:
                start = time.perf_counter()
            logits = model(logits[:, -1].argmax(-1, keepdim=True), cache=cache)
        int(logits.argmax())  # waits for the GPU
    seconds = time.perf_counter() - start
    pattern = model.config.hybrid_override_pattern
    all_attention = memory["kv"] * (pattern.count("M") + pattern.count("*")) // pattern.count("*")
    return Speed(position, steps / seconds, memory["conv"] + memory["ssm"], memory["kv"], all_attention)


class Proof(NamedTuple):
    """Something that was checked, the largest difference in logits, and whether it is as it should be."""

    claim: str
    difference: float
    holds: bool
    detail: str = ""


@torch.no_grad()
def against_reference(model: NemotronHForCausalLM, text: bytes) -> Proof:
    """The trained weights in `hybrid_ops.reference.model`: NumPy, float64, one token after the other."""
    ids = as_ids(text, model.device)[None]
    weights = {name: parameter.cpu().numpy() for name, parameter in model.state_dict().items()}
    expected, _ = reference.forward(weights, model.config, ids.cpu().numpy())
    got = model(ids).cpu().double().numpy()
    difference = float(np.abs(got - expected).max())
    same = int((got.argmax(-1) == expected.argmax(-1)).sum())
    return Proof(
        "the model computes what NumPy does in float64",
        difference,
        difference <= LOGIT_TOLERANCE and same == len(text),
        f"same likeliest byte at {same} of {len(text)} positions",
    )


@torch.no_grad()
def ways_of_reading(model: NemotronHForCausalLM, text: bytes) -> list[Proof]:
    """The text at once, without a cache, against the text in pieces and byte by byte with one."""
    ids = as_ids(text, model.device)[None]
    at_once = model(ids)
    pieces = ids.split([1, 50, len(text) - 51], dim=1)
    ways = {"read in pieces = read at once": pieces, "read byte by byte = read at once": ids.split(1, dim=1)}
    proofs = []
    for claim, way in ways.items():
        cache = model.new_cache(1)
        logits = torch.cat([model(piece, cache=cache) for piece in way], dim=1)
        difference = float((logits - at_once).abs().max())
        proofs.append(Proof(claim, difference, difference <= LOGIT_TOLERANCE, f"{len(way)} calls"))
    return proofs


def loads(model: NemotronHForCausalLM, text: bytes) -> list[np.ndarray]:
    """For each mixture of experts of the backbone, the share of the text's bytes that each expert was chosen for."""
    layers = [layer for name, layer in model.named_modules() if layer in moe_layers(model) and "mtp" not in name]
    for layer in layers:
        layer.load.zero_()
    model(as_ids(text, model.device)[None])  # gradients are recorded, so the layers count
    return [layer.load.cpu().numpy() / len(text) for layer in layers]


class Drafting(NamedTuple):
    """Writing with drafts of the multi-token prediction head: how often each was right, and what that brought."""

    acceptance: list[float]  # by position behind the newest byte
    per_pass: float  # bytes that a pass of the backbone settles, on average
    proof: Proof


@torch.no_grad()
def drafting(model: NemotronHForCausalLM, text: bytes, *, drafts: int, prompts: int, length: int) -> Drafting:
    """Continue pieces of the text, `length` bytes each, with drafts and without: the same bytes, in fewer passes.

    Where two bytes are equally likely the texts may part, for several bytes at once are summed in another order; then
    the difference is that of their logits.
    """
    ids = as_ids(text, model.device)
    starts = torch.linspace(0, len(text) - length, prompts).long().to(ids.device)
    ids = ids[starts[:, None] + torch.arange(length, device=ids.device)]
    result = speculate(model, ids, length, num_draft_tokens=drafts)
    greedy = model.generate(ids, length)
    difference, parted = 0.0, 0
    for prompt, mine, other in zip(ids, result.tokens, greedy, strict=True):
        apart = (mine != other).nonzero()
        if len(apart):
            at = int(apart[0])
            logits = model(torch.cat([prompt, other[:at]])[None], last_only=True)[0, -1]
            difference = max(difference, float((logits[mine[at]] - logits[other[at]]).abs()))
            parted += 1
    passes = result.drafted[0] / prompts
    proof = Proof(
        f"written with {drafts} drafts a pass = byte by byte",
        difference,
        difference <= LOGIT_TOLERANCE,
        f"{prompts - parted} of {prompts} texts of {length} bytes are the same",
    )
    return Drafting(result.acceptance, (length - 1) / passes, proof)


class Memory(NamedTuple):
    """One head's state after each byte of a text, (len(text), headdim, dstate)."""

    text: bytes
    layer: int
    head: int
    states: np.ndarray


@torch.no_grad()
def watch(model: NemotronHForCausalLM, text: bytes) -> Memory:
    """Read the text byte by byte and keep the state of one head: of the last Mamba-2 layer, the one of middling memory.

    Of its heads some forget within a few bytes and some hardly ever; the one in the middle is the most telling.
    """
    ids = as_ids(text, model.device)[None]
    cache = model.new_cache(1)
    states = torch.stack([_after(model, token, cache) for token in ids.split(1, dim=1)]).cpu().numpy()
    change = np.abs(np.diff(states, axis=0)).mean((0, 2, 3)) / np.abs(states).mean((0, 2, 3))
    head = int(np.argsort(change)[len(change) // 2])
    return Memory(text, model.config.hybrid_override_pattern.rindex("M"), head, states[:, head])


def _after(model: NemotronHForCausalLM, token: Tensor, cache: HybridCache) -> Tensor:
    """All heads' states of the last Mamba-2 layer after one more token, (nheads, headdim, dstate)."""
    model(token, cache=cache)
    return cache.ssm_states[-1][0].clone()
