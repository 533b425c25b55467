"""The forecast: it finds a model that is known, never turns against its signs, and its intervals hold what they say."""

import itertools
import math

import numpy as np
import pytest

from portllm.checking.forecast_model import Feature
from scripts.forecast.fit import RIDGE, Cell, fit, pooled_quantile, splits

DRIFT, LIKENESS = Feature("drift", sign=-1, is_log=True), Feature("likeness", sign=1)
TRUTH = {"intercept": 0.5, "drift": 2.0, "likeness": 1.0}


def retention_of(drift, likeness):
    """Of the known model: the drift counts by its logarithm to base e."""
    index = TRUTH["intercept"] - TRUTH["drift"] * (math.log(drift) + 3) + TRUTH["likeness"] * likeness
    return 1 / (1 + math.exp(-index))


def make_cells(*, pairs=20, patches=4, noise=0.0, shared=0.0, seed=0):
    """Cells of the known model: `noise` of each cell and `shared` of each base pair are added to its retention."""
    draw = np.random.Generator(np.random.PCG64(seed))
    cells = []
    for pair in range(pairs):
        drift, moved = float(np.exp(draw.uniform(-6, 0))), float(draw.normal()) * shared
        for patch in range(patches):
            likeness = float(draw.normal())
            value = retention_of(drift, likeness) + moved + float(draw.normal()) * noise
            cells.append(Cell(f"pair {pair}", f"patch {patch}", {"drift": drift, "likeness": likeness}, value))
    return cells


def test_a_fit_finds_the_model_that_made_the_cells():
    forecaster = fit(make_cells(pairs=40), [DRIFT, LIKENESS])
    slopes = {slope.feature.name: slope.weight / slope.spread for slope in forecaster.slopes}
    assert slopes["drift"] == pytest.approx(TRUTH["drift"], rel=0.1)
    assert slopes["likeness"] == pytest.approx(TRUTH["likeness"], rel=0.15)
    for drift, likeness in ((0.005, 0.0), (0.05, 1.0), (0.3, -1.0)):
        found = forecaster.predict({"drift": drift, "likeness": likeness}).retention
        assert found == pytest.approx(retention_of(drift, likeness), abs=0.03)


def test_a_fit_is_the_minimum_of_its_objective():
    cells = make_cells(noise=0.1, seed=3)
    forecaster = fit(cells, [DRIFT, LIKENESS, Feature("likeness", sign=-1)])
    z = np.array([[s.standardized(c.measures[s.feature.name]) for s in forecaster.slopes] for c in cells])
    target = np.clip([cell.retention for cell in cells], 0, 1)
    weights = np.array([slope.weight for slope in forecaster.slopes])
    excess = 1 / (1 + np.exp(-(forecaster.intercept + z @ weights))) - target
    slopes = z.T @ excess + RIDGE * len(cells) * weights
    # Karush-Kuhn-Tucker: flat where a slope is free, rising where it is held at 0.
    assert excess.sum() == pytest.approx(0, abs=1e-3)
    assert slopes[:2] == pytest.approx([0, 0], abs=1e-3)
    assert weights[2] == 0
    assert slopes[2] > 0


def test_a_measure_that_says_the_opposite_of_its_sign_gets_no_slope():
    against = Feature("likeness", sign=-1)
    forecaster = fit(make_cells(), [DRIFT, against])
    assert forecaster.slopes[1].weight == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_forecasts_never_rise_with_drift_nor_fall_with_likeness_whatever_the_cells(seed):
    draw = np.random.Generator(np.random.PCG64(seed))
    cells = [
        Cell(str(n % 5), str(n), {"drift": float(draw.uniform(0, 1)), "likeness": float(draw.normal())}, float(value))
        for n, value in enumerate(draw.uniform(-0.5, 1.5, size=20))
    ]
    forecaster = fit(cells, [DRIFT, LIKENESS])
    by_drift = [forecaster.predict({"drift": d, "likeness": 0.0}).retention for d in np.linspace(0, 2, 30)]
    by_likeness = [forecaster.predict({"drift": 0.1, "likeness": x}).retention for x in np.linspace(-4, 4, 30)]
    assert all(now <= before for before, now in itertools.pairwise(by_drift))
    assert all(now >= before for before, now in itertools.pairwise(by_likeness))


def test_outside_of_the_cells_the_forecast_stays_at_their_edge_and_says_so():
    cells = make_cells()
    forecaster = fit(cells, [DRIFT, LIKENESS])
    greatest = max(cell.measures["drift"] for cell in cells)
    edge, beyond = (forecaster.predict({"drift": drift, "likeness": 0.0}) for drift in (greatest, 10 * greatest))
    assert (edge.outside, beyond.outside) == ((), ("drift",))
    assert beyond.retention == edge.retention
    assert forecaster.predict({"drift": 1e-9, "likeness": 99.0}).outside == ("drift", "likeness")
    assert (
        forecaster.predict({"drift": 0.0, "likeness": 0.0}).outside == ()
    )  # an update that left alone what is measured


def test_no_base_pair_is_on_both_sides_of_a_split():
    cells = make_cells(pairs=5)
    for pair, rest, held_out in splits(cells):
        assert {cell.pair for cell in held_out} == {pair}
        assert pair not in {cell.pair for cell in rest}
        assert len(rest) + len(held_out) == len(cells)
    assert len(splits(cells)) == 5


@pytest.mark.slow
def test_intervals_hold_new_base_pairs_as_often_as_they_say():
    inside = total = 0
    for seed in range(25):
        cells = make_cells(pairs=13, noise=0.05, shared=0.1, seed=seed)
        forecaster = fit([cell for cell in cells if cell.pair != "pair 0"], [DRIFT, LIKENESS], confidence=0.8)
        for cell in cells:
            if cell.pair == "pair 0":
                forecast = forecaster.predict(cell.measures)
                inside += forecast.low <= min(max(cell.retention, 0), 1) <= forecast.high
                total += 1
    assert 0.8 <= inside / total < 1.0


def test_too_few_base_pairs_leave_everything_possible():
    forecast = fit(make_cells(pairs=3, noise=0.05), [DRIFT]).predict({"drift": 0.05})
    assert (forecast.low, forecast.high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="one base pair alone"):
        fit(make_cells(pairs=1), [DRIFT])


def test_groups_of_any_size_weigh_the_same_in_the_pooled_quantile():
    assert pooled_quantile([[1.0] * 100, [5.0], [6.0], [7.0]], confidence=0.4) == 5.0
