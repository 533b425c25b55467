"""The bytes of one output tensor, block by block: read, change, round, measure. Memory holds one block at a time.

A block is small enough for a processor's cache, and the values of one block after the other lie in the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.row_reader import RowReader
from portllm.checkpoint.tensors import TORCH_DTYPES, encode, load, load_rows
from portllm.errors import NonFiniteError
from portllm.patch.delta import ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.merge import (
    Scratch,
    add,
    delta_rows,
    fold_scale,
    measure_merge,
    renormalize,
    round_nearest,
    round_stochastic,
)
from portllm.patch.noise import rounding_noise
from portllm.patch.rounding import MergeSums
from portllm.pipeline.plan import MergeStep

BLOCK_ELEMENTS = 1 << 17
"""Elements of a weight in memory at once: half a MiB in float32, and four times that with all that it becomes."""

GPU_BLOCK_ELEMENTS = 1 << 23
"""The same where a GPU computes, which is slow to begin and quick to end."""

FEWEST_ROWS = 16
"""A product of fewer can take another kernel, which rounds otherwise."""

COPY_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class Nearest:
    """Round to the nearest value, ties to even."""

    def __str__(self) -> str:
        return "nearest"


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Round up or down at random, so that the expected value is exact; bfloat16 only."""

    seed: int = 0

    def __str__(self) -> str:
        return f"stochastic-seed{self.seed}"


Rounding = Nearest | Stochastic
NEAREST = Nearest()


@dataclass(frozen=True, slots=True)
class Block:
    """A part of one tensor on its way; its bytes lie in memory that the next block of the same bench takes.

    Attributes:
        source: The bytes as they were read.
        data: The bytes to write; `source` itself for a tensor that is copied.
        sums: What rounding took of the change; None for a tensor that the patch does not touch.
    """

    source: memoryview
    data: memoryview
    sums: MergeSums | None


class Bench:
    """Where one thread makes blocks: how it rounds, on which device, and the memory that it uses again.

    Args:
        rounding: How a sum is brought to the storage dtype.
        device: Where the arithmetic is done, `cpu` or `cuda`.
        keep_cached: Leave in the kernel's cache what was read.
    """

    def __init__(self, rounding: Rounding, *, device: str = "cpu", keep_cached: bool = True) -> None:
        self.rounding = rounding
        self.device = device
        self.reader = RowReader(pinned=device != "cpu", keep_cached=keep_cached)
        self.scratch = Scratch(device)

    def load(self, info: TensorInfo) -> Tensor:
        """A factor, whole, in the dtype that is computed with."""
        return _wide(load(info).to(self.device))

    def row_blocks(self, info: TensorInfo) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about as many elements as a block has; a scalar is one row."""
        rows = info.shape[0] if info.shape else 1
        elements = BLOCK_ELEMENTS if self.device == "cpu" else GPU_BLOCK_ELEMENTS
        step = max(FEWEST_ROWS, elements // max(1, info.n_params // max(1, rows)))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, trace)


def blocks_of(step: MergeStep, bench: Bench) -> Iterator[Block]:
    """The blocks of one output tensor, in order.

    Raises:
        NonFiniteError: A value is infinite or not a number, or becomes so in the storage dtype.
    """
    if step.change is not None:
        yield from _changed_blocks(step, bench)
    elif not step.is_copy:
        yield from _cast_blocks(step, bench)
    else:
        for start in range(0, step.source.n_bytes, COPY_BYTES):
            data = encode(bench.reader.data(step.source, start, min(start + COPY_BYTES, step.source.n_bytes)))
            yield Block(data, data, None)


def _cast_blocks(step: MergeStep, bench: Bench) -> Iterator[Block]:
    for start, stop in bench.row_blocks(step.source):
        weight = bench.reader.rows(step.source, start, stop)
        stored = weight.to(TORCH_DTYPES[step.entry.dtype])
        if not stored.isfinite().all() and (weight.isfinite() & ~stored.isfinite()).any():
            raise NonFiniteError(
                f"'{step.entry.name}': rows {start} to {stop} hold a value that does not fit into {step.entry.dtype}. "
                "Store a wider dtype."
            )
        yield Block(encode(weight), encode(stored), None)


def _changed_blocks(step: MergeStep, bench: Bench) -> Iterator[Block]:
    for rows in _changed_rows(step, bench):
        merged = _round(rows, step, bench)
        sums = measure_merge(rows.weight, rows.change, merged, scratch=bench.scratch)
        if not sums.is_finite:
            raise NonFiniteError(
                f"'{step.entry.name}': rows {rows.start} to {rows.start + len(rows.stored)} hold an infinity or NaN in "
                f"the weight, in the patch or in what they become as {step.entry.dtype}. Look for a diverged training "
                "run, or store a wider dtype."
            )
        yield Block(encode(rows.stored), encode(merged), sums)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a weight on their way.

    Attributes:
        start: The first row.
        stored: As they were read.
        weight: The same on the device, in the dtype that is computed with.
        change: What is added to them.
        exact: What they become, not rounded yet.
    """

    start: int
    stored: Float[Tensor, "rows d"]
    weight: Float[Tensor, "rows d"]
    change: Float[Tensor, "rows d"]
    exact: Float[Tensor, "rows d"]


def _changed_rows(step: MergeStep, bench: Bench) -> Iterator[Rows]:
    match step.change:
        case LowRankDelta(transposed=False) as delta:
            yield from _low_rank_rows(step, delta, bench)
        case LowRankDelta() as delta:
            yield from _transposed_rows(step, delta, bench)
        case WholeValue(values=info):
            for start, stop in bench.row_blocks(step.source):
                stored = _matrix(bench.reader.rows(step.source, start, stop))
                yield _replaced(start, stored, _wide(_matrix(load_rows(info, start, stop).to(bench.device))), bench)
        case RowValues(values=info, rows=rows):
            yield from _with_row_values(step, bench.load(info), rows, bench)
        case VectorDelta(values=info, scale=scale):
            stored = _matrix(bench.reader.rows(step.source, 0, step.source.shape[0]))
            yield _added(0, stored, bench.load(info)[:, None] * scale, bench)
        case ExpertsDelta() as experts:
            yield from _experts_rows(step, experts, bench)
        case ExpertDelta(experts=experts, number=number) as part:
            a, b = _stacked(experts, bench)
            factors = _of_expert(a, b, experts, number)
            for start, stop, change in _products(
                factors[1][part.start : part.stop], factors[0], experts.scale, step.source, bench
            ):
                yield _added(start, bench.reader.rows(step.source, start, stop), change, bench)


def _low_rank_rows(step: MergeStep, delta: LowRankDelta[TensorInfo], bench: Bench) -> Iterator[Rows]:
    a, b = bench.load(delta.a), bench.load(delta.b)
    magnitude = None if delta.magnitude is None else bench.load(delta.magnitude)
    for start, stop, change in _products(b, a, delta.scale, step.source, bench):
        stored = bench.reader.rows(step.source, start, stop)
        rows = _added(start, stored, change, bench)
        if magnitude is None:
            yield rows
        else:
            yield _replaced(start, stored, renormalize(rows.exact, magnitude[start:stop]), bench)


def _products(
    b: Tensor, a: Tensor, scale: float, matrix: TensorInfo, bench: Bench
) -> Iterator[tuple[int, int, Tensor]]:
    """The rows of `scale · B A` for one block of rows of a matrix after the other, with the rows' numbers."""
    blocks = list(bench.row_blocks(matrix))
    height = blocks[0][1]
    b, scale = fold_scale(b, a, scale)
    for start, stop in blocks:
        # A product of few rows can take another kernel, which rounds otherwise than that of the whole matrix: the last
        # block is multiplied at full height, from rows that the block before it has had already.
        first = max(0, stop - height)
        change = delta_rows(b[first:stop], a, scale=scale, scratch=bench.scratch)
        yield start, stop, change[start - first :]


def _experts_rows(step: MergeStep, delta: ExpertsDelta[TensorInfo], bench: Bench) -> Iterator[Rows]:
    """For a weight of shape (n_experts, d_out, d_in): the rows of one expert after the other."""
    n_experts, d_out, d_in = step.source.shape
    rows, matrix = (replace(step.source, shape=(height, d_in)) for height in (n_experts * d_out, d_out))
    a, b = _stacked(delta, bench)
    for number in range(n_experts):
        factors = _of_expert(a, b, delta, number)
        for start, stop, change in _products(factors[1], factors[0], delta.scale, matrix, bench):
            first = number * d_out + start
            yield _added(first, bench.reader.rows(rows, first, first + stop - start), change, bench)


def _stacked(delta: ExpertsDelta[TensorInfo], bench: Bench) -> tuple[Tensor, Tensor]:
    """The factors of all experts."""
    return bench.load(delta.a), bench.load(delta.b)


def _of_expert(a: Tensor, b: Tensor, delta: ExpertsDelta[TensorInfo], number: int) -> tuple[Tensor, Tensor]:
    """One expert's factors, A of shape (rank, d_in) and B of shape (d_out, rank)."""
    return a[number * delta.rank : (number + 1) * delta.rank], b[:, number :: delta.n_experts].contiguous()


def _transposed_rows(step: MergeStep, delta: LowRankDelta[TensorInfo], bench: Bench) -> Iterator[Rows]:
    """For a weight stored as (d_in, d_out): its rows are columns of A."""
    a, b = bench.load(delta.a), bench.load(delta.b)
    if delta.magnitude is not None:  # a norm runs over all rows, so all of them are needed at once
        stored = bench.reader.rows(step.source, 0, step.source.shape[0])
        # A norm of rows that lie in memory as columns is summed in their order, and rounds as PEFT's does.
        tuned = _wide(stored.to(bench.device)).T + delta_rows(b, a, scale=delta.scale)
        exact = renormalize(tuned, bench.load(delta.magnitude))
        yield _replaced(0, stored, exact.T.contiguous(), bench)
        return
    blocks = list(bench.row_blocks(step.source))
    height = blocks[0][1]
    for start, stop in blocks:
        first = max(0, stop - height)  # see `_products`
        product = delta_rows(b, a[:, first:stop].contiguous(), scale=delta.scale, scratch=bench.scratch)
        change = product[:, start - first :].T.contiguous()
        yield _added(start, bench.reader.rows(step.source, start, stop), change, bench)


def _with_row_values(step: MergeStep, values: Tensor, rows: tuple[int, ...], bench: Bench) -> Iterator[Rows]:
    places = torch.tensor(rows)
    for start, stop in bench.row_blocks(step.source):
        stored = bench.reader.rows(step.source, start, stop)
        exact = _wide(stored.to(bench.device)).clone()
        inside = (places >= start) & (places < stop)
        exact[places[inside] - start] = values[inside].to(exact.dtype)
        yield _replaced(start, stored, exact, bench)


def _added(start: int, stored: Tensor, change: Tensor, bench: Bench) -> Rows:
    working = torch.promote_types(change.dtype, torch.promote_types(stored.dtype, torch.float32))
    weight = bench.scratch.wide("weight", stored, working)
    return Rows(start, stored, weight, change, add(weight, change, scratch=bench.scratch))


def _replaced(start: int, stored: Tensor, exact: Tensor, bench: Bench) -> Rows:
    weight = bench.scratch.wide("weight", stored, exact.dtype)
    return Rows(start, stored, weight, exact - weight, exact)


def _round(rows: Rows, step: MergeStep, bench: Bench) -> Tensor:
    exact = rows.exact
    if isinstance(bench.rounding, Stochastic):
        start = rows.start * exact.shape[1]
        noise = rounding_noise(seed=bench.rounding.seed, tensor=step.entry.name, start=start, count=exact.numel())
        return round_stochastic(exact, noise=noise.reshape(exact.shape).to(exact.device))
    return round_nearest(exact, dtype=TORCH_DTYPES[step.entry.dtype], scratch=bench.scratch)


def _matrix(rows: Tensor) -> Tensor:
    """Rows of a tensor with any number of axes, as a matrix."""
    return rows.reshape(len(rows), -1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
