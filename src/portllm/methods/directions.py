"""Inputs of a domain told apart from those of general text: what A of further factors should read. Pure.

What is fitted along a direction that both have moves general text as well. Along a direction a that the domain has and
general text hardly, answers can be mended at little cost elsewhere. Those directions have the largest

    a S_domain a' / a (S_general + ε I) a',

with S the mean products `x' x` of the inputs. They are looked for among the leading directions of the domain alone:
others are hardly seen, and would be fitted to noise.

Source: the generalised eigenvalues of two covariances, as in Fukunaga and Koontz (1970), IEEE Transactions on Computers
19(4); its use here is this project's (docs/methods/align.md).
"""

import torch
from torch import Tensor

from portllm.arrays import Float, Float32, Float64

SPAN = 64
"""Leading directions of the domain that are looked among."""

SUBSPACE_STEPS = 3

EPSILON = 0.1
"""What both have of every direction, as a share of their mean squares."""


def domain_directions(
    domain: Float[Tensor, "tokens d_in"],
    weight: Float[Tensor, " tokens"],
    general: Float[Tensor, "others d_in"],
    count: int,
) -> Float32[Tensor, "count d_in"]:
    """Directions in which inputs of a domain are large beside those of general text, each of mean square 1 on it.

    Args:
        domain: Inputs.
        weight: What each counts.
        general: Inputs of general text; without any, the leading directions of the domain are found.
        count: Of directions; no more than inputs are wide.
    """
    rows = domain * (weight / weight.sum()).sqrt()[:, None]
    basis = leading_directions(rows, min(SPAN, rows.shape[1]))
    here, there = _products(rows @ basis), _products(general @ basis) / max(len(general), 1)
    typical = (rows.double().pow(2).sum() + general.double().pow(2).sum() / max(len(general), 1)) / rows.shape[1]
    floor = (EPSILON * typical).clamp(min=torch.finfo(torch.float64).tiny)
    lower = torch.linalg.cholesky(there + floor * torch.eye(len(there), dtype=torch.float64))
    half = torch.linalg.solve_triangular(lower, here, upper=False)
    ratio = torch.linalg.solve_triangular(lower, half.T, upper=False)
    found = torch.linalg.eigh((ratio + ratio.T) / 2).eigenvectors.flip(1)[:, :count]
    inside = torch.linalg.solve_triangular(lower.T, found, upper=True).T
    sizes = (inside @ here * inside).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
    directions: Tensor = inside / sizes @ basis.T.double()
    return directions.float()


def leading_directions(rows: Float[Tensor, "tokens d"], count: int) -> Float[Tensor, "d count"]:
    """Orthonormal directions of about the largest squares, by subspace iteration."""
    basis = torch.randn(rows.shape[1], count, generator=torch.Generator().manual_seed(0)).to(rows)
    for _ in range(SUBSPACE_STEPS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    return basis


def _products(rows: Float[Tensor, "tokens d"]) -> Float64[Tensor, "d d"]:
    wide = rows.double()
    products: Tensor = wide.T @ wide
    return products
