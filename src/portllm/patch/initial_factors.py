"""The factors that an adapter began with, where PEFT took them out of the base's weight. Pure.

PiSSA and OLoRA begin with a part of the weight itself: with `s` the scale, `s·B0·A0` is the part, and training goes on
with `W - s·B0·A0` as the base. What was learned, relative to `W`, is `s·B·A - s·B0·A0`, a delta of twice the rank.

Source: PiSSA (Meng et al., 2024, arXiv 2404.02948, eq. 2 to 4), OLoRA (Büyükakyüz, 2024, arXiv 2406.01775), and what
`pissa_init` and `olora_init` of PEFT 0.21 do. How exactly a part is determined is this project's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.linalg import frobenius, product_svd
from portllm.patch.delta import LowRankDelta

EPS = 2.0**-23
"""Of float32, in which PEFT decomposes the weight."""

SVD_ERROR = 4.0
"""A singular value decomposition in float32 is exact for a matrix that differs by so many `EPS` of its norm: measured
on normal matrices up to 1024 x 2048, with gaps from 1e-2 to 1e-5 made into their spectra."""

KNOWN_ENOUGH = 0.01
"""Share of the delta's norm up to which it need not be known."""


@dataclass(frozen=True, slots=True)
class InitialFactors:
    """The factors at the beginning of training.

    Attributes:
        a: A0.
        b: B0.
        uncertainty: How far, in the Frobenius norm, `s·B0·A0` may be from what PEFT subtracted: two correct
            decompositions in float32 differ so much.
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    uncertainty: float


def principal_part(weight: Float[Tensor, "d_out d_in"], *, rank: int, scale: float) -> InitialFactors:
    """PiSSA's: `s·B0·A0 = U_r S_r V_rᵀ`, the part of the weight with the largest singular values.

    The product does not depend on the signs of singular vectors, but on where the spectrum is cut: an error of the
    decomposition counts `s_r / (s_r - s_{r+1})` times. It is computed in float64, from the smaller Gram matrix.

    Example:
        >>> found = principal_part(torch.diag(torch.tensor([4.0, 2.0]))[:, :2], rank=1, scale=2.0)
        >>> (2.0 * found.b @ found.a).round(decimals=6)
        tensor([[4., 0.],
                [0., 0.]])
    """
    wide = weight.double()
    is_tall = wide.shape[0] >= wide.shape[1]
    values, vectors = torch.linalg.eigh(wide.T @ wide if is_tall else wide @ wide.T)
    s = values.flip(0).clamp(min=0).sqrt()
    leading = vectors.flip(1)[:, :rank]
    root = (s[:rank] / scale).sqrt()
    inverse = torch.where(root > 0, 1 / (scale * root), torch.zeros((), dtype=root.dtype))
    b, a = (
        (wide @ leading * inverse, root[:, None] * leading.T)
        if is_tall
        else (leading * root, inverse[:, None] * (leading.T @ wide))
    )
    last, following = float(s[rank - 1].item()), float(s[rank].item()) if rank < len(s) else 0.0
    times = math.sqrt(rank) + last / (last - following) if last > following else math.inf
    return InitialFactors(a.float(), b.float(), SVD_ERROR * EPS * float(s[0].item()) * times)


def leading_columns_part(weight: Float[Tensor, "d_out d_in"], *, rank: int, scale: float) -> InitialFactors:
    """OLoRA's: `B0 = Q_r`, `A0 = R_r` of `W = Q R`, that is, the weight projected on the span of its first columns.

    Only these columns are decomposed. An error of the decomposition counts as often as they are badly conditioned.

    Example:
        >>> found = leading_columns_part(torch.tensor([[3.0, 1.0], [4.0, 2.0]]), rank=1, scale=1.0)
        >>> (found.b @ found.a).round(decimals=4)
        tensor([[3.0000, 1.3200],
                [4.0000, 1.7600]])
    """
    wide = weight.double()
    q, r = torch.linalg.qr(wide[:, :rank])
    s = torch.linalg.svdvals(r)
    uncertainty = scale * EPS * float((s[0] / s[-1]).item()) * frobenius(weight) if s[-1] > 0 else math.inf
    return InitialFactors((q.T @ wide).float(), q.float(), uncertainty)


def without(
    delta: LowRankDelta[Tensor], a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"]
) -> LowRankDelta[Tensor]:
    """The delta less `s·B0·A0`: `[B, -B0]` and `[A; A0]`, of twice the rank.

    Example:
        >>> delta = LowRankDelta(a=torch.tensor([[3.0]]), b=torch.tensor([[2.0]]), scale=0.5)
        >>> less = without(delta, torch.tensor([[1.0]]), torch.tensor([[4.0]]))
        >>> less.scale * less.b @ less.a
        tensor([[1.]])
    """
    dtype = torch.promote_types(
        torch.promote_types(delta.a.dtype, delta.b.dtype), torch.promote_types(a.dtype, b.dtype)
    )
    return LowRankDelta(
        a=torch.cat([delta.a.to(dtype), a.to(dtype)]),
        b=torch.cat([delta.b.to(dtype), -b.to(dtype)], dim=1),
        scale=delta.scale,
        transposed=delta.transposed,
        magnitude=delta.magnitude,
        is_embedding=delta.is_embedding,
    )


def known_to(delta: LowRankDelta[Tensor], uncertainty: float) -> float:
    """The uncertainty as a share of the delta's norm; infinite for a delta of zero."""
    norm = delta.scale * frobenius(product_svd(delta.b, delta.a).s)
    return uncertainty / norm if norm else math.inf
