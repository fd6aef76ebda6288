"""The SSD recurrence for new tokens in plain torch; float32 arithmetic (float64 for float64 inputs).

Everything that does not depend on the state is computed for all tokens at once; only the recurrence itself is a loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import compute_dtype


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    update_state: bool,
    null_slot: int,
) -> None:
    """Fill y, store states. Tokens are (batch, T, ..), or (total, ..) with cu_seqlens; rounding by `seed`, if any."""
    dtype, device = compute_dtype(x), x.device
    nslots, nheads = state.shape[:2]
    if cu_seqlens is None:
        batch, steps = x.shape[:2]
        begin = torch.arange(batch, device=device) * steps
        lengths = torch.full((batch,), steps, device=device)
        x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))
        z = None if z is None else z.flatten(0, 1)
    else:
        bounds = cu_seqlens.long().clamp(0, len(x))
        begin, lengths = bounds[:-1], (bounds[1:] - bounds[:-1]).clamp(min=0)
        batch = len(lengths)
        steps = int(lengths.max()) if batch else 0
    if nslots == 0 or batch == 0:
        y.zero_()
        return

    slot = torch.arange(batch, device=device) if read_slots is None else _chosen(read_slots, num_accepted)
    kept = slot >= 0 if read_slots is None else _usable(slot, nslots, null_slot)
    S = state[slot.where(kept, 0)].to(dtype)  # [batch, H, P, N], a copy

    per_head = nheads // B.shape[-2]
    xs, steps_of_dt = x.to(dtype), _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_min, dt_max)
    decay = torch.exp(steps_of_dt * A.to(dtype))  # [tokens, H]
    inputs = steps_of_dt[..., None] * xs  # [tokens, H, P]
    B, C = (t.to(dtype).repeat_interleave(per_head, dim=-2) for t in (B, C))  # [tokens, H, N]
    result = torch.zeros_like(xs)
    if D is not None:
        result = xs * (D.to(dtype)[:, None] if D.dim() == 1 else D.to(dtype))
    gate = None if z is None else F.silu(z.to(dtype))
    covered = torch.zeros(len(xs), dtype=torch.bool, device=device)

    for t in range(steps):
        active = kept & (t < lengths)
        row = (begin + t).where(active, 0)
        after = S * decay[row][..., None, None]
        after.addcmul_(inputs[row][..., None], B[row][..., None, :])
        S = after.where(active[:, None, None, None], S)
        rows = row[active]
        result[rows] += (S[active] @ C[rows][..., None])[..., 0]
        covered[rows] = True
        if update_state and write_slots is not None and write_slots.dim() == 2 and t < write_slots.shape[1]:
            place = write_slots[:, t].long()
            _store(state, S, place, active & _usable(place, nslots, null_slot), seed, torch.full_like(place, t))
    if update_state and (write_slots is None or write_slots.dim() == 1):
        place = slot if write_slots is None else write_slots.long()
        wanted = kept if write_slots is None else kept & _usable(place, nslots, null_slot)
        _store(state, S, place, wanted, seed, (lengths - 1).clamp(min=0))
    if gate is not None:
        result = result * gate
    y.copy_(result.where(covered[:, None, None], 0.0).view(y.shape))


def _chosen(read_slots: Tensor, num_accepted: Tensor | None) -> Tensor:
    """The slot that each sequence starts from; -1 where num_accepted points outside the table."""
    if num_accepted is None:
        return read_slots.long()
    column = num_accepted.long() - 1
    inside = (column >= 0) & (column < read_slots.shape[1])
    if read_slots.shape[1] == 0:
        return torch.full_like(column, -1)
    return read_slots.long().gather(1, column.where(inside, 0)[:, None])[:, 0].where(inside, -1)


def _usable(slot: Tensor, nslots: int, null_slot: int) -> Tensor:
    return (slot >= 0) & (slot < nslots) & (slot != null_slot)


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:  # log1p(exp(dt)), of an exponential that cannot overflow
        dt = dt.clamp(min=0) + torch.log1p(torch.exp(-dt.abs()))
    return dt.clamp(dt_min, dt_max)


def _store(state: Tensor, S: Tensor, place: Tensor, wanted: Tensor, seed: Tensor | None, t: Tensor) -> None:
    """state[place[b]] = S[b] for every wanted b, rounded to nearest, or with the bits of token t[b]."""
    place, S = place[wanted], S[wanted]
    if seed is not None:
        elements = state[0].numel()
        index = place[:, None] * elements + torch.arange(elements, device=S.device)
        bits = random_bits(seed, index, t[wanted][:, None])
        S = round_stochastic(S.float(), bits.view(S.shape), state.dtype)
    state[place] = S.to(state.dtype)


def round_stochastic(v: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 v to float16 or bfloat16: |v| goes to floor(|v| + bits * 2^-16 * step) on the grid, saturating.

    In integers: `fixed` is the target's bit pattern of |v| with 16 more bits behind the point, so the sum's carry
    rounds, over a change of exponent too. NaN stays NaN, and zero keeps its sign.
    """
    pattern = v.contiguous().view(torch.int32).long()
    magnitude = pattern & 0x7FFFFFFF
    if dtype == torch.float16:
        # below 2^-14 the grid is even, steps of 2^-24: |v| 2^40 has 16 bits behind the point
        subnormal = (v.abs().nan_to_num(0.0).clamp(max=2.0**-14) * 2.0**40).long()
        normal = (magnitude.clamp(max=0x477FE000) - 0x38000000) << 3  # 65504 at most; other exponent bias
        fixed, largest, nan = torch.where(magnitude < 0x38800000, subnormal, normal), 0x7BFF, 0x7E00
    else:
        fixed, largest, nan = magnitude, 0x7F7F, 0x7FC0
    rounded = ((fixed + bits) >> 16).clamp(max=largest)
    rounded = rounded.where(magnitude <= 0x7F800000, nan)
    return torch.where(pattern < 0, rounded - 0x8000, rounded).to(torch.int16).view(dtype)


def random_bits(seed: Tensor, index: Tensor, t: Tensor) -> Tensor:
    """16 bits each for the elements `index` (batch, 8 m), row-major in the whole pool, after token t (batch, 1).

    key = low and high word of seed; counter = (index // 8 low, index // 8 high, t, 0). Rows begin at multiples of 8, so
    8 neighbours share a block of four words: low half, high half, next word.
    """
    block = index[:, ::8] // 8
    words = torch.stack(philox4x32_10(seed, (block & 0xFFFFFFFF, block >> 32, t.expand_as(block), block * 0)), dim=-1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)


def philox4x32_10(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Salmon et al. 2011. Words are int64 below 2^32: products wrap at 2^64, which their two halves do not see."""
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, seed >> 32 & mask
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & mask) ^ c1 ^ k0, p1 & mask, (p0 >> 32 & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
