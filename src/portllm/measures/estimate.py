"""Drift of many weights from windows of some, with its standard error. Pure.

Weights are divided into strata (a tensor, or the experts of one layer). Of each stratum some units are read, each as
likely as any other, and stand for the rest: the sums of the stratum are those of the units times `scale`. Relative
drift and cosine are functions of the estimated sums, and their variance is that of their linear part:

    Var f ≈ Σ_strata scale² · (1 - 1/scale) · m/(m - 1) · Σ_units (u - ū)²,    u = Σ_k ∂f/∂S_k · S_k(unit)

with m units in the stratum. A stratum that was read whole has scale 1 and adds nothing. Windows lie spread over a
tensor, one in each of equal parts, so the error is rather stated too large than too small.

Source: ratio estimates from stratified samples, Cochran, Sampling Techniques, 3rd edition, 1977, sections 5.3 and 6.2.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from portllm.measures.drift import DriftSums

NORMAL_95 = 1.959964
"""Standard errors on either side of a 95 % interval of a normal estimate whose error is known."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """What was read of one part of a model.

    Attributes:
        units: The sums of each window that was read.
        scale: Elements of the stratum for each one that was read; 1 where all were.
    """

    units: tuple[DriftSums, ...]
    scale: float = 1.0

    @property
    def total(self) -> DriftSums:
        """The estimated sums of the whole stratum."""
        return sum(self.units, DriftSums()).scaled(self.scale)


@dataclass(frozen=True, slots=True)
class SampledEstimate:
    """A number and how sure it is.

    Attributes:
        value: The estimate.
        error: Its standard error; 0.0 where everything was read, infinite where it cannot be told.
        freedom: Degrees of freedom of the error: how many windows it is known from.
    """

    value: float
    error: float = 0.0
    freedom: float = math.inf

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - self._reach

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + self._reach

    @property
    def _reach(self) -> float:
        """Student's quantile times the error, by its expansion in 1/freedom (Abramowitz and Stegun, 26.7.5)."""
        z, n = NORMAL_95, max(1.0, self.freedom)
        quantile = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        return quantile * self.error if self.error else 0.0


@dataclass(frozen=True, slots=True)
class DriftEstimate:
    """Drift of some weights.

    Attributes:
        relative: `|W1 - W0| / |W0|`.
        cosine: `<W0, W1> / (|W0| |W1|)`.
        sums: The sums that both follow from.
    """

    relative: SampledEstimate
    cosine: SampledEstimate
    sums: DriftSums


def estimate_drift(strata: Iterable[Stratum]) -> DriftEstimate:
    """Relative drift and cosine over all strata.

    Example:
        >>> windows = (DriftSums(4.0, 1.0, 4.0, 5.0), DriftSums(4.0, 1.2, 4.0, 5.2))
        >>> drift = estimate_drift([Stratum(windows, scale=10.0)])
        >>> round(drift.relative.value, 4), round(drift.relative.error, 4)
        (0.5244, 0.0226)
        >>> estimate_drift([Stratum(windows)]).relative.error
        0.0
    """
    strata = list(strata)
    sums = sum((stratum.total for stratum in strata), DriftSums())
    relative, cosine = sums.relative, sums.cosine
    if not sums.base_sq or not sums.evolved_sq:
        return DriftEstimate(SampledEstimate(relative), SampledEstimate(cosine), sums)
    slope = 0.5 / (relative * sums.base_sq) if relative else 0.0
    by_sum = DriftSums(base_sq=-0.5 * relative / sums.base_sq, drift_sq=slope)
    norms = math.sqrt(sums.base_sq) * math.sqrt(sums.evolved_sq)
    by_angle = DriftSums(
        base_sq=-0.5 * cosine / sums.base_sq, product=1 / norms, evolved_sq=-0.5 * cosine / sums.evolved_sq
    )
    return DriftEstimate(
        SampledEstimate(relative, *_standard_error(strata, by_sum)),
        SampledEstimate(cosine, *_standard_error(strata, by_angle)),
        sums,
    )


def _standard_error(strata: Sequence[Stratum], slopes: DriftSums) -> tuple[float, float]:
    """The standard error of a function of the sums, and its degrees of freedom (Welch and Satterthwaite's)."""
    variance = spent = 0.0
    for stratum in strata:
        if stratum.scale <= 1.0:
            continue
        n = len(stratum.units)
        if n < 2:
            return math.inf, 1.0
        parts = [
            slopes.base_sq * unit.base_sq
            + slopes.drift_sq * unit.drift_sq
            + slopes.product * unit.product
            + slopes.evolved_sq * unit.evolved_sq
            for unit in stratum.units
        ]
        mean = math.fsum(parts) / n
        spread = math.fsum((part - mean) ** 2 for part in parts)
        part = stratum.scale**2 * (1 - 1 / stratum.scale) * n / (n - 1) * spread
        variance += part
        spent += part**2 / (n - 1)
    return math.sqrt(variance), variance**2 / spent if spent else math.inf
