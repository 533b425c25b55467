"""The sums of drift over whole tensors, at the speed of memory. Pure: tensors in, sums out.

A block of both weights is brought to float32 in buffers that stay in the processor's cache, and the three sums

    |W0|²,   |D|²,   <W0, D>      with D = W1 - W0

are float32 dot products over `BLOCK` elements; blocks are added in float64, in their order. `<W0, W1>` and `|W1|²`
follow from them, so that nothing is lost where the drift is small: D is formed element by element, not as a difference
of sums.

Error: bfloat16 and float16 are exact in float32, and the difference of two of them is rounded once, by 2^-24 at most. A
dot product of n terms in k lanes errs by at most (n/k + k)·2^-24 of the sum of the terms' sizes: 2.5·10^-4 for n = 2^16
and the 16 lanes of one vector, where no rounding makes up for another. Measured it is 3·10^-6, and the tests hold it to
1e-5 of float64; what is told apart by it are percents. On one thread the same block gives the same bits; whoever shares
blocks among threads adds their sums in order.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from portllm.assess.drift import DriftSums

BLOCK = 1 << 16
"""Elements of a dot product: two float32 buffers of this size fit into a core's cache."""


class DriftKernel:
    """Buffers for one thread's blocks; `measure` reuses them."""

    def __init__(self) -> None:
        self._base = torch.empty(BLOCK)
        self._drift = torch.empty(BLOCK)

    def measure(self, base: Float[Tensor, " n"], evolved: Float[Tensor, " n"]) -> DriftSums:
        """The sums over two parts of the same weight, in one dimension.

        Example:
            >>> DriftKernel().measure(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])).drift_sq
            0.25
        """
        base_sq = drift_sq = cross = 0.0
        for start in range(0, len(base), BLOCK):
            w0, drift = self._block(base[start : start + BLOCK], evolved[start : start + BLOCK])
            base_sq += torch.dot(w0, w0).item()
            drift_sq += torch.dot(drift, drift).item()
            cross += torch.dot(w0, drift).item()
        return DriftSums(base_sq, drift_sq, base_sq + cross, base_sq + 2 * cross + drift_sq)

    def _block(
        self, base: Float[Tensor, " n"], evolved: Float[Tensor, " n"]
    ) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
        w0, drift = self._base[: len(base)], self._drift[: len(base)]
        w0.copy_(base)
        drift.copy_(evolved)
        drift.sub_(w0)
        return w0, drift
