"""A tensor block by block: read once, and for each patch changed, rounded, measured. Memory holds one block at a time.

A block is small enough for a processor's cache, and the values of one block after the other lie in the same memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.row_reader import RowReader
from portllm.checkpoint.tensors import TORCH_DTYPES, encode, load, load_rows
from portllm.errors import NonFiniteError
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
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
    """A part of one output tensor; its bytes lie in memory that the next block of the same bench takes.

    Attributes:
        data: The bytes to write.
        sums: What rounding took of the change; None for a tensor that the patch does not touch.
    """

    data: memoryview
    sums: MergeSums | None = None


Make = Callable[[int, Tensor], Block]
"""What one output gets for some rows of a tensor: the first row's number, and the rows as they were read."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is cut into blocks, whatever becomes of them.

    Attributes:
        matrix: The tensor as it is read: its rows are what the blocks count.
        ranges: The first row of each block, and the one after its last.
    """

    matrix: TensorInfo
    ranges: tuple[tuple[int, int], ...]

    @property
    def height(self) -> int:
        """Rows of the largest block."""
        return self.ranges[0][1] if self.ranges else 0


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


def cut_for(steps: Sequence[MergeStep], bench: Bench) -> Cut:
    """Cut the source of some steps so that each of them can do with one block at a time."""
    source = steps[0].source
    if all(step.is_copy for step in steps):
        ranges = ((start, min(start + COPY_BYTES, source.n_bytes)) for start in range(0, source.n_bytes, COPY_BYTES))
        return Cut(replace(source, dtype="U8", shape=(source.n_bytes,)), tuple(ranges))
    changes = [step.change for step in steps if step.change is not None]
    if any(
        isinstance(change, LowRankDelta) and change.transposed and change.magnitude is not None for change in changes
    ):
        return Cut(source, ((0, source.shape[0]),))  # a norm runs over all rows, so all of them are needed at once
    if any(isinstance(change, ExpertsDelta) for change in changes):
        n_experts, d_out, d_in = source.shape
        blocks = list(bench.row_blocks(replace(source, shape=(d_out, d_in))))
        return Cut(
            replace(source, shape=(n_experts * d_out, d_in)),
            tuple(
                (number * d_out + start, number * d_out + stop) for number in range(n_experts) for start, stop in blocks
            ),
        )
    return Cut(source, tuple(bench.row_blocks(source)))


def read_blocks(cut: Cut, bench: Bench) -> Iterator[tuple[int, Tensor]]:
    """The blocks of a tensor as they are stored, each with the number of its first row."""
    for start, stop in cut.ranges:
        yield start, bench.reader.rows(cut.matrix, start, stop)


def maker_of(step: MergeStep, cut: Cut, bench: Bench) -> Make:
    """What makes the blocks of one output tensor; it keeps the patch's factors for the tensor.

    The function that it returns raises NonFiniteError where a value is infinite or not a number, or becomes so in the
    storage dtype.

    Raises:
        CheckpointError: The patch cannot be read.
    """
    if step.change is not None:
        return partial(_changed, step, _changer_of(step.change, cut, bench), bench)
    return _copied if step.is_copy else partial(_cast, step)


def _copied(start: int, stored: Tensor) -> Block:
    del start
    return Block(encode(stored))


def _cast(step: MergeStep, start: int, stored: Tensor) -> Block:
    cast = stored.to(TORCH_DTYPES[step.entry.dtype])
    if not cast.isfinite().all() and (stored.isfinite() & ~cast.isfinite()).any():
        stop = start + (len(stored) if stored.ndim else 1)
        raise NonFiniteError(
            f"'{step.entry.name}': rows {start} to {stop} hold a value that does not fit into {step.entry.dtype}. "
            "Store a wider dtype."
        )
    return Block(encode(cast))


def _changed(step: MergeStep, change: "Changer", bench: Bench, start: int, stored: Tensor) -> Block:
    rows = change(start, stored)
    merged = _round(rows, step, bench)
    sums = measure_merge(rows.weight, rows.change, merged, scratch=bench.scratch)
    if not sums.is_finite:
        raise NonFiniteError(
            f"'{step.entry.name}': rows {start} to {start + len(stored)} hold an infinity or NaN in the weight, in the "
            f"patch or in what they become as {step.entry.dtype}. Look for a diverged training run, or store a wider "
            "dtype."
        )
    return Block(encode(merged), sums)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a weight on their way.

    Attributes:
        start: The first row.
        weight: As they were read, on the device, in the dtype that is computed with.
        change: What is added to them.
        exact: What they become, not rounded yet.
    """

    start: int
    weight: Float[Tensor, "rows d"]
    change: Float[Tensor, "rows d"]
    exact: Float[Tensor, "rows d"]


Changer = Callable[[int, Tensor], Rows]
"""What a patch does to some rows of a weight: the first row's number, and the rows as they were read."""


def _changer_of(change: Change[TensorInfo], cut: Cut, bench: Bench) -> Changer:
    match change:
        case LowRankDelta(transposed=False) as delta:
            return _low_rank(delta, cut, bench)
        case LowRankDelta() as delta:
            return _transposed(delta, cut, bench)
        case WholeValue(values=info):
            values = replace(info, shape=cut.matrix.shape)
            return lambda start, stored: _replaced(
                start,
                _matrix(stored),
                _wide(_matrix(load_rows(values, start, start + len(stored)).to(bench.device))),
                bench,
            )
        case RowValues(values=info, rows=rows):
            return _row_values(bench.load(info), rows, bench)
        case VectorDelta(values=info, scale=scale):
            added = bench.load(info)[:, None] * scale
            return lambda start, stored: _added(start, _matrix(stored), added[start : start + len(stored)], bench)
        case ExpertsDelta() as experts:
            return _experts(experts, cut, bench)
        case ExpertDelta(experts=experts, number=number) as part:
            a, b = _of_expert(*_stacked(experts, bench), experts, number)
            b, scale = fold_scale(b[part.start : part.stop], a, experts.scale)
            return lambda start, stored: _added(
                start, stored, _product(b, a, scale, start, len(stored), cut, bench), bench
            )


def _low_rank(delta: LowRankDelta[TensorInfo], cut: Cut, bench: Bench) -> Changer:
    a, b = bench.load(delta.a), bench.load(delta.b)
    b, scale = fold_scale(b, a, delta.scale)
    magnitude = None if delta.magnitude is None else bench.load(delta.magnitude)

    def change(start: int, stored: Tensor) -> Rows:
        rows = _added(start, stored, _product(b, a, scale, start, len(stored), cut, bench), bench)
        if magnitude is None:
            return rows
        return _replaced(start, stored, renormalize(rows.exact, magnitude[start : start + len(stored)]), bench)

    return change


def _product(b: Tensor, a: Tensor, scale: float, start: int, count: int, cut: Cut, bench: Bench) -> Tensor:
    """`count` rows of `scale · B A` from row `start` on."""
    # A product of few rows can take another kernel, which rounds otherwise than that of the whole matrix: the last
    # block is multiplied at full height, from rows that the block before it has had already.
    first = max(0, start + count - cut.height)
    return delta_rows(b[first : start + count], a, scale=scale, scratch=bench.scratch)[start - first :]


def _experts(delta: ExpertsDelta[TensorInfo], cut: Cut, bench: Bench) -> Changer:
    """For a weight of shape (n_experts, d_out, d_in), which is read as the rows of one expert after the other."""
    stacked = _stacked(delta, bench)
    d_out = cut.matrix.shape[0] // delta.n_experts

    @lru_cache(maxsize=1)
    def factors(number: int) -> tuple[Tensor, Tensor, float]:
        a, b = _of_expert(*stacked, delta, number)
        return a, *fold_scale(b, a, delta.scale)

    def change(start: int, stored: Tensor) -> Rows:
        number, first = divmod(start, d_out)
        a, b, scale = factors(number)
        added = _product(b, a, scale, first, len(stored), cut, bench)
        return _added(start, stored, added, bench)

    return change


def _stacked(delta: ExpertsDelta[TensorInfo], bench: Bench) -> tuple[Tensor, Tensor]:
    """The factors of all experts."""
    return bench.load(delta.a), bench.load(delta.b)


def _of_expert(a: Tensor, b: Tensor, delta: ExpertsDelta[TensorInfo], number: int) -> tuple[Tensor, Tensor]:
    """One expert's factors, A of shape (rank, d_in) and B of shape (d_out, rank)."""
    return a[number * delta.rank : (number + 1) * delta.rank], b[:, number :: delta.n_experts].contiguous()


def _transposed(delta: LowRankDelta[TensorInfo], cut: Cut, bench: Bench) -> Changer:
    """For a weight stored as (d_in, d_out): its rows are columns of A."""
    a, b = bench.load(delta.a), bench.load(delta.b)

    def change(start: int, stored: Tensor) -> Rows:
        stop = start + len(stored)
        first = max(0, stop - cut.height)  # see `_product`
        product = delta_rows(b, a[:, first:stop].contiguous(), scale=delta.scale, scratch=bench.scratch)
        return _added(start, stored, product[:, start - first :].T.contiguous(), bench)

    return change if delta.magnitude is None else _renormalized_columns(a, b, delta.scale, delta.magnitude, bench)


def _renormalized_columns(a: Tensor, b: Tensor, scale: float, magnitude: TensorInfo, bench: Bench) -> Changer:
    norms = bench.load(magnitude)

    def change(start: int, stored: Tensor) -> Rows:
        # A norm of rows that lie in memory as columns is summed in their order, and rounds as PEFT's does.
        tuned = _wide(stored.to(bench.device)).T + delta_rows(b, a, scale=scale)
        return _replaced(start, stored, renormalize(tuned, norms).T.contiguous(), bench)

    return change


def _row_values(values: Tensor, rows: tuple[int, ...], bench: Bench) -> Changer:
    places = torch.tensor(rows)

    def change(start: int, stored: Tensor) -> Rows:
        exact = _wide(stored.to(bench.device)).clone()
        inside = (places >= start) & (places < start + len(stored))
        exact[places[inside] - start] = values[inside].to(exact.dtype)
        return _replaced(start, stored, exact, bench)

    return change


def _added(start: int, stored: Tensor, change: Tensor, bench: Bench) -> Rows:
    working = torch.promote_types(change.dtype, torch.promote_types(stored.dtype, torch.float32))
    weight = bench.scratch.wide("weight", stored, working)
    return Rows(start, weight, change, add(weight, change, scratch=bench.scratch))


def _replaced(start: int, stored: Tensor, exact: Tensor, bench: Bench) -> Rows:
    weight = bench.scratch.wide("weight", stored, exact.dtype)
    return Rows(start, weight, exact - weight, exact)


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
