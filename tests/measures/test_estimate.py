"""Estimates from windows: exact where all is read, and intervals that hold the truth as often as they say."""

import math

import numpy as np
import pytest

from portllm.measures.drift import DriftSums, measure_drift
from portllm.measures.estimate import SampledEstimate, Stratum, estimate_drift

WINDOW, WINDOWS, READ = 50, 40, 8


def window_sums(rng):
    """The sums of every window of a weight whose rows differ in size, as those of real models do."""
    base = rng.normal(size=(WINDOWS, WINDOW)) * rng.gamma(4, 0.25, size=(WINDOWS, 1))
    evolved = base + 0.05 * rng.normal(size=base.shape) * rng.gamma(4, 0.25, size=(WINDOWS, 1))
    return [measure_drift(*pair) for pair in zip(base, evolved, strict=True)]


def test_what_is_read_whole_has_no_error():
    sums = [DriftSums(4.0, 1.0, 4.0, 5.0), DriftSums(9.0, 0.5, 9.0, 9.5)]
    drift = estimate_drift([Stratum((part,)) for part in sums])
    whole = sums[0] + sums[1]
    assert drift.relative == SampledEstimate(whole.relative, 0.0)
    assert drift.cosine == SampledEstimate(whole.cosine, 0.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    strata = [window_sums(rng) for _ in range(6)]
    whole = sum((part for stratum in strata for part in stratum), DriftSums())
    held = {"relative": 0, "cosine": 0}
    draws = 400
    for _ in range(draws):
        read = [[stratum[i] for i in rng.choice(WINDOWS, READ, replace=False)] for stratum in strata]
        drift = estimate_drift([Stratum(tuple(units), WINDOWS / READ) for units in read])
        for name in held:
            estimate = getattr(drift, name)
            held[name] += estimate.low <= getattr(whole, name) <= estimate.high
    # The tails of such rows are heavier than a normal distribution's: a little under 95 % is what there is to expect.
    assert all(0.90 * draws < count < 0.99 * draws for count in held.values()), held


def test_one_window_of_many_says_nothing_about_its_error():
    drift = estimate_drift([Stratum((DriftSums(4.0, 1.0, 4.0, 5.0),), scale=10.0)])
    assert drift.relative.error == math.inf


def test_scales_weigh_the_strata():
    small, large = DriftSums(1.0, 0.0, 1.0, 1.0), DriftSums(1.0, 1.0, 1.0, 2.0)
    drift = estimate_drift([Stratum((small, small), 2.0), Stratum((large, large), 50.0)])
    assert drift.relative.value == pytest.approx(math.sqrt(100 / 104))


def test_weights_of_zero_have_their_limits():
    assert estimate_drift([Stratum((DriftSums(), DriftSums()), 3.0)]).relative.value == 0.0
    assert estimate_drift([Stratum((DriftSums(0.0, 1.0, 0.0, 1.0),))]).relative.value == math.inf


@pytest.mark.parametrize("freedom", [3, 5, 12, 100])
def test_intervals_are_those_of_student(freedom):
    from scipy.stats import t

    reach = SampledEstimate(0.0, 1.0, freedom).high
    assert reach == pytest.approx(t.ppf(0.975, freedom), rel=0.04)
