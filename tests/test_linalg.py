"""Decompositions against LAPACK in float64 and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.linalg import (
    Svd,
    exact_svd,
    frobenius,
    product_svd,
    randomized_svd,
    rank_floor,
    square_sum,
    svd_above,
    working_dtype,
)

FLOAT32_TOLERANCE = 2e-6
"""A few units of float32's roundoff, relative to the largest singular value."""


def decaying(m, n, *, decay=0.5, seed=0, dtype=torch.float32):
    """A matrix with singular values 1, decay, decay², ..."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return ((u * decay ** torch.arange(k, dtype=torch.float64)) @ v.T).to(dtype)


def noisy(m, n, *, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return signal + noise * torch.randn(m, n, generator=generator)


def rebuilt(found):
    return (found.u * found.s) @ found.vt


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (250, 250)])
def test_a_randomized_decomposition_leaves_out_what_the_exact_one_does(shape):
    matrix = noisy(*shape, rank=10, noise=0.5)
    exact = torch.linalg.svdvals(matrix.double())
    found = randomized_svd(matrix, rank=16)
    best = exact[16:].square().sum().sqrt().item()
    assert frobenius(matrix - rebuilt(found)) <= 1.015 * best
    assert torch.allclose(found.s[:10].double(), exact[:10], rtol=1e-5)


def spectrum(kind, count):
    """Singular values of `count` directions, of the kinds that differences of weights have, and of worse ones."""
    place = torch.arange(count, dtype=torch.float64)
    signal = (place < 16).double()
    return {
        "flat": torch.ones(count, dtype=torch.float64),
        "bulk": 2 - place / count,
        "slow": 0.99**place,
        "fast": 0.8**place,
        "power": 1 / (1 + place),
        "root": (1 + place) ** -0.5,
        "signal": signal + 0.01 * (1 - place / (2 * count)),
        "weak signal": signal + 0.3 * (1 - place / (2 * count)),
        "two steps": signal + 0.5 * (place < 60) + 0.01,
        "graded": signal * 10 ** (-place / 4) + 1e-5,
        "rank-deficient": (place < 40).double(),
    }[kind]


def with_spectrum(m, n, s, *, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, len(s), generator=generator, dtype=torch.float64)).Q for side in (m, n))
    return (u * s) @ v.T


SPECTRA = (
    "flat", "bulk", "slow", "fast", "power", "root", "signal", "weak signal", "two steps", "graded", "rank-deficient",
)  # fmt: skip


@given(
    kind=st.sampled_from(SPECTRA),
    shape=st.sampled_from([(500, 150), (150, 500), (310, 300), (130, 900)]),
    rank=st.sampled_from([1, 7, 16, 32]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_left_out_is_within_a_hundredth_of_the_least_whatever_the_spectrum(kind, shape, rank, seed):
    s = spectrum(kind, min(shape))
    matrix = with_spectrum(*shape, s, seed=seed)
    found = randomized_svd(matrix.float(), rank=rank, seed=seed)
    left_out = (matrix - rebuilt(Svd(*(part.double() for part in found)))).norm().item()
    assert left_out <= 1.01 * s[rank:].norm().item() + FLOAT32_TOLERANCE * s.norm().item()


@given(kind=st.sampled_from(SPECTRA), seed=st.integers(0, 9), place=st.integers(0, 149))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_value_that_is_clearly_above_a_threshold_is_missed_and_none_below_is_kept(kind, seed, place):
    s = spectrum(kind, 150)
    threshold = max(1.005 * s[place].item(), FLOAT32_TOLERANCE)
    found = svd_above(with_spectrum(400, 150, s, seed=seed).float(), threshold=threshold)
    assert (s > 1.01 * threshold).sum() <= len(found.s) <= (s > threshold).sum()


def test_a_spectrum_with_a_gap_takes_three_products(monkeypatch):
    products = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: products.append(matrix.shape) or qr(matrix))
    matrix = noisy(900, 500, rank=16, noise=0.01)
    products.clear()
    randomized_svd(matrix, rank=16)
    assert products == [(900, 32), (500, 32), (900, 32)]


def test_sampled_singular_values_are_never_above_the_true_ones():
    matrix = noisy(300, 200, rank=4, noise=1.0)
    exact = torch.linalg.svdvals(matrix.double())
    found = randomized_svd(matrix, rank=20)
    assert (found.s.double() <= exact[:20] * (1 + FLOAT32_TOLERANCE)).all()


def test_vectors_are_orthonormal():
    found = randomized_svd(decaying(300, 200), rank=12)
    assert torch.allclose(found.u.T @ found.u, torch.eye(12), atol=1e-5)
    assert torch.allclose(found.vt @ found.vt.T, torch.eye(12), atol=1e-5)


def test_the_largest_entry_of_every_left_vector_is_positive():
    for found in (randomized_svd(noisy(300, 200, rank=5, noise=0.1), rank=8), exact_svd(decaying(5, 7))):
        peaks = found.u.gather(0, found.u.abs().argmax(dim=0, keepdim=True))
        assert (peaks > 0).all()


def test_the_signs_do_not_depend_on_the_way():
    matrix = decaying(300, 200)
    randomized, exact = randomized_svd(matrix, rank=5), exact_svd(matrix).cut(5)
    assert torch.allclose(randomized.u, exact.u, atol=1e-4)
    assert torch.allclose(randomized.vt, exact.vt, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    matrix = noisy(300, 200, rank=5, noise=1.0)
    first, second, other = (randomized_svd(matrix, rank=8, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    assert not torch.equal(first.u, other.u)


def test_a_rank_beyond_the_matrix_gives_all_there_is():
    assert randomized_svd(torch.ones(3, 2), rank=9).s.shape == (2,)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        randomized_svd(torch.ones(3, 2), rank=0)


def test_sixteen_bits_are_computed_in_float32_and_float64_stays():
    assert exact_svd(torch.ones(3, 2, dtype=torch.bfloat16)).s.dtype == torch.float32
    assert exact_svd(torch.ones(3, 2, dtype=torch.float64)).s.dtype == torch.float64
    assert working_dtype(torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)) == torch.float64


def test_the_rank_grows_until_the_threshold():
    matrix = decaying(300, 240, decay=0.97)  # 100 values above 0.97 ** 99.5: more than two doublings
    assert len(svd_above(matrix, threshold=0.97**99.5).s) == 100


def test_the_rank_is_bounded():
    assert len(svd_above(decaying(300, 240, decay=0.97), threshold=0.0, max_rank=7).s) == 7


def test_a_threshold_above_all_keeps_nothing():
    assert len(svd_above(decaying(30, 20), threshold=2.0).s) == 0


@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_decomposition_of_a_product_is_that_of_its_dense_form(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    found = product_svd(torch.from_numpy(b), torch.from_numpy(a))
    k = min(m, n, rank)
    assert np.allclose(found.s.numpy()[:k], scipy.linalg.svdvals(b @ a)[:k], atol=1e-10)
    assert np.allclose(rebuilt(found).numpy(), b @ a, atol=1e-10)


def test_the_floor_is_that_of_numpy():
    s = torch.tensor([3.0, 1e-9])
    assert rank_floor(s, shape=(40, 20)) == pytest.approx(3.0 * 40 * np.finfo(np.float32).eps)
    assert rank_floor(torch.zeros(0), shape=(40, 20)) == 0.0


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_norms_are_those_of_float64(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = values.double().square().sum().item()
    assert square_sum(values) == pytest.approx(expected, rel=1e-6)
    assert frobenius(values) == pytest.approx(expected**0.5, rel=1e-6)
