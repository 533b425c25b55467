"""A tensor block by block: how it is cut, and how its blocks are read. Memory holds one block at a time.

A block is small enough for a processor's cache, and the bytes of one block after the other lie in the same memory. What
becomes of a block is another module's: `fused` or `changes`. Nothing here loads torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from portllm.errors import NonFiniteError
from portllm.merging.plan import MergeStep
from portllm.merging.rounding_modes import Rounding
from portllm.patch.delta import ExpertsDelta, LowRankDelta
from portllm.patch.rounding import MergeSums
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.spans import SpanReader

if TYPE_CHECKING:
    from portllm.patch.merge import Scratch

BLOCK_ELEMENTS = 1 << 18
"""Elements of a weight in memory at once: half a MiB in bfloat16, a MiB in float32."""

GPU_BLOCK_ELEMENTS = 1 << 23
"""The same where a GPU computes, which is slow to begin and quick to end."""

FEWEST_ROWS = 16
"""A product of fewer can take another kernel, which rounds otherwise."""

COPY_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """Some rows of a tensor as they were read; the bytes are overwritten when the next are.

    Attributes:
        start: The first row.
        stop: The one after the last.
        data: Their bytes.
        is_stored: Whether they are rows of the tensor, and not of those that the output has behind its last.
    """

    start: int
    stop: int
    data: memoryview
    is_stored: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """A part of one output tensor; its bytes lie in memory that the next block of the same bench takes.

    Attributes:
        data: The bytes to write.
        sums: What rounding took of the change; None for a tensor that the patch does not touch.
    """

    data: memoryview
    sums: MergeSums | None = None


BlockKernel = Callable[[SourceBlock], Block]
"""What one output gets for some rows of a tensor."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a tensor is cut into blocks, whatever becomes of them.

    Attributes:
        matrix: The tensor as it is read: its rows are what the blocks count.
        ranges: The first row of each block, and the one after its last.
        n_stored: How many of the rows are in the file, where not all are.
        resized: What has the others; None for rows of zeros.
    """

    matrix: TensorInfo
    ranges: tuple[tuple[int, int], ...]
    n_stored: int | None = None
    resized: TensorInfo | None = None

    @property
    def height(self) -> int:
        """Rows of the largest block."""
        return self.ranges[0][1] if self.ranges else 0


class Workspace:
    """Where one thread makes blocks: how it rounds, on which device, and the memory that it uses again.

    Args:
        rounding: How a sum is brought to the storage dtype.
        device: Where the arithmetic is done, `cpu` or `cuda`.
        keep_cached: Leave in the kernel's cache what was read.
    """

    def __init__(self, rounding: Rounding, *, device: str = "cpu", keep_cached: bool = True) -> None:
        self.rounding = rounding
        self.device = device
        self.reader = _reader(device, keep_cached=keep_cached)
        self._room = np.empty(0, np.uint8)

    @cached_property
    def scratch(self) -> "Scratch":
        """Memory for values that torch computes."""
        from portllm.patch.merge import Scratch  # loads torch, which most merges do without

        return Scratch(self.device)

    def room(self, n_bytes: int) -> memoryview:
        """Memory for the bytes of a block, with whatever it held before."""
        if len(self._room) < n_bytes:
            self._room = np.empty(n_bytes, np.uint8)
        return self._room[:n_bytes].data

    def row_blocks(self, info: TensorInfo) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about as many elements as a block has; a scalar is one row."""
        rows = info.shape[0] if info.shape else 1
        elements = BLOCK_ELEMENTS if self.device == "cpu" else GPU_BLOCK_ELEMENTS
        step = max(FEWEST_ROWS, elements // max(1, info.n_params // max(1, rows)))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, trace)


def _reader(device: str, *, keep_cached: bool) -> SpanReader:
    if device == "cpu":
        return SpanReader(keep_cached=keep_cached)
    from portllm.tensors.rows import RowReader

    return RowReader(pinned=True, keep_cached=keep_cached)


def cut_for(steps: Sequence[MergeStep], bench: Workspace) -> Tiling:
    """Cut the source of some steps so that each of them can do with one block at a time."""
    source = steps[0].source
    if source.shape != steps[0].entry.shape:
        return _with_rows_behind(steps[0], bench)
    if all(step.is_copy for step in steps):
        ranges = ((start, min(start + COPY_BYTES, source.n_bytes)) for start in range(0, source.n_bytes, COPY_BYTES))
        return Tiling(replace(source, dtype="U8", shape=(source.n_bytes,)), tuple(ranges))
    changes = [step.change for step in steps if step.change is not None]
    if any(
        isinstance(change, LowRankDelta) and change.transposed and change.magnitude is not None for change in changes
    ):
        return Tiling(source, ((0, source.shape[0]),))  # a norm runs over all rows, so all of them are needed at once
    if any(isinstance(change, ExpertsDelta) for change in changes):
        n_experts, d_out, d_in = source.shape
        blocks = list(bench.row_blocks(replace(source, shape=(d_out, d_in))))
        return Tiling(
            replace(source, shape=(n_experts * d_out, d_in)),
            tuple(
                (number * d_out + start, number * d_out + stop) for number in range(n_experts) for start, stop in blocks
            ),
        )
    return Tiling(source, tuple(bench.row_blocks(source)))


def _with_rows_behind(step: MergeStep, bench: Workspace) -> Tiling:
    """The tiling of a tensor that has more rows in the output than in its file: no block has of both."""
    n_stored, n_rows = step.source.shape[0], step.entry.shape[0]
    behind = bench.row_blocks(replace(step.source, shape=(n_rows - n_stored, *step.source.shape[1:])))
    ranges = (*bench.row_blocks(step.source), *((n_stored + start, n_stored + stop) for start, stop in behind))
    return Tiling(replace(step.source, shape=step.entry.shape), ranges, n_stored, step.resized)


def read_blocks(cut: Tiling, bench: Workspace) -> Iterator[SourceBlock]:
    """The blocks of a tensor as they are stored; what is quantized, as the values it stands for."""
    row_bytes = n_bytes_of(cut.matrix.dtype, cut.matrix.shape[1:])
    for start, stop in cut.ranges:
        if cut.n_stored is not None and start >= cut.n_stored:
            yield SourceBlock(start, stop, _rows_behind(cut, start, stop, row_bytes), is_stored=False)
        elif cut.matrix.encoding is None:
            yield SourceBlock(start, stop, bench.reader.span(cut.matrix, start * row_bytes, stop * row_bytes))
        else:
            from portllm.tensors.tensors import encode, load_rows  # loads torch

            yield SourceBlock(start, stop, encode(load_rows(cut.matrix, start, stop)))


def _rows_behind(cut: Tiling, start: int, stop: int, row_bytes: int) -> memoryview:
    """Rows that the file does not have, as it would store them."""
    if cut.resized is None:
        return memoryview(bytearray((stop - start) * row_bytes))
    from portllm.tensors.tensors import TORCH_DTYPES, encode, load_rows  # loads torch

    return encode(load_rows(cut.resized, start, stop).to(TORCH_DTYPES[cut.matrix.dtype]))


def copied(stored: SourceBlock) -> Block:
    """What is left as it is."""
    return Block(stored.data)


def require_finite(sums: MergeSums, step: MergeStep, stored: SourceBlock) -> None:
    """Raise NonFiniteError if rows of a changed weight are not all numbers, before or after."""
    if not sums.is_finite:
        raise NonFiniteError(
            f"'{step.entry.name}': rows {stored.start} to {stored.stop} contain an infinity or NaN in the weight, "
            f"in the patch or after the cast to {step.entry.dtype}. Check for a diverged training run, or use a "
            "wider dtype."
        )
