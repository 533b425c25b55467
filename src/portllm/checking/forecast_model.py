"""How much of its gain a patch will keep, from what was measured of other patches and updates. Pure numpy.

The forecast of retention is a fractional logit whose slopes have known signs:

    R = σ(b + Σ_k w_k z_k),    w_k ≥ 0,    z_k = sign_k · (t_k(x_k) - center_k) / spread_k

with `t_k` the logarithm for measures that span decades, else the identity. More drift can never raise the forecast,
more of a likeness never lower it, whatever the cells it is fitted on. Retention counts as 0 below 0 and as 1 above 1.

The fit minimizes the cross-entropy `-Σ R log μ + (1 - R) log(1 - μ)` plus a ridge on the slopes (Papke and Wooldridge,
1996, Journal of Applied Econometrics 11), which is convex, by Newton's steps for the slopes that are free to move, cut
off at zero (Bertsekas, 1982, SIAM Journal on Control and Optimization 20).

The interval is conformal over base pairs, the groups of cells that share one: each group's misses, against
`FLAT + √(μ(1 - μ))`, are those of a fit without it, every group counts alike, and the one to come is one more of which
nothing is known (Dunn, Wasserman and Ramdas, 2022, Journal of the American Statistical Association 118, pooled CDFs).
Patches of one base pair are never on both sides of such a split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

CONFIDENCE = 0.9
"""Of intervals: with 10 groups or more, one that ends anywhere needs no more than that."""

RIDGE = 0.001
"""On slopes of standardized measures, for each cell: keeps them finite where a measure tells all cells apart."""

FLAT = 0.05
"""What a miss is measured against where the forecast is 0 or 1, and there is no more room for misses on one side."""

ROUNDS = 200
STILL = 1e-10
"""The fit ends where no number moves by more in a step."""

Column = Float64[np.ndarray, " cells"]
Matrix = Float64[np.ndarray, "cells features"]


@dataclass(frozen=True, slots=True)
class Feature:
    """A measure that the forecast may rest on.

    Attributes:
        name: Of the measure.
        sign: 1 where more of it speaks for the patch, -1 where it speaks against it.
        is_log: Whether its logarithm counts.
    """

    name: str
    sign: int
    is_log: bool = False


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


@dataclass(frozen=True, slots=True)
class Slope:
    """One feature of a fitted forecast.

    Attributes:
        feature: Which.
        weight: Slope, 0 or more, of the standardized measure in the direction that speaks for the patch.
        center: Mean over cells of the measure, or of its logarithm.
        spread: Standard deviation of the same.
        low: Least value of the measure among the cells; of a logarithm, the least above 0.
        high: Greatest.
    """

    feature: Feature
    weight: float
    center: float
    spread: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether a measure lies in the cells' range; none at all of what speaks against a patch is no extreme."""
        return bool(self.low <= value <= self.high or (value == 0 and self.feature.sign < 0))

    def standardized(self, value: float) -> float:
        """`z` of a measure; one outside of the cells' range counts as the end of the range."""
        held = min(max(value, self.low), self.high)
        return self.feature.sign * ((math.log(held) if self.feature.is_log else held) - self.center) / self.spread


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is to be expected.

    Attributes:
        retention: Expected share of retraining's gain, between 0 and 1.
        low: Lower end of the interval.
        high: Upper end.
        outside: Measures outside of the range that the forecast was fitted on; they count as its nearer end, so that
            what is said is of an update less extreme than this one.
    """

    retention: float
    low: float
    high: float
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecaster:
    """A fitted forecast.

    Attributes:
        slopes: One for each feature.
        intercept: `b`.
        reach: What a miss, against `FLAT + √(μ(1 - μ))`, stays below; infinite where there are too few pairs to tell.
        confidence: In which share of updates.

    Example:
        >>> slope = Slope(Feature("drift", sign=-1, is_log=True), 2.0, center=-4.0, spread=1.0, low=0.001, high=1.0)
        >>> forecaster = Forecaster((slope,), intercept=1.0, reach=0.5, confidence=0.9)
        >>> near, far, beyond = (forecaster.predict({"drift": drift}) for drift in (0.001, 0.1, 2.0))
        >>> round(near.retention, 3), round(far.retention, 3), beyond.outside
        (0.999, 0.084, ('drift',))
    """

    slopes: tuple[Slope, ...]
    intercept: float
    reach: float
    confidence: float

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that it needs."""
        return tuple(slope.feature.name for slope in self.slopes)

    def predict(self, measures: Mapping[str, float]) -> Forecast:
        """The forecast for a patch on an update.

        Args:
            measures: By name; all of `self.measures` are there.
        """
        z = [slope.standardized(measures[slope.feature.name]) for slope in self.slopes]
        mean = _sigmoid(self.intercept + sum(slope.weight * value for slope, value in zip(self.slopes, z, strict=True)))
        around = self.reach * _room(mean)
        outside = tuple(
            slope.feature.name
            for slope in self.slopes
            if slope.weight and not slope.covers(measures[slope.feature.name])
        )
        return Forecast(mean, max(0.0, mean - around), min(1.0, mean + around), outside)


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
    intercept, weights = _descend(z.reshape(len(cells), len(slopes)), target)
    fitted = tuple(replace(slope, weight=weight) for slope, weight in zip(slopes, weights, strict=True))
    return Forecaster(fitted, intercept, math.inf, confidence)


def _standardize(feature: Feature, values: Sequence[float]) -> Slope:
    low = min(value for value in values if value > 0) if feature.is_log else min(values)
    high = max(values)
    seen = np.array([max(value, low) for value in values], np.float64)
    shown = np.log(seen) if feature.is_log else seen
    spread = float(shown.std())
    return Slope(feature, 0.0, float(shown.mean()), spread if spread > 0 else 1.0, low, high)


def _descend(z: Matrix, target: Column) -> tuple[float, list[float]]:
    """Intercept and slopes; see the module's docstring."""
    inputs = np.column_stack([np.ones(len(z)), z])
    ridge = RIDGE * len(z) * np.array([0.0] + [1.0] * z.shape[1])
    least = np.array([-math.inf] + [0.0] * z.shape[1])

    def objective(at: Column) -> float:
        index = inputs @ at
        return float((np.logaddexp(0.0, index) - target * index).sum() + (ridge * at * at).sum() / 2)

    found = np.zeros(inputs.shape[1])
    for _ in range(ROUNDS):
        means = _sigmoids(inputs @ found)
        slope = inputs.T @ (means - target) + ridge * found
        free = (found > least) | (slope < 0)
        curvature = (inputs.T * (means * (1 - means))) @ inputs + np.diag(ridge)
        curvature[0, 0] += 1e-9  # where all means are 0 or 1, nothing else holds the intercept
        step = np.zeros_like(found)
        step[free] = -np.linalg.solve(curvature[np.ix_(free, free)], slope[free])
        size, now = 1.0, objective(found)
        while objective(np.maximum(found + size * step, least)) > now and size > STILL:
            size /= 2
        before, found = found, np.maximum(found + size * step, least)
        if np.abs(found - before).max() < STILL:
            break
    return float(found[0]), found[1:].tolist()


def _miss(cell: Cell, forecaster: Forecaster) -> float:
    forecast = forecaster.predict(cell.measures).retention
    return abs(min(max(cell.retention, 0.0), 1.0) - forecast) / _room(forecast)


def _room(mean: float) -> float:
    return FLAT + math.sqrt(mean * (1 - mean))


def _sigmoid(value: float) -> float:
    return float(_sigmoids(np.array([value]))[0])


def _sigmoids(values: Column) -> Column:
    found: Column = 0.5 * (1 + np.tanh(values / 2))
    return found
