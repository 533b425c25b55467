"""A patch against the drift: sizes, angles, and what of the drift lies where the patch works. Pure numpy.

A low-rank delta `Δ = s·B·A` reads its input by the rows of A and writes by the columns of B. The share of the drift `D`
that lies there is `|D P_A|² / |D|²` and `|P_B D|² / |D|²`, with `P` the orthogonal projections on those spaces. Drift
that knows nothing of the patch has `rank / d_in` and `rank / d_out` of itself there, by chance.

With rows v_i that span a space and their Gram matrix `G = V Vᵀ = Q Λ Qᵀ`, the squared length of what of `X` lies in it
is `|Λ^(-1/2) Qᵀ V Xᵀ|²`; directions with an eigenvalue of rounding are left out. No basis is formed: the work is that
of a thin product. Factors are taken in float64.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

GRAM_FLOOR = 1e-12
"""Eigenvalues of a Gram matrix below this share of the largest are rounding of the factors."""


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the drift lies in a space, and how much would by chance; parts add up.

    Attributes:
        inside: Squared norm of what lies in the space.
        chance: Squared norm of what would, for drift without direction: `rank / d` of all.
        total: Squared norm of all.

    Example:
        >>> share = Share(inside=2.0, chance=0.5, total=10.0)
        >>> share.share, share.by_chance
        (0.2, 0.05)
    """

    inside: float = 0.0
    chance: float = 0.0
    total: float = 0.0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.inside + other.inside, self.chance + other.chance, self.total + other.total)

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
class Alignment:
    """Sums over the same elements of patch and drift.

    Attributes:
        product: <Δ, D>.
        delta_sq: |Δ|².
        drift_sq: |D|².
    """

    product: float = 0.0
    delta_sq: float = 0.0
    drift_sq: float = 0.0

    def __add__(self, other: "Alignment") -> "Alignment":
        return Alignment(self.product + other.product, self.delta_sq + other.delta_sq, self.drift_sq + other.drift_sq)

    @property
    def cosine(self) -> float | None:
        """`<Δ, D> / (|Δ| |D|)`; None where either is zero."""
        norms = math.sqrt(self.delta_sq) * math.sqrt(self.drift_sq)
        return self.product / norms if norms else None


def share_inside(drift: Float[np.ndarray, "k d"], spanning: Float[np.ndarray, "rank d"]) -> Share:
    """How much of some rows of the drift lies in the space that other rows span.

    Example:
        >>> share_inside(np.array([[3.0, 4.0, 0.0]]), np.array([[2.0, 0.0, 0.0]])).share
        0.36
    """
    basis, rows = spanning.astype(np.float64), drift.astype(np.float64, copy=False)
    values, vectors = np.linalg.eigh(basis @ basis.T)
    kept = values > GRAM_FLOOR * max(float(values[-1]), 0.0) if len(values) else np.zeros(0, bool)
    inner = vectors[:, kept].T @ (basis @ rows.T) / np.sqrt(values[kept])[:, None]
    total = _dot(rows, rows)
    return Share(_dot(inner, inner), total * int(kept.sum()) / basis.shape[1], total)


def align(delta: Float[np.ndarray, "k d"], drift: Float[np.ndarray, "k d"]) -> Alignment:
    """The sums over some rows of a delta and of the drift.

    Example:
        >>> align(np.array([[1.0, 0.0]]), np.array([[2.0, 2.0]])).cosine
        0.7071067811865475
    """
    one, other = delta.astype(np.float64), drift.astype(np.float64, copy=False)
    return Alignment(_dot(one, other), _dot(one, one), _dot(other, other))


def product_square(b: Float[np.ndarray, "m rank"], a: Float[np.ndarray, "rank n"]) -> float:
    """`|B A|²` without the product: `tr((Bᵀ B)(A Aᵀ))`, in float64.

    Example:
        >>> product_square(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0]]))
        100.0
    """
    left, right = b.astype(np.float64), a.astype(np.float64)
    return max(_dot(left.T @ left, right @ right.T), 0.0)  # in this order, NaN stays


def _dot(one: Float[np.ndarray, "k d"], other: Float[np.ndarray, "k d"]) -> float:
    """`<X, Y>`; einsum sums in one order, BLAS in one that depends on its threads."""
    return float(np.einsum("ij,ij->", one, other))
