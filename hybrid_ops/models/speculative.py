"""Speculative decoding: the multi-token prediction head drafts, one pass of the backbone verifies several tokens."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .generate import end_tokens

if TYPE_CHECKING:
    from .nemotron_h import NemotronHForCausalLM


class Speculation(NamedTuple):
    """Generated tokens, and how good the drafts were."""

    tokens: Tensor  # (nseq, n) int64, as of `generate`
    drafted: list[int]  # how many drafts there were for each position behind the newest token
    accepted: list[int]  # how many of them were what the model itself goes on with

    @property
    def acceptance(self) -> list[float]:
        """The share of accepted drafts of each position."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]


@torch.no_grad()
def speculate(
    model: "NemotronHForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    num_draft_tokens: int,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Iterable[int] | str | None = "config",
) -> Speculation:
    """Continue prompts greedily, several tokens a pass: the tokens of `generate`, and how many drafts were right.

    Each round the head drafts `num_draft_tokens` tokens behind the newest one of every sequence, and one pass of the
    backbone over all of these says how it would have gone on at each. The drafts up to the first wrong one count, and
    so does the backbone's own token there. What rejected tokens left in the states is taken back: every SSM state is
    kept for each token of the pass, convolutions roll back, keys and values are overwritten.

    The tokens are those of greedy decoding one by one, but for rounding: a pass over several tokens sums in another
    order, and an SSM state of 16 bits is rounded less often. Where two logits are that close, the texts may part.

    Args:
        model: one with a multi-token prediction head.
        input_ids, max_new_tokens, attention_mask, cu_seqlens, eos_token_id: as in `hybrid_ops.models.generate`.
        num_draft_tokens: drafts a round, at least 1.

    Returns:
        Speculation: tokens, and of each draft position how often it was drafted and accepted, in sequences that had not
        ended yet.

    Raises:
        ValueError, TypeError: a model without a head, and what `generate` raises.

    >>> from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM, speculate
    >>> model = NemotronHForCausalLM(NemotronHConfig.preset("tiny-moe"))
    >>> result = speculate(model, torch.tensor([[72, 105]]), 8, num_draft_tokens=2)
    >>> result.tokens.shape, len(result.acceptance)
    (torch.Size([1, 8]), 2)
    """
    if model.mtp is None:
        raise ValueError("num_draft_tokens is for a model with num_nextn_predict_layers=1, got one with 0")
    if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens must be an integer >= 1, got {num_draft_tokens!r}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    ends = frozenset(end_tokens(eos_token_id, model.config.eos_token_ids))
    nseq = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    texts = _Texts(nseq, max_new_tokens, num_draft_tokens, ends)
    if texts.finished:
        return texts.result(model)
    cache = model.new_cache(nseq, num_draft_tokens=num_draft_tokens)
    heads = model.new_cache(nseq, mtp=True)
    logits, hidden = model(
        input_ids,
        cache=cache,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        last_only=True,
        return_hidden=True,
    )
    newest = logits[:, -1].argmax(-1)
    counts = list(cache.lengths)
    hidden, prompts = _side_by_side(hidden, input_ids, attention_mask, cu_seqlens, counts)
    next_ids = prompts.roll(-1, dims=1)
    next_ids[torch.arange(nseq, device=model.device), torch.tensor(counts, device=model.device) - 1] = newest
    texts.add([[token] for token in newest.tolist()])
    while not texts.finished:
        drafts = model.draft(hidden, next_ids, num_draft_tokens, heads, counts=counts)
        logits, hidden = model(torch.cat([newest[:, None], drafts], dim=1), cache=cache, return_hidden=True)
        next_ids = logits.argmax(-1)  # (nseq, 1 + drafts): what follows the newest token, and each draft
        right = (drafts == next_ids[:, :-1]).long().cumprod(1).sum(1)
        counts = (1 + right).tolist()
        cache.accept(counts)
        newest = next_ids.gather(1, right[:, None])[:, 0]
        texts.add([row[:count] for row, count in zip(next_ids.tolist(), counts, strict=True)], drafted=True)
    return texts.result(model)


class _Texts:
    """What the sequences have so far, up to their ends."""

    def __init__(self, nseq: int, limit: int, drafts: int, ends: frozenset[int]) -> None:
        self.limit, self.ends = limit, ends
        self.texts: list[list[int]] = [[] for _ in range(nseq)]
        self.drafted, self.accepted = [0] * drafts, [0] * drafts

    def _open(self, text: list[int]) -> bool:
        return len(text) < self.limit and not (text and text[-1] in self.ends)

    @property
    def finished(self) -> bool:
        return not any(self._open(text) for text in self.texts)

    def add(self, pieces: list[list[int]], *, drafted: bool = False) -> None:
        """The next tokens of every sequence; with `drafted` all but the last of each were drafts that were right."""
        for text, piece in zip(self.texts, pieces, strict=True):
            if drafted and self._open(text):
                for position in range(len(self.drafted)):
                    self.drafted[position] += 1
                    self.accepted[position] += position < len(piece) - 1
            for token in piece:
                if self._open(text):
                    text.append(token)

    def result(self, model: "NemotronHForCausalLM") -> Speculation:
        longest = max(map(len, self.texts), default=0)
        pad = model.config.pad_token_id or 0
        rows = [text + [pad] * (longest - len(text)) for text in self.texts]
        tokens = torch.tensor(rows, dtype=torch.int64, device=model.device).view(len(rows), longest)
        return Speculation(tokens, self.drafted, self.accepted)


def _side_by_side(
    hidden: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """The prompts' hidden states (nseq, longest, hidden) and tokens (nseq, longest), padded on the right."""
    if attention_mask is None and cu_seqlens is None:
        return hidden, input_ids.long()
    if attention_mask is not None:
        hidden, input_ids = hidden[attention_mask.bool()], input_ids[attention_mask.bool()]
    else:
        hidden, input_ids = hidden[0], input_ids[0]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(hidden.split(counts), batch_first=True), pad(input_ids.long().split(counts), batch_first=True)
