"""The bytes of one output tensor, block by block: read, change, round, measure. Memory holds one block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.reader import read_bytes
from portllm.checkpoint.tensors import TORCH_DTYPES, encode, load, load_rows
from portllm.errors import NonFiniteError
from portllm.patch.delta import ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.merge import add, delta_rows, measure_merge, renormalize, round_nearest, round_stochastic
from portllm.patch.noise import rounding_noise
from portllm.patch.rounding import MergeSums
from portllm.pipeline.plan import MergeStep

BLOCK_ELEMENTS = 1 << 21
"""Elements of a weight in memory at once: 8 MiB in float32, and a few times that while it is measured."""

COPY_BYTES = 1 << 23


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
    """A part of one tensor on its way.

    Attributes:
        source: The bytes as they were read.
        data: The bytes to write.
        sums: What rounding took of the change; None for a tensor that the patch does not touch.
    """

    source: bytes | memoryview
    data: bytes | memoryview
    sums: MergeSums | None


def blocks_of(step: MergeStep, rounding: Rounding) -> Iterator[Block]:
    """The blocks of one output tensor, in order.

    Raises:
        NonFiniteError: A value is infinite or not a number, or becomes so in the storage dtype.
    """
    if step.change is not None:
        yield from _changed_blocks(step, rounding)
    elif step.entry.dtype != step.source.dtype:
        yield from _cast_blocks(step)
    else:
        for start in range(0, step.source.n_bytes, COPY_BYTES):
            data = read_bytes(step.source, start, min(start + COPY_BYTES, step.source.n_bytes))
            yield Block(data, data, None)


def _cast_blocks(step: MergeStep) -> Iterator[Block]:
    for start, stop in _row_blocks(step.source):
        weight = load_rows(step.source, start, stop) if step.source.shape else load(step.source)
        stored = weight.to(TORCH_DTYPES[step.entry.dtype])
        if (weight.isfinite() & ~stored.isfinite()).any():
            raise NonFiniteError(
                f"'{step.entry.name}': rows {start} to {stop} hold a value that does not fit into {step.entry.dtype}. "
                "Store a wider dtype."
            )
        yield Block(encode(weight), encode(stored), None)


def _changed_blocks(step: MergeStep, rounding: Rounding) -> Iterator[Block]:
    for start, weight, change, exact in _changed_rows(step):
        merged = _round(exact, step, rounding, offset=start * weight.shape[1])
        sums = measure_merge(weight, change, merged)
        if not sums.is_finite:
            raise NonFiniteError(
                f"'{step.entry.name}': rows {start} to {start + len(weight)} hold an infinity or NaN in the weight, in "
                f"the patch or in what they become as {step.entry.dtype}. Look for a diverged training run, or store a "
                "wider dtype."
            )
        yield Block(encode(weight), encode(merged), sums)


Rows = tuple[int, Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, "rows d"]]
"""The first row of a block, the weight's rows, what is added to them, and what they become, not rounded yet."""


def _changed_rows(step: MergeStep) -> Iterator[Rows]:
    match step.change:
        case LowRankDelta(transposed=False) as delta:
            yield from _low_rank_rows(step, delta)
        case LowRankDelta() as delta:
            yield from _transposed_rows(step, delta)
        case WholeValue(values=info):
            for start, stop in _row_blocks(step.source):
                yield _replaced(start, _matrix(step.source, start, stop), _wide(_matrix(info, start, stop)))
        case RowValues(values=info, rows=rows):
            yield from _with_row_values(step, load(info), rows)
        case VectorDelta(values=info, scale=scale):
            weight = _matrix(step.source, 0, step.source.shape[0])
            yield _added(0, weight, _wide(load(info))[:, None] * scale)
        case ExpertsDelta() as experts:
            yield from _experts_rows(step, experts)
        case ExpertDelta(experts=experts, number=number) as part:
            a, b = _factors_of(experts, number)
            for start, stop, change in _products(b[part.start : part.stop], a, experts.scale, step.source):
                yield _added(start, load_rows(step.source, start, stop), change)


def _low_rank_rows(step: MergeStep, delta: LowRankDelta[TensorInfo]) -> Iterator[Rows]:
    a, b = load(delta.a), load(delta.b)
    magnitude = None if delta.magnitude is None else load(delta.magnitude)
    for start, stop, change in _products(b, a, delta.scale, step.source):
        weight = load_rows(step.source, start, stop)
        if magnitude is None:
            yield _added(start, weight, change)
        else:
            yield _replaced(start, weight, renormalize(add(weight, change), magnitude[start:stop]))


def _products(b: Tensor, a: Tensor, scale: float, matrix: TensorInfo) -> Iterator[tuple[int, int, Tensor]]:
    """The rows of `scale · B A` for one block of rows of a matrix after the other, with the rows' numbers."""
    blocks = list(_row_blocks(matrix))
    height = blocks[0][1]
    for start, stop in blocks:
        # A product of few rows can take another kernel, which rounds otherwise than that of the whole matrix: the last
        # block is multiplied at full height, from rows that the block before it has had already.
        first = max(0, stop - height)
        yield start, stop, delta_rows(b[first:stop], a, scale=scale)[start - first :]


def _experts_rows(step: MergeStep, delta: ExpertsDelta[TensorInfo]) -> Iterator[Rows]:
    """For a weight of shape (n_experts, d_out, d_in): the rows of one expert after the other."""
    n_experts, d_out, d_in = step.source.shape
    rows, matrix = (replace(step.source, shape=(height, d_in)) for height in (n_experts * d_out, d_out))
    for number in range(n_experts):
        a, b = _factors_of(delta, number)
        for start, stop, change in _products(b, a, delta.scale, matrix):
            first = number * d_out + start
            yield _added(first, load_rows(rows, first, first + stop - start), change)


def _factors_of(delta: ExpertsDelta[TensorInfo], number: int) -> tuple[Tensor, Tensor]:
    """One expert's factors, A of shape (rank, d_in) and B of shape (d_out, rank)."""
    a = load_rows(delta.a, number * delta.rank, (number + 1) * delta.rank)
    return a, load(delta.b)[:, number :: delta.n_experts].contiguous()


def _transposed_rows(step: MergeStep, delta: LowRankDelta[TensorInfo]) -> Iterator[Rows]:
    """For a weight stored as (d_in, d_out): its rows are columns of A."""
    a, b = load(delta.a), load(delta.b)
    if delta.magnitude is not None:  # a norm runs over all rows, so all of them are needed at once
        weight = load(step.source)
        exact = renormalize(add(weight.T, delta_rows(b, a, scale=delta.scale)), load(delta.magnitude))
        yield _replaced(0, weight, exact.T.contiguous())
        return
    blocks = list(_row_blocks(step.source))
    height = blocks[0][1]
    for start, stop in blocks:
        first = max(0, stop - height)  # see `_low_rank_rows`
        change = delta_rows(b, a[:, first:stop].contiguous(), scale=delta.scale)[:, start - first :].T.contiguous()
        yield _added(start, load_rows(step.source, start, stop), change)


def _with_row_values(step: MergeStep, values: Tensor, rows: tuple[int, ...]) -> Iterator[Rows]:
    places = torch.tensor(rows)
    for start, stop in _row_blocks(step.source):
        weight = load_rows(step.source, start, stop)
        exact = _wide(weight).clone()
        inside = (places >= start) & (places < stop)
        exact[places[inside] - start] = _wide(values)[inside]
        yield _replaced(start, weight, exact)


def _added(start: int, weight: Tensor, change: Tensor) -> Rows:
    return start, weight, change, add(weight, change)


def _replaced(start: int, weight: Tensor, exact: Tensor) -> Rows:
    return start, weight, exact - weight.to(exact.dtype), exact


def _round(exact: Tensor, step: MergeStep, rounding: Rounding, *, offset: int) -> Tensor:
    if isinstance(rounding, Stochastic):
        noise = rounding_noise(seed=rounding.seed, tensor=step.entry.name, start=offset, count=exact.numel())
        return round_stochastic(exact, noise=noise.reshape(exact.shape))
    return round_nearest(exact, dtype=TORCH_DTYPES[step.entry.dtype])


def _matrix(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows of a tensor with any number of axes, as a matrix."""
    return load_rows(info, start, stop).reshape(stop - start, -1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _row_blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `BLOCK_ELEMENTS` elements; a scalar is one row."""
    rows = info.shape[0] if info.shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, info.n_params // max(1, rows)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
