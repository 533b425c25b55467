"""Shares of the drift in a patch's spaces, against projections by SVD; sizes of products, against the product."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.measures import overlap
from portllm.measures.overlap import (
    BLOCK,
    Alignment,
    DriftShare,
    align,
    gram,
    product_squares,
    products,
    shares_inside,
    square,
)

FLOAT32 = 1e-5
"""What the module says of its products."""


def by_svd(drift, spanning):
    """The share by an orthonormal basis."""
    _, s, vt = np.linalg.svd(spanning, full_matrices=False)
    basis = vt[s > 1e-6 * s[0]]
    return np.square(drift @ basis.T).sum() / np.square(drift).sum(), len(basis) / drift.shape[1]


def share_inside(drift, spanning):
    """Of one drift in one space."""
    inner, total, width = products(spanning, drift)[None], square(drift), drift.shape[1]
    return shares_inside(inner, gram(spanning)[None], totals=[total], width=width)[0]


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


@pytest.mark.parametrize("beside", [0.0, np.nan, np.inf, 1e30])
def test_a_space_that_cannot_be_measured_changes_no_other(beside):
    rng = np.random.default_rng(4)
    spanning, drift = rng.normal(size=(3, 9)).astype(np.float32), rng.normal(size=(2, 9)).astype(np.float32)
    spaces, drifts = np.stack([spanning, np.full_like(spanning, beside)]), np.stack([drift, drift])
    with np.errstate(all="ignore"):
        found = shares_inside(products(spaces, drifts), gram(spaces), totals=[square(drift)] * 2, width=9)
    assert found[0].share == pytest.approx(share_inside(drift, spanning).share)
    assert (found[0].by_chance, found[1].chance) == (pytest.approx(3 / 9), 0.0)
    assert math.isfinite(found[1].inside) is (beside == 0.0)


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
    assert DriftShare(2.0, 2.0, 10.0).excess == 0.0
    assert DriftShare(10.0, 2.0, 10.0).excess == 1.0
    assert DriftShare(10.0, 10.0, 10.0).excess is None


def test_shares_of_parts_weigh_by_the_drift():
    assert (DriftShare(1.0, 0.1, 2.0) + DriftShare(0.0, 0.1, 8.0)).share == pytest.approx(0.1)


@pytest.fixture(params=["loops", "numpy"])
def either_way(request, monkeypatch):
    """Products by the loops in C, and without them."""
    if request.param == "numpy":
        monkeypatch.setattr(overlap, "kernels", None)
    elif overlap.kernels is None:
        pytest.skip("the loops were not built here")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)])
def test_products_are_the_same_however_the_matrices_are_stored(turned):
    rng = np.random.default_rng(5)
    stacks = [rng.normal(size=(2, height, 70)).astype(np.float32) for height in (3, 5)]
    exact = stacks[0].astype(np.float64) @ stacks[1].astype(np.float64).swapaxes(1, 2)
    for number in turned:
        stacks[number] = np.ascontiguousarray(stacks[number].swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(products(*stacks), exact, atol=1e-4)
    some = [stack[:, :, ::3] for stack in stacks]  # neither rows nor columns lie side by side
    np.testing.assert_allclose(products(*some), products(*(np.ascontiguousarray(part) for part in some)), atol=1e-5)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shapes", [((3, 8), (0, 8)), ((2, 0, 8), (2, 3, 8)), ((0, 2, 8), (0, 3, 8))])
def test_no_rows_have_no_products(shapes):
    one, other = (np.zeros(shape, np.float32) for shape in shapes)
    assert products(one, other).shape == (*one.shape[:-1], other.shape[-2])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_products_are_those_of_float64_whatever_the_width(width):
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(4, 3, width)).astype(np.float32), rng.normal(size=(4, 5, width)).astype(np.float32)
    exact = np.einsum("nrd,nkd->nrk", one, other, dtype=np.float64)
    lengths = np.linalg.norm(one, axis=2)[:, :, None] * np.linalg.norm(other, axis=2)[:, None]
    assert np.abs(products(one, other) - exact).max() <= FLOAT32 * lengths.max()
    assert np.array_equal(products(one, other)[1], products(one[1], other[1]))


def test_the_size_of_a_product_is_that_of_the_product():
    rng = np.random.default_rng(2)
    b, a = rng.normal(size=(2, 17, 4)).astype(np.float32), rng.normal(size=(2, 4, 9)).astype(np.float32)
    exact = np.square(b.astype(float) @ a.astype(float)).sum(axis=(1, 2))
    assert product_squares(gram(b.swapaxes(1, 2)), gram(a)) == pytest.approx(exact, rel=FLOAT32)


def test_alignment_is_the_cosine():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    exact = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    assert (align(one[:2], other[:2]) + align(one[2:], other[2:])).cosine == pytest.approx(exact)
