"""What an update took from the inputs of a domain, given back by factors of low rank. Pure.

An update moves a weight from W0 to W1 = W0 + D, so for an input x a module says `D x` more than it did. A map M of
rank k gives most of that back on a domain, and leaves general text alone, where it solves

    min over M of rank k of  Σ_domain w |D x + M x|² + Σ_general w |M x|² + λ |M|².

With S and G the weighted products `x x'` of both and C = S + G + λ I, the best M of all ranks is `M* = -D S C^-1`, and
the best of rank k is `U U' M*`, U the leading left singular vectors of `M* C^(1/2)` (reduced-rank ridge regression, as
in `portllm.methods.tail`). D is known, so nothing is fitted to noise, however few the inputs. Only the leading
directions of the domain's inputs are looked among: of others D is not undone.

Source: reduced-rank ridge regression, Mukherjee and Zhu (2011), Statistical Analysis and Data Mining 4(6); its use on
the difference of two checkpoints is this project's (docs/methods/align.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float32, Float64
from portllm.methods.ranks import Factors

SPAN = 256
"""Leading directions of the domain's inputs that are looked among."""

SUBSPACE_STEPS = 2

RIDGE = 0.01
"""λ, as a share of the domain's mean square in these directions."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """Inputs of some tokens, and what each counts."""

    x: Float[Tensor, "tokens d_in"]
    weight: Float[Tensor, " tokens"]


@dataclass(frozen=True, slots=True)
class Span:
    """The inputs of modules that are given the same, in the leading directions of a domain.

    Attributes:
        basis: These directions, orthonormal.
        here: S, in them.
        lower: Cholesky factor of C, in them.
    """

    basis: Float[Tensor, "d_in n"]
    here: Float64[Tensor, "n n"]
    lower: Float64[Tensor, "n n"]

    @classmethod
    def of(cls, domain: Sequence[Weighted], general: Sequence[Weighted]) -> "Span":
        """Of what the domain and general text give, some tokens at a time; there may be no general text."""
        basis = leading_directions(domain, SPAN)
        here, there = _products(domain, basis), _products(general, basis)
        ridge = max(RIDGE * float(here.trace()) / len(here), torch.finfo(torch.float64).tiny)
        return cls(basis, here, torch.linalg.cholesky(here + there + ridge * torch.eye(len(here), dtype=here.dtype)))

    def undoing(self, drift: Float32[Tensor, "d_out d_in"], count: int) -> Factors:
        """Factors of the map that undoes a drift on the domain and does nothing on general text.

        Args:
            drift: D.
            count: Rank k; no more than inputs are wide. Where a lower one does it, the last factors are zeros.

        Example:
            >>> seen = Weighted(torch.tensor([[1.0, 0.0]]), torch.ones(1))
            >>> factors = Span.of([seen], []).undoing(torch.eye(2), 1)
            >>> (factors.b @ factors.a).diag()  # of what the domain has, up to the ridge; of what it lacks, nothing
            tensor([-0.9950,  0.0000])
        """
        best = -torch.cholesky_solve(self.here @ (drift @ self.basis).double().T, self.lower).T
        seen = best @ self.lower
        squares, vectors = torch.linalg.eigh(seen.T @ seen)
        found = squares.flip(0)[:count]
        there_is = found > len(found) * torch.finfo(torch.float64).eps * found[:1].clamp(min=0)
        left = seen @ vectors.flip(1)[:, :count] * torch.where(there_is, found, torch.inf).rsqrt()
        return Factors((left.T @ best @ self.basis.T.double()).float(), left.float())


def leading_directions(inputs: Sequence[Weighted], count: int) -> Float[Tensor, "d_in n"]:
    """Orthonormal directions of about the largest squares, by subspace iteration; no more than inputs are wide."""
    first = inputs[0].x
    count = min(count, first.shape[1])
    basis = torch.randn(first.shape[1], count, generator=torch.Generator().manual_seed(0)).to(first)
    for _ in range(SUBSPACE_STEPS):
        products = (each.x.T @ (each.weight[:, None] * (each.x @ basis)) for each in inputs)
        basis = torch.linalg.qr(sum(products, torch.zeros_like(basis))).Q
    return basis


def _products(inputs: Sequence[Weighted], basis: Float[Tensor, "d_in n"]) -> Float64[Tensor, "n n"]:
    """Of what inputs have of some directions; zeros without any."""
    sums = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    for each in inputs:
        inside = (each.x @ basis).double()
        sums += inside.T @ (each.weight.double()[:, None] * inside)
    return sums
