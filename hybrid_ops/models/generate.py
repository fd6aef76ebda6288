"""Generation: a prompt is read at once, then one token at a time through the update operators; and `warmup`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .nemotron_h import NemotronHForCausalLM


def generate(
    model: "NemotronHForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Iterable[int] | str | None = "config",
    num_draft_tokens: int = 0,
    callback: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue prompts, greedily or by sampling.

    Args:
        model: the model.
        input_ids: (batch, seqlen), every prompt equally long or padded as `attention_mask` says; or packed (1, total)
            with `cu_seqlens`. A prompt has at least one token.
        max_new_tokens: tokens to make for each prompt, at most.
        attention_mask: (batch, seqlen), 0 for padding, on the left or on the right.
        cu_seqlens: (nseq + 1,) int32.
        do_sample: draw from the distribution; otherwise the most likely token is taken.
        temperature: logits are divided by it before drawing; > 0.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the most likely tokens whose probabilities first reach p in sum, 0 < p <= 1.
        generator: the random numbers; on the model's device.
        eos_token_id: a sequence that makes one of these ends there; "config" takes the configuration's, None none.
        num_draft_tokens: > 0: the multi-token prediction head drafts so many tokens a round, which one pass verifies;
            greedy only, without `callback`. `hybrid_ops.models.speculate` is the same and counts what was accepted.
        callback: called with the (nseq,) tokens of every step as soon as they are known.

    Returns:
        (nseq, n) int64, n <= max_new_tokens new tokens; behind its end a sequence has `config.pad_token_id` (or 0).

    Raises:
        ValueError, TypeError: an option out of its range, and what the model's forward raises.

    >>> from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
    >>> model = NemotronHForCausalLM(NemotronHConfig.preset("tiny"))
    >>> model.generate(torch.tensor([[72, 105]]), 4).shape
    torch.Size([1, 4])
    """
    if num_draft_tokens:
        if do_sample or callback is not None:
            raise ValueError("num_draft_tokens must be 0 with do_sample or callback, which drafts cannot serve")
        from .speculative import speculate

        return speculate(
            model,
            input_ids,
            max_new_tokens,
            num_draft_tokens=num_draft_tokens,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            eos_token_id=eos_token_id,
        ).tokens
    steps = []
    for tokens in stream(
        model,
        input_ids,
        max_new_tokens,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        eos_token_id=eos_token_id,
    ):
        steps.append(tokens)
        if callback is not None:
            callback(tokens)
    if steps:
        return torch.stack(steps, dim=1)
    nseq = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return torch.empty(nseq, 0, dtype=torch.int64, device=model.device)


def stream(
    model: "NemotronHForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Iterable[int] | str | None = "config",
) -> Iterator[Tensor]:
    """The tokens of `generate` as they are made, (nseq,) int64 a step; ends where `generate` ends."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (do_sample=False takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    def choose(logits: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)

    ends = end_tokens(eos_token_id, model.config.eos_token_ids)
    nseq = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return _stream(model, input_ids, max_new_tokens, attention_mask, cu_seqlens, nseq, choose, ends)


def _stream(
    model: "NemotronHForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    nseq: int,
    choose: Callable[[Tensor], Tensor],
    ends: tuple[int, ...],
) -> Iterator[Tensor]:
    if max_new_tokens == 0:
        return
    cache = model.new_cache(nseq, max_length=input_ids.shape[1] + max_new_tokens if cu_seqlens is None else None)
    with torch.no_grad():
        logits = model(input_ids, cache=cache, attention_mask=attention_mask, cu_seqlens=cu_seqlens, last_only=True)
    finished = torch.zeros(nseq, dtype=torch.bool, device=model.device)
    end_tokens = torch.tensor(ends, dtype=torch.int64, device=model.device)
    pad = model.config.pad_token_id or 0
    for step in range(max_new_tokens):
        tokens = choose(logits[:, -1])
        if ends:
            tokens = tokens.masked_fill(finished, pad)
            finished |= torch.isin(tokens, end_tokens)
        yield tokens
        if step + 1 == max_new_tokens or (ends and bool(finished.all())):
            return
        with torch.no_grad():
            logits = model(tokens[:, None], cache=cache)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits, (nseq, vocab) -> (nseq,) int64.

    `top_k` first, then `top_p` of what is left, as Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration", section 3.1, define the nucleus: the smallest set of likeliest tokens with at least that probability.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def end_tokens(given: int | Iterable[int] | str | None, config: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(given, str):
        if given != "config":
            raise ValueError(f"eos_token_id must be an integer, several, None or 'config', got {given!r}")
        return config
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def warmup(model: "NemotronHForCausalLM", *, batch_sizes: Sequence[int] = (1, 2)) -> None:
    """Run small prompts and a few decoding steps, so that every Triton kernel the model can reach is compiled.

    Whole, packed and continued prompts, for each batch size, and drafts where the model has a head for them; the model
    is left as it was. On a GPU kernels are compiled on all cores of the machine first. On the CPU it is a quick pass
    without effect.

    >>> from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
    >>> hybrid_ops.warmup(NemotronHForCausalLM(NemotronHConfig.preset("tiny")))
    """
    if model.device.type == "cuda":
        from ..triton_kernels.launch import compile_only

        with compile_only():
            _visit(model, batch_sizes)
    _visit(model, batch_sizes)


def _visit(model: "NemotronHForCausalLM", batch_sizes: Sequence[int]) -> None:
    # a long prompt of more than one chunk; odd lengths, for kernels specialise on sizes divisible by 16
    lengths = (1, 19, model.config.chunk_size + 16)
    with torch.no_grad():
        for batch in batch_sizes:
            cache = model.new_cache(batch)
            for length in lengths:
                ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
                model(ids)
                model(ids, cache=cache, last_only=True)
                model(ids[:, :1], cache=cache)
                bounds = torch.arange(batch + 1, dtype=torch.int32, device=model.device) * length
                cache.reset()
                model(ids.reshape(1, -1), cache=cache, cu_seqlens=bounds, last_only=True)
                if model.mtp is not None:
                    generate(model, ids, 4, num_draft_tokens=2, eos_token_id=None)
