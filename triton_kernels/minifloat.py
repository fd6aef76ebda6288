"""E2M1, E4M3, E5M2 and bfloat16 by integer arithmetic: the same bits on every GPU and in Triton's interpreter.

A format is named by a constant string. Its codes are int32; a code's magnitude bits are in the order of the values.
"""

import triton
import triton.language as tl

FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of float32's; those of NaN are above


@triton.jit
def magnitude_bits(v):
    """The bits of |v|, int32, in the order of the values; 0 for NaN, which no maximum is to see."""
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits > INFINITY, 0, bits)


@triton.jit
def encode(v, target: tl.constexpr):
    """Codes of float32 v: nearest even, saturating. NaN is 0x7F, positive; in E2M1, which has none, 6."""
    mantissa: tl.constexpr = 1 if target == "e2m1" else (3 if target == "e4m3" else 2)
    bias: tl.constexpr = 1 if target == "e2m1" else (7 if target == "e4m3" else 15)
    largest: tl.constexpr = 0x40C00000 if target == "e2m1" else (0x43E00000 if target == "e4m3" else 0x47600000)
    shift: tl.constexpr = 23 - mantissa
    # a float32 of this exponent has the format's smallest step as its last bit: adding it rounds subnormal numbers
    magic: tl.constexpr = (151 - bias - mantissa) << 23
    bits = v.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, largest)
    normal = (magnitude + ((magnitude >> shift) & 1) + ((1 << (shift - 1)) - 1)) >> shift
    normal -= (127 - bias) << mantissa
    offset = tl.full([], magic, tl.int32).to(tl.float32, bitcast=True)
    small = (magnitude.to(tl.float32, bitcast=True) + offset).to(tl.int32, bitcast=True) - magic
    code = tl.where(magnitude < ((128 - bias) << 23), small, normal)
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
