"""The references' matrix products, of which float32 ones are what every kernel's error is measured by."""

import numpy as np
import pytest

from hybrid_ops.reference.products import product


@pytest.mark.parametrize("columns", [None, 5])
def test_terms_are_added_one_after_the_other(columns):
    random = np.random.default_rng(0)
    a = random.standard_normal((3, 4, 70)).astype(np.float32)
    b = random.standard_normal((70,) if columns is None else (70, columns)).astype(np.float32)
    total = np.zeros((3, 4) if columns is None else (3, 4, columns), np.float32)
    for k in range(70):
        terms = a[..., k].astype(np.float64) * b[k] if columns is None else a[..., k, None].astype(np.float64) * b[k]
        total = (total + terms).astype(np.float32)
    np.testing.assert_array_equal(product(a, b), total)
    assert product(a, b).dtype == np.float32
    np.testing.assert_array_equal(product(a.astype(np.float64), b), a.astype(np.float64) @ b)


def test_of_nothing():
    assert product(np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32)).tolist() == [[0, 0, 0]] * 2


def test_infinities_and_nan():
    a, b = np.array([[3e38, 3e38], [np.inf, 1], [np.nan, 0]], np.float32), np.array([[3], [-3]], np.float32)
    np.testing.assert_array_equal(product(a, b), [[np.inf], [np.inf], [np.nan]])
