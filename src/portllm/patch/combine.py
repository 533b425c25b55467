"""Several deltas of one weight into one. Pure: tensors in, tensors out, seeds as arguments.

The exact sum needs no arithmetic on dense weights: factors stand side by side and ranks add up. A smaller rank comes
from two thin QRs of the factors, never from their product. TIES and DARE choose element by element, so these two do
make the product, of one module at a time, and what they choose is cut to a rank again.

Source: TIES from Yadav et al., 2023 (arXiv 2306.01708), with weights as in PEFT's `ties`; DARE from Yu et al., 2023
(arXiv 2311.03099).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from portllm.arrays import Bool, Float
from portllm.linalg import Svd, frobenius, product_svd, working_dtype
from portllm.patch.capture import Captured, split_evenly, truncate
from portllm.patch.delta import LowRankDelta
from portllm.patch.merge import delta_rows

Selection = Literal["ties", "dare"]
"""Ways to choose among the elements of dense deltas."""

FLOOR = 8
"""Units of roundoff, relative to the norms of both factors, below which a singular value is nothing but rounding."""


def concatenate(deltas: Sequence[LowRankDelta[Tensor]], *, weights: Sequence[float]) -> LowRankDelta[Tensor]:
    """`Σ w_i Δ_i` exactly: `B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]`, `A = [A_1; A_2; ...]`, scale 1, ranks added up.

    In float32 (float64 where a factor is); the one rounding is that of `w_i s_i B_i`.

    Example:
        >>> delta = LowRankDelta(a=torch.ones(1, 2), b=torch.ones(3, 1), scale=0.5)
        >>> combined = concatenate([delta, delta], weights=[1.0, 3.0])
        >>> combined.b @ combined.a
        tensor([[2., 2.],
                [2., 2.],
                [2., 2.]])
    """
    dtype = working_dtype(*(factor for delta in deltas for factor in (delta.a, delta.b)))
    scaled = [delta.b.to(dtype) * (weight * delta.scale) for delta, weight in zip(deltas, weights, strict=True)]
    return LowRankDelta(a=torch.cat([delta.a.to(dtype) for delta in deltas]), b=torch.cat(scaled, dim=1), scale=1.0)


def rerank(delta: LowRankDelta[Tensor], *, rank: int | None = None) -> Captured:
    """The closest delta of a smaller rank, from thin QRs of the factors.

    Args:
        delta: What to cut; its factors are multiplied out nowhere.
        rank: Directions to keep; None keeps all that are more than rounding, which loses nothing and drops what
            parallel deltas share.

    Example:
        >>> a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> rerank(LowRankDelta(a=a, b=torch.eye(2), scale=1.0)).rank
        1
    """
    found = product_svd(delta.b, delta.a)
    scaled = Svd(found.u, found.s * abs(delta.scale), found.vt if delta.scale >= 0 else -found.vt)
    squares = scaled.s.double().square()
    # What cancels between deltas leaves rounding of the size of the factors, not of the product.
    size = abs(delta.scale) * frobenius(delta.a) * frobenius(delta.b)
    above = scaled.cut(int((scaled.s > FLOOR * torch.finfo(scaled.s.dtype).eps * size).sum().item()))
    kept = above if rank is None else above.cut(rank)
    total, rest = (float(part.sum().item()) for part in (squares, squares[len(kept.s) :]))
    return Captured(split_evenly(kept) if len(kept.s) else None, total, rest, 0.0)


def select(
    deltas: Sequence[LowRankDelta[Tensor]],
    *,
    weights: Sequence[float],
    method: Selection,
    density: float,
    rank: int,
    seed: int = 0,
    name: str = "",
) -> Captured:
    """Dense deltas combined by TIES or DARE, cut to a rank again.

    Args:
        deltas: Of one weight.
        weights: One for each.
        method: See `ties` and `dare`.
        density: Share of each delta's elements that takes part.
        rank: Of the result.
        seed: Of DARE's draws and of the randomized decomposition.
        name: Of the module, so that no two draw alike.
    """
    dense = [delta_rows(delta.b, delta.a, scale=delta.scale) for delta in deltas]
    chosen = (
        ties(dense, weights=weights, density=density)
        if method == "ties"
        else dare(dense, weights=weights, density=density, seed=seed, name=name)
    )
    return truncate(chosen, rank=rank, seed=seed)


def ties(
    deltas: Sequence[Float[Tensor, "d_out d_in"]], *, weights: Sequence[float], density: float
) -> Float[Tensor, "d_out d_in"]:
    """Trim, elect a sign, and average those that agree with it.

    Of each delta the `density` share of largest magnitude is kept. For each element the sign of `Σ w_i Δ_i` is
    elected; the result is the sum of the `w_i Δ_i` of that sign, divided by how many there are.

    Example:
        >>> deltas = [torch.tensor([[4.0, 1.0]]), torch.tensor([[-1.0, 3.0]]), torch.tensor([[2.0, 0.0]])]
        >>> ties(deltas, weights=[1.0, 1.0, 1.0], density=1.0)
        tensor([[3., 2.]])
    """
    # Two passes, so that no more than one trimmed delta is in memory beside the sums.
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(trim(delta, density=density), alpha=weight)
    elected = total.sign_()
    agreeing = torch.zeros_like(deltas[0])
    count = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = trim(delta, density=density).mul_(weight)
        agrees = (weighted.sign() == elected) & (elected != 0)
        agreeing += weighted.mul_(agrees)
        count += agrees
    return agreeing.div_(count.clamp_(min=1))


def trim(delta: Float[Tensor, "d_out d_in"], *, density: float) -> Float[Tensor, "d_out d_in"]:
    """A delta with all but its largest elements zero: `⌊density · n⌋` of its n elements are kept.

    Of elements of equal magnitude the first are kept.

    Example:
        >>> trim(torch.tensor([[3.0, -4.0, 1.0, 4.0]]), density=0.5)
        tensor([[ 0., -4.,  0.,  4.]])
    """
    kept = int(density * delta.numel())
    if kept >= delta.numel():
        return delta.clone()
    flat = delta.reshape(-1)
    order = flat.abs().sort(descending=True, stable=True).indices[:kept]
    trimmed = torch.zeros_like(flat)
    trimmed[order] = flat[order]
    return trimmed.reshape(delta.shape)


def dare(
    deltas: Sequence[Float[Tensor, "d_out d_in"]],
    *,
    weights: Sequence[float],
    density: float,
    seed: int = 0,
    name: str = "",
) -> Float[Tensor, "d_out d_in"]:
    """Drop elements at random and scale up the others: `Σ w_i (m_i ⊙ Δ_i) / density`, each `m_i` one in `density`.

    The expected value is `Σ w_i Δ_i`.

    Example:
        >>> dare([torch.ones(2, 3)], weights=[2.0], density=1.0)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    total = torch.zeros_like(deltas[0])
    for number, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        kept = drawn(delta, density=density, seed=seed, name=f"{name}\0{number}")
        total.add_(delta * kept, alpha=weight / density)
    return total


def drawn(delta: Float[Tensor, "d_out d_in"], *, density: float, seed: int, name: str) -> Bool[Tensor, "d_out d_in"]:
    """Which elements a draw keeps, each with probability `density`: a function of seed, name and shape alone.

    Example:
        >>> bool(drawn(torch.zeros(2, 3), density=1.0, seed=0, name="q").all())
        True
    """
    key = int.from_bytes(blake3(f"portllm dare 1\0{seed}\0{name}".encode()).digest(16), "little")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(delta.numel(), dtype=np.float32)
    return torch.from_numpy(uniform < density).reshape(delta.shape)
