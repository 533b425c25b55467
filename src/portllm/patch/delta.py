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

    With a magnitude `m` (DoRA) the tuned weight is `m · (W + Δ) / |W + Δ|`, row by row, instead of `W + Δ`.

    Attributes:
        a: Shape (rank, d_in), PEFT's `lora_A`.
        b: Shape (d_out, rank), PEFT's `lora_B`.
        scale: alpha / rank, or alpha / √rank for rank-stabilized LoRA.
        transposed: The model stores the weight as (d_in, d_out): GPT-2's Conv1D, and embeddings.
        magnitude: Shape (d_out), or None for plain LoRA.
        is_embedding: The weight is an embedding's, whose tokens are the inputs; PEFT has other keys for these.

    Example:
        >>> import torch
        >>> LowRankDelta(a=torch.zeros(8, 12), b=torch.zeros(20, 8), scale=2.0).shape
        (20, 12)
    """

    a: F
    b: F
    scale: float
    transposed: bool = False
    magnitude: F | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as the model stores it: (d_out, d_in), or the other way round where transposed."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    @property
    def n_params(self) -> int:
        """Numbers in the factors, and in the magnitude."""
        return self.rank * sum(self.shape) + (self.b.shape[0] if self.magnitude is not None else 0)


@dataclass(frozen=True, slots=True)
class WholeValue(Generic[F]):
    """The tuned model's value of a tensor, in the place of the base's (`modules_to_save`, trained biases)."""

    values: F


@dataclass(frozen=True, slots=True)
class RowValues(Generic[F]):
    """The tuned model's value of some rows of an embedding (`trainable_token_indices`).

    Attributes:
        values: Shape (len(rows), d).
        rows: Which rows, as token ids.
    """

    values: F
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VectorDelta(Generic[F]):
    """What `lora_bias` adds to a bias: `scale · values`."""

    values: F
    scale: float


Change = LowRankDelta[F] | WholeValue[F] | RowValues[F] | VectorDelta[F]
"""What a patch does to one tensor of the model."""
