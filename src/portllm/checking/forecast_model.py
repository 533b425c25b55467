"""How much of its gain a patch will keep, from what was measured of other patches and updates. Pure.

The forecast of retention is a fractional logit whose slopes have known signs:

    R = σ(b + Σ_k w_k z_k),    w_k ≥ 0,    z_k = sign_k · (t_k(x_k) - center_k) / spread_k

with `t_k` the logarithm for measures that span decades, else the identity. More drift can never raise the forecast,
more of a likeness never lower it, whatever the cells it is fitted on. Retention counts as 0 below 0 and as 1 above 1.

`scripts/forecast/fit.py` fits it.

The interval is conformal over base pairs, the groups of cells that share one: each group's misses, against
`FLAT + √(μ(1 - μ))`, are those of a fit without it, every group counts alike, and the one to come is one more of which
nothing is known (Dunn, Wasserman and Ramdas, 2022, Journal of the American Statistical Association 118, pooled CDFs).
Patches of one base pair are never on both sides of such a split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.9
"""Of intervals: with 10 groups or more, one that ends anywhere needs no more than that."""

FLAT = 0.05
"""What a miss is measured against where the forecast is 0 or 1, and there is no more room for misses on one side."""


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
        around = self.reach * room(mean)
        outside = tuple(
            slope.feature.name
            for slope in self.slopes
            if slope.weight and not slope.covers(measures[slope.feature.name])
        )
        return Forecast(mean, max(0.0, mean - around), min(1.0, mean + around), outside)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one of the patches that the forecast was fitted on.

    Attributes:
        drift: Of the weights that it changes.
        retention: By `loss` and by `accuracy`, where it is a number.
    """

    drift: float
    retention: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Shipped:
    """What was fitted, and on what.

    Attributes:
        forecasters: Of retention by `loss` and by `accuracy`; of each, by what it rests on: `weights`, or `text` too.
        base: The model whose updates the cells are of.
        n_updates: Updates of it.
        outcomes: Of the patches on them.
    """

    forecasters: Mapping[str, Mapping[str, Forecaster]]
    base: str
    n_updates: int
    outcomes: tuple[Outcome, ...]

    @property
    def n_cells(self) -> int:
        """Patches that it was fitted on."""
        return len(self.outcomes)


@dataclass(frozen=True, slots=True)
class Expected:
    """The forecast of one patch, and what it rests on.

    Attributes:
        forecasts: Of retention by `loss` and by `accuracy`.
        rests_on: `weights` or `text`.
        confidence: Of the intervals.
        shipped: What it was fitted on.
    """

    forecasts: Mapping[str, Forecast]
    rests_on: str
    confidence: float
    shipped: Shipped

    @property
    def outside(self) -> tuple[str, ...]:
        """Measures outside of the range that it was fitted on."""
        return tuple(dict.fromkeys(name for forecast in self.forecasts.values() for name in forecast.outside))

    def to_json(self) -> dict[str, object]:
        """What `check --json` shows."""
        return {
            **{
                name: {"retention": forecast.retention, "low": forecast.low, "high": forecast.high}
                for name, forecast in self.forecasts.items()
            },
            "confidence": self.confidence,
            "extrapolated": list(self.outside),
            "rests_on": self.rests_on,
            "fitted_on": {
                "base": self.shipped.base,
                "updates": self.shipped.n_updates,
                "cells": self.shipped.n_cells,
            },
        }


def room(mean: float) -> float:
    """What a miss is measured against: `FLAT + √(μ(1 - μ))`."""
    return FLAT + math.sqrt(mean * (1 - mean))


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
