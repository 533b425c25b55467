"""Whether a delta does to the evolved model's activations what it did to the base's. Pure numpy; in rank space.

A module reads x in the base and x' in the evolved model, at the same token of the same text. The delta `Δ = s·B·A` is
carried over as it is, so what it reads there is `A x'` and what it adds is `Δ x'`. With the Gram matrix `G = s² BᵀB`,

    <Δx, Δx'> = (A x)ᵀ G (A x'),    |Δx' - Δx|² = (A(x'-x))ᵀ G (A(x'-x)) ≤ |sB|₂² |A(x'-x)|²,    |sB|₂² = λ_max(G)

so that nothing of the width of the output is formed: vectors of the rank and one small matrix say all of it.
"""

import math
from dataclasses import dataclass

import numpy as np

from portllm.arrays import Float, Float64


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a delta reads and adds in the evolved model, beside the base; sums run over tokens.

    Attributes:
        read_cosine: The mean over tokens of `cos(A x, A x')`.
        read_ratio: `√(Σ |A x'|² / Σ |A x|²)`.
        effect_cosine: `Σ <Δx, Δx'> / √(Σ |Δx|² Σ |Δx'|²)`: tokens count by what the delta adds to them.
        effect_ratio: `√(Σ |Δx'|² / Σ |Δx|²)`.
        effect_change: `√(Σ |Δx' - Δx|² / Σ |Δx|²)`.
        change_bound: `|sB|₂ √(Σ |A(x' - x)|² / Σ |Δx|²)`, which `effect_change` cannot pass.
    """

    read_cosine: float
    read_ratio: float
    effect_cosine: float
    effect_ratio: float
    effect_change: float
    change_bound: float


def measure_fidelity(
    before: Float[np.ndarray, "tokens rank"],
    after: Float[np.ndarray, "tokens rank"],
    gram: Float[np.ndarray, "rank rank"],
) -> Fidelity | None:
    """Compare what a delta reads and adds at the same tokens in two models.

    Tokens at which it reads nothing in one of them are left out of `read_cosine`.

    Args:
        before: `A x` of each token in the base.
        after: `A x'` in the evolved model.
        gram: `G = s² BᵀB`.

    Returns:
        None where the delta adds nothing to any token of the base, or nothing to any of the evolved model's.

    Example:
        >>> read = np.array([[1.0, 0.0], [0.0, 2.0]])
        >>> found = measure_fidelity(read, 2 * read, np.eye(2))
        >>> found.read_cosine, found.effect_cosine, found.effect_ratio, found.effect_change
        (1.0, 1.0, 2.0, 1.0)
    """
    before, after = before.astype(np.float64), after.astype(np.float64)
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    values = values.clip(min=0.0)
    root = vectors * np.sqrt(values)  # |p root| is |Δx| for p = A x
    old, new = before @ root, after @ root
    old_sq, new_sq = _square(old), _square(new)
    if not old_sq or not new_sq:
        return None
    change = after - before
    return Fidelity(
        read_cosine=float(_cosines(before, after).mean()),
        read_ratio=math.sqrt(_square(after) / _square(before)),
        effect_cosine=_bounded(float(np.vdot(old, new)) / math.sqrt(old_sq * new_sq)),
        effect_ratio=math.sqrt(new_sq / old_sq),
        effect_change=math.sqrt(_square(change @ root) / old_sq),
        change_bound=math.sqrt(float(values[-1]) * _square(change) / old_sq),
    )


def _cosines(
    one: Float64[np.ndarray, "tokens rank"], other: Float64[np.ndarray, "tokens rank"]
) -> Float64[np.ndarray, " some"]:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    here = norms > 0
    cosines: Float64[np.ndarray, " some"] = ((one * other).sum(axis=1)[here] / norms[here]).clip(-1.0, 1.0)
    return cosines


def _square(values: Float64[np.ndarray, "..."]) -> float:
    return float(np.vdot(values, values))


def _bounded(cosine: float) -> float:
    """Without what rounding adds beyond 1."""
    return min(1.0, max(-1.0, cosine))
