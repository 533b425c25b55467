"""Add a delta to a weight, and measure what the storage dtype keeps of it. Pure: tensors in, tensors and sums out.

Source: the delta `s·B·A` is LoRA's (Hu et al., 2021, arXiv 2106.09685, eq. 3); adding an old delta to an evolved
weight is PortLLM's (arXiv 2410.10870, eq. 6). The measures are this project's.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int32
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MergeSums:
    """Sums over elements from which the measures of a merge follow; sums of parts add up to the sum of the whole.

    With weight W, delta Δ and merged weight Q(W+Δ), rounded to the storage dtype:

    Attributes:
        delta_sq: |Δ|².
        gain: <Q(W+Δ) - W, Δ>.
        lost_sq: |Q(W+Δ) - W - Δ|².
        weight_sq: |W|².

    Example:
        >>> weight, delta = torch.ones(1, 2), torch.full((1, 2), 0.25)
        >>> sums = measure_merge(weight, delta, weight + delta)
        >>> sums.kept_gain, sums.rounding_loss, sums.relative_size
        (1.0, 0.0, 0.25)
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


def delta_rows(
    b: Float[Tensor, "rows rank"], a: Float[Tensor, "rank d_in"], *, scale: float
) -> Float[Tensor, "rows d_in"]:
    """Rows of the delta `scale · B A`, for the same rows of B, in float32 (float64 where a factor is).

    Example:
        >>> delta_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), scale=0.5)
        tensor([[1.5000, 2.0000],
                [3.0000, 4.0000]])
    """
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (b.to(dtype) @ a.to(dtype)).mul_(scale)


def add_rounded(
    weight: Float[Tensor, "rows d_in"], delta: Float[Tensor, "rows d_in"], *, dtype: torch.dtype
) -> Float[Tensor, "rows d_in"]:
    """`Q(W + Δ)`: the sum in float32 (float64 where either is), rounded once, to nearest even, to `dtype`.

    Example:
        >>> weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
        >>> add_rounded(weight, torch.tensor([[0.01]]), dtype=torch.bfloat16)
        tensor([[1.0078]], dtype=torch.bfloat16)
    """
    working = torch.float64 if torch.float64 in (weight.dtype, delta.dtype) else torch.float32
    return (weight.to(working) + delta.to(working)).to(dtype)


def add_stochastic(
    weight: Float[Tensor, "rows d_in"], delta: Float[Tensor, "rows d_in"], *, noise: Int32[Tensor, "rows d_in"]
) -> BFloat16[Tensor, "rows d_in"]:
    """`Q(W + Δ)` in bfloat16, rounded up or down with the probability that keeps the expected value exact.

    The sum is taken in float32; `noise`, uniform in [0, 2^16), is added to the half of its bits that bfloat16 drops
    before they are cut off, so a value a quarter of the way to the next one goes there once in four times.

    Source: stochastic rounding as in Croci et al., 2022 (https://doi.org/10.1098/rsos.211631), mode 1.

    Example:
        >>> one, step = torch.ones(1, 4, dtype=torch.bfloat16), torch.full((1, 4), 2.0**-9)
        >>> add_stochastic(one, step, noise=torch.tensor([[0, 49151, 49152, 65535]], dtype=torch.int32))
        tensor([[1.0000, 1.0000, 1.0078, 1.0078]], dtype=torch.bfloat16)
    """
    bits = (weight.float() + delta.float()).view(torch.int32)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def measure_merge(
    weight: Float[Tensor, "rows d_in"], delta: Float[Tensor, "rows d_in"], merged: Float[Tensor, "rows d_in"]
) -> MergeSums:
    """The sums of one block of rows, accumulated in float64."""
    exact = weight.double()
    delta = delta.double()
    change = merged.double() - exact
    return MergeSums(
        delta_sq=_dot(delta, delta),
        gain=_dot(change, delta),
        lost_sq=_dot(change - delta, change - delta),
        weight_sq=_dot(exact, exact),
    )


def _dot(left: Tensor, right: Tensor) -> float:
    return torch.dot(left.reshape(-1), right.reshape(-1)).item()
