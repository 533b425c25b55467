"""Linear CKA against its definition with centered Gram matrices, and what it does not see."""

import numpy as np
import pytest

from portllm.measures.similarity import linear_cka

EXACT = 1e-9


def drawn(inputs, width, seed=0):
    return np.random.default_rng(seed).standard_normal((inputs, width))


def by_definition(x, y):
    """`HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))` with `K = X Xᵀ` (Kornblith et al., 2019, equations 2 and 3)."""
    center = np.eye(len(x)) - 1 / len(x)

    def hsic(k, other):
        return np.trace(k @ center @ other @ center)

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


@pytest.mark.parametrize("shapes", [((9, 4), (9, 6)), ((5, 12), (5, 12)), ((5, 12), (5, 3))])
def test_it_is_the_ratio_of_hsics(shapes):
    x, y = (drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    assert linear_cka(x, y) == pytest.approx(by_definition(x, y), rel=EXACT)


def test_it_does_not_see_rotations_scales_and_shifts():
    x, y = drawn(9, 4), drawn(9, 4, seed=1)
    turn = np.linalg.qr(drawn(4, 4, seed=2)).Q
    assert linear_cka(x, 3.0 * x @ turn + 5.0) == pytest.approx(1.0, abs=EXACT)
    assert linear_cka(x, 3.0 * y @ turn + 5.0) == pytest.approx(linear_cka(x, y), rel=EXACT)


def test_a_shear_is_seen():
    x = drawn(9, 4)
    assert linear_cka(x, x * [1.0, 1.0, 1.0, 9.0]) < 0.99


def test_states_that_are_all_the_same_have_none():
    assert linear_cka(np.ones((5, 3)), drawn(5, 3)) is None
