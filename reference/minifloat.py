"""Numbers of 4 and 8 bits: E2M1 (OCP Microscaling Formats v1.0), E4M3 and E5M2 (Micikevicius et al., 2022).

A code is a sign bit in front of a magnitude; magnitudes are in the order of their values, so code 0 is zero and the
last finite code the largest value. Rounding saturates there, infinity too, and NaN has one code.
"""

from typing import NamedTuple

import numpy as np

from .ssd_update import round_stochastic


class Format(NamedTuple):
    min_exponent: int  # of the smallest normal number
    mantissa: int  # bits
    largest: float
    sign: int  # its bit in a code
    nan: int  # the code of NaN; E2M1 has none, and takes the largest


FORMATS = {
    "e2m1": Format(0, 1, 6.0, 0x8, 0x7),
    "e4m3": Format(-6, 3, 448.0, 0x80, 0x7F),
    "e5m2": Format(-14, 2, 57344.0, 0x80, 0x7F),
}


def magnitudes(target):
    """The values of the codes from 0 to the largest finite one, float64."""
    form = FORMATS[target]
    code = np.arange(form.sign)
    field, fraction = code >> form.mantissa, code & (1 << form.mantissa) - 1
    significand = fraction + np.where(field > 0, 1 << form.mantissa, 0)
    values = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - 1 + form.min_exponent - form.mantissa)
    return values[values <= form.largest]


def round_nearest(v, target):
    """Float32 v to the nearest value of the grid, ties to the even mantissa, saturating; NaN stays. Returns float64."""
    form = FORMATS[target]
    with np.errstate(invalid="ignore"):
        magnitude = np.minimum(np.abs(np.asarray(v, np.float64)), form.largest)
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, form.min_exponent)
        step = np.ldexp(1.0, exponent - form.mantissa)
        return np.copysign(np.rint(magnitude / step) * step, v)


def encode(v, target, bits=None):
    """The codes, uint8, of float32 v: rounded to nearest even, or with 16 random bits each.

    -0 keeps its sign in 8 bits. In E2M1 the sign bit says v < 0: what rounds to zero from below has it, -0 has not.
    """
    v, form = np.asarray(v, np.float32), FORMATS[target]
    rounded = np.abs(round_nearest(v, target) if bits is None else round_stochastic(v, bits, target))
    code = np.searchsorted(magnitudes(target), np.nan_to_num(rounded))
    negative = v < 0 if target == "e2m1" else np.signbit(v)
    return np.where(np.isnan(v), form.nan, code | np.where(negative, form.sign, 0)).astype(np.uint8)


def decode(code, target):
    """The values, float32, of codes; E5M2's infinity and every code of NaN included."""
    form, code = FORMATS[target], np.asarray(code)
    finite, magnitude = magnitudes(target), code & form.sign - 1
    value = finite[np.minimum(magnitude, len(finite) - 1)]
    if target != "e2m1":
        value = np.where(magnitude < len(finite), value, np.nan)
    if target == "e5m2":
        value = np.where(magnitude == len(finite), np.inf, value)
    return np.where(code & form.sign, -value, value).astype(np.float32)
