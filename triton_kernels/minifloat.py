"""E2M1, E4M3, E5M2 and bfloat16 by integer arithmetic: the same bits on every GPU and in Triton's interpreter.

A format is named by a constant string. Its codes are int32; a code's magnitude bits are in the order of the values.
"""

import triton
import triton.language as tl

FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of float32's; those of NaN are above


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """The bits of max |x| along an axis, int32, in the order of the values; NaN left out, 0 where all are.

    In integers: 0x7FFFFF more than the bits of infinity is the largest int32, so every NaN turns negative.
    """
    bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + 0x7FFFFF
    return tl.maximum(tl.max(bits, axis=axis), 0x7FFFFF) - 0x7FFFFF


@triton.jit
def encode(v, target: tl.constexpr):
    """Codes of float32 v: nearest even, saturating. NaN is 0x7F, positive; in E2M1, which has none, 6.

    The step of the grid at |v| is the last bit of a float32 some exponents larger: adding that rounds |v| to a multiple
    of the step, and the sum's last bits count the steps.
    """
    mantissa: tl.constexpr = 1 if target == "e2m1" else (3 if target == "e4m3" else 2)
    normal: tl.constexpr = 127 if target == "e2m1" else (121 if target == "e4m3" else 113)  # exponent of the smallest
    largest: tl.constexpr = 0x40C00000 if target == "e2m1" else (0x43E00000 if target == "e4m3" else 0x47600000)
    bits = v.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, largest)
    exponent = tl.maximum(magnitude & 0x7F800000, normal << 23)
    offset = exponent + ((23 - mantissa) << 23)
    rounded = magnitude.to(tl.float32, bitcast=True) + offset.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - offset
    code = steps + (exponent >> (23 - mantissa)) - (normal << mantissa)
    if target == "e2m1":
        return code | tl.where(v < 0.0, 8, 0)
    return tl.where((bits & 0x7FFFFFFF) > INFINITY, 0x7F, code | ((bits >> 24) & 0x80))


@triton.jit
def encode_e2m1_stochastic(v, bits):
    """Codes of E2M1: |v| goes to floor(|v| + bits * 2^-16 * step) on the grid, saturating; NaN becomes 6.

    In integers with 16 bits behind the point: steps of 1/2 below 1, the float's own bits above.
    """
    magnitude = tl.minimum(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x40C00000)
    small = (tl.minimum(magnitude.to(tl.float32, bitcast=True), 1.0) * 131072.0).to(tl.int32)
    large = (magnitude - 0x3F000000) >> 6
    fixed = tl.where(magnitude < 0x3F800000, small, large)
    return tl.minimum((fixed + bits.to(tl.int32)) >> 16, 7) | tl.where(v < 0.0, 8, 0)


@triton.jit
def decode(code, target: tl.constexpr):
    """float32 of int32 codes. The two formats of 8 bits are read as float16, whose exponent is as wide or wider."""
    if target == "e2m1":
        magnitude = code & 7
        half = tl.where(magnitude == 1, 0x3F000000, 0)
        bits = tl.where(magnitude < 2, half, (magnitude << 22) + (126 << 23))
        return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)  # -v would be 0 - v, which knows no -0
    if target == "e5m2":
        return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(code):
    """float32 of int32 codes: 2^(code - 127), of which the smallest is subnormal; 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(v):
    """A float16, bfloat16 or float32 value as float32; the interpreter does not know bfloat16's subnormal numbers."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def cast(v, dtype: tl.constexpr):
    """float32 to a wider type than these, nearest even; bfloat16 by integers, for the interpreter truncates there."""
    if dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > INFINITY, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)
