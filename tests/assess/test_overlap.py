"""Shares of the drift in a patch's spaces, against projections by SVD; sizes of products, against the product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.assess.overlap import Alignment, Share, align, product_square, share_inside


def by_svd(drift, spanning):
    """The share by an orthonormal basis."""
    _, s, vt = np.linalg.svd(spanning, full_matrices=False)
    basis = vt[s > 1e-6 * s[0]]
    return np.square(drift @ basis.T).sum() / np.square(drift).sum(), len(basis) / drift.shape[1]


@given(st.integers(1, 5), st.integers(6, 20), st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_share_is_that_of_an_orthogonal_projection(rank, width, rows, seed):
    rng = np.random.default_rng(seed)
    drift, spanning = rng.normal(size=(rows, width)), rng.normal(size=(rank, width)) * rng.gamma(1, size=(rank, 1))
    found = share_inside(drift, spanning)
    assert (found.share, found.by_chance) == pytest.approx(by_svd(drift, spanning), rel=1e-8)


def test_rows_that_repeat_each_other_count_once():
    rng = np.random.default_rng(0)
    drift, one = rng.normal(size=(4, 9)).astype(np.float32), rng.normal(size=(1, 9)).astype(np.float32)
    twice = share_inside(drift, np.concatenate([one, -3 * one, 0 * one]))
    assert twice.by_chance == pytest.approx(1 / 9)
    assert twice.share == pytest.approx(share_inside(drift, one).share)


def test_drift_made_of_the_rows_lies_inside_wholly():
    rng = np.random.default_rng(1)
    spanning = rng.normal(size=(3, 11))
    assert share_inside(rng.normal(size=(5, 3)) @ spanning, spanning).share == pytest.approx(1.0)


def test_a_factor_of_zero_spans_nothing():
    found = share_inside(np.ones((2, 5)), np.zeros((3, 5)))
    assert (found.share, found.by_chance) == (0.0, 0.0)


def test_what_did_not_drift_has_no_share():
    assert share_inside(np.zeros((2, 5)), np.ones((1, 5))).share is None
    assert Alignment().cosine is None


def test_the_excess_is_zero_by_chance_and_one_where_all_lies_inside():
    assert Share(2.0, 2.0, 10.0).excess == 0.0
    assert Share(10.0, 2.0, 10.0).excess == 1.0
    assert Share(10.0, 10.0, 10.0).excess is None


def test_shares_of_parts_weigh_by_the_drift():
    assert (Share(1.0, 0.1, 2.0) + Share(0.0, 0.1, 8.0)).share == pytest.approx(0.1)


def test_the_size_of_a_product_is_that_of_the_product():
    rng = np.random.default_rng(2)
    b, a = rng.normal(size=(17, 4)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)
    assert product_square(b, a) == pytest.approx(np.square(b.astype(float) @ a.astype(float)).sum(), rel=1e-12)


def test_alignment_is_the_cosine():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    exact = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    assert (align(one[:2], other[:2]) + align(one[2:], other[2:])).cosine == pytest.approx(exact)
