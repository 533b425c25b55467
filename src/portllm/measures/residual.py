"""The port residual: what a retrained delta has beyond the ported one. Pure; in float64, from the factors alone.

With ported delta `Δ = s·B·A` and retrained delta `Δ' = s'·B'·A'`, the residual is one product of stacked factors,

    R = Δ' - Δ = [s'B'  -sB] [A'; A],

so its rank is at most the sum of both ranks, and two thin QRs and a small SVD give all its singular values; the dense
product is never formed. The paper's Lemma bounds this rank; that R is small is a claim of its own, which its Table 1
supports by measuring (PortLLM, arXiv 2410.10870, section 3.3). Angles between the spaces that both deltas
write to (columns of B) and read from (rows of A) are the arc cosines of the singular values of the product of their
bases (Björck and Golub, 1973, https://doi.org/10.1090/S0025-5718-1973-0348991-3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float64
from portllm.linalg import Svd, product_svd
from portllm.patch.delta import LowRankDelta

FLOOR = 8
"""Units of float32 roundoff, relative to the norms of the factors, below which a singular value is rounding.

Factors are trained and stored in float32: two deltas that are equal in exact arithmetic differ by so much.
"""


@dataclass(frozen=True, slots=True)
class Residual:
    """Ported and retrained delta of one module, beside each other.

    Attributes:
        ported: Singular values of Δ, those that are more than rounding.
        retrained: Of Δ'.
        residual: Of R = Δ' - Δ.
        product: `<Δ, Δ'>`.
        column_cosines: Cosines of the principal angles between the column spaces, falling; as many as the smaller rank.
        row_cosines: Likewise of the row spaces.
    """

    ported: tuple[float, ...]
    retrained: tuple[float, ...]
    residual: tuple[float, ...]
    product: float
    column_cosines: tuple[float, ...]
    row_cosines: tuple[float, ...]

    @property
    def cosine(self) -> float | None:
        """`<Δ, Δ'> / (|Δ| |Δ'|)`; None where either is zero."""
        norms = math.hypot(*self.ported) * math.hypot(*self.retrained)
        return self.product / norms if norms else None


def measure_residual(ported: LowRankDelta[Tensor], retrained: LowRankDelta[Tensor]) -> Residual:
    """Compare two deltas of one weight.

    Args:
        ported: Δ, without a magnitude.
        retrained: Δ', of the same shape and without a magnitude.

    Raises:
        ValueError: The shapes differ, or a delta has a magnitude, with which it is no sum.

    Example:
        >>> b, a = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[3.0, 4.0]])
        >>> found = measure_residual(LowRankDelta(a, b, 1.0), LowRankDelta(a, b, 2.0))
        >>> found.ported, found.residual, found.cosine
        ((5.0,), (5.0,), 1.0)
    """
    if ported.shape != retrained.shape or ported.transposed != retrained.transposed:
        raise ValueError(f"deltas of shape {ported.shape} and {retrained.shape}: must belong to the same weight.")
    if ported.magnitude is not None or retrained.magnitude is not None:
        raise ValueError("a delta with a magnitude is not a sum, so its residual is not a product of factors.")
    b, a = _factors(ported)
    other_b, other_a = _factors(retrained)
    one, other = _spectrum(b, a), _spectrum(other_b, other_a)
    return Residual(
        ported=_values(one),
        retrained=_values(other),
        residual=_values(_spectrum(torch.cat([other_b, -b], dim=1), torch.cat([other_a, a]))),
        product=float(((b.T @ other_b) * (a @ other_a.T)).sum().item()),
        column_cosines=_cosines(one.u, other.u),
        row_cosines=_cosines(one.vt.T, other.vt.T),
    )


def _factors(delta: LowRankDelta[Tensor]) -> tuple[Float64[Tensor, "m rank"], Float64[Tensor, "rank n"]]:
    """B with the scale in it, and A."""
    return delta.b.double() * delta.scale, delta.a.double()


def _spectrum(b: Float64[Tensor, "m rank"], a: Float64[Tensor, "rank n"]) -> Svd:
    """The singular triplets of `B A` that are more than rounding of its terms."""
    found = product_svd(b, a)
    # What cancels between terms leaves rounding of the size of the terms, not of the sum.
    size = float((b.norm(dim=0) * a.norm(dim=1)).norm().item())
    floor = FLOOR * torch.finfo(torch.float32).eps * size
    return found.cut(int((found.s > floor).sum().item()))


def _values(svd: Svd) -> tuple[float, ...]:
    return tuple(svd.s.tolist())


def _cosines(one: Float[Tensor, "n k"], other: Float[Tensor, "n l"]) -> tuple[float, ...]:
    """Cosines of the principal angles between two spaces, given by orthonormal columns."""
    if not one.shape[1] or not other.shape[1]:
        return ()
    return tuple(torch.linalg.svdvals(one.T @ other).clamp(max=1.0).tolist())
