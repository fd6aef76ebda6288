"""`MTP`: the multi-token prediction head, one block of layers that predicts the token after the next, and so on."""

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import RMSNorm
from .cache import HybridCache
from .config import NemotronHConfig
from .layers import Layer


class MTPLayer(Layer):
    """A layer of the head. The first also has what makes its input, the last the norm behind it, as checkpoints do."""

    def __init__(
        self, letter: str, config: NemotronHConfig, *, first: bool = False, last: bool = False, **factory: Any
    ) -> None:
        super().__init__(letter, config, **factory)
        d, eps = config.hidden_size, config.layer_norm_epsilon
        if first:
            self.enorm = RMSNorm(d, eps=eps, **factory)
            self.hnorm = RMSNorm(d, eps=eps, **factory)
            self.eh_proj = nn.Linear(2 * d, d, bias=False, **factory)
        if last:
            self.final_layernorm = RMSNorm(d, eps=eps, **factory)


class MTP(nn.Module):
    """Multi-token prediction: from what is known at token t, and token t + 1, to token t + 2.

    ::

        x = eh_proj(concat(enorm(embedding of token t + 1), hnorm(h_t)))     # a residual stream of its own
        x = x + mixer(norm(x))                                               # for every layer, "*E"
        o_t = final_layernorm(x);   logits of token t + 2 = lm_head(o_t)

    h is the backbone's output behind its final norm. With o in place of h the same block predicts one token further,
    and so on to any depth. Embedding and lm_head are the model's.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2; NVIDIA 2025, "NVIDIA Nemotron 3".
    """

    def __init__(self, config: NemotronHConfig, **factory: Any) -> None:
        super().__init__()
        pattern = config.mtp_hybrid_override_pattern
        self.layers = nn.ModuleList(
            [
                MTPLayer(
                    letter,
                    config.for_layer(index, mtp=True),
                    first=index == 0,
                    last=index == len(pattern) - 1,
                    **factory,
                )
                for index, letter in enumerate(pattern)
            ]
        )

    def forward(
        self, embedded: Tensor, hidden: Tensor, cache: HybridCache | None = None, bounds: list[int] | None = None
    ) -> Tensor:
        """o (batch, seqlen, hidden).

        Args:
            embedded: (batch, seqlen, hidden), the embedding of each token's successor.
            hidden: (batch, seqlen, hidden), what the backbone, or this head one depth before, made of each token.
            cache: keys and values of the tokens before, `HybridCache(.., mtp=True)`; those of this call are added.
            bounds: of packed sequences, as for `hybrid_ops.nn.Attention`.
        """
        first, last = cast(MTPLayer, self.layers[0]), cast(MTPLayer, self.layers[-1])
        x, residual = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], dim=-1)), None
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, None if cache is None else cache.layers[index], None, bounds, False)
        return last.final_layernorm.add(x, residual)[0]  # type: ignore[arg-type]  # there is at least one layer


def shift(hidden: Tensor, input_ids: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor, list[int] | None]:
    """Each token's hidden state beside the next token, where there is one, in every packed sequence."""
    if bounds is None:
        return hidden[:, :-1], input_ids[:, 1:], None
    spans = list(itertools.pairwise(bounds))
    not_last = [token for start, end in spans for token in range(start, end - 1)]
    kept = torch.tensor(not_last, dtype=torch.int64, device=hidden.device)
    shorter = itertools.accumulate((max(end - start - 1, 0) for start, end in spans), initial=0)
    return hidden[:, kept], input_ids[:, kept + 1], list(shorter)
