"""What a storage dtype would keep of a patch that is merged into a weight. Pure numpy; the sums are `MergeSums`."""

import numpy as np
from jaxtyping import Float, Float32

from portllm.assess.storage import round_to
from portllm.patch.rounding import MergeSums

STORED_AS = ("BF16", "F16", "F32")
"""The dtypes that a model is stored in for use."""


def measure_rounding(weight: Float32[np.ndarray, "k d"], delta: Float[np.ndarray, "k d"]) -> dict[str, MergeSums]:
    """The sums of one part of a weight W and of what is added to it, for `Q(W + Δ)` in each storage dtype.

    The sum is formed in float32, as in a merge, and rounded once.

    Example:
        >>> weight, delta = np.ones((1, 2), np.float32), np.array([[0.001, 0.01]])
        >>> [round(sums.kept_gain, 2) for sums in measure_rounding(weight, delta).values()]
        [0.77, 0.98, 1.0]
    """
    change, before = delta.astype(np.float64), weight.astype(np.float64)
    merged = weight + delta.astype(np.float32)
    delta_sq, weight_sq = _dot(change, change), _dot(before, before)
    found = {}
    for dtype in STORED_AS:
        moved = round_to(merged, dtype) - before
        lost = moved - change
        found[dtype] = MergeSums(delta_sq, _dot(moved, change), _dot(lost, lost), weight_sq)
    return found


def _dot(one: Float[np.ndarray, "k d"], other: Float[np.ndarray, "k d"]) -> float:
    return float(np.einsum("ij,ij->", one, other))
