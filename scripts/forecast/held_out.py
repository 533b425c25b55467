"""How well a forecast does on base pairs that it has not seen.

Each base pair is forecast by a fit on all others, its interval included: no patch of the pair, and nothing that was
chosen with its help, has been seen.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from portllm.checking.forecast_model import CONFIDENCE, Feature, Forecast
from scripts.forecast.fit import Cell, fit, splits

RESAMPLES = 2000

Forecasts = Sequence[tuple[Cell, Forecast]]


def forecast_held_out(
    cells: Sequence[Cell], features: Sequence[Feature], *, confidence: float = CONFIDENCE
) -> list[tuple[Cell, Forecast]]:
    """Every cell with the forecast of a fit on the other base pairs.

    Args:
        cells: Of three base pairs or more.
        features: What forecasts may rest on.
        confidence: Of intervals.
    """
    found = []
    for _, rest, held_out in splits(cells):
        forecaster = fit(rest, features, confidence=confidence)
        found += [(cell, forecaster.predict(cell.measures)) for cell in held_out]
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation, or None where one side has the same value everywhere."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


@dataclass(frozen=True, slots=True)
class Rank:
    """How well an order is met.

    Attributes:
        value: Spearman's correlation; None where everything is said to be equal.
        low: Lower end of its 95 % interval, over base pairs.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


def rank_agreement(
    pairs: Sequence[str], said: Sequence[float], found: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Rank:
    """Spearman's correlation with the percentile interval of a bootstrap that draws whole base pairs.

    Args:
        pairs: The base pair of each cell.
        said: What was said of it.
        found: What was measured.
        seed: Of the draws.
        resamples: How many.
    """
    value = spearman(said, found)
    if value is None:
        return Rank(None, None, None)
    members: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        members[pair].append(place)
    groups = [members[pair] for pair in sorted(members)]
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = []
    for _ in range(resamples):
        places = [place for group in generator.integers(len(groups), size=len(groups)) for place in groups[group]]
        again = spearman([said[place] for place in places], [found[place] for place in places])
        if again is not None:
            drawn.append(again)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Rank(value, float(low), float(high))


def coverage(forecasts: Forecasts) -> float:
    """The share of cells whose retention, held between 0 and 1, lies in its interval."""
    inside = [forecast.low <= min(max(cell.retention, 0.0), 1.0) <= forecast.high for cell, forecast in forecasts]
    return sum(inside) / len(inside)


def mean_miss(forecasts: Forecasts) -> float:
    """The mean distance of forecast and retention, the latter held between 0 and 1."""
    misses = [abs(min(max(cell.retention, 0.0), 1.0) - forecast.retention) for cell, forecast in forecasts]
    return math.fsum(misses) / len(misses)


@dataclass(frozen=True, slots=True)
class Regret:
    """What it costs to decide by a rule whether a patch is ported or trained again.

    Attributes:
        points: Accuracy that is lost against the better of the two, in points, mean over cells.
        worst: The most that is lost on one base pair, mean over its cells.
        trained: Share of cells that the rule has trained again.
        needlessly: Share of cells that it has trained again though the port was as good, within the tolerance.
    """

    points: float
    worst: float
    trained: float
    needlessly: float


def regret(
    cells: Sequence[Cell],
    ported: Mapping[tuple[str, str], float],
    retrained: Mapping[tuple[str, str], float],
    ports: Callable[[int], bool],
    *,
    tolerance: float,
) -> Regret:
    """The regret of a rule.

    Args:
        cells: What is decided on.
        ported: Accuracy of the ported patch, between 0 and 1, by base pair and patch.
        retrained: The same of one that was trained on the evolved model.
        ports: Whether the rule ports the cell of this number.
        tolerance: Accuracy by which a port may lie behind and still be as good.
    """
    lost: dict[str, list[float]] = defaultdict(list)
    trained = needless = 0
    for number, cell in enumerate(cells):
        key = (cell.pair, cell.patch)
        ports_it = ports(number)
        chosen = ported[key] if ports_it else retrained[key]
        lost[cell.pair].append(100 * (max(ported[key], retrained[key]) - chosen))
        trained += not ports_it
        needless += not ports_it and ported[key] >= retrained[key] - tolerance
    every = [points for of_pair in lost.values() for points in of_pair]
    worst = max(math.fsum(points) / len(points) for points in lost.values())
    return Regret(math.fsum(every) / len(every), worst, trained / len(cells), needless / len(cells))
