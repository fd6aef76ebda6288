"""Who runs a model: this library, and `transformers` with the very same tensors, eagerly and by CUDA graphs."""

import contextlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_ops.models import NemotronHForCausalLM

Step = Callable[[Tensor], Tensor]  # the next tokens, (batch, 1) -> logits (batch, 1, vocab)
OLDEST = (5, 17)


class Ours:
    """`hybrid_ops.models`."""

    def __init__(self, model: NemotronHForCausalLM, *, graph: bool = False) -> None:
        self.model, self.graph = model, graph
        self.name = self.impl = "graph" if graph else "eager"

    def active(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last tokens, (batch, 1, vocab)."""
        batch, seqlen = ids.shape
        return self.model(ids, cache=self.model.new_cache(batch, max_length=seqlen), last_only=True)  # type: ignore

    def start(self, ids: Tensor, room: int, *, quick: bool = False) -> tuple[Tensor, Step]:
        """The same into a cache with room for so many tokens, and the step that goes on from there."""
        cache = self.model.new_cache(ids.shape[0], max_length=room, static=self.graph)
        return self.model(ids, cache=cache, last_only=True), lambda tokens: self.model(tokens, cache=cache)  # type: ignore


class Theirs:
    """`transformers`, as it is or patched; with `graph` its step in a CUDA graph, over its static cache."""

    def __init__(self, model: Any, *, patch: bool = False, graph: bool = False) -> None:
        self.model, self.patch, self.graph = model, patch, graph
        self.name = "+".join(["transformers", *["patch"] * patch, *["graph"] * graph])

    def active(self) -> contextlib.AbstractContextManager[object]:
        """The model is patched inside; to patch takes longer than a step."""
        return self._patched() if self.patch else contextlib.nullcontext()

    def _patched(self) -> contextlib.AbstractContextManager[object]:
        from hybrid_ops.integrations.transformers import patched

        return patched(self.model)

    def prefill(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=True, logits_to_keep=1).logits

    def start(self, ids: Tensor, room: int, *, quick: bool = False) -> tuple[Tensor, Step]:
        """With `quick` the patched model fills the cache: without mamba_ssm their own would need 4 GB a chunk row."""
        import transformers

        config = self.model.config
        if self.graph:
            cache = transformers.StaticCache(config, max_cache_len=room)
        else:
            cache = transformers.DynamicCache(config=config)
        with self._patched() if quick else contextlib.nullcontext():
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits, lambda tokens: self.model(tokens, past_key_values=cache, use_cache=True).logits


class Captured:
    """A step in a CUDA graph. What it has to load and compile it must have done: call it before."""

    def __init__(self, step: Step, tokens: Tensor) -> None:
        self._step = step  # and with it the cache, whose memory the graph reads and writes
        self._tokens = tokens.clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._logits = step(self._tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The result is overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def transformers_model(ours: NemotronHForCausalLM) -> Any:
    """transformers' model with the tensors of ours: no weight is there twice.

    Its clamp of dt in prefill is taken away, as the published configurations say; no work depends on it.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # of packages that are missing `versions` tells
    skipped = ("architectures", "model_type", "num_hidden_layers")
    fields = {field: value for field, value in ours.config.to_dict().items() if field not in skipped}
    with torch.device("meta"):
        theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**fields))
    tensors = {name.replace("backbone.", "model.", 1): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(tensors, assign=True)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    return theirs.eval().requires_grad_(False)


def why_no_transformers() -> str | None:
    """Why it cannot be compared with; None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "not installed: pip install transformers"
    version = importlib.metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"must be {'.'.join(map(str, OLDEST))} or newer, is {version}"
    return None


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # on the path, without having been installed
        return "of unknown version"


def versions() -> str:
    """What transformers runs on here."""
    parts = []
    for library in ("mamba_ssm", "causal_conv1d"):
        there = importlib.util.find_spec(library) is not None
        parts.append(f"{library} {_version(library)}" if there else f"no {library}: its own torch code")
    return f"transformers {importlib.metadata.version('transformers')} ({', '.join(parts)})"
