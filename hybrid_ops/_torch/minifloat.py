"""Codes of E2M1, E4M3 and E5M2 in plain torch, and arithmetic that rounds as written on every device.

torch divides by a Python number by multiplying with its reciprocal (on a GPU), and a Python number by a tensor always
so: both round twice. A constant is therefore a tensor here wherever it takes part in a division.
"""

import torch
from torch import Tensor

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FLOAT_MAX = torch.finfo(torch.float32).max


def constant(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)


def encode_fp8(v: Tensor, target: str) -> Tensor:
    """float32 to codes of 8 bits, uint8: nearest even, saturating; every NaN becomes the positive one."""
    codes = v.clamp(-LARGEST[target], LARGEST[target]).to(FP8[target]).view(torch.uint8)
    return codes.where(~v.isnan(), 0x7F)


def decode_e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def encode_e2m1(v: Tensor, bits: Tensor | None = None) -> Tensor:
    """float32 to codes of 4 bits, int32: nearest even, or with 16 random bits each; saturating, NaN becomes 6.

    The sign bit says v < 0, so what rounds to zero from below has it, and -0 has not.
    """
    magnitude = v.abs().clamp(max=6.0)
    if bits is None:
        code = torch.zeros_like(v, dtype=torch.int32)
        for tie, even_is_below in ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False)):
            code += magnitude > tie if even_is_below else magnitude >= tie
        code += magnitude > 5.0
    else:
        # codes with 16 bits behind the point: steps of 1/2 below 1, the float's own bits above
        small = (magnitude.nan_to_num() * 2.0**17).int()
        large = (magnitude.view(torch.int32) - 0x3F000000) >> 6
        code = ((torch.where(magnitude < 1, small, large) + bits) >> 16).clamp(max=7).int()
    return code.where(~v.isnan(), 7) + 8 * (v < 0)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes of 4 bits to float32."""
    half, one = codes & 1, codes >> 1 & 3  # mantissa and exponent field
    magnitude = torch.where(one == 0, half * 0.5, (2 + half) * torch.exp2(one - 2.0))
    return torch.where(codes < 8, magnitude, -magnitude)
