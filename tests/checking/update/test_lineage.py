"""Lineage from cosines."""

import numpy as np
import pytest

from portllm.checking.update.lineage import Lineage, lineage_of
from portllm.measures.drift import measure_drift
from portllm.measures.estimate import Stratum, estimate_drift


def lineage(base, evolved):
    return lineage_of(estimate_drift([Stratum((measure_drift(base, evolved),))]))


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(size=(60, 70))


def test_equal_weights_are_the_same(weight):
    assert lineage(weight, weight) is Lineage.SAME


@pytest.mark.parametrize(("noise", "found"), [(0.01, Lineage.CONTINUATION), (1.0, Lineage.SIBLING)])
def test_noise_takes_weights_away_from_their_origin(weight, noise, found):
    moved = weight + noise * np.random.default_rng(1).normal(size=weight.shape)
    assert lineage(weight, moved) is found


def test_other_weights_of_the_same_shape_are_independent(weight):
    assert lineage(weight, np.random.default_rng(2).normal(size=weight.shape)) is Lineage.INDEPENDENT


def test_the_same_rows_in_another_order_are_independent(weight):
    assert lineage(weight, np.roll(weight, 1, axis=0)) is Lineage.INDEPENDENT


def test_the_opposite_weights_are_independent(weight):
    assert lineage(weight, -weight) is Lineage.INDEPENDENT


def test_nothing_to_compare_is_unrelated():
    assert lineage_of(None) is Lineage.UNRELATED
