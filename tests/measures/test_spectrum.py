"""Singular values of a product of factors, against the decomposition of the product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.measures.spectrum import FACTOR_FLOOR, product_values


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_values_of_a_product_are_those_of_its_decomposition(rank, height, width, seed):
    rng = np.random.default_rng(seed)
    b, a = rng.normal(size=(height, rank)), rng.normal(size=(rank, width)) * rng.gamma(0.1, size=(rank, 1))
    found, expected = product_values(b, a), np.linalg.svd(b @ a, compute_uv=False)
    expected = np.pad(expected, (0, max(0, rank - len(expected))))[:rank]
    assert found == pytest.approx(expected, abs=2 * FACTOR_FLOOR * max(expected))
    assert np.square(found).sum() == pytest.approx(np.square(b @ a).sum())


def test_a_value_a_thousand_times_smaller_than_another_keeps_its_digits():
    # Longer than a block of columns; the squares of the values lie a million apart.
    rng = np.random.default_rng(0)
    columns, rows = np.linalg.qr(rng.normal(size=(1500, 2)))[0], np.linalg.qr(rng.normal(size=(1200, 2)))[0]
    b, a = (columns * [1.0, 1e-3]).astype(np.float32), rows.T.astype(np.float32)
    assert product_values(b, a) == pytest.approx([1.0, 1e-3], rel=1e-5)


def test_directions_that_repeat_each_other_leave_a_value_of_zero():
    b = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], np.float32)
    assert product_values(b, np.eye(2, 5, dtype=np.float32)).tolist() == [pytest.approx(10**0.5), 0.0]


def test_the_values_of_what_is_no_number_are_no_numbers():
    assert np.isnan(product_values(np.array([[np.inf]]), np.array([[1.0]]))).all()
    assert product_values(np.zeros((3, 2)), np.ones((2, 4))).tolist() == [0.0, 0.0]
