"""The factors of an export, one module at a time: the scale in B, zeros up to the common rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.errors import NonFiniteError
from portllm.exporting.plan import Slot
from portllm.progress import Progress, silent
from portllm.tensors.tensors import load, torch_dtype


@dataclass(frozen=True, slots=True)
class Factors:
    """What is written of one module.

    Attributes:
        module: Its name.
        a: Shape (rank, d_in).
        b: Shape (d_out, rank); the scale is in it.
    """

    module: str
    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]


def baked(
    a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"], *, scale: float, rank: int
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """Factors of the same delta with scale 1, and with `rank - r` directions of zeros behind theirs.

    Example:
        >>> a, b = baked(torch.ones(1, 2), torch.ones(3, 1), scale=0.5, rank=2)
        >>> a.tolist(), b.tolist()
        ([[1.0, 1.0], [0.0, 0.0]], [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0]])
    """
    wide_a, wide_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    wide_a[: a.shape[0]] = a
    wide_b[:, : b.shape[1]] = b * scale
    return wide_a, wide_b


def each_factors(slots: Sequence[Slot], *, rank: int, dtype: str, progress: Progress = silent) -> Iterator[Factors]:
    """What is written of each module, in order; rounded once, to `dtype`.

    Raises:
        NonFiniteError: A factor contains an infinity or NaN, or has one in this dtype.
    """
    stored = torch_dtype(dtype)
    for done, slot in enumerate(slots, start=1):
        d_out, d_in = slot.shape
        a, b = torch.zeros(rank, d_in, dtype=stored), torch.zeros(d_out, rank, dtype=stored)
        if slot.delta is not None:
            exact = (load(factor).double() for factor in (slot.delta.a, slot.delta.b))
            a, b = (factor.to(stored) for factor in baked(*exact, scale=slot.delta.scale, rank=rank))
            if not (a.isfinite().all() and b.isfinite().all()):
                raise NonFiniteError(
                    f"'{slot.module}': its factors contain an infinity or NaN in {dtype}. The training run may have "
                    "diverged; otherwise use --dtype float32."
                )
        yield Factors(slot.module, a, b)
        progress("export", done, len(slots), "tensors")
