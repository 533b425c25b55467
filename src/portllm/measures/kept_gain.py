"""What a storage dtype would keep of a patch that is merged into a weight. Pure; the sums are `MergeSums`.

A loop in C takes the sums in one pass, where it was built (`portllm.native`); else numpy does, tile by tile.
"""

import numpy as np

from portllm.arrays import Float32
from portllm.native import kernels
from portllm.patch.rounding import MergeSums
from portllm.tensors.rounding import round_to

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
    sums = np.empty((len(weights), 2 + 2 * len(STORED_AS)))
    if kernels is None:
        step = max(1, TILE // max(1, weights.shape[1]))
        for start in range(0, len(weights), step):
            tile = slice(start, start + step)
            sums[tile] = _of_tile(weights[tile], deltas[tile])
    else:
        weights, deltas = (np.ascontiguousarray(values, np.float32) for values in (weights, deltas))
        kernels.rounding(weights, deltas, sums, len(weights))
    return [
        {
            dtype: MergeSums(delta_sq, gain, lost_sq, weight_sq)
            for dtype, gain, lost_sq in zip(STORED_AS, of_dtypes[::2], of_dtypes[1::2], strict=True)
        }
        for delta_sq, weight_sq, *of_dtypes in sums.tolist()
    ]


def _of_tile(weights: Float32[np.ndarray, "n d"], deltas: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n 8"]:
    """|Δ|² and |W|², then gain and loss in each dtype."""
    merged = weights + deltas
    sums = [np.vecdot(deltas, deltas), np.vecdot(weights, weights)]
    for dtype in STORED_AS:
        moved = round_to(merged, dtype) - weights
        lost = moved - deltas
        sums += [np.vecdot(moved, deltas), np.vecdot(lost, lost)]
    return np.stack(sums, axis=-1)
