"""Fidelity against the dense products that it stands for, and the laws that it must keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.measures.fidelity import measure_fidelity

EXACT = 1e-9
"""Float64 sums of a few hundred products, with the root of an eigenvalue between."""


def drawn(seed, *, tokens=7, rank=3, d_in=12, d_out=20):
    generator = np.random.default_rng(seed)
    shapes = ((tokens, d_in), (tokens, d_in), (rank, d_in), (d_out, rank))
    return [generator.standard_normal(shape) for shape in shapes]


def measure(x, moved, a, b, scale=1.5):
    return measure_fidelity(x @ a.T, moved @ a.T, scale**2 * (b.T @ b))


@given(st.integers(0, 2**32 - 1))
def test_it_is_that_of_the_dense_delta_on_whole_activations(seed):
    x, moved, a, b = drawn(seed)
    delta = 1.5 * b @ a
    old, new, change = x @ delta.T, moved @ delta.T, (moved - x) @ delta.T
    found = measure(x, moved, a, b)
    cosines = [p @ q / (np.linalg.norm(p) * np.linalg.norm(q)) for p, q in zip(x @ a.T, moved @ a.T, strict=True)]
    expected = {
        "read_cosine": np.mean(cosines),
        "read_ratio": np.linalg.norm(moved @ a.T) / np.linalg.norm(x @ a.T),
        "effect_cosine": (old * new).sum() / (np.linalg.norm(old) * np.linalg.norm(new)),
        "effect_ratio": np.linalg.norm(new) / np.linalg.norm(old),
        "effect_change": np.linalg.norm(change) / np.linalg.norm(old),
        "change_bound": np.linalg.norm(1.5 * b, 2) * np.linalg.norm((moved - x) @ a.T) / np.linalg.norm(old),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=EXACT, abs=EXACT), name


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_the_bound_is_never_passed_and_is_met_by_a_delta_of_rank_one(seed, rank):
    found = measure(*drawn(seed, rank=rank))
    assert found.effect_change <= found.change_bound * (1 + EXACT)
    if rank == 1:
        assert found.effect_change == pytest.approx(found.change_bound, rel=EXACT)


def test_the_same_activations_change_nothing():
    x, _, a, b = drawn(0)
    found = measure(x, x, a, b)
    assert (found.effect_change, found.change_bound) == (0.0, 0.0)
    assert (found.read_ratio, found.effect_ratio) == (1.0, 1.0)
    assert (found.read_cosine, found.effect_cosine) == pytest.approx((1.0, 1.0), abs=EXACT)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_scale_of_the_patch_and_of_the_activations_does_not_matter(patch, activations):
    x, moved, a, b = drawn(1)
    found = measure(x, moved, a, b)
    for other in (
        measure(x, moved, patch * a, b),
        measure(x, moved, a, patch * b),
        measure(x, moved, a, b, scale=patch),
    ):
        assert other.effect_change == pytest.approx(found.effect_change, rel=EXACT)
        assert other.effect_cosine == pytest.approx(found.effect_cosine, rel=EXACT)
    other = measure(activations * x, activations * moved, a, b)
    assert other.effect_change == pytest.approx(found.effect_change, rel=EXACT)
    assert other.read_cosine == pytest.approx(found.read_cosine, rel=EXACT)


def test_effects_do_not_depend_on_which_factors_make_the_delta():
    x, moved, a, b = drawn(2)
    mix = np.random.default_rng(3).standard_normal((3, 3))
    found, other = measure(x, moved, a, b), measure(x, moved, np.linalg.solve(mix, a), b @ mix)
    assert other.effect_cosine == pytest.approx(found.effect_cosine, rel=1e-6)
    assert other.effect_change == pytest.approx(found.effect_change, rel=1e-6)
    assert abs(other.read_cosine - found.read_cosine) > 1e-3  # what is read does


def test_a_delta_that_adds_nothing_has_no_fidelity():
    x, moved, a, b = drawn(4)
    assert measure(x, moved, a, 0 * b) is None
    assert measure(0 * x, moved, a, b) is None
    assert measure(x, 0 * moved, a, b) is None


def test_tokens_at_which_nothing_is_read_do_not_count():
    x, moved, a, b = drawn(5)
    silent = np.vstack([x, np.zeros((2, 12))])
    found = measure(silent, np.vstack([moved, np.zeros((2, 12))]), a, b)
    assert found.read_cosine == pytest.approx(measure(x, moved, a, b).read_cosine, rel=EXACT)
