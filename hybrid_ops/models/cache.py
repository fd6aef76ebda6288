"""`HybridCache`: everything a hybrid model remembers of a batch of sequences between calls."""

from collections.abc import Sequence

import torch

from ..nn import Drafts, KVCache, MambaState
from .config import NemotronHConfig

_FIRST_CAPACITY = 256  # tokens; doubled when full


class HybridCache:
    """Convolution states, SSM states and keys and values of `batch_size` sequences; row i belongs to sequence i.

    The SSM states are in `config.mamba_ssm_cache_dtype` (float64 in a float64 model), the rest in the model's dtype.
    The Mamba states have a fixed size; the keys and values grow as they are needed, unless `static`.

    Args:
        config: the model's.
        batch_size: number of sequences.
        device, dtype: the model's.
        max_length: tokens a sequence for which keys and values have room at once.
        num_draft_tokens: after a prompt, calls may bring up to 1 + num_draft_tokens tokens of which `accept` then takes
            some back. Each SSM state takes 1 + num_draft_tokens times the memory for that.
        static: everything stays where it is, so that a call for one token of every sequence can be captured in a CUDA
            graph; needs max_length. A replay moves the cache on as the call would, but `lengths`, which the host
            keeps, does not learn of it: replay up to max_length tokens, then `reset`.
        mtp: for the layers of the multi-token prediction head instead of the backbone's.

    >>> from hybrid_ops.models import HybridCache, NemotronHConfig
    >>> HybridCache(NemotronHConfig.preset("tiny"), 2).lengths
    [0, 0]
    """

    def __init__(
        self,
        config: NemotronHConfig,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        num_draft_tokens: int = 0,
        static: bool = False,
        mtp: bool = False,
    ) -> None:
        if static and max_length is None:
            raise ValueError("max_length must be given for a static cache, got None")
        if static and num_draft_tokens:
            raise ValueError(f"num_draft_tokens must be 0 in a static cache, got {num_draft_tokens}")
        if num_draft_tokens < 0:
            raise ValueError(f"num_draft_tokens must be >= 0, got {num_draft_tokens}")
        factory = dict(device=device, dtype=dtype)
        ssm_dtype = dtype if dtype == torch.float64 else getattr(torch, config.mamba_ssm_cache_dtype)
        kv_shape = (batch_size, config.num_key_value_heads, max_length or _FIRST_CAPACITY, config.head_dim)
        slots = torch.arange(batch_size, dtype=torch.int32, device=device)
        self.num_draft_tokens = num_draft_tokens
        self._drafts = Drafts.new(batch_size, num_draft_tokens, device) if num_draft_tokens else None
        self._newest: list[int] = []  # tokens of the last call, while some of them can be taken back
        self.lengths = [0] * batch_size  # shared with every KVCache, changed in place
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.layers: list[MambaState | KVCache | None] = []
        for index, letter in enumerate(config.mtp_hybrid_override_pattern if mtp else config.hybrid_override_pattern):
            layer = config.for_layer(index, mtp=mtp)
            state: MambaState | KVCache | None = None
            if letter == "M":
                # channels next to each other in memory, as the convolution's input has them
                width = config.conv_kernel - 1 + num_draft_tokens
                conv = torch.zeros(batch_size, width, layer.conv_dim, **factory)  # type: ignore[arg-type]
                nslots = batch_size * (1 + num_draft_tokens)
                ssm_shape = (nslots, config.mamba_num_heads, config.mamba_head_dim, layer.ssm_state_size)
                ssm = torch.zeros(ssm_shape, device=device, dtype=ssm_dtype)
                state = MambaState(conv.transpose(1, 2), ssm, slots, self._drafts)
            elif letter == "*":
                k, v = (torch.zeros(kv_shape, **factory) for _ in range(2))  # type: ignore[arg-type]
                state = KVCache(k, v, self.lengths, self._positions, static)
            self.layers.append(state)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def ssm_states(self) -> list[torch.Tensor]:
        """The SSM state of each Mamba-2 layer, (batch, nheads, headdim, dstate)."""
        return [layer.accepted()[1] for layer in self.layers if isinstance(layer, MambaState)]

    @property
    def conv_states(self) -> list[torch.Tensor]:
        """The convolution state of each Mamba-2 layer, (batch, conv_dim, width - 1), oldest first."""
        return [layer.accepted()[0] for layer in self.layers if isinstance(layer, MambaState)]

    @property
    def kv(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each attention layer, (batch, kv_heads, longest, head_dim)."""
        longest = max(self.lengths, default=0)
        return [(c.k[:, :, :longest], c.v[:, :, :longest]) for c in self.layers if isinstance(c, KVCache)]

    def steps(self, tokens: int) -> bool:
        """Whether a call with so many tokens of every sequence goes through the update operators."""
        return 1 <= tokens <= 1 + self.num_draft_tokens and all(self.lengths)

    def advance(self, counts: Sequence[int], *, stepped: bool = False) -> None:
        """Note that sequence i has `counts[i]` tokens more, by update operators or not; the model calls it."""
        self._newest = list(counts) if stepped else []
        self._set_lengths([length + count for length, count in zip(self.lengths, counts, strict=True)])
        if self._drafts is not None:
            self._drafts.num_accepted.copy_(self._on_device(counts if stepped else [1] * len(counts)))
            self._drafts.rollback.zero_()

    def accept(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[i]` of the tokens that sequence i had in the last call; at least one.

        Once a call, and not for a prompt.

        Raises:
            ValueError: counts out of range, or nothing to take back.
        """
        newest = self._newest
        if self._drafts is None:
            raise ValueError("accept is for a cache with num_draft_tokens >= 1, got one with 0")
        if not newest and self.lengths:
            raise ValueError(
                "accept must come once behind a call of 1 to 1 + num_draft_tokens tokens on top of a prompt"
            )
        if len(counts) != len(newest) or not all(1 <= c <= n for c, n in zip(counts, newest, strict=True)):
            raise ValueError(f"counts must be from 1 to the tokens of the last call, {newest}, got {list(counts)}")
        rejected = [n - count for n, count in zip(newest, counts, strict=True)]
        self._set_lengths([length - r for length, r in zip(self.lengths, rejected, strict=True)])
        self._newest = []
        self._drafts.num_accepted.copy_(self._on_device(counts))
        self._drafts.rollback.copy_(self._on_device(rejected))

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of sequence i from `lengths[i]` on; for a cache of attention layers only.

        Raises:
            ValueError: a Mamba-2 layer, whose state cannot go back, or a length beyond what is there.
        """
        if any(isinstance(layer, MambaState) for layer in self.layers):
            raise ValueError("truncate is for a cache without Mamba-2 layers, whose states cannot go back")
        if len(lengths) != len(self.lengths) or not all(
            0 <= n <= m for n, m in zip(lengths, self.lengths, strict=True)
        ):
            raise ValueError(f"lengths must be at most those in the cache, {self.lengths}, got {list(lengths)}")
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        added = {new - old for new, old in zip(lengths, self.lengths, strict=True)}
        if len(added) == 1:
            self._positions += added.pop()
        else:
            self._positions.copy_(self._on_device(lengths))
        self.lengths[:] = lengths

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._positions.device)

    def reset(self) -> None:
        """Forget everything: every sequence is at its start again, the memory is kept."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.conv.zero_()
                layer.ssm.zero_()
        if self._drafts is not None:
            self._drafts.num_accepted.fill_(1)
            self._drafts.rollback.zero_()
        self._newest = []
        self._positions.zero_()
        self.lengths[:] = [0] * len(self.lengths)

    def nbytes(self) -> dict[str, int]:
        """Bytes in use: "conv" and "ssm", which do not depend on the length, and "kv", which grows with it."""

        def size(tensors: Sequence[torch.Tensor]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        per_token = size([t[:1, :, :1] for pair in self.kv for t in pair]) if any(self.lengths) else 0
        return {"conv": size(self.conv_states), "ssm": size(self.ssm_states), "kv": per_token * sum(self.lengths)}
