"""Drift: how far an evolved weight moved from the base's. Pure: tensors in, sums out."""

import math
from dataclasses import dataclass

import numpy as np

from portllm.arrays import Float
from portllm.measures.sums import Sums


@dataclass(frozen=True, slots=True)
class DriftSums(Sums):
    """Sums over elements of base W0 and evolved W1; sums of parts add up to the sum of the whole.

    Attributes:
        base_sq: |W0|².
        drift_sq: |W1 - W0|².
        product: <W0, W1>.
        evolved_sq: |W1|².

    Example:
        >>> sums = measure_drift(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
        >>> round(sums.relative, 3), round(sums.cosine, 4)
        (0.1, 0.9985)
    """

    base_sq: float = 0.0
    drift_sq: float = 0.0
    product: float = 0.0
    evolved_sq: float = 0.0

    def scaled(self, factor: float) -> "DriftSums":
        """The sums of a whole of which these are the sums of one part in `factor`."""
        return DriftSums(factor * self.base_sq, factor * self.drift_sq, factor * self.product, factor * self.evolved_sq)

    @property
    def is_finite(self) -> bool:
        """False when a weight holds an infinity or NaN, or a value whose square is too large for the sum."""
        return math.isfinite(self.base_sq + self.drift_sq + self.product + self.evolved_sq)

    @property
    def relative(self) -> float:
        """`|W1 - W0| / |W0|`; infinite for a base of zero that moved."""
        if not self.base_sq:
            return math.inf if self.drift_sq else 0.0
        return math.sqrt(self.drift_sq / self.base_sq)

    @property
    def cosine(self) -> float:
        """`<W0, W1> / (|W0| |W1|)`; 1.0 where either is zero."""
        norms = math.sqrt(self.base_sq) * math.sqrt(self.evolved_sq)
        return self.product / norms if norms else 1.0


def measure_drift(base: Float[np.ndarray, "..."], evolved: Float[np.ndarray, "..."]) -> DriftSums:
    """The sums of one tensor, or of the same part of it in both models, accumulated in float64."""
    w0 = base.astype(np.float64).reshape(-1)
    w1 = evolved.astype(np.float64).reshape(-1)
    drift = w1 - w0
    return DriftSums(
        base_sq=float(w0 @ w0),
        drift_sq=float(drift @ drift),
        product=float(w0 @ w1),
        evolved_sq=float(w1 @ w1),
    )
