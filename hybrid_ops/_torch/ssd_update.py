"""The SSD recurrence for new tokens in plain torch; float32 arithmetic (float64 for float64 inputs).

Everything that does not depend on the state is computed for all tokens at once; only the recurrence itself is a loop.
"""

import torch
from torch import Tensor

from .minifloat import constant, encode_fp8
from .norm import compute_dtype
from .quant_fp8 import multiplier

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


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
    state_scale: Tensor | None,
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
    slot = torch.arange(len(begin), device=device) if read_slots is None else _chosen(read_slots, num_accepted)
    kept = _which(_usable(slot, nslots, None if read_slots is None else null_slot))  # the others are padding
    slot, begin, lengths = slot[kept], begin[kept], lengths[kept]
    write = None if write_slots is None else write_slots[kept].long()
    each = write if write is not None and write.dim() == 2 else None
    if len(slot) == 0:
        y.zero_()
        return
    shortest, longest = int(lengths.min()), int(lengths.max())

    steps_of_dt, xs = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_min, dt_max), x.to(dtype)
    decay = torch.exp(steps_of_dt * A.to(dtype))[..., None, None]  # [tokens, H, 1, 1]
    inputs = (steps_of_dt[..., None] * xs)[..., None]  # [tokens, H, P, 1]
    B, C = (t.to(dtype).repeat_interleave(nheads // t.shape[-2], dim=-2) for t in (B, C))  # [tokens, H, N]
    result = torch.zeros_like(xs)
    covered = torch.zeros(len(xs), dtype=torch.bool, device=device)
    S = _read(state, state_scale, slot, dtype)  # [batch, H, P, N], a copy
    for t in range(longest):
        active = slice(None) if t < shortest else (t < lengths).nonzero()[:, 0]
        rows = begin[active] + t
        part = S[active]
        part.mul_(decay[rows]).addcmul_(inputs[rows], B[rows][..., None, :])
        if t >= shortest:
            S[active] = part
        result[rows] = (part * C[rows][..., None, :]).sum(3)
        covered[rows] = True
        if update_state and each is not None and t < each.shape[1]:
            place = each[active, t]
            wanted = _which(_usable(place, nslots, null_slot))
            _store(state, state_scale, part[wanted], place[wanted], seed, torch.full_like(place[wanted], t))
    if update_state and each is None:
        place = slot if write is None else write
        wanted = _which(_usable(place, nslots, None if write is None else null_slot))
        _store(state, state_scale, S[wanted], place[wanted], seed, (lengths[wanted] - 1).clamp(min=0))

    if D is not None:
        result.addcmul_(D.to(dtype)[:, None] if D.dim() == 1 else D.to(dtype), xs)
    if z is not None:
        # not F.silu, whose last bit depends on whether an element was in a vector: on strides and the number of tokens
        z = z.to(dtype)
        result.mul_(z / (1 + torch.exp(-z)))
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


def _usable(slot: Tensor, nslots: int, null_slot: int | None) -> Tensor:
    inside = (slot >= 0) & (slot < nslots)
    return inside if null_slot is None else inside & (slot != null_slot)


def _which(mask: Tensor) -> Tensor | slice:
    """An index of the true ones, that copies nothing where all are."""
    return slice(None) if bool(mask.all()) else mask.nonzero()[:, 0]


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:  # log1p(exp(dt)), of an exponential that cannot overflow
        dt = dt.clamp(min=0) + torch.log1p(torch.exp(-dt.abs()))
    return dt.clamp(dt_min, dt_max)


def _read(state: Tensor, state_scale: Tensor | None, slot: Tensor, dtype: torch.dtype) -> Tensor:
    if state_scale is None:
        return state[slot].to(dtype)
    codes = state.view(torch.uint8)[slot].view(state.dtype)  # torch indexes no tensors of 8-bit floats
    return (codes.float() * state_scale[slot][..., None]).to(dtype)


def _store(state: Tensor, state_scale: Tensor | None, S: Tensor, place: Tensor, seed: Tensor | None, t: Tensor) -> None:
    """state[place[b]] = S[b], rounded to nearest, or with the bits of token t[b]; 8-bit states with their scales."""
    if state_scale is not None:
        codes, state_scale[place] = quantize_rows(S.float(), state.dtype)
        state.view(torch.uint8)[place] = codes
        return
    if seed is not None:
        elements = state[0].numel()
        index = place[:, None] * elements + torch.arange(elements, device=S.device)
        S = round_stochastic(S.float(), random_bits(seed, index, t[:, None]).view(S.shape), state.dtype)
    state[place] = S.to(state.dtype)


def quantize_rows(S: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, as uint8, and scale) of the rows of S; a NaN makes the scale of its row NaN where int8 has none."""
    s = multiplier(S.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1), LARGEST[dtype])
    v, scale = S * s[..., None], torch.div(constant(1.0, s), s)
    if dtype == torch.float8_e4m3fn:
        return encode_fp8(v, "e4m3"), scale
    codes = v.nan_to_num(nan=0.0).clamp(-127, 127).round().to(torch.int8)
    return codes.view(torch.uint8), scale.where(~S.isnan().any(-1), torch.nan)


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
