import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.measures.spectral import spectral_norm


def gram(matrix):
    return lambda x: matrix.T @ (matrix @ x)


def normal(seed, shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), shape=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_it_is_within_its_tolerance_of_a_singular_value_and_never_above_the_largest(seed, shape):
    values = torch.linalg.svdvals(matrix := normal(seed, shape))
    found = spectral_norm(gram(matrix), shape[1])
    assert found.value <= float(values[0]) * (1 + 1e-12)
    assert float((values - found.value).abs().min()) <= found.value * (found.tolerance + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_largest_singular_value(seed):
    matrix = normal(seed, (40, 30 + seed))
    assert spectral_norm(gram(matrix), 30 + seed).value == pytest.approx(
        float(torch.linalg.svdvals(matrix)[0]), rel=1e-3
    )


def test_a_weight_with_close_values_needs_few_products():
    found = spectral_norm(gram(normal(0, (300, 200))), 200)
    assert found.tolerance <= 1e-3
    assert found.products < 40


def test_a_zero_matrix_has_norm_zero():
    found = spectral_norm(gram(torch.zeros(5, 7, dtype=torch.float64)), 7)
    assert (found.value, found.tolerance, found.products) == (0.0, 0.0, 1)


def test_the_start_does_not_matter():
    matrix = normal(1, (40, 30))
    first, second = (spectral_norm(gram(matrix), 30, seed=seed, tolerance=1e-9).value for seed in (0, 1))
    assert first == pytest.approx(second, rel=1e-8)
