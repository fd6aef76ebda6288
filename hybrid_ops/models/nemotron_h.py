"""`NemotronHForCausalLM`: the reference hybrid model, embedding, layers, output projection."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _checks
from ..nn import MLP, Attention, Experts, Gate, Mamba2Mixer, MoE, RMSNorm
from ..nn.quantized import QuantizedWeight
from .cache import HybridCache
from .config import NemotronHConfig
from .layers import Backbone
from .mtp import MTP, shift


def _to_residual(module: nn.Module) -> Tensor | None:
    """The matrix of a mixer, or of a shared expert, that writes to the residual stream."""
    if isinstance(module, Mamba2Mixer):
        return module.out_proj.weight
    if isinstance(module, Attention):
        return module.o_proj.weight
    if isinstance(module, MLP):
        return module.down_proj.weight
    if isinstance(module, MoE):
        return cast(Tensor, module.experts.down_proj if (fc2 := module.fc2_latent_proj) is None else fc2.weight)
    return None


def _padded(packed: Tensor, mask: Tensor) -> Tensor:
    """(1, total, n) -> (batch, seqlen, n), 0 where the mask is false."""
    return packed.new_zeros(*mask.shape, packed.shape[-1]).masked_scatter(mask[..., None], packed)


class NemotronHForCausalLM(nn.Module):
    """A hybrid language model of the Nemotron-H family: embedding, layers, final norm, output projection.

    ``h = h + mixer(RMSNorm(h))`` for every layer, no positional embedding; parameters have the names that Hugging Face
    checkpoints of `nemotron_h` use; experts are one tensor a layer, as in transformers 5. A new model is initialised
    for training: matrices normal with `config.initializer_range`, those that write to the residual stream divided by
    sqrt(number of layers). `mtp` is the multi-token prediction head (`hybrid_ops.models.MTP`), None without one.

    Args:
        config: sizes and options.
        device, dtype: of the parameters; A_log, D, dt_bias and the routers' correction bias stay float32. On "meta"
            nothing is allocated.

    >>> from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
    >>> model = NemotronHForCausalLM(NemotronHConfig.preset("tiny"))
    >>> model(torch.tensor([[72, 105, 33]])).shape
    torch.Size([1, 3, 256])
    """

    def __init__(
        self,
        config: NemotronHConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.mtp = MTP(config, device=device, dtype=dtype) if config.num_nextn_predict_layers else None
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, for training from scratch. Not of a quantised model."""
        config = self.config
        for name, module in self.named_modules():
            if isinstance(module, QuantizedWeight):
                raise TypeError(f"{name} must be a parameter to be drawn anew, got {type(module).__name__}")
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Gate):
                module.weight.normal_(std=config.initializer_range)
            if isinstance(module, Gate):
                module.e_score_correction_bias.zero_()
            if isinstance(module, Experts):
                for matrices in module.parameters():
                    matrices.normal_(std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Conv1d):
                module.reset_parameters()
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            if isinstance(module, Mamba2Mixer):
                module.init_states(config.time_step_min, config.time_step_max, config.time_step_floor)
                module.norm.weight.fill_(1)
        if config.rescale_prenorm_residual:
            for module in self.modules():
                if (weight := _to_residual(module)) is not None:
                    weight.div_(math.sqrt(config.num_hidden_layers))

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.embeddings.weight.dtype  # lm_head may be quantised

    def new_cache(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        num_draft_tokens: int = 0,
        static: bool = False,
        mtp: bool = False,
    ) -> HybridCache:
        """An empty `HybridCache` on the model's device, in its dtype."""
        return HybridCache(
            self.config,
            batch_size,
            device=self.device,
            dtype=self.dtype,
            max_length=max_length,
            num_draft_tokens=num_draft_tokens,
            static=static,
            mtp=mtp,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: HybridCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
        return_hidden: bool = False,
        mtp_depth: int = 0,
    ) -> Tensor | tuple[Tensor, Any]:
        """Logits of the next token after every token.

        Args:
            input_ids: (batch, seqlen) integers; packed (1, total) with `cu_seqlens`.
            cache: what earlier calls read; the tokens of this call go on from there and are added to it. A call with
                a cache records no gradient. A prompt may be read at once, in pieces, or token by token.
            cu_seqlens: (nseq + 1,) int32, boundaries of packed sequences; sequence i is the cache's row i. Its values
                are read on the host.
            attention_mask: (batch, seqlen), true or 1 for tokens, 0 for padding, which may be on either side. Padding
                is left out of the computation: it changes no state, and its logits are zero.
            last_only: only the logits after each sequence's last token.
            return_hidden: also return what the output projection and the multi-token prediction head read: the final
                norm's output of every token, (batch, seqlen, hidden), 0 for padding.
            mtp_depth: also return the logits of the multi-token prediction head, a list of so many: the k-th has those
                of the token k + 2 further, for every token that has k + 1 successors here. So for k = 0 it is
                (batch, seqlen - 1, vocab), and compares with input_ids[:, 2:] up to its last; packed, each sequence
                is k + 1 shorter. For training: without a cache, a mask and `last_only`.

        Returns:
            (batch, seqlen, vocab) float32 (float64 in a float64 model), (1, total, vocab) packed; with `last_only`
            (nseq, 1, vocab). With `return_hidden` or `mtp_depth`, a pair.

        Raises:
            ValueError, TypeError: a shape, dtype, device, mask or boundary that is not the one expected.
        """
        nseq = self._check(input_ids, cache, cu_seqlens, attention_mask)
        self._check_mtp(mtp_depth, cache, attention_mask, last_only, return_hidden)
        if attention_mask is not None:
            return self._forward_padded(input_ids, attention_mask.bool(), cache, last_only, return_hidden)
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        counts = [input_ids.shape[1]] * nseq if bounds is None else [b - a for a, b in itertools.pairwise(bounds)]
        if last_only and 0 in counts:
            raise ValueError(
                "input_ids must have at least one token of every sequence where only the last logits are wanted, "
                f"got none of sequence {counts.index(0)}"
            )
        stepped = cache is not None and bounds is None and cache.steps(input_ids.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden = last = self.backbone(input_ids, cache, cu_seqlens, bounds, stepped)
            if last_only:
                last = (hidden[:, -1] if cu_seqlens is None else hidden[0, cu_seqlens[1:].long() - 1]).unsqueeze(1)
            logits = self._project(last)
            further = [self._project(h) for h in self._mtp_hidden(hidden, input_ids, bounds, mtp_depth)]
        if cache is not None:
            cache.advance(counts, stepped=stepped)
        if mtp_depth:
            return logits, further
        return (logits, hidden) if return_hidden else logits

    def _project(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _mtp_hidden(self, hidden: Tensor, input_ids: Tensor, bounds: list[int] | None, depth: int) -> Iterator[Tensor]:
        """What the head makes of whole sequences at each depth, every time of one token less."""
        for _ in range(depth):
            hidden, input_ids, bounds = shift(hidden, input_ids, bounds)
            hidden = self.mtp(self.backbone.embeddings(input_ids), hidden, bounds=bounds)  # type: ignore[misc]
            yield hidden

    @torch.no_grad()
    def draft(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        num_tokens: int,
        cache: HybridCache,
        *,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Guess the next tokens of every sequence with the multi-token prediction head, each the likeliest.

        Args:
            hidden: (batch, m, hidden), what the forward with `return_hidden` made of the newest m tokens.
            next_ids: (batch, m) int64, the token behind each of them. The guesses are those behind the last.
            num_tokens: how many.
            cache: `new_cache(batch, mtp=True)`, which has read all tokens before these m and is left with these too.
            counts: sequence i has only its first counts[i] of the m tokens, at least one; None: all.

        Returns:
            (batch, num_tokens) int64.

        Raises:
            ValueError, TypeError: a model without the head; a shape, dtype or number that is not the one expected.
        """
        if self.mtp is None:
            raise ValueError("draft is for a model with num_nextn_predict_layers=1, got one with 0")
        batch, m = next_ids.shape
        _checks.tensor("hidden", hidden, (batch, m, self.config.hidden_size), dtype=self.dtype, device=self.device)
        counts = [m] * batch if counts is None else list(counts)
        if len(counts) != batch or not all(1 <= count <= m for count in counts):
            raise ValueError(f"counts must be {batch} numbers from 1 to {m}, got {counts}")
        if cache.batch_size != batch:
            raise ValueError(f"cache must hold {batch} sequences, got {cache.batch_size}")
        read = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        hidden = self.mtp(self.backbone.embeddings(next_ids), hidden, cache)
        cache.advance([m] * batch)
        cache.truncate(read)
        last = torch.tensor(counts, dtype=torch.int64, device=self.device) - 1
        hidden = hidden[torch.arange(batch, device=self.device), last].unsqueeze(1)
        drafts: list[Tensor] = []
        for _ in range(num_tokens):
            if drafts:
                hidden = self.mtp(self.backbone.embeddings(drafts[-1]), hidden, cache)
                cache.advance([1] * batch)
            drafts.append(self._project(hidden).argmax(-1))
        cache.truncate(read)
        return torch.cat(drafts, dim=1) if drafts else next_ids[:, :0]

    def _forward_padded(
        self, input_ids: Tensor, mask: Tensor, cache: HybridCache | None, last_only: bool, return_hidden: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A padded batch is computed packed, without its padding."""
        cu_seqlens = torch.zeros(input_ids.shape[0] + 1, dtype=torch.int32, device=input_ids.device)
        cu_seqlens[1:] = mask.sum(1).cumsum(0)
        logits, hidden = self(
            input_ids[mask][None], cache=cache, cu_seqlens=cu_seqlens, last_only=last_only, return_hidden=True
        )
        logits = logits if last_only else _padded(logits, mask)
        return (logits, _padded(hidden, mask)) if return_hidden else logits

    def _check_mtp(
        self,
        depth: int,
        cache: HybridCache | None,
        attention_mask: Tensor | None,
        last_only: bool,
        return_hidden: bool,
    ) -> None:
        if not isinstance(depth, int) or depth < 0:
            raise ValueError(f"mtp_depth must be an integer >= 0, got {depth!r}")
        if depth and self.mtp is None:
            raise ValueError(f"mtp_depth must be 0 in a model with num_nextn_predict_layers=0, got {depth}")
        if depth:
            others = dict(cache=cache, attention_mask=attention_mask)
            flags = dict(last_only=last_only or None, return_hidden=return_hidden or None)
            _checks.at_most_one(mtp_depth=depth, **others, **flags)

    def _check(
        self, input_ids: Tensor, cache: HybridCache | None, cu_seqlens: Tensor | None, attention_mask: Tensor | None
    ) -> int:
        """Returns the number of sequences."""
        _checks.at_most_one(cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        batch = 1 if cu_seqlens is not None else None
        _checks.rank("input_ids", input_ids, (2,), "(batch, seqlen)")
        _checks.tensor("input_ids", input_ids, (batch, None), dtype=(torch.int64, torch.int32), device=self.device)
        if _checks.readable(input_ids) and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"input_ids must be in [0, {self.config.vocab_size}), got {low if low < 0 else high}")
        if attention_mask is not None:
            dtypes = (torch.bool, torch.int64, torch.int32)
            _checks.tensor("attention_mask", attention_mask, input_ids.shape, dtype=dtypes, device=self.device)
        nseq = input_ids.shape[0]
        if cu_seqlens is not None:
            nseq = _checks.cu_seqlens(cu_seqlens, input_ids.shape[1], self.device)
        if cache is not None and cache.batch_size != nseq:
            raise ValueError(f"cache must hold {nseq} sequences, got {cache.batch_size}")
        drafting = cache is not None and cache.num_draft_tokens and any(cache.lengths)
        if cache is not None and drafting and (cu_seqlens is not None or not cache.steps(input_ids.shape[1])):
            raise ValueError(
                f"input_ids must be (batch, 1 to {1 + cache.num_draft_tokens}) behind the prompt in a cache with "
                f"num_draft_tokens={cache.num_draft_tokens}, got {tuple(input_ids.shape)}"
            )
        return nseq

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """The new tokens, (nseq, up to max_new_tokens); options as in `hybrid_ops.models.generate`."""
        from .generate import generate

        return generate(self, input_ids, max_new_tokens, **options)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """The new tokens one step at a time, (nseq,); options as in `hybrid_ops.models.stream`."""
        from .generate import stream

        return stream(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        config: NemotronHConfig | None = None,
        dequantize: bool = False,
        progress: bool | None = None,
    ) -> "NemotronHForCausalLM":
        """A model from a Hugging Face folder; see `hybrid_ops.models.load_checkpoint`."""
        from .checkpoint import load_checkpoint

        options = dict(dtype=dtype, device=device, config=config, dequantize=dequantize, progress=progress)
        return load_checkpoint(cls, folder, **options)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face folder; see `hybrid_ops.models.save_checkpoint`."""
        from .checkpoint import save_checkpoint

        save_checkpoint(self, folder, max_shard_bytes=max_shard_bytes)
