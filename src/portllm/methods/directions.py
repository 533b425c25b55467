"""Weighted of a domain told apart from those of general text: what A of further factors should read. Pure.

What is fitted along a direction that both have moves general text as well. Along a direction a that the domain has and
general text hardly, answers can be mended at little cost elsewhere. Those directions have the largest

    a S_domain a' / a (S_general + ε I) a',

with S the mean products `x' x` of the inputs. They are looked for among the leading directions of the domain alone:
others are hardly seen, and would be fitted to noise.

Source: the generalised eigenvalues of two covariances, as in Fukunaga and Koontz (1970), IEEE Transactions on Computers
19(4); its use here is this project's (docs/methods/align.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float32, Float64

SPAN = 64
"""Leading directions of the domain that are looked among."""

SUBSPACE_STEPS = 3

EPSILON = 0.1
"""What both have of every direction, as a share of their mean squares."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """Of some tokens, and what each counts."""

    x: Float[Tensor, "tokens d_in"]
    weight: Float[Tensor, " tokens"]


def domain_directions(
    domain: Sequence[Weighted], general: Sequence[Weighted], count: int
) -> Float32[Tensor, "count d_in"]:
    """Directions in which inputs of a domain are large beside those of general text, each of mean square 1 on it.

    Args:
        domain: Weighted, some tokens at a time, and what each counts.
        general: Likewise; without any, the leading directions of the domain are found.
        count: Of directions; no more than inputs are wide.
    """
    basis = leading_directions(domain, SPAN)
    here, there = _mean_products(domain, basis), _mean_products(general, basis)
    typical = (_mean_square(domain) + _mean_square(general)) / len(basis)
    floor = max(EPSILON * typical, torch.finfo(torch.float64).tiny)
    lower = torch.linalg.cholesky(there + floor * torch.eye(len(there), dtype=torch.float64))
    half = torch.linalg.solve_triangular(lower, here, upper=False)
    ratio = torch.linalg.solve_triangular(lower, half.T, upper=False)
    found = torch.linalg.eigh((ratio + ratio.T) / 2).eigenvectors.flip(1)[:, :count]
    inside = torch.linalg.solve_triangular(lower.T, found, upper=True).T
    sizes = (inside @ here * inside).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
    directions: Tensor = inside / sizes @ basis.T.double()
    return directions.float()


def leading_directions(inputs: Sequence[Weighted], count: int) -> Float[Tensor, "d_in n"]:
    """Orthonormal directions of about the largest squares, by subspace iteration; no more than inputs are wide."""
    first = inputs[0].x
    count = min(count, first.shape[1])
    basis = torch.randn(first.shape[1], count, generator=torch.Generator().manual_seed(0)).to(first)
    for _ in range(SUBSPACE_STEPS):
        products = (each.x.T @ (each.weight[:, None] * (each.x @ basis)) for each in inputs)
        basis = torch.linalg.qr(sum(products, torch.zeros_like(basis))).Q
    return basis


def _mean_products(inputs: Sequence[Weighted], basis: Float[Tensor, "d_in n"]) -> Float64[Tensor, "n n"]:
    """Of what inputs have of some directions; zeros without any."""
    sums = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    for each in inputs:
        inside = (each.x @ basis).double()
        sums += inside.T @ (each.weight.double()[:, None] * inside)
    return sums / _total(inputs)


def _mean_square(inputs: Sequence[Weighted]) -> float:
    squares = (float(each.weight.double() @ each.x.pow(2).sum(dim=1).double()) for each in inputs)
    return sum(squares) / _total(inputs)


def _total(inputs: Sequence[Weighted]) -> float:
    return sum(float(each.weight.double().sum()) for each in inputs) or 1.0
