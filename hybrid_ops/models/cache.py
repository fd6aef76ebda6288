"""`HybridCache`: everything a hybrid model remembers of a batch of sequences between calls."""

from collections.abc import Sequence

import torch

from ..nn import KVCache, MambaState
from .config import NemotronHConfig

_FIRST_CAPACITY = 256  # tokens; doubled when full


class HybridCache:
    """Convolution states, SSM states and keys and values of `batch_size` sequences; row i belongs to sequence i.

    The SSM states are in `config.mamba_ssm_cache_dtype` (float64 in a float64 model), the rest in the model's dtype.
    The Mamba states have a fixed size; the keys and values grow as they are needed.

    Args:
        config: the model's.
        batch_size: number of sequences.
        device, dtype: the model's.
        max_length: tokens a sequence for which keys and values have room at once.

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
    ) -> None:
        factory = dict(device=device, dtype=dtype)
        ssm_dtype = dtype if dtype == torch.float64 else getattr(torch, config.mamba_ssm_cache_dtype)
        kv_shape = (batch_size, config.num_key_value_heads, max_length or _FIRST_CAPACITY, config.head_dim)
        slots = torch.arange(batch_size, dtype=torch.int32, device=device)
        self.lengths = [0] * batch_size  # shared with every KVCache, changed in place
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.layers: list[MambaState | KVCache | None] = []
        for index, letter in enumerate(config.hybrid_override_pattern):
            layer = config.for_layer(index)
            state: MambaState | KVCache | None = None
            if letter == "M":
                # channels next to each other in memory, as the convolution's input has them
                conv = torch.zeros(batch_size, config.conv_kernel - 1, layer.conv_dim, **factory)  # type: ignore[arg-type]
                ssm_shape = (batch_size, config.mamba_num_heads, config.mamba_head_dim, layer.ssm_state_size)
                ssm = torch.zeros(ssm_shape, device=device, dtype=ssm_dtype)
                state = MambaState(conv.transpose(1, 2), ssm, slots)
            elif letter == "*":
                k, v = (torch.zeros(kv_shape, **factory) for _ in range(2))  # type: ignore[arg-type]
                state = KVCache(k, v, self.lengths, self._positions)
            self.layers.append(state)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def ssm_states(self) -> list[torch.Tensor]:
        """The SSM state of each Mamba-2 layer, (batch, nheads, headdim, dstate)."""
        return [layer.ssm for layer in self.layers if isinstance(layer, MambaState)]

    @property
    def conv_states(self) -> list[torch.Tensor]:
        """The convolution state of each Mamba-2 layer, (batch, conv_dim, width - 1), oldest first."""
        return [layer.conv for layer in self.layers if isinstance(layer, MambaState)]

    @property
    def kv(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each attention layer, (batch, kv_heads, longest, head_dim)."""
        longest = max(self.lengths, default=0)
        return [(c.k[:, :, :longest], c.v[:, :, :longest]) for c in self.layers if isinstance(c, KVCache)]

    def advance(self, counts: Sequence[int]) -> None:
        """Note that sequence i has `counts[i]` tokens more; the model calls it after each forward."""
        if len(set(counts)) == 1:
            self._positions += counts[0]
        else:
            self._positions += torch.tensor(counts, dtype=torch.int64, device=self._positions.device)
        self.lengths[:] = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def reset(self) -> None:
        """Forget everything: every sequence is at its start again, the memory is kept."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.conv.zero_()
                layer.ssm.zero_()
        self._positions.zero_()
        self.lengths[:] = [0] * len(self.lengths)

    def nbytes(self) -> dict[str, int]:
        """Bytes in use: "conv" and "ssm", which do not depend on the length, and "kv", which grows with it."""

        def size(tensors: Sequence[torch.Tensor]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        per_token = size([t[:1, :, :1] for pair in self.kv for t in pair]) if any(self.lengths) else 0
        return {"conv": size(self.conv_states), "ssm": size(self.ssm_states), "kv": per_token * sum(self.lengths)}
