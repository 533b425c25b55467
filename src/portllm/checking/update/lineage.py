"""Whether two models come from one training run, as far as their weights tell. Pure.

Weights that were trained on stay near where they were. Weights that were trained from another start have nothing in
common with them, unit by unit: their cosine is that of random vectors, which for m·n elements is 1/√(m·n), and with
equal norms their relative drift is √2. Equal shapes say nothing: Qwen2 and Qwen2.5 of 7 B parameters have the same, and
a patch of the one ruins the other (UpgradeBench, arXiv 2608.20918).

Two models that were trained on from one parent, as a base and its instruction-tuned version, look like a continuation
of each other; weights alone cannot tell which is older.
"""

from enum import StrEnum

from portllm.measures.estimate import DriftEstimate
from portllm.measures.thresholds import CONTINUATION_COSINE, INDEPENDENT_COSINE


class Lineage(StrEnum):
    """What the evolved model is to the base."""

    SAME = "same"
    """Every weight that was compared is equal."""

    CONTINUATION = "continuation"
    """Trained on from the base, or both a little from one parent."""

    SIBLING = "sibling"
    """A common origin, and since then so much training that the weights point elsewhere."""

    INDEPENDENT = "independent"
    """The same shapes, and weights that have nothing in common: another start, or units in another order."""

    UNRELATED = "unrelated"
    """Another architecture: there are no matrices of the same name and shape."""


ORDER = tuple(Lineage)
"""From the nearest to the farthest."""


def lineage_of(drift: DriftEstimate | None) -> Lineage:
    """The lineage of some weights; None stands for weights that cannot be compared at all.

    Example:
        >>> from portllm.measures.drift import DriftSums
        >>> from portllm.measures.estimate import Stratum, estimate_drift
        >>> near = DriftSums(base_sq=1.0, drift_sq=0.01, product=1.0, evolved_sq=1.01)
        >>> apart = DriftSums(base_sq=1.0, drift_sq=2.0, product=0.0, evolved_sq=1.0)
        >>> [str(lineage_of(estimate_drift([Stratum((sums,))]))) for sums in (near, apart)]
        ['continuation', 'independent']
    """
    if drift is None:
        return Lineage.UNRELATED
    if drift.sums.drift_sq == 0:
        return Lineage.SAME
    if drift.cosine.value >= CONTINUATION_COSINE.value:
        return Lineage.CONTINUATION
    return Lineage.SIBLING if drift.cosine.value >= INDEPENDENT_COSINE.value else Lineage.INDEPENDENT
