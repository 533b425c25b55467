"""Singular values and norms of weights and of factor products. Pure: tensors in, tensors out, seeds as arguments.

Everything is computed in the dtype of its input, float32 at least. The randomized decomposition follows Halko,
Martinsson and Tropp, 2011 (https://doi.org/10.1137/090771806), algorithms 4.4 and 5.1: a few products with a thin
matrix instead of a full decomposition, and the same truncation error to the digits that matter where the spectrum
falls. `torch.linalg.svd` in float64 is the oracle of its tests.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLING = 16
"""Directions sampled beyond those that are asked for."""

POWER_ITERATIONS = 2
"""Products with `M Mᵀ` that sharpen the sample; each divides what leaks from the spectrum's tail."""

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
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> Svd:
    """The leading `rank` singular triplets of a matrix, by random sampling of its range.

    With a seeded normal `Ω` of `rank + oversampling` columns and `Q` an orthonormal basis of `(M Mᵀ)^q M Ω`, the
    triplets are those of `Q Qᵀ M`. Every basis on the way is made orthonormal again, so nothing is lost to rounding.

    Args:
        matrix: M.
        rank: Triplets to find; all there are where it is larger.
        seed: Of `Ω`.
        oversampling: Columns of `Ω` beyond `rank`.
        power_iterations: q.

    Raises:
        ValueError: `rank` is below 1.

    Example:
        >>> matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0]))[:, :2]
        >>> randomized_svd(matrix, rank=1).s
        tensor([9.])
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1.")
    smaller = min(matrix.shape)
    if rank + oversampling >= EXACT_SHARE * smaller:
        return exact_svd(matrix).cut(rank)
    matrix = matrix.to(working_dtype(matrix))
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(matrix.shape[1], rank + oversampling, generator=generator, dtype=matrix.dtype)
    basis = _basis(matrix @ sample.to(matrix.device))
    for _ in range(power_iterations):
        basis = _basis(matrix @ _basis(matrix.T @ basis))
    inner, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return _signed(basis @ inner, s, vt).cut(rank)


def svd_above(matrix: Float[Tensor, "m n"], *, threshold: float, max_rank: int | None = None, seed: int = 0) -> Svd:
    """The singular triplets whose value is above a threshold, at most `max_rank` of them.

    The rank of the randomized decomposition doubles until the next singular value falls to the threshold. Sampled
    values are never above the true ones, so what is kept is above the threshold indeed.

    Example:
        >>> matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
        >>> svd_above(matrix, threshold=2.0).s
        tensor([9., 4.])
    """
    most = min(matrix.shape) if max_rank is None else min(max_rank, *matrix.shape)
    rank = min(FIRST_RANK, most)
    while True:
        found = randomized_svd(matrix, rank=rank, seed=seed) if rank else exact_svd(matrix).cut(0)
        above = int((found.s > threshold).sum().item())
        if above < rank or rank == most:
            return found.cut(above)
        rank = min(2 * rank, most)


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


def _basis(matrix: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def _signed(u: Float[Tensor, "m k"], s: Float[Tensor, " k"], vt: Float[Tensor, "k n"]) -> Svd:
    """The triplets with signs that depend on the vectors alone, not on how they were found."""
    if not u.numel():
        return Svd(u, s, vt)
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
    return Svd(u * signs, s, vt * signs[:, None])
