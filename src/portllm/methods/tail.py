"""Corrections of low rank at the last writer, from the answers' places alone. Pure.

The last writer adds to the state r that the last norm and the head read; u is its input. A correction `b a u` moves r.
What r should be moved by follows from the states or from the logits of the answers, and `a` and `b` from a ridge
regression of that on u, cut to its best rank.

Source: reduced-rank ridge regression, Mukherjee and Zhu (2011), Statistical Analysis and Data Mining 4(6); its use here
is this project's (docs/methods/align.md).
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from portllm.methods.ranks import Factors

BALANCE_STEPS = 200
BALANCE_TOLERANCE = 1e-9


def reduced_rank(
    u: Float[Tensor, "places d_in"],
    move: Float[Tensor, "places d"],
    weight: Float[Tensor, " places"],
    *,
    rank: int,
    rho: float,
) -> Factors:
    """The map of a rank that takes inputs nearest to the moves wanted: least `Σ w |move - b a u|² + λ |b a|²`.

    With `λ = ρ Σ w |u|² / Σ w`, and U and E the inputs and moves, each times the root of its weight. The best map of
    all ranks is `M = E' (K + λ)^-1 U` with `K = U U'`; the best of a rank is its projection on the leading eigenvectors
    of `E' (K + λ)^-1 K E`.

    Args:
        u: Inputs.
        move: What each should be taken to.
        weight: What each counts.
        rank: Of the map; no more than there are places.
        rho: Ridge, as a share of the mean square of an input.
    """
    root = weight.double().sqrt()[:, None]
    left, sizes, right = torch.linalg.svd(root * u.double(), full_matrices=False)
    penalty = rho * sizes.pow(2).sum() / weight.double().sum()
    squares = sizes.pow(2)
    kept = torch.where(squares > 0, squares / (squares + penalty).clamp(min=torch.finfo(torch.float64).tiny), squares)
    moved = (root * move.double()).T @ left
    leading = torch.linalg.svd(moved * kept.sqrt(), full_matrices=False).U[:, :rank]
    inverse = torch.where(sizes > 0, kept / sizes.clamp(min=torch.finfo(torch.float64).tiny), sizes)
    whole = (moved * inverse) @ right
    return Factors(leading.T @ whole, leading)


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


def constant(
    u: Float[Tensor, "places d_in"], wanted: Float[Tensor, " places"], weight: Float[Tensor, " places"], *, rho: float
) -> Float64[Tensor, " d_in"]:
    """The vector a with `a u` nearest to a number for each place: ridge regression, as `reduced_rank`."""
    factors = reduced_rank(u, wanted[:, None], weight, rank=1, rho=rho)
    return (factors.b @ factors.a)[0]
