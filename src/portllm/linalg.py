"""Singular values and norms of weights and of factor products. Pure: tensors in, tensors out, seeds as arguments.

Everything is computed in the dtype of its input, float32 at least. The randomized decomposition follows Halko,
Martinsson and Tropp, 2011 (https://doi.org/10.1137/090771806), algorithms 4.4 and 5.1: a few products with a thin
matrix instead of a full decomposition. How many is not set beforehand: it stops when what further products can still
find is below one percent of what is left out. `torch.linalg.svd` in float64 is the oracle of its tests.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from portllm.arrays import Float, Float64

OVERSAMPLING = 16
"""Directions sampled beyond those that are asked for."""

TOLERANCE = 0.01
"""Share of the squared residual that further products may still find; the residual is off by half as much."""

MOST_PRODUCTS = 16
"""Products with the matrix after which the decomposition ends in any case."""

SLOWEST = 0.8
"""What is still to come after a gain is taken as that of a geometric series, of this ratio at most."""

LAST_VALUE_GROWTH = 2.0
"""What the square of a sample's last value, which is always found too small, may lack."""

FIRST_RANK = 32
"""Directions of the first try where the rank is to be found."""

EXACT_SHARE = 0.4
"""Share of all directions above which the full decomposition is no slower than the randomized one."""


class Svd(NamedTuple):
    """Leading singular triplets: `M ≈ U diag(s) Vᵀ`, `s` falling.

    Attributes:
        u: Left vectors as columns; in each, the entry of largest magnitude is positive.
        s: Singular values.
        vt: Right vectors as rows.
    """

    u: Float[Tensor, "m rank"]
    s: Float[Tensor, " rank"]
    vt: Float[Tensor, "rank n"]

    def cut(self, rank: int) -> "Svd":
        """The leading `rank` triplets."""
        return Svd(self.u[:, :rank], self.s[:rank], self.vt[:rank])


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 where an input is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def frobenius(matrix: Float[Tensor, "..."]) -> float:
    """`‖M‖`, the root of the sum of squares, summed in float64.

    Example:
        >>> frobenius(torch.tensor([[3.0], [4.0]]))
        5.0
    """
    return math.sqrt(square_sum(matrix))


def square_sum(matrix: Float[Tensor, "..."]) -> float:
    """`‖M‖²`: each row in its own dtype, over rows in float64."""
    rows = matrix.reshape(len(matrix) if matrix.ndim else 1, -1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=working_dtype(matrix))
    return float(norms.double().square().sum().item())


def exact_svd(matrix: Float[Tensor, "m n"]) -> Svd:
    """All singular triplets, by LAPACK.

    Example:
        >>> exact_svd(torch.tensor([[0.0, -2.0], [1.0, 0.0]])).s
        tensor([2., 1.])
    """
    return _signed(*torch.linalg.svd(matrix.to(working_dtype(matrix)), full_matrices=False))


def randomized_svd(
    matrix: Float[Tensor, "m n"],
    *,
    rank: int,
    seed: int = 0,
    total_sq: float | None = None,
) -> Svd:
    """The leading `rank` singular triplets of a matrix, by random sampling of its range.

    A seeded normal sample of `rank + OVERSAMPLING` columns is multiplied by `M`, `Mᵀ`, `M`, ... in turn and made
    orthonormal after each product; the triplets are those of `M` in the last basis. It ends when the squared residual
    `‖M - U S Vᵀ‖²` is at most about `1 + TOLERANCE` times that of the best matrix of the rank.

    Args:
        matrix: M.
        rank: Triplets to find; all there are where it is larger.
        seed: Of the sample.
        total_sq: `‖M‖²`, where it is known.

    Raises:
        ValueError: `rank` is below 1.

    Example:
        >>> matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0]))[:, :2]
        >>> randomized_svd(matrix, rank=1).s
        tensor([9.])
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1.")
    columns = rank + OVERSAMPLING
    if columns >= EXACT_SHARE * min(matrix.shape):
        return exact_svd(matrix).cut(rank)
    matrix = matrix.to(working_dtype(matrix))
    energy = square_sum(matrix) if total_sq is None else total_sq

    def is_settled(squares: Tensor, to_come: Tensor) -> bool:
        return float(to_come[:rank].sum().item()) <= TOLERANCE * _left_out(squares, rank, energy)

    return _iterate(matrix, _sample(matrix, columns, seed), is_settled).cut(rank)


def svd_above(
    matrix: Float[Tensor, "m n"],
    *,
    threshold: float,
    max_rank: int | None = None,
    seed: int = 0,
    total_sq: float | None = None,
) -> Svd:
    """The singular triplets whose value is above a threshold, at most `max_rank` of them.

    The sample grows to twice the columns until a singular value in it falls to the threshold; what it found before
    stays in it. Sampled values are never above the true ones, so what is kept is above the threshold indeed; among
    values that lie close together, one that is above it by a hair may be missed.

    Args:
        matrix: M.
        threshold: What is kept lies above it.
        max_rank: Keep at most so many.
        seed: Of the sample.
        total_sq: `‖M‖²`, where it is known.

    Example:
        >>> matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
        >>> svd_above(matrix, threshold=2.0).s
        tensor([9., 4.])
    """
    most = min(matrix.shape) if max_rank is None else min(max_rank, *matrix.shape)
    matrix = matrix.to(working_dtype(matrix))
    energy = square_sum(matrix) if total_sq is None else total_sq
    rank = min(FIRST_RANK, most)
    known: Tensor = matrix.new_empty((matrix.shape[1], 0))

    def above(values: Tensor) -> int:
        return min(rank, int((values > threshold).sum().item()))

    def is_settled(squares: Tensor, to_come: Tensor) -> bool:
        kept = above(squares.sqrt())
        if kept == rank < most:  # there are more: the sample has to grow
            return True
        may_pass = kept < rank and float((squares + to_come)[kept].item()) > threshold**2
        return not may_pass and float(to_come[:kept].sum().item()) <= TOLERANCE * _left_out(squares, kept, energy)

    while rank + OVERSAMPLING < EXACT_SHARE * min(matrix.shape):
        fresh = _sample(matrix, rank + OVERSAMPLING - known.shape[1], seed)
        found = _iterate(matrix, torch.cat([known, fresh], dim=1), is_settled)
        if above(found.s) < rank or rank == most:
            return found.cut(above(found.s))
        rank, known = min(2 * rank, most), found.vt.T
    found, rank = exact_svd(matrix), most
    return found.cut(above(found.s))


def product_svd(b: Float[Tensor, "m rank"], a: Float[Tensor, "rank n"]) -> Svd:
    """All singular triplets of `B A` that its rank allows, without the product: two thin QRs and a small SVD.

    With `B = Q_b R_b` and `Aᵀ = Q_a R_a`, `B A = Q_b (R_b R_aᵀ) Q_aᵀ`, and the matrix in the middle is small.

    Example:
        >>> product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]])).s
        tensor([10.])
    """
    dtype = working_dtype(b, a)
    q_b, r_b = torch.linalg.qr(b.to(dtype))
    q_a, r_a = torch.linalg.qr(a.to(dtype).T)
    inner_u, s, inner_vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _signed(q_b @ inner_u, s, inner_vt @ q_a.T)


def rank_floor(s: Float[Tensor, " rank"], *, shape: tuple[int, int]) -> float:
    """The singular value below which nothing but rounding is left: `max(shape) · ε · s_1`, as in `matrix_rank`.

    Example:
        >>> rank_floor(torch.tensor([1.0]), shape=(1, 8)) == 8 * 2.0**-23
        True
    """
    return max(shape) * torch.finfo(s.dtype).eps * float(s[0].item()) if len(s) else 0.0


def _sample(matrix: Float[Tensor, "m n"], columns: int, seed: int) -> Float[Tensor, "n columns"]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    return sample.to(matrix.device)


def _iterate(
    matrix: Float[Tensor, "m n"], sample: Float[Tensor, "n columns"], is_settled: Callable[[Tensor, Tensor], bool]
) -> Svd:
    """Triplets of a matrix in the span of a sample, which products with it sharpen until `is_settled`.

    The left vectors of `M V Vᵀ` are the next basis `U`, the right ones of `U Uᵀ M` the next `V`, and so on. No singular
    value falls on the way, as those of `Uᵀ M` are at least those of `Uᵀ M V Vᵀ`: every product can only add to what is
    found.

    Args:
        matrix: M.
        sample: Where to begin.
        is_settled: Told the squares of the values, and what further products may add to each.
    """
    found = _within_rows(matrix, torch.linalg.qr(matrix @ sample).Q)
    squares = found.s.double().square()
    for number in range(MOST_PRODUCTS - 2):
        found = _within_rows(matrix, found.u) if number % 2 else _within_columns(matrix, found.vt.T)
        before, squares = squares, found.s.double().square()
        floor = rank_floor(found.s, shape=(matrix.shape[0], matrix.shape[1]))
        if is_settled(squares, _to_come(before, squares, floor=floor)):
            break
    return _signed(*found)


def _within_columns(matrix: Float[Tensor, "m n"], right: Float[Tensor, "n k"]) -> Svd:
    """The triplets of `M V Vᵀ`, for a basis `V`."""
    left, triangle = torch.linalg.qr(matrix @ right)
    u, s, vt = torch.linalg.svd(triangle)
    return Svd(left @ u, s, vt @ right.T)


def _within_rows(matrix: Float[Tensor, "m n"], left: Float[Tensor, "m k"]) -> Svd:
    """The triplets of `U Uᵀ M`, for a basis `U`."""
    # Of the two forms of the product this one is twice as fast.
    right, triangle = torch.linalg.qr((left.T @ matrix).T)
    u, s, vt = torch.linalg.svd(triangle.T)
    return Svd(left @ u, s, vt @ right.T)


def _to_come(
    before: Float64[Tensor, " columns"], now: Float64[Tensor, " columns"], *, floor: float
) -> Float64[Tensor, " columns"]:
    """What further products may add to the squared values of a sample, judged by what the last one added.

    In subspace iteration the squared error of value `i` falls by `(s_l / s_i)²` with each product, `s_l` being the last
    value of the sample (Halko, Martinsson and Tropp, 2011, section 9.3): a geometric series.
    """
    gains = (now - before).clamp(min=0.0)
    gains[now <= floor**2] = 0.0
    ratios = (LAST_VALUE_GROWTH * now[-1] / now).nan_to_num(0.0).clamp(max=SLOWEST)
    return gains * ratios / (1 - ratios)


def _left_out(squares: Float64[Tensor, " columns"], rank: int, total_sq: float) -> float:
    """The squared residual of the leading values of a sample.

    Where it is small, the difference has lost its digits; the sample's other values are a part of it that has not.
    """
    return max(total_sq - float(squares[:rank].sum().item()), float(squares[rank:].sum().item()))


def _signed(u: Float[Tensor, "m k"], s: Float[Tensor, " k"], vt: Float[Tensor, "k n"]) -> Svd:
    """The triplets with signs that depend on the vectors alone, not on how they were found."""
    if not u.numel():
        return Svd(u, s, vt)
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
    return Svd(u * signs, s, vt * signs[:, None])
