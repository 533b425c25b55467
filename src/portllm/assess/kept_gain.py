"""What a storage dtype would keep of a patch that is merged into a weight. Pure numpy; the sums are `MergeSums`."""

import numpy as np
from jaxtyping import Float32

from portllm.assess.storage import round_to
from portllm.patch.rounding import MergeSums

STORED_AS = ("BF16", "F16", "F32")
"""The dtypes that a model is stored in for use."""

TILE = 1 << 14
"""Elements that are rounded at once: 64 kB, which stay in the processor's cache."""


def measure_rounding(
    weights: Float32[np.ndarray, "n d"], deltas: Float32[np.ndarray, "n d"]
) -> list[dict[str, MergeSums]]:
    """The sums of a part of each weight W, a row, and of what is added to it, for `Q(W + Δ)` in each storage dtype.

    The sum is formed in float32, as in a merge, and rounded once; so are the products of a row.

    Example:
        >>> weights, deltas = np.ones((1, 2), np.float32), np.array([[0.001, 0.01]], np.float32)
        >>> [round(sums.kept_gain, 2) for sums in measure_rounding(weights, deltas)[0].values()]
        [0.77, 0.98, 1.0]
    """
    step = max(1, TILE // max(1, weights.shape[1]))
    tiles = (slice(start, start + step) for start in range(0, len(weights), step))
    return [sums for tile in tiles for sums in _of_tile(weights[tile], deltas[tile])]


def _of_tile(weights: Float32[np.ndarray, "n d"], deltas: Float32[np.ndarray, "n d"]) -> list[dict[str, MergeSums]]:
    merged = weights + deltas
    delta_sq, weight_sq = np.vecdot(deltas, deltas).tolist(), np.vecdot(weights, weights).tolist()
    found: list[dict[str, MergeSums]] = [{} for _ in weights]
    for dtype in STORED_AS:
        moved = round_to(merged, dtype) - weights
        lost = moved - deltas
        gain, lost_sq = np.vecdot(moved, deltas).tolist(), np.vecdot(lost, lost).tolist()
        for sums, *four in zip(found, delta_sq, gain, lost_sq, weight_sq, strict=True):
            sums[dtype] = MergeSums(*four)
    return found
