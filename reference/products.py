"""Matrix products of the references."""

import numpy as np


def product(a, b):
    """a @ b, b of one or two dimensions. In float32 the terms are added one after the other, each with one rounding.

    What a kernel may be wrong by is measured by float32 arithmetic. A BLAS adds in an order that depends on the
    processor: with AVX-512 OpenBLAS adds small products in 16 parts, more exact than a kernel can be asked to be.
    """
    a, b = np.asarray(a), np.asarray(b)
    if np.result_type(a, b) != np.float32:
        return a @ b
    total = np.zeros((*a.shape[:-1], *b.shape[1:]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(b.shape[0]):  # a product of two float32 is exact in float64
            total = (total + np.multiply.outer(a[..., k].astype(np.float64), b[k])).astype(np.float32)
    return total
