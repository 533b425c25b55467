"""What a patch adds to one weight. A factor is whatever carries a shape: a tensor, or one that is still on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Factor(Protocol):
    """One factor of a delta: a tensor, or the description of one in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Its axes, outermost first."""


F = TypeVar("F", bound=Factor)


@dataclass(frozen=True, slots=True)
class LowRankDelta(Generic[F]):
    """The delta `Δ = scale · B A` of a weight of shape (d_out, d_in).

    Attributes:
        a: Shape (rank, d_in), PEFT's `lora_A`.
        b: Shape (d_out, rank), PEFT's `lora_B`.
        scale: alpha / rank, or alpha / √rank for rank-stabilized LoRA.

    Example:
        >>> import torch
        >>> LowRankDelta(a=torch.zeros(8, 12), b=torch.zeros(20, 8), scale=2.0).shape
        (20, 12)
    """

    a: F
    b: F
    scale: float

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in): the shape of the weight that the delta belongs to."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def n_params(self) -> int:
        """Numbers in both factors."""
        return self.rank * sum(self.shape)
