"""In how many directions a low-rank delta works: its singular values, from its factors alone. Pure numpy, float64."""

import numpy as np

from portllm.arrays import Float, Float64
from portllm.measures.overlap import gram

FACTOR_FLOOR = 1e-6
"""Singular values below this share of the largest are rounding: of factors in float32, and of the squares here."""


def product_values(b: Float[np.ndarray, "m rank"], a: Float[np.ndarray, "rank n"]) -> Float64[np.ndarray, " rank"]:
    """The singular values of `B A`, falling, without the product; those below `FACTOR_FLOOR` of the largest are 0.

    With the Gram matrix of the columns of B as `G = Q Λ Qᵀ`, they are the roots of the eigenvalues of
    `Λ^½ Qᵀ (A Aᵀ) Q Λ^½`. Where a factor holds no number, neither do they.

    Example:
        >>> product_values(np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])).tolist()
        [6.0, 1.0]
    """
    inner, outer = gram(b.astype(np.float64).T), gram(a.astype(np.float64))
    if not (np.isfinite(inner).all() and np.isfinite(outer).all()):
        return np.full(len(inner), np.nan)
    values, vectors = np.linalg.eigh(inner)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    found: Float64[np.ndarray, " rank"] = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ outer @ root)[::-1], 0.0))
    found[found < FACTOR_FLOOR * found.max(initial=0.0)] = 0.0
    return found
