"""What storing a merged weight takes of the delta: sums over elements, and the measures that follow. Pure."""

import math

import msgspec


class MergeSums(msgspec.Struct, frozen=True, array_like=True):
    """Sums over elements from which the measures of a merge follow; sums of parts add up to the sum of the whole.

    With weight W, delta Δ and merged weight Q(W+Δ), rounded to the storage dtype:

    Attributes:
        delta_sq: |Δ|².
        gain: <Q(W+Δ) - W, Δ>.
        lost_sq: |Q(W+Δ) - W - Δ|².
        weight_sq: |W|².

    Example:
        >>> sums = MergeSums(delta_sq=4.0, gain=3.0, lost_sq=1.0, weight_sq=100.0)
        >>> sums.kept_gain, sums.rounding_loss, sums.relative_size
        (0.75, 0.5, 0.2)
    """

    delta_sq: float = 0.0
    gain: float = 0.0
    lost_sq: float = 0.0
    weight_sq: float = 0.0

    def __add__(self, other: "MergeSums") -> "MergeSums":
        return MergeSums(
            self.delta_sq + other.delta_sq,
            self.gain + other.gain,
            self.lost_sq + other.lost_sq,
            self.weight_sq + other.weight_sq,
        )

    @property
    def kept_gain(self) -> float:
        """`<Q(W+Δ) - W, Δ> / |Δ|²`: 1.0 when nothing is lost; 1.0 for a delta of zero."""
        return self.gain / self.delta_sq if self.delta_sq else 1.0

    @property
    def rounding_loss(self) -> float:
        """`|Q(W+Δ) - W - Δ| / |Δ|`; 0.0 for a delta of zero."""
        return math.sqrt(self.lost_sq / self.delta_sq) if self.delta_sq else 0.0

    @property
    def relative_size(self) -> float:
        """`|Δ| / |W|`; infinite for a weight of zero that a delta changes."""
        if not self.weight_sq:
            return math.inf if self.delta_sq else 0.0
        return math.sqrt(self.delta_sq / self.weight_sq)

    @property
    def is_finite(self) -> bool:
        """False when the weight, the delta or the merged weight holds an infinity or NaN."""
        return math.isfinite(self.delta_sq + self.lost_sq + self.weight_sq)
