"""Corrections of low rank at the last writer, from the answers' places alone. Pure.

The last writer adds to the state r that the last norm and the head read; u is its input. A correction `b a u` moves r.
What r should be moved by follows from the states or from the logits of the answers, and `a` and `b` from a ridge
regression of that on u, cut to its best rank.

Source: reduced-rank ridge regression, Mukherjee and Zhu (2011), Statistical Analysis and Data Mining 4(6); its use here
is this project's (docs/methods/align.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float, Float64
from portllm.methods.ranks import Factors

BALANCE_STEPS = 200
BALANCE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Regression:
    """Reduced-rank ridge regressions on the same inputs: their Gram matrix is taken apart once, the smaller one.

    Attributes:
        u: Inputs, each times the root of its weight.
        root: Of the weights.
        vectors: Eigenvectors of `U U'`, or of `U' U` where there are more places than inputs are wide.
        squares: Their eigenvalues.
        penalty: Ridge λ.
    """

    u: Float64[Tensor, "places d_in"]
    root: Float64[Tensor, "places 1"]
    vectors: Float64[Tensor, "n n"]
    squares: Float64[Tensor, " n"]
    penalty: Float64[Tensor, ""]

    @classmethod
    def on(cls, u: Float[Tensor, "places d_in"], weight: Float[Tensor, " places"], *, rho: float) -> "Regression":
        """On some inputs.

        Args:
            u: Inputs.
            weight: What each counts.
            rho: Ridge, as a share of the mean square of an input: `λ = ρ Σ w |u|² / Σ w`.
        """
        root = weight.double().sqrt()[:, None]
        wide = root * u.double()
        squares, vectors = torch.linalg.eigh(wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide)
        return cls(wide, root, vectors, squares.clamp(min=0), rho * wide.pow(2).sum() / weight.double().sum())

    def fit(self, move: Float[Tensor, "places d"], *, rank: int) -> Factors:
        """The map of a rank that takes inputs nearest to the moves wanted: least `Σ w |move - b a u|² + λ |b a|²`.

        With U and E the inputs and moves, each times the root of its weight, the best map of all ranks is
        `M = E' (U U' + λ)^-1 U = E' U (U' U + λ)^-1`; the best of a rank is its projection on the leading eigenvectors
        of `M (U' U + λ) M'`.

        Args:
            move: What each input should be taken to.
            rank: Of the map; no more than there are places.
        """
        is_dual = len(self.u) <= self.u.shape[1]
        floor = self.squares.sum() * len(self.squares) * torch.finfo(torch.float64).eps
        raised = (self.squares + self.penalty).clamp(min=torch.finfo(torch.float64).tiny)
        inverse = torch.where(self.squares > floor, 1 / raised, torch.zeros_like(raised))
        moved = (self.root * move.double()).T
        parts = moved @ self.vectors if is_dual else moved @ self.u @ self.vectors
        shares = self.squares * inverse if is_dual else inverse
        leading = _leading(parts * shares.sqrt(), rank)
        inputs = self.vectors.T @ self.u if is_dual else self.vectors.T
        return Factors((leading.T @ parts * inverse) @ inputs, leading)


def _leading(matrix: Float64[Tensor, "d n"], rank: int) -> Float64[Tensor, "d rank"]:
    """Its leading left singular vectors."""
    if len(matrix) <= matrix.shape[1]:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    else:
        vectors = torch.linalg.svd(matrix, full_matrices=False).U
    first: Tensor = vectors[:, :rank]
    return first


def logit_moves(
    difference: Float[Tensor, "places tokens"],
    head: Float[Tensor, "tokens width"],
    gain: Float[Tensor, " width"],
    states: Float[Tensor, "places width"],
) -> Float64[Tensor, "places width"]:
    """The least moves of states that make up for differences of some tokens' logits: `rms(r) J^+ d`.

    J are the rows `g · E_y`, centered over the tokens, since a softmax does not see what all logits share; the norm's
    `1 / rms(r)` is taken as fixed.

    Args:
        difference: Of logits, wanted minus there.
        head: Rows E_y of the head.
        gain: Weight g of the norm before it.
        states: Before the norm.
    """
    rows = gain.double() * head.double()
    rows = rows - rows.mean(dim=0)
    wanted = difference.double()
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    rms = states.double().pow(2).mean(dim=1, keepdim=True).sqrt()
    moves: Tensor = rms * (wanted @ torch.linalg.pinv(rows).T)
    return moves


def balance(
    wanted: Float[Tensor, "places tokens"], logits: Float[Tensor, "places tokens"]
) -> Float64[Tensor, " tokens"]:
    """Biases b that make the mean shares of tokens what they should be: `mean softmax(z + b) = mean p`.

    By iterative proportional fitting, `b += log(mean p / mean softmax(z + b))`, which cannot raise the divergence.

    Args:
        wanted: Shares of some tokens, summing to one at each place.
        logits: Those of the model for the same tokens.

    Example:
        >>> balance(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]])).diff()
        tensor([-1.], dtype=torch.float64)
    """
    target = wanted.double().mean(dim=0)
    bias = torch.zeros_like(target)
    for _ in range(BALANCE_STEPS):
        step = target.log() - (logits.double() + bias).softmax(dim=1).mean(dim=0).log()
        bias = bias + step
        if step.abs().max() < BALANCE_TOLERANCE:
            break
    return bias - bias.mean()


def balance_move(
    bias: Float[Tensor, " tokens"], head: Float[Tensor, "tokens width"], gain: Float[Tensor, " width"]
) -> Float64[Tensor, " width"]:
    """The least direction v with `(g · E_y) v = b_y`, up to what all tokens share."""
    rows = gain.double() * head.double()
    found: Tensor = torch.linalg.pinv(rows - rows.mean(dim=0)) @ (bias.double() - bias.double().mean())
    return found
