"""Fits a forecast to cells, and its interval by leaving out one base pair after another.

The fit minimizes the cross-entropy `-Σ R log μ + (1 - R) log(1 - μ)` plus a ridge on the slopes (Papke and Wooldridge,
1996, Journal of Applied Econometrics 11), which is convex, with slopes of 0 or more (L-BFGS-B: Byrd, Lu, Nocedal and
Zhu, 1995, SIAM Journal on Scientific Computing 16).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from portllm.checking.forecast_model import CONFIDENCE, Feature, Forecaster, Slope, room

RIDGE = 0.001
"""On slopes of standardized measures, for each cell: keeps them finite where a measure tells all cells apart."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A patch on an update, of which it is known what came of it.

    Attributes:
        pair: The base pair: cells of one update share it.
        patch: What tells it from other cells of the pair.
        measures: By name.
        retention: As it was measured.
    """

    pair: str
    patch: str
    measures: Mapping[str, float]
    retention: float


def fit(cells: Sequence[Cell], features: Sequence[Feature], *, confidence: float = CONFIDENCE) -> Forecaster:
    """Fit a forecast, and its interval by leaving out one base pair after another.

    Args:
        cells: Of three base pairs or more, each with every measure; of one whose logarithm counts, some above 0.
        features: What it may rest on; one that says nothing gets a slope of 0.
        confidence: Of the interval.
    """
    fitted = _fit(cells, features, confidence=confidence)
    misses: list[list[float]] = []
    for pair, rest, held_out in splits(cells):
        if not rest:
            raise ValueError(f"cells of one base pair alone, '{pair}': nothing is left to fit on without it.")
        without = _fit(rest, features, confidence=confidence)
        misses.append([_miss(cell, without) for cell in held_out])
    return replace(fitted, reach=pooled_quantile(misses, confidence=confidence))


def splits(cells: Sequence[Cell]) -> list[tuple[str, list[Cell], list[Cell]]]:
    """For each base pair, its name, the cells of all others and its own."""
    return [
        (pair, [cell for cell in cells if cell.pair != pair], [cell for cell in cells if cell.pair == pair])
        for pair in sorted({cell.pair for cell in cells})
    ]


def pooled_quantile(groups: Sequence[Sequence[float]], *, confidence: float) -> float:
    """The least value below which, with one more group of which nothing is known, the share `confidence` lies.

    Every group weighs as much as any other: a value of a group of `n` counts `1 / n`.

    Args:
        groups: Values of each, one or more.
        confidence: Between 0 and 1.

    Returns:
        Infinity where the groups are too few: `k` of them hold a share of `k / (k + 1)` at most.

    Example:
        >>> pooled_quantile([[1.0], [2.0], [3.0], [4.0]], confidence=0.6)
        3.0
        >>> pooled_quantile([[1.0], [2.0]], confidence=0.9)
        inf
    """
    weighted = sorted((value, 1 / len(group)) for group in groups for value in group)
    below = 0.0
    for value, weight in weighted:
        below += weight
        if below >= confidence * (len(groups) + 1) - 1e-9:
            return value
    return math.inf


def _fit(cells: Sequence[Cell], features: Sequence[Feature], *, confidence: float) -> Forecaster:
    slopes = [_standardize(feature, [cell.measures[feature.name] for cell in cells]) for feature in features]
    z = np.array([[slope.standardized(cell.measures[slope.feature.name]) for slope in slopes] for cell in cells])
    target = np.clip(np.array([cell.retention for cell in cells], np.float64), 0.0, 1.0)
    intercept, weights = _minimize(z.reshape(len(cells), len(slopes)), target)
    fitted = tuple(replace(slope, weight=weight) for slope, weight in zip(slopes, weights, strict=True))
    return Forecaster(fitted, intercept, math.inf, confidence)


def _standardize(feature: Feature, values: Sequence[float]) -> Slope:
    low = min(value for value in values if value > 0) if feature.is_log else min(values)
    high = max(values)
    seen = np.array([max(value, low) for value in values], np.float64)
    shown = np.log(seen) if feature.is_log else seen
    spread = float(shown.std())
    return Slope(feature, 0.0, float(shown.mean()), spread if spread > 0 else 1.0, low, high)


def _minimize(z: np.ndarray, target: np.ndarray) -> tuple[float, list[float]]:
    """Intercept and slopes; see the module's docstring."""
    inputs = np.column_stack([np.ones(len(z)), z])
    ridge = RIDGE * len(z) * np.array([0.0] + [1.0] * z.shape[1])

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        index = inputs @ at
        value = (np.logaddexp(0.0, index) - target * index).sum() + (ridge * at * at).sum() / 2
        return value, inputs.T @ (expit(index) - target) + ridge * at

    bounds = [(None, None)] + [(0, None)] * z.shape[1]
    found = minimize(objective, np.zeros(inputs.shape[1]), jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-14).x
    return float(found[0]), found[1:].tolist()


def _miss(cell: Cell, forecaster: Forecaster) -> float:
    forecast = forecaster.predict(cell.measures).retention
    return abs(min(max(cell.retention, 0.0), 1.0) - forecast) / room(forecast)
