"""The sums of drift over whole tensors, at the speed of memory. Pure: numpy arrays in, sums out.

Of weights in bfloat16 a loop in C takes the sums in one pass, where it was built (`portllm.native`). All others are
brought to float32 block by block, in buffers that stay in the processor's cache. The three sums

    |W0|²,   |D|²,   <W0, D>      with D = W1 - W0

are float32 dot products over `DOT` elements (in C over half as many), which are added in float64, in their order.
`<W0, W1>` and `|W1|²` follow from them, so that nothing is lost where the drift is small: D is formed element by
element, not from sums.

Error: bfloat16 and float16 are exact in float32, and the difference of two of them is rounded once, by 2^-24 at most. A
dot product of n terms in k lanes errs by at most (n/k + k)·2^-24 of the sum of the terms' sizes: 3.1·10^-5 for n = 2^13
and the 16 lanes of one vector, where no rounding makes up for another. The tests hold it to 1e-5 of float64; what is
told apart by it are percents. A dot product that short is made by one thread of the BLAS, so that the same block gives
the same bits; whoever shares blocks among threads adds their sums in order.

numpy and not torch, whose import alone takes longer than reading a small model: the passes cost the same in both.
"""

import numpy as np

from portllm.arrays import Float32, Shaped
from portllm.measures.drift import DriftSums
from portllm.native import kernels

BLOCK = 1 << 17
"""Elements that are brought to float32 at once: two buffers of this size fit into a core's cache."""

DOT = 1 << 13
"""Elements of a dot product."""


def widen(stored: Shaped[np.ndarray, "*shape"], out: Float32[np.ndarray, "*shape"]) -> None:
    """Write the float32 values of a stored weight to `out`; uint16 are the bits of bfloat16.

    Example:
        >>> out = np.empty(2, np.float32)
        >>> widen(np.array([0x3F80, 0x4000], np.uint16), out)
        >>> out.tolist()
        [1.0, 2.0]
    """
    if stored.dtype != np.uint16:
        np.copyto(out, stored, casting="same_kind")
        return
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, 16, out=bits)


class DriftKernel:
    """Buffers for one thread's blocks; `measure` reuses them."""

    def __init__(self) -> None:
        self._base = np.empty(BLOCK, np.float32)
        self._drift = np.empty(BLOCK, np.float32)

    def measure(self, base: Shaped[np.ndarray, " n"], evolved: Shaped[np.ndarray, " n"]) -> DriftSums:
        """The sums over two parts of the same weight, in one dimension, each as it is stored, bfloat16 as uint16.

        Example:
            >>> DriftKernel().measure(np.array([3.0, 4.0]), np.array([3.0, 4.5])).drift_sq
            0.25
        """
        if kernels is not None and base.dtype == evolved.dtype == np.uint16:
            return _sums(*kernels.drift(base, evolved))
        base_sq = drift_sq = cross = 0.0
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number shows in the sums
            for start in range(0, len(base), BLOCK):
                w0, drift = self._block(base[start : start + BLOCK], evolved[start : start + BLOCK])
                base_sq += _dot(w0, w0)
                drift_sq += _dot(drift, drift)
                cross += _dot(w0, drift)
        return _sums(base_sq, drift_sq, cross)

    def _block(
        self, base: Shaped[np.ndarray, " n"], evolved: Shaped[np.ndarray, " n"]
    ) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        w0, drift = self._base[: len(base)], self._drift[: len(base)]
        widen(base, w0)
        widen(evolved, drift)
        np.subtract(drift, w0, out=drift)
        return w0, drift


def _sums(base_sq: float, drift_sq: float, cross: float) -> DriftSums:
    return DriftSums(base_sq, drift_sq, base_sq + cross, base_sq + 2 * cross + drift_sq)


def _dot(a: Float32[np.ndarray, " n"], b: Float32[np.ndarray, " n"]) -> float:
    whole = len(a) // DOT * DOT
    parts = np.vecdot(a[:whole].reshape(-1, DOT), b[:whole].reshape(-1, DOT))
    return float(parts.sum(dtype=np.float64)) + float(np.vecdot(a[whole:], b[whole:]))
