"""The bounds against SciPy's beta quantiles and binomial tail, their laws, and the coverage that they promise."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from portllm.certifying.bounds import change_interval, least_inputs, log_tail, lower_bound, plan_inputs, upper_bound

SMALL_TOLERANCE = 1e-12
LARGE = 10_000
LARGE_TOLERANCE = 1e-11  # lgamma(1e6) is 1e7, whose last digit is 2e-9; the log of the tail has a slope above 1e3 there
CONFIDENCES = (0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999999)


@st.composite
def counts(draw, most=1_000_000):
    """k of n, of any size and as often near the ends as in the middle."""
    n = min(most, int(10 ** draw(st.floats(0, math.log10(most)))))
    k = min(n, int(10 ** draw(st.floats(0, math.log10(most)))) - 1)
    return draw(st.sampled_from([k, n - k])), n


def tolerance(n):
    """How far from SciPy a bound may be."""
    return SMALL_TOLERANCE if n <= LARGE else LARGE_TOLERANCE


# ---- the numbers


@given(counts(), st.sampled_from(CONFIDENCES))
def test_the_upper_bound_is_scipys_quantile_of_the_beta_distribution(count, confidence):
    k, n = count
    expected = 1.0 if k == n else stats.beta.ppf(confidence, k + 1, n - k)
    assert upper_bound(k, n, confidence=confidence) == pytest.approx(expected, abs=tolerance(n))


@given(counts(), st.sampled_from(CONFIDENCES))
def test_the_lower_bound_is_scipys_quantile_of_the_beta_distribution(count, confidence):
    k, n = count
    expected = 0.0 if k == 0 else stats.beta.ppf(1 - confidence, k, n - k + 1)
    assert lower_bound(k, n, confidence=confidence) == pytest.approx(expected, abs=tolerance(n))


@given(counts(most=10_000), st.floats(0, 1))
def test_the_tail_is_scipys(count, p):
    k, n = count
    # SciPy's own tail is 0 from about 1e-285 on.
    assert math.exp(log_tail(k, n, p)) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-250)


def test_a_tail_that_scipy_takes_for_nothing_is_compared_by_the_sum_of_its_terms():
    k, n, p = 30, 749, 0.65625
    terms = [math.comb(n, i) * Fraction(p) ** i * (1 - Fraction(p)) ** (n - i) for i in range(k + 1)]
    assert math.exp(log_tail(k, n, p)) == pytest.approx(float(sum(terms)), rel=1e-9)


def test_without_a_disagreement_the_bound_has_a_closed_form():
    for n, confidence in itertools.product((1, 2, 30, 300, 10**6), CONFIDENCES):
        expected = 1 - (1 - confidence) ** (1 / n)
        assert upper_bound(0, n, confidence=confidence) == pytest.approx(expected, rel=1e-9)


def test_one_input_says_almost_nothing():
    assert upper_bound(0, 1) == pytest.approx(0.95, abs=1e-15)
    assert upper_bound(1, 1) == 1.0
    assert lower_bound(0, 1) == 0.0


def test_the_known_numbers():
    assert upper_bound(0, 300) == pytest.approx(0.0099, abs=5e-5)
    assert upper_bound(0, 59) < 0.05 < upper_bound(0, 58)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (0, 0), (0, -1)])
def test_what_is_no_count_is_refused(k, n):
    with pytest.raises(ValueError, match="is not a valid count"):
        upper_bound(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_what_is_no_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="must be strictly between 0 and 1"):
        upper_bound(1, 10, confidence=confidence)


# ---- laws


@given(counts(most=5000), st.sampled_from(CONFIDENCES))
def test_more_disagreements_or_fewer_inputs_make_the_bound_larger(count, confidence):
    k, n = count
    bound = upper_bound(k, n, confidence=confidence)
    assert 0.0 < bound <= 1.0
    if k < n:
        assert bound < upper_bound(k + 1, n, confidence=confidence)
        assert upper_bound(k, n + 1, confidence=confidence) < bound


@given(counts(most=5000), st.sampled_from(list(itertools.pairwise(CONFIDENCES))))
def test_more_confidence_makes_the_bound_larger(count, confidences):
    k, n = count
    less, more = (upper_bound(k, n, confidence=confidence) for confidence in confidences)
    assert less < more or k == n


@given(counts(most=5000), st.sampled_from([c for c in CONFIDENCES if c >= 0.5]))
def test_what_was_seen_lies_between_the_bounds(count, confidence):
    k, n = count
    slack = 1e-15  # of 1 - u
    assert lower_bound(k, n, confidence=confidence) <= k / n + slack
    assert k / n <= upper_bound(k, n, confidence=confidence)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.data())
def test_the_interval_of_a_change_turns_around_with_the_models(count, data):
    negative, n = count
    positive = data.draw(st.integers(0, n - negative))
    low, high = change_interval(negative, positive, n)
    assert low <= (positive - negative) / n <= high
    assert change_interval(positive, negative, n) == pytest.approx((-high, -low))


# ---- plans


@given(st.integers(0, 60), st.floats(0.001, 0.9), st.sampled_from(CONFIDENCES))
def test_the_least_number_of_inputs_meets_the_bound_and_one_less_does_not(k, bound, confidence):
    n = least_inputs(k, bound, confidence=confidence)
    assert upper_bound(k, n, confidence=confidence) <= bound * (1 + 1e-9)
    if n - 1 > k:
        assert upper_bound(k, n - 1, confidence=confidence) > bound * (1 - 1e-9)


@pytest.mark.parametrize("bound", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.7])
@pytest.mark.parametrize("power", [0.5, 0.9, 0.99])
def test_a_plan_is_the_smallest_that_has_the_chance_asked_for(bound, share, power):
    expected = share * bound
    k = next(k for k in itertools.count() if stats.binom.cdf(k, least_inputs(k, bound), expected) >= power)
    plan = plan_inputs(bound, expected=expected, power=power)
    assert (plan.n_allowed, plan.n_inputs) == (k, least_inputs(k, bound))
    assert plan.chance == pytest.approx(stats.binom.cdf(k, plan.n_inputs, expected))


def test_a_plan_without_expected_disagreements_allows_none():
    plan = plan_inputs(0.02)
    assert (plan.n_inputs, plan.n_allowed, plan.chance) == (149, 0, 1.0)


@pytest.mark.parametrize(
    ("bound", "expected", "power"), [(0.02, 0.02, 0.9), (0.02, -0.1, 0.9), (0, 0, 0.9), (0.1, 0, 1)]
)
def test_a_plan_that_cannot_be_is_refused(bound, expected, power):
    with pytest.raises(ValueError, match=r"must be (strictly between|at least) 0"):
        plan_inputs(bound, expected=expected, power=power)


# ---- coverage

SIZES = (5, 30, 100, 300)
SHARES = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)
LEVELS = (0.8, 0.9, 0.95, 0.99)


def test_the_bound_holds_as_often_as_it_promises_in_every_cell():
    # Not simulated: the chance of every k is known.
    cells = 0
    for n, confidence in itertools.product(SIZES, LEVELS):
        bounds = np.array([upper_bound(k, n, confidence=confidence) for k in range(n + 1)])
        for share in SHARES:
            chance = stats.binom.pmf(np.arange(n + 1), n, share)
            assert chance[bounds >= share].sum() >= confidence - 1e-9, (n, confidence, share)
            cells += 1
    assert cells == 208


RUNS = 4000
SEED = 11


def test_the_loss_of_a_simulated_port_stays_below_its_bound():
    """Right answers, flips and other changes of answers are drawn together; the claim is about the true scores."""
    draw = np.random.Generator(np.random.PCG64(SEED))
    confidence, cells = 0.95, 0
    # The share of runs that hold has this standard deviation at the promised level; five of them are 1 in 3 million.
    allowed = confidence - 5 * math.sqrt(confidence * (1 - confidence) / RUNS)
    for n in (20, 100, 300):
        up = np.array([upper_bound(k, n, confidence=confidence) for k in range(n + 1)])
        each = 1 - (1 - confidence) / 4
        tight = np.array([upper_bound(k, n, confidence=each) for k in range(n + 1)])
        least = 1 - tight[::-1]
        for negative, positive, other in itertools.product(
            (0.0, 0.005, 0.03, 0.1, 0.3), (0.0, 0.01, 0.1, 0.3), (0, 0.02, 0.2, 0.4)
        ):
            shares = [negative, positive, other, 1 - negative - positive - other]
            if shares[-1] < -1e-12:
                continue
            counted = draw.multinomial(n, np.clip(shares, 0, 1), size=RUNS)
            change = positive - negative
            differing = counted[:, :3].sum(axis=1)
            held = {
                "disagreement": change >= -up[differing] - 1e-12,
                "negative flips": change >= -up[counted[:, 0]] - 1e-12,
                "interval": (change >= least[counted[:, 1]] - tight[counted[:, 0]] - 1e-12)
                & (change <= tight[counted[:, 1]] - least[counted[:, 0]] + 1e-12),
            }
            for claim, holds in held.items():
                assert holds.mean() >= allowed, (claim, n, shares)
            cells += 1
    assert cells >= 200


def test_the_interval_that_is_simulated_is_the_one_that_is_given():
    each = 1 - (1 - 0.95) / 4
    low, high = change_interval(3, 8, 100)
    assert low == lower_bound(8, 100, confidence=each) - upper_bound(3, 100, confidence=each)
    assert high == upper_bound(8, 100, confidence=each) - lower_bound(3, 100, confidence=each)
