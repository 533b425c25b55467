"""What a patch adds to one weight. A factor is whatever carries a shape: a tensor, or one that is still on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, runtime_checkable

from typing_extensions import TypeVar

from portllm.tensors.info import TensorInfo


@runtime_checkable
class Factor(Protocol):
    """One factor of a delta: a tensor, or the description of one in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Its axes, outermost first."""


F = TypeVar("F", bound=Factor, default=TensorInfo)
"""Factors are on disk where nothing else is said."""


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


@dataclass(frozen=True, slots=True)
class ExpertsDelta(Generic[F]):
    """The deltas of one weight of all experts of a layer, `Δ_e = scale · B_e A_e` for expert `e`.

    Where the model stores it the other way round, `Δ_e` is added to the transposed weight.

    PEFT stacks them: `A_e` are the rows `e·rank` to `(e+1)·rank` of `a`; `B_e` is every `n_experts`th column of `b`
    from column `e` on.

    Attributes:
        a: Shape (n_experts · rank, d_in).
        b: Shape (d_out, rank · n_experts).
        scale: alpha / rank, or alpha / √rank for rank-stabilized LoRA.
        rank: Of each expert.
        transposed: The model stores each expert's weight as (d_in, d_out), as GPT-OSS does.

    Example:
        >>> import torch
        >>> ExpertsDelta(a=torch.zeros(3 * 4, 12), b=torch.zeros(20, 4 * 3), scale=1.5, rank=4).shape
        (3, 20, 12)
    """

    a: F
    b: F
    scale: float
    rank: int
    transposed: bool = False

    @property
    def n_experts(self) -> int:
        """How many experts there are."""
        return self.a.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the weight of all experts: (n_experts, d_out, d_in), the last two swapped where transposed."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (self.n_experts, d_in, d_out) if self.transposed else (self.n_experts, d_out, d_in)

    @property
    def n_params(self) -> int:
        """Numbers in the factors."""
        return self.a.shape[0] * (self.a.shape[1] + self.b.shape[0])


@dataclass(frozen=True, slots=True)
class ExpertDelta(Generic[F]):
    """What belongs to a matrix of one expert, where a file stores the experts one by one.

    Attributes:
        experts: The deltas of all experts.
        number: Which expert.
        start: First row of its delta that belongs to this matrix.
        stop: Behind the last one.
    """

    experts: ExpertsDelta[F]
    number: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix: (d_out, d_in)."""
        return self.stop - self.start, self.experts.shape[2]


Change = LowRankDelta[F] | WholeValue[F] | RowValues[F] | VectorDelta[F] | ExpertsDelta[F] | ExpertDelta[F]
"""What a patch does to one tensor of the model."""
