"""A patch against the drift: sizes, angles, and what of the drift lies where the patch works. Pure.

A low-rank delta `Δ = s·B·A` reads its input by the rows of A and writes by the columns of B. The share of the drift `D`
that lies there is `|D P_A|² / |D|²` and `|P_B D|² / |D|²`, with `P` the orthogonal projections on those spaces. Drift
that knows nothing of the patch has `rank / d_in` and `rank / d_out` of itself there, by chance.

With rows v_i that span a space and their Gram matrix `G = V Vᵀ`, brought to a diagonal of ones so that a row counts
whatever its length, `G = Q Λ Qᵀ`, the squared length of what of `X` lies in it is `|Λ^(-1/2) Qᵀ V Xᵀ|²`; directions
with an eigenvalue of rounding are left out. No basis is formed, and the product of the factors neither: the Gram
matrices of both and what `V` makes of a few rows give sizes, angles and shares.

Products of rows are float32 products over blocks of columns that are added in float64: within 1e-5 of float64
throughout. A loop in C makes them where it was built (`portllm.native`), else numpy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from portllm.arrays import Float, Float64
from portllm.measures.sums import Sums
from portllm.native import kernels

BLOCK = 1 << 10
"""Columns of a product that is added up in float64: so few that one thread of the BLAS makes it, at usual ranks."""

EPSILON = 1e-12
"""So much of a direction lets a matrix have an inverse, and changes nothing that counts."""

GRAM_FLOOR = 1e-5
"""Eigenvalues of a Gram matrix below this share of the largest are rounding of the factors."""


@dataclass(frozen=True, slots=True)
class DriftShare(Sums):
    """How much of the drift lies in a space, and how much would by chance; parts add up.

    Attributes:
        inside: Squared norm of what lies in the space.
        chance: Squared norm of what would, for drift without direction: `rank / d` of all.
        total: Squared norm of all.

    Example:
        >>> share = DriftShare(inside=2.0, chance=0.5, total=10.0)
        >>> share.share, share.by_chance
        (0.2, 0.05)
    """

    inside: float = 0.0
    chance: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float | None:
        """`|D P|² / |D|²`; None where nothing drifted or nothing was read."""
        return self.inside / self.total if self.total else None

    @property
    def by_chance(self) -> float | None:
        """What it would be by chance."""
        return self.chance / self.total if self.total else None

    @property
    def excess(self) -> float | None:
        """What of the share is more than chance, of what could be: 0.0 by chance, 1.0 where all drift lies there."""
        if self.total <= self.chance:
            return None
        return (self.inside - self.chance) / (self.total - self.chance)


@dataclass(frozen=True, slots=True)
class Alignment(Sums):
    """Sums over the same elements of patch and drift.

    Attributes:
        product: <Δ, D>.
        delta_sq: |Δ|².
        drift_sq: |D|².
    """

    product: float = 0.0
    delta_sq: float = 0.0
    drift_sq: float = 0.0

    @property
    def cosine(self) -> float | None:
        """`<Δ, D> / (|Δ| |D|)`; None where either is zero."""
        norms = math.sqrt(self.delta_sq) * math.sqrt(self.drift_sq)
        return self.product / norms if norms else None


def products(one: Float[np.ndarray, "*n r d"], other: Float[np.ndarray, "*n k d"]) -> Float64[np.ndarray, "*n r k"]:
    """The products of rows with rows, `X Yᵀ`, of one pair of matrices or of many.

    Example:
        >>> products(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[1.0, 1.0]])).tolist()
        [[7.0], [1.0]]
    """
    if kernels is None or not one.dtype == other.dtype == np.float32:
        return _products_by_blocks(one, other)
    if _has_columns(one) and not _has_columns(other):
        return products(other, one).swapaxes(-1, -2)
    if not _has_columns(other):
        one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    found = np.empty((*one.shape[:-1], other.shape[-2]))
    count = math.prod(one.shape[:-2])
    kernels.products(*(rows.reshape(count, *rows.shape[-2:]) for rows in (one, other)), found)
    return found


def _has_columns(rows: Float[np.ndarray, "*n r d"]) -> bool:
    """Whether the elements of each column lie side by side, as in factors that are stored by output."""
    return rows.strides[-2] == rows.itemsize < rows.strides[-1]


def _products_by_blocks(
    one: Float[np.ndarray, "*n r d"], other: Float[np.ndarray, "*n k d"]
) -> Float64[np.ndarray, "*n r k"]:
    width = one.shape[-1]
    whole = width // BLOCK * BLOCK
    left, right = (_blocks(rows[..., :whole]) for rows in (one, other))
    found: Float64[np.ndarray, "*n r k"] = (left @ right.swapaxes(-1, -2)).sum(axis=-3, dtype=np.float64)
    return found if whole == width else found + one[..., whole:] @ other[..., whole:].swapaxes(-1, -2)


def _blocks(rows: Float[np.ndarray, "*n r d"]) -> Float[np.ndarray, "*n blocks r block"]:
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK, BLOCK).swapaxes(-2, -3)


def gram(rows: Float[np.ndarray, "*n rank d"]) -> Float64[np.ndarray, "*n rank rank"]:
    """The products of rows with each other, `V Vᵀ`.

    Example:
        >>> gram(np.array([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    return products(rows, rows)


def shares_inside(
    inner: Float[np.ndarray, "n rank k"],
    grams: Float64[np.ndarray, "n rank rank"],
    *,
    totals: Sequence[float],
    width: int,
) -> list[DriftShare]:
    """How much of some rows `X` of the drift lies in the space that the rows of `V` span, for several of both.

    Args:
        inner: `V Xᵀ`.
        grams: `gram(V)`; where one is not finite, neither is its share.
        totals: `|X|²`.
        width: Columns of all.

    Example:
        >>> rows, drift = np.array([[[2.0, 0.0, 0.0]]]), np.array([[[3.0, 4.0, 0.0]]])
        >>> round(shares_inside(products(rows, drift), gram(rows), totals=[25.0], width=3)[0].share, 6)
        0.36
    """
    lengths = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))[..., None]
    lengths = np.where(lengths > 0, lengths, 1.0)  # a row of zeros spans nothing
    angles = grams / (lengths * lengths.swapaxes(-1, -2))
    inner = inner / lengths
    rank = grams.shape[-1]
    inverse = np.linalg.inv(angles + EPSILON * np.eye(rank))
    # No eigenvalue is smaller than one through the trace, and none larger than the rank.
    if (GRAM_FLOOR * rank * np.trace(inverse, axis1=-2, axis2=-1) < 1).all():
        inside, counts = _dots(inner, inverse @ inner), [rank] * len(grams)
    else:
        is_finite = np.isfinite(angles).all(axis=(-1, -2))[:, None]
        values, vectors = np.linalg.eigh(np.where(is_finite[..., None], angles, 0.0))
        kept = values > GRAM_FLOOR * values[:, -1:]
        weights = np.divide(1.0, values, out=np.where(is_finite, 0.0, np.full_like(values, np.nan)), where=kept)
        found = vectors.swapaxes(-1, -2) @ inner
        inside, counts = _dots(found, weights[..., None] * found), kept.sum(axis=-1).tolist()
    return [
        DriftShare(part, total * count / width, total)
        for part, count, total in zip(inside, counts, totals, strict=True)
    ]


def align(delta: Float[np.ndarray, "k d"], drift: Float[np.ndarray, "k d"]) -> Alignment:
    """The sums over some rows of a delta and of the drift.

    Example:
        >>> align(np.array([[1.0, 0.0]]), np.array([[2.0, 2.0]])).cosine
        0.7071067811865475
    """
    one, other = delta.astype(np.float64), drift.astype(np.float64, copy=False)
    return Alignment(_dot(one, other), square(one), square(other))


def product_squares(
    left: Float64[np.ndarray, "n rank rank"], right: Float64[np.ndarray, "n rank rank"]
) -> Float64[np.ndarray, " n"]:
    """`|B A|²` without the products, from the Gram matrices of B's columns and A's rows: `tr((Bᵀ B)(A Aᵀ))`.

    Example:
        >>> product_squares(gram(np.array([[[3.0, 4.0]]])), gram(np.array([[[0.0, 2.0]]]))).tolist()
        [100.0]
    """
    return np.maximum(_dots(left, right), 0.0)  # NaN stays


def square(values: Float[np.ndarray, "k d"]) -> float:
    """`|X|²`, in float64."""
    wide = values.astype(np.float64, copy=False)
    return _dot(wide, wide)


def _dots(one: Float[np.ndarray, "n r k"], other: Float[np.ndarray, "n r k"]) -> list[float]:
    dots: list[float] = np.vecdot(one.reshape(len(one), -1), other.reshape(len(other), -1)).tolist()
    return dots


def _dot(one: Float[np.ndarray, "k d"], other: Float[np.ndarray, "k d"]) -> float:
    """`<X, Y>`; einsum sums in one order, BLAS in one that depends on its threads."""
    return float(np.einsum("ij,ij->", one, other))
