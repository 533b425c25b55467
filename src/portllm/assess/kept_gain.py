"""What a storage dtype would keep of a patch that is merged into a weight. Pure numpy; the sums are `MergeSums`."""

import numpy as np
from jaxtyping import Float, Float32

from portllm.patch.rounding import MergeSums

STORED_AS = ("BF16", "F16", "F32")
"""The dtypes that a model is stored in for use."""


def measure_rounding(weight: Float32[np.ndarray, "k d"], delta: Float[np.ndarray, "k d"], dtype: str) -> MergeSums:
    """The sums of one part of a weight W and of what is added to it, for `Q(W + Δ)` in a storage dtype.

    The sum is formed in float32, as in a merge, and rounded once.

    Example:
        >>> weight, delta = np.ones((1, 2), np.float32), np.array([[0.001, 0.01]])
        >>> [round(measure_rounding(weight, delta, dtype).kept_gain, 2) for dtype in STORED_AS]
        [0.77, 0.98, 1.0]
    """
    change = delta.astype(np.float64)
    stored = round_to(weight + change.astype(np.float32), dtype).astype(np.float64)
    before = weight.astype(np.float64)
    lost = stored - before - change
    return MergeSums(
        delta_sq=_dot(change, change),
        gain=_dot(stored - before, change),
        lost_sq=_dot(lost, lost),
        weight_sq=_dot(before, before),
    )


def round_to(values: Float32[np.ndarray, "*shape"], dtype: str) -> Float32[np.ndarray, "*shape"]:
    """The values as a storage dtype holds them, to nearest even; what does not fit becomes infinite.

    Example:
        >>> round_to(np.array([1.00390625, 1.01171875, 70000.0], np.float32), "BF16").tolist()
        [1.0, 1.015625, 70144.0]
    """
    match dtype:
        case "BF16":  # the upper half of a float32; carrying into it what the lower half rounds to
            bits = values.view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
            return np.where(np.isfinite(values), rounded.view(np.float32), values)
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).astype(np.float32)
        case _:
            return values


def _dot(one: Float[np.ndarray, "k d"], other: Float[np.ndarray, "k d"]) -> float:
    return float(np.einsum("ij,ij->", one, other))
