"""Drift: by hand, against float64, and that parts add up."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.measures.drift import DriftSums, measure_drift

vectors = st.integers(1, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-10, 10, width=32), min_size=n, max_size=n)] * 2)
)


def test_by_hand():
    sums = measure_drift(np.array([[1.0, 2.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]))
    assert sums == DriftSums(base_sq=9.0, drift_sq=4.0, product=5.0, evolved_sq=5.0)
    assert sums.relative == pytest.approx(2 / 3)
    assert sums.cosine == pytest.approx(5 / (3 * math.sqrt(5)))


def test_a_model_that_did_not_move_has_no_drift():
    weight = np.linspace(-1, 1, 7, dtype=np.float32)
    sums = measure_drift(weight, weight.copy())
    assert (sums.relative, sums.cosine) == (0.0, pytest.approx(1.0))


def test_weights_of_zero_have_their_limits():
    zero, one = np.zeros(3), np.ones(3)
    assert measure_drift(zero, zero).relative == 0.0
    assert measure_drift(zero, one).relative == math.inf
    assert measure_drift(one, zero).relative == 1.0
    assert measure_drift(zero, one).cosine == measure_drift(one, zero).cosine == 1.0


@given(vectors, st.integers(0, 30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_parts_add_up_to_the_whole_in_float64(pair, cut):
    base, evolved = (np.array(values, dtype=np.float32) for values in pair)
    whole = measure_drift(base, evolved)
    total = measure_drift(base[:cut], evolved[:cut]) + measure_drift(base[cut:], evolved[cut:])
    exact = [math.fsum(x * y for x, y in zip(*both, strict=True)) for both in (
        (base.tolist(), base.tolist()),
        ((evolved.astype(float) - base).tolist(), (evolved.astype(float) - base).tolist()),
        (base.tolist(), evolved.tolist()),
        (evolved.tolist(), evolved.tolist()),
    )]  # fmt: skip
    for sums in (whole, total):
        found = [sums.base_sq, sums.drift_sq, sums.product, sums.evolved_sq]
        assert found == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_sums_are_taken_in_float64():
    base, evolved = np.full(10_000, 1.0, np.float32), np.full(10_000, 1.0 + 2.0**-23, np.float32)
    assert measure_drift(base, evolved).relative == pytest.approx(2.0**-23, rel=1e-9)
