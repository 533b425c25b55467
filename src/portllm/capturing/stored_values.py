"""Values that lie on disk, and computed ones put down there, so that a patch of either can be written."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.errors import NonFiniteError
from portllm.methods.values import Values, blocks, joined, n_rows_of, take_rows
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.tensors.spool import Spool


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Values as they lie on disk."""

    info: TensorInfo

    @property
    def name(self) -> str:
        """The tensor's name in its file."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As the header says."""
        return self.info.shape

    def rows(self, start: int, stop: int) -> "Tensor":
        """Read these rows."""
        from portllm.tensors.tensors import load_rows  # loads torch, which most ports do without

        return load_rows(self.info, start, stop)


def stacked(first: Values | None, weight: Values, rows: Sequence[int]) -> Values:
    """Some rows of a tensor, behind those of another where there is one."""
    behind = take_rows(weight, rows)
    return behind if first is None else joined(first, behind)


@contextmanager
def settled(patch: Patch[Values], folder: Path) -> Iterator[Patch[TensorInfo]]:
    """The patch with all that is computed put down in a folder, for as long as the block lasts.

    Raises:
        NonFiniteError: A computed value is infinite or not a number.
    """
    with ExitStack() as stack:

        @cache
        def spool() -> "Spool":
            from portllm.tensors.spool import SPOOL_FILE, Spool

            return stack.enter_context(Spool(folder / SPOOL_FILE))

        yield patch.mapped(lambda values: values.info if isinstance(values, StoredValues) else _put(values, spool()))


def _put(values: Values, spool: "Spool") -> TensorInfo:
    from portllm.tensors.tensors import DTYPE_NAMES

    computed = (_finite(values, *block) for block in blocks(n_rows_of(values), math.prod(values.shape[1:])))
    first = next(computed)
    with spool.writing(values.name, DTYPE_NAMES[first.dtype], tuple(values.shape)) as entry:
        for block in chain((first,), computed):
            entry.append_tensor(block)
    return entry.info


def _finite(values: Values, start: int, stop: int) -> "Tensor":
    block = values.rows(start, stop)
    if not block.isfinite().all():
        raise NonFiniteError(
            f"'{values.name}': contains an infinity or NaN after porting. Look for one in the patch and in both "
            "models, and for zero rows under a DoRA magnitude."
        )
    return block
