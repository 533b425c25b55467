"""How much of a base's quantization a merge puts beside the patch: sums over elements, and the measure. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from portllm.measures.sums import Sums

BROKE_MODELS = 10.0
"""From this ratio on, merged models were seen to break (unsloth-zoo pull request 810: 10 to 150 on Falcon-H1)."""


@dataclass(frozen=True, slots=True)
class GapSums(Sums):
    """Sums over elements of one tensor.

    The deltas Δ were fitted to D = dequant(quant(W)), and the merge adds them to W. So beside Δ it adds q = W - D,
    which the training never saw.

    Attributes:
        gap_sq: |q|².
        delta_sq: |Δ|².

    Example:
        >>> GapSums(gap_sq=9.0, delta_sq=4.0).ratio
        1.5
    """

    gap_sq: float = 0.0
    delta_sq: float = 0.0

    @property
    def ratio(self) -> float:
        """`|q| / |Δ|`; infinite for a delta of zero beside a gap."""
        if not self.delta_sq:
            return math.inf if self.gap_sq else 0.0
        return math.sqrt(self.gap_sq / self.delta_sq)


@dataclass(frozen=True, slots=True)
class QuantizationGap:
    """The measure of a whole merge.

    Attributes:
        scheme: How the weights that the deltas were fitted to are quantized.
        source: Where these weights were had from, for people.
        tensors: The sums of each changed tensor that was quantized, by name.
    """

    scheme: str
    source: str
    tensors: Mapping[str, GapSums] = field(default_factory=dict)

    @property
    def total(self) -> GapSums:
        """The sums over all these tensors."""
        return sum(self.tensors.values(), GapSums())

    @property
    def worst(self) -> str | None:
        """The tensor of the largest ratio."""
        return max(self.tensors, key=lambda name: self.tensors[name].ratio, default=None)

    @property
    def dominates(self) -> bool:
        """Whether the gap is so much larger than the patch that merged models were seen to break."""
        return self.total.ratio >= BROKE_MODELS
