"""How a forecast is judged: on base pairs it has not seen, by rank, coverage and the points that decisions cost."""

import numpy as np
import pytest

from portllm.checking.forecast_model import Feature, Forecast
from scripts.forecast.fit import Cell
from scripts.forecast.held_out import coverage, forecast_held_out, mean_miss, rank_agreement, regret, spearman
from tests.scripts.test_fit import DRIFT, LIKENESS, make_cells


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.Generator(np.random.PCG64(0))
    one, other = draw.integers(0, 6, size=40), draw.integers(0, 6, size=40)
    assert spearman(one.tolist(), other.tolist()) == pytest.approx(stats.spearmanr(one, other).statistic)


def test_a_base_pair_is_forecast_without_its_own_cells():
    cells = make_cells(pairs=6)
    # One pair says the opposite of all others: it cannot be forecast, unless it was seen.
    odd = [Cell(c.pair, c.patch, c.measures, 1 - c.retention) if c.pair == "pair 2" else c for c in cells]
    said = {(c.pair, c.patch): f.retention for c, f in forecast_held_out(odd, [DRIFT, LIKENESS])}
    same = {(c.pair, c.patch): f.retention for c, f in forecast_held_out(cells, [DRIFT, LIKENESS])}
    assert said.keys() == {(c.pair, c.patch) for c in cells}
    assert all(said[key] == same[key] for key in said if key[0] == "pair 2")
    assert any(said[key] != same[key] for key in said if key[0] != "pair 2")


def test_rank_agreement_has_an_interval_over_base_pairs():
    cells = make_cells(noise=0.1)
    said = [cell.retention + 0.1 * (-1) ** place for place, cell in enumerate(cells)]
    rank = rank_agreement([cell.pair for cell in cells], said, [cell.retention for cell in cells], resamples=50)
    assert rank.low < rank.value < rank.high <= 1.0
    assert rank.value > 0.8
    constant = rank_agreement(["a", "b"], [1.0, 1.0], [0.0, 1.0])
    assert constant.value is None


def test_coverage_and_miss_count_retention_between_nothing_and_all():
    cells = [Cell("a", "1", {}, -3.0), Cell("a", "2", {}, 0.5), Cell("b", "1", {}, 1.2), Cell("b", "2", {}, 0.9)]
    forecasts = [Forecast(0.1, 0.0, 0.2), Forecast(0.5, 0.4, 0.6), Forecast(0.9, 0.8, 1.0), Forecast(0.1, 0.0, 0.2)]
    pairs = list(zip(cells, forecasts, strict=True))
    assert coverage(pairs) == 0.75
    assert mean_miss(pairs) == pytest.approx((0.1 + 0.0 + 0.1 + 0.8) / 4)


def test_regret_counts_what_a_decision_loses_and_what_it_spends():
    cells = [Cell("a", "1", {}, 1.0), Cell("a", "2", {}, 1.0), Cell("b", "1", {}, 0.0), Cell("b", "2", {}, 0.0)]
    ported = {("a", "1"): 0.8, ("a", "2"): 0.9, ("b", "1"): 0.5, ("b", "2"): 0.4}
    retrained = {("a", "1"): 0.81, ("a", "2"): 0.85, ("b", "1"): 0.8, ("b", "2"): 0.8}
    always = regret(cells, ported, retrained, lambda _: True, tolerance=0.02)
    assert (always.points, always.trained, always.needlessly) == (pytest.approx((1 + 0 + 30 + 40) / 4), 0.0, 0.0)
    assert always.worst == pytest.approx(35)
    right = regret(cells, ported, retrained, lambda number: number < 2, tolerance=0.02)
    assert (right.points, right.trained, right.needlessly) == (pytest.approx(0.25), 0.5, 0.0)
    never = regret(cells, ported, retrained, lambda _: False, tolerance=0.02)
    assert (never.points, never.trained, never.needlessly) == (pytest.approx(5 / 4), 1.0, 0.5)


def test_a_rule_that_says_the_same_of_all_has_no_rank():
    assert spearman([1.0] * 4, [0.1, 0.2, 0.3, 0.4]) is None
    assert Feature("x", 1).is_log is False
