"""What became of patches on updates that moved the weights about as far: counts, beside the fitted forecast. Pure."""

from dataclasses import dataclass

from portllm.checking.forecast_model import Shipped

ABOUT = 3.0
"""Updates from a third of the drift to three times of it count as moving the weights about as far."""

ENOUGH, HALF = 0.9, 0.5
"""Retention from which most of the gain was kept, and below which most of it was lost."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Patches that the forecast was fitted on, on updates that moved the weights about as far.

    Attributes:
        n: How many.
        kept: Of these, how many kept `ENOUGH` of retraining's gain.
        lost: How many kept less than `HALF` of it.
    """

    n: int
    kept: int
    lost: int


def seen_about(shipped: Shipped, drift: float, target: str) -> Seen:
    """How the patches fared whose weights drifted about as far.

    Args:
        shipped: What the forecast was fitted on.
        drift: Of the weights that the patch changes.
        target: `accuracy` or `loss`.
    """
    found = [
        outcome.retention[target]
        for outcome in shipped.outcomes
        if target in outcome.retention and drift / ABOUT <= outcome.drift <= drift * ABOUT
    ]
    return Seen(len(found), sum(kept >= ENOUGH for kept in found), sum(kept < HALF for kept in found))
