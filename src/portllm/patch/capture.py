"""A low-rank delta from two weights: what to keep of their difference, and what that leaves out. Pure.

Source: the nearest matrix of a rank is the truncated singular value decomposition (Eckart and Young, 1936). How the
rank is chosen, by the noise of the two files' rounding, is this project's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float64
from portllm.linalg import Svd, randomized_svd, rank_floor, square_sum, svd_above, working_dtype
from portllm.patch.delta import LowRankDelta
from portllm.patch.noise_edge import noise_edge, rounding_variance

BLOCK_ELEMENTS = 1 << 22
"""Elements of a dense product in memory at once, when it is measured what a delta leaves out."""

SMALL_SHARE = 2.0**-10
"""Share of |D|² below which `|D|² - |B A|²` has lost too many of its digits to be |D - B A|²."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A low-rank delta, and what separates it from the difference it stands for.

    Attributes:
        delta: With scale 1; None where nothing of the difference is kept.
        difference_sq: |D|², for the difference D.
        residual_sq: |D - B A|².
        noise_edge: Singular values of D below it cannot be told from the rounding of the two files; None where that
            was not asked.
    """

    delta: LowRankDelta[Tensor] | None
    difference_sq: float
    residual_sq: float
    noise_edge: float | None

    @property
    def rank(self) -> int:
        """The delta's rank; 0 where nothing is kept."""
        return 0 if self.delta is None else self.delta.rank

    @property
    def truncation_residual(self) -> float:
        """`|D - B A| / |D|`; 0.0 for a difference of zero."""
        return (self.residual_sq / self.difference_sq) ** 0.5 if self.difference_sq else 0.0


class RoundingNoise:
    """The rounding noise of two stored weights, gathered over blocks of rows.

    Example:
        >>> noise, weight = RoundingNoise((1, 3)), torch.ones(1, 3, dtype=torch.bfloat16)
        >>> noise.add_rows(0, weight, weight)
        >>> bool((noise.rows * 12 * 2**14).round() == 6)
        True
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.rows: Float64[Tensor, " d_out"] = torch.zeros(shape[0], dtype=torch.float64)
        self.columns: Float64[Tensor, " d_in"] = torch.zeros(shape[1], dtype=torch.float64)

    def add_rows(self, start: int, base: Float[Tensor, "rows d_in"], tuned: Float[Tensor, "rows d_in"]) -> None:
        """Count rows from `start` on, in the dtypes in which they are stored."""
        variance = rounding_variance(base) + rounding_variance(tuned)
        self.rows[start : start + len(variance)] = variance.sum(dim=1)
        self.columns += variance.sum(dim=0)

    @property
    def edge(self) -> float:
        """The edge of the noise's spectrum; see `noise_edge`."""
        return noise_edge(self.rows, self.columns)


def capture_low_rank(
    base: Float[Tensor, "d_out d_in"],
    tuned: Float[Tensor, "d_out d_in"],
    *,
    rank: int | None = None,
    max_rank: int | None = None,
) -> Captured:
    """The closest delta of a rank from `base` to `tuned`, and the share it leaves out.

    With `D = tuned - base ≈ U S Vᵀ`, the delta is `B = U √S`, `A = √S Vᵀ`.

    Args:
        base: Weight that fine-tuning started from, in its storage dtype.
        tuned: The same weight after fine-tuning, in its storage dtype.
        rank: Directions to keep; None keeps those that stand above the rounding noise of the two files.
        max_rank: Keep at most so many of them.

    Example:
        >>> base = torch.zeros(2, 3)
        >>> tuned = base + torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
        >>> captured = capture_low_rank(base, tuned, rank=1)
        >>> captured.rank, captured.truncation_residual < 1e-6
        (1, True)
    """
    edge = None
    if rank is None:
        noise = RoundingNoise((base.shape[0], base.shape[1]))
        noise.add_rows(0, base, tuned)
        edge = noise.edge
    dtype = working_dtype(base, tuned)
    return truncate(tuned.to(dtype) - base.to(dtype), rank=rank, edge=edge, max_rank=max_rank)


def truncate(
    difference: Float[Tensor, "d_out d_in"],
    *,
    rank: int | None,
    edge: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
    difference_sq: float | None = None,
) -> Captured:
    """The closest delta of a rank to a dense difference.

    Args:
        difference: D.
        rank: Directions to keep; None keeps those with a singular value above `edge`, or all where there is none.
        edge: The edge of the noise.
        max_rank: Keep at most so many where `rank` is None.
        seed: Of the randomized decomposition.
        difference_sq: `|D|²`, where it is known.
    """
    difference_sq = square_sum(difference) if difference_sq is None else difference_sq
    if not difference_sq:
        return Captured(None, 0.0, 0.0, edge)
    if rank is None:
        found = svd_above(difference, threshold=edge or 0.0, max_rank=max_rank, seed=seed, total_sq=difference_sq)
    else:
        found = randomized_svd(difference, rank=rank, seed=seed, total_sq=difference_sq)
    kept = without_rounding(found, (difference.shape[0], difference.shape[1]))
    if not len(kept.s):
        return Captured(None, difference_sq, difference_sq, edge)
    delta = split_evenly(kept)
    # The triplets are those of a projection of D, so what they leave out is orthogonal to them.
    left_out_sq = difference_sq - square_sum(kept.s)
    if left_out_sq < SMALL_SHARE * difference_sq:
        left_out_sq = residual_sq(difference, delta)
    return Captured(delta, difference_sq, left_out_sq, edge)


def without_rounding(found: Svd, shape: tuple[int, int]) -> Svd:
    """The triplets but for those whose value is rounding of the computation itself."""
    return found.cut(int((found.s > rank_floor(found.s, shape=shape)).sum().item()))


def split_evenly(found: Svd) -> LowRankDelta[Tensor]:
    """`B = U √S`, `A = √S Vᵀ`, of scale 1: factors of the same norm."""
    root = found.s.sqrt()
    return LowRankDelta(a=(root[:, None] * found.vt).contiguous(), b=(found.u * root).contiguous(), scale=1.0)


def residual_sq(difference: Float[Tensor, "d_out d_in"], delta: LowRankDelta[Tensor]) -> float:
    """`|D - s·B·A|²`, in blocks of rows."""
    step = max(1, BLOCK_ELEMENTS // max(1, difference.shape[1]))
    total = 0.0
    for start in range(0, difference.shape[0], step):
        product = (delta.b[start : start + step] @ delta.a).mul_(delta.scale)
        total += square_sum(difference[start : start + step] - product)
    return total
