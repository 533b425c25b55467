"""Tensors as port methods see them: with a shape and rows that are read, or computed, when somebody asks for them.

So a method says what becomes of an embedding of a gigabyte without having it in memory, and what it passes on untouched
is never read at all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from portllm.patch.delta import Factor
from portllm.tensors.windows import runs

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Of what is read or computed at a time."""


class Values(Factor, Protocol):
    """A tensor, still on disk or still to be computed."""

    @property
    def name(self) -> str:
        """Stands in messages."""

    @property
    def rows(self) -> "Callable[[int, int], Tensor]":
        """Called with `start` and `stop`: these rows, at least one, along the first axis; a scalar has one row."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that a function of `start` and `stop` gives, the same whenever it is asked."""

    name: str
    shape: tuple[int, ...]
    rows: "Callable[[int, int], Tensor]"


def computed(name: str, tensor: "Tensor") -> Computed:
    """Values that are there already.

    Example:
        >>> import torch
        >>> whole(computed("w", torch.tensor([[1.0], [2.0]]))).tolist()
        [[1.0], [2.0]]
    """
    by_row = tensor if tensor.ndim else tensor.reshape(1)
    return Computed(name, tuple(tensor.shape), lambda start, stop: by_row[start:stop])


def n_rows_of(values: Factor) -> int:
    """How many rows there are to ask for."""
    return values.shape[0] if len(values.shape) else 1


def whole(values: Values) -> "Tensor":
    """All of it, in its shape."""
    return values.rows(0, n_rows_of(values)).reshape(tuple(values.shape))


def blocks(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """First and last row of blocks of at most `BLOCK_ELEMENTS`, but for a row that is longer.

    Example:
        >>> list(blocks(3, 1 << 21))
        [(0, 2), (2, 3)]
    """
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def take_rows(values: Values, rows: Sequence[int]) -> Computed:
    """Some rows in some order; -1 stands for a row of zeros.

    Example:
        >>> import torch
        >>> whole(take_rows(computed("w", torch.tensor([[1.0], [2.0]])), (1, -1))).tolist()
        [[2.0], [0.0]]
    """

    def taken(start: int, stop: int) -> "Tensor":
        import torch

        wanted = rows[start:stop]
        zeros = torch.zeros_like(values.rows(0, 1)) if -1 in wanted else None
        parts = (
            values.rows(wanted[first], wanted[last - 1] + 1) if zeros is None or wanted[first] >= 0 else zeros
            for first, last in runs(wanted)
        )
        return torch.cat(list(parts))

    return Computed(values.name, (len(rows), *values.shape[1:]), taken)


def joined(first: Values, second: Values) -> Computed:
    """The rows of one and then those of another, in a dtype that holds both.

    Example:
        >>> import torch
        >>> whole(joined(computed("w", torch.tensor([[1.0]])), computed("v", torch.tensor([[2.0]])))).tolist()
        [[1.0], [2.0]]
    """
    n_first = n_rows_of(first)

    def rows(start: int, stop: int) -> "Tensor":
        import torch

        dtype = torch.promote_types(first.rows(0, 1).dtype, second.rows(0, 1).dtype)
        parts = [first.rows(start, min(stop, n_first))] if start < n_first else []
        parts += [second.rows(max(0, start - n_first), stop - n_first)] if stop > n_first else []
        return torch.cat([part.to(dtype) for part in parts])

    return Computed(first.name, (n_first + n_rows_of(second), *first.shape[1:]), rows)


def summed(first: Values, second: Values) -> Computed:
    """The sum of two matrices of one shape, in a dtype that holds both."""
    return Computed(
        first.name, tuple(first.shape), lambda start, stop: first.rows(start, stop) + second.rows(start, stop)
    )


def take_columns(values: Values, columns: Sequence[int]) -> Computed:
    """Some columns of a matrix in some order; -1 stands for a column of zeros.

    Example:
        >>> import torch
        >>> whole(take_columns(computed("w", torch.tensor([[1.0, 2.0]])), (1, -1))).tolist()
        [[2.0, 0.0]]
    """

    def taken(start: int, stop: int) -> "Tensor":
        import torch

        wanted = torch.tensor(columns)
        return values.rows(start, stop)[:, wanted.clamp(min=0)].masked_fill_(wanted < 0, 0)

    return Computed(values.name, (values.shape[0], len(columns)), taken)
