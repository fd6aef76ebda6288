"""Inputs of the golden bytes, from raw bits of PCG64: the same with every version of NumPy."""

import numpy as np


def values(seed, shape, exponents, *, block, spread, ties, bfloat16, zero_blocks=True):
    """float32 of `shape`, finite: blocks of very different size, among them zeros; many ties.

    `exponents` belong to the matrices in turn; of the `block` elements along the last dimension they lie within
    `spread` of each other. A quarter has only the mantissa bits `ties`, the indices `bfloat16` of the first dimension
    only those of bfloat16. An exponent that is too small makes a subnormal number.
    """
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))).reshape(shape)

    def field(shift, bits):
        return (raw >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.int64)

    def of_block(bits):
        return bits[..., ::block].repeat(block, -1)[..., : shape[-1]]

    matrices = np.resize(exponents, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    exponent = np.maximum(127 + matrices - of_block(field(0, 4)) - field(4, 6) % spread, 0)
    mantissa = field(10, 23)
    mantissa[field(33, 2) == 0] &= ties
    mantissa[bfloat16] &= 0x7F0000
    bits = field(35, 1) << 31 | exponent << 23 | mantissa
    bits[(field(36, 5) == 0) | (zero_blocks & (of_block(field(41, 6)) == 0))] = 0
    return bits.astype(np.uint32).view(np.float32)
