"""Fit the factors of what writes to the residual stream, by weighted ridge regression. Pure; sums of small matrices.

At a module that writes to the residual stream, a patch adds `B A x` for each token's input `x`. Where the stream of the
new model has an error `e` there (what the old specialist has and the new model lacks), the least change of B that makes
up for it solves

    min over D of  Σ w |e - D z|² + λ |D|²,    z = A x,    λ = ρ tr(Σ w z z') / r,

whose solution needs two sums over tokens, `Σ w z z'` (r x r) and `Σ w e z'` (d x r), whatever their number.

Source: ridge regression, Hoerl and Kennard (1970), Technometrics 12(1); its use on the residual stream of a ported
patch is this project's (docs/methods/align.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float64


@dataclass
class Sums:
    """What the regression needs of the tokens that were seen so far; in float64.

    Attributes:
        zz: `Σ w z z'`.
        ez: `Σ w e z'`.
    """

    zz: Float64[Tensor, "r r"]
    ez: Float64[Tensor, "d r"]

    @classmethod
    def of(
        cls, z: Float[Tensor, "tokens r"], error: Float[Tensor, "tokens d"], weight: Float[Tensor, " tokens"]
    ) -> "Sums":
        """Of some tokens; an error counts as exactly as it is given."""
        exact, weighted = z.double(), z * weight[:, None]
        return cls(exact.T @ (exact * weight.double()[:, None]), (error.T @ weighted).double())

    def __add__(self, other: "Sums") -> "Sums":
        """Of the tokens of both."""
        return Sums(self.zz + other.zz, self.ez + other.ez)

    def beyond(self, b: Float[Tensor, "d r"]) -> "Sums":
        """Of what an error still lacks with b in force, `e - b z`.

        Example:
            >>> sums = Sums.of(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]]), torch.ones(2))
            >>> sums.beyond(torch.tensor([[1.0]])).solve(0.0)
            tensor([[2.]], dtype=torch.float64)
        """
        return Sums(self.zz, self.ez - b.double() @ self.zz)

    def solve(self, rho: float) -> Float64[Tensor, "d r"]:
        """The change D of B; zero where no token has an input.

        Args:
            rho: Ridge, as a share of the mean square of an input.

        Example:
            >>> Sums.of(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]]), torch.ones(2)).solve(0.0)
            tensor([[3.]], dtype=torch.float64)
        """
        return ridge(self.zz, self.ez, rho)


def ridge(zz: Float64[Tensor, "r r"], ez: Float64[Tensor, "d r"], rho: float) -> Float64[Tensor, "d r"]:
    """`ez (zz + λ I)^+` with `λ = ρ tr(zz) / r`; directions that no token has are left alone."""
    values, vectors = torch.linalg.eigh(zz)
    values = values.clamp(min=0)
    floor = values[-1:].sum() * len(zz) * torch.finfo(torch.float64).eps
    raised = values + rho * values.mean() if len(values) else values
    inverse = torch.where(
        values > floor, 1 / raised.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(values)
    )
    change: Tensor = (ez @ vectors) * inverse @ vectors.T
    return change
