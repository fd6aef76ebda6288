"""Grouped-query causal attention without positional embedding, on torch's `scaled_dot_product_attention`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN makes a plan for every number of keys, and while decoding each step has another one: 60 ms a step
_OF_STEPS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class KVCache:
    """Keys and values of one layer: each (batch, num_kv_heads, capacity, head_dim); row i is sequence i's.

    `past` says how many tokens of each sequence are in it; the model keeps it, together for all layers. `positions` is
    the same on the device, (batch,) int64.

    With `static` the memory never moves, and a step of one token asks the device alone where it stands: it is the same
    step, wherever it is replayed. For that it reads all keys there is room for, and hides those yet to come.
    """

    k: Tensor
    v: Tensor
    past: list[int]
    positions: Tensor
    static: bool = False

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a sequence; what is there is kept."""
        capacity = self.k.shape[2]
        if length > capacity and self.static:
            raise ValueError(f"max_length must be at least {length} for a static cache to go on, got {capacity}")
        if length > capacity:
            more = max(length, 2 * capacity) - capacity
            self.k, self.v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))


class Attention(nn.Module):
    """``o_proj(softmax(q k^T / sqrt(head_dim) + causal mask) v)``, `num_heads // num_kv_heads` queries to a key."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, bounds: Sequence[int] | None = None, cache: KVCache | None = None) -> Tensor:
        """Attend over whole sequences, or over pieces of them that go on from `cache`.

        Args:
            x: (batch, seqlen, hidden), or packed (1, total, hidden) with `bounds`.
            bounds: where each packed sequence starts and the last one ends, nseq + 1 numbers.
            cache: keys and values of the tokens before; those of x are added.

        Returns:
            (batch, seqlen, hidden).
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, seqlen, head_dim)
        if bounds is not None:
            y = self._packed(q, k, v, bounds, cache)
        elif cache is None or not any(cache.past):
            if cache is not None:
                _append(cache, slice(None), 0, k, v)
            y = attend(q, k, v)
        elif x.shape[1] == 1 and (cache.static or len(set(cache.past)) > 1):
            y = self._masked_step(q, k, v, cache)
        elif len(set(cache.past)) == 1:
            y = attend(q, *_append(cache, slice(None), cache.past[0], k, v))
        else:
            rows = [slice(i, i + 1) for i in range(x.shape[0])]
            y = torch.cat(
                [
                    attend(q[row], *_append(cache, row, past, k[row], v[row]))
                    for row, past in zip(rows, cache.past, strict=True)
                ]
            )
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], cache: KVCache | None) -> Tensor:
        """One sequence after the other: they share no keys."""
        pieces = []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            keys, values = k[:, :, start:end], v[:, :, start:end]
            if cache is not None:
                keys, values = _append(cache, slice(i, i + 1), cache.past[i], keys, values)
            pieces.append(attend(q[:, :, start:end], keys, values))
        return torch.cat(pieces, dim=2) if pieces else q

    def _masked_step(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """One token of sequences that have different lengths so far, or lengths that the host does not know."""
        longest = max(cache.past) + 1
        cache.reserve(longest)
        if cache.static:
            longest = cache.k.shape[2]
        rows = torch.arange(len(cache.past), device=q.device)
        cache.k[rows, :, cache.positions] = k[:, :, 0]
        cache.v[rows, :, cache.positions] = v[:, :, 0]
        seen = torch.arange(longest, device=q.device) <= cache.positions[:, None]  # (batch, longest)
        return attend(q, cache.k[:, :, :longest], cache.v[:, :, :longest], seen[:, None, None])


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Causal attention of the last m of n positions: q (batch, heads, m, head_dim), k and v (batch, kv_heads, n, ..).

    `seen`, (batch, 1, 1, n) bool, hides keys from the one query position (m = 1).
    """
    heads, kv_heads, m, n = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if m == 0:
        return q
    if m == 1:  # the queries of a group become rows of one matrix: no copies of the keys, no causal mask
        with sdpa_kernel(_OF_STEPS):
            y = F.scaled_dot_product_attention(q.reshape(-1, kv_heads, heads // kv_heads, q.shape[3]), k, v, seen)
        return y.reshape(q.shape)
    if m == n:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo: seconds that only this path needs

    mask = causal_lower_right(m, n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)


def _append(cache: KVCache, rows: slice, past: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write k and v behind the `past` tokens that `rows` of the cache have; returns all of them."""
    length = past + k.shape[2]
    cache.reserve(length)
    cache.k[rows, :, past:length] = k
    cache.v[rows, :, past:length] = v
    return cache.k[rows, :, :length], cache.v[rows, :, :length]
