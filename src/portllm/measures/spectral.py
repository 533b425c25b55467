"""The largest singular value of a matrix that is only ever multiplied with. Pure.

Lanczos on `MᵀM` with full reorthogonalization (Golub and Van Loan, Matrix Computations, 4th edition, section 10.1):
after k products the largest eigenvalue θ of a k x k tridiagonal matrix estimates `|M|₂²` from below, and the residual
`ρ = β |y_k|`, which is known without another product, says that an eigenvalue of `MᵀM` lies within ρ of θ. It ends when
`ρ ≤ tolerance · θ`: then a singular value of M lies within about half the tolerance of `√θ`, relatively. That it is the
largest one is not proven but as good as certain with a random start; the error of θ itself is of the order of ρ².
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float

TOLERANCE = 1e-3
"""Residual, relative to the eigenvalue, at which it ends."""

MOST_PRODUCTS = 100
"""Products with `MᵀM` after which it ends in any case."""


@dataclass(frozen=True, slots=True)
class SpectralNorm:
    """A largest singular value and how sure it is.

    Attributes:
        value: `√θ`; never above `|M|₂` but for rounding.
        tolerance: `ρ / θ` reached: a singular value of M lies within half of it, relatively.
        products: With `MᵀM`.
    """

    value: float
    tolerance: float
    products: int


def spectral_norm(
    gram: Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]],
    size: int,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> SpectralNorm:
    """The largest singular value of a matrix M with `size` columns.

    Args:
        gram: Multiplies a float64 vector by `MᵀM`.
        size: Columns of M.
        seed: Of the first vector.
        tolerance: See above.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
        >>> round(spectral_norm(lambda x: matrix.T @ (matrix @ x), 2).value, 6)
        3.0
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = gram(basis[-1])
        diagonal.append(float((basis[-1] @ image).item()))
        known = torch.stack(basis, dim=1)
        for _ in range(2):  # once leaves rounding behind that grows with every further product
            image = image - known @ (known.T @ image)
        beta = float(image.norm().item())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        theta = max(0.0, float(values[-1].item()))
        rest = beta * abs(float(vectors[-1, -1].item()))
        if rest <= tolerance * theta or len(basis) == min(size, MOST_PRODUCTS):
            return SpectralNorm(math.sqrt(theta), rest / theta if theta else 0.0, len(basis))
        beside.append(beta)
        basis.append(image / beta)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Float[Tensor, "k k"]:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix
