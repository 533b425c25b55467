"""What becomes of the blocks of a tensor, by torch: every kind of change, every dtype, either rounding, any device.

`portllm.merging.with_native` does the commonest of it in less time, with the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.errors import NonFiniteError
from portllm.merging.blocks import Block, BlockKernel, SourceBlock, Tiling, Workspace, require_finite
from portllm.merging.plan import MergeStep
from portllm.merging.rounding_modes import Stochastic
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.merge import add, delta_rows, fold_scale, measure_merge, renormalize, round_nearest, round_stochastic
from portllm.patch.noise import rounding_noise
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import TORCH_DTYPES, encode, load, load_rows, torch_dtype


def change_of(step: MergeStep, cut: Tiling, bench: Workspace) -> BlockKernel:
    """What makes the blocks of one output tensor that is no copy; it keeps the patch's factors for the tensor.

    The function that it returns raises NonFiniteError where a value is infinite or not a number, or becomes so in the
    storage dtype.

    Raises:
        CheckpointError: The patch cannot be read.
    """
    if step.change is not None:
        return partial(_changed, step, _changer_of(step.change, cut, bench), cut, bench)
    return partial(_cast, step, cut)


def _values(cut: Tiling, stored: SourceBlock) -> Tensor:
    """The rows as a tensor, in the same memory."""
    matrix = cut.matrix
    shape = (stored.stop - stored.start, *matrix.shape[1:]) if matrix.shape else ()
    if not stored.data:
        return torch.empty(shape, dtype=torch_dtype(matrix.dtype))
    return torch.frombuffer(stored.data, dtype=torch_dtype(matrix.dtype)).reshape(shape)


def _cast(step: MergeStep, cut: Tiling, stored: SourceBlock) -> Block:
    values = _values(cut, stored)
    cast = values.to(TORCH_DTYPES[step.entry.dtype])
    if not cast.isfinite().all() and (values.isfinite() & ~cast.isfinite()).any():
        raise NonFiniteError(
            f"'{step.entry.name}': rows {stored.start} to {stored.stop} contain a value that overflows "
            f"{step.entry.dtype}. Use a wider dtype."
        )
    return Block(encode(cast))


def _changed(step: MergeStep, change: "Changer", cut: Tiling, bench: Workspace, stored: SourceBlock) -> Block:
    rows = change(stored.start, _values(cut, stored))
    merged = _round(rows, step, bench)
    sums = measure_merge(rows.weight, rows.change, merged, scratch=bench.scratch)
    require_finite(sums, step, stored)
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


def _changer_of(change: Change[TensorInfo], cut: Tiling, bench: Workspace) -> Changer:
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
            return _row_values(_factor(bench, info), rows, bench)
        case VectorDelta(values=info, scale=scale):
            added = _factor(bench, info)[:, None] * scale
            return lambda start, stored: _added(start, _matrix(stored), added[start : start + len(stored)], bench)
        case ExpertsDelta() as experts:
            return _experts(experts, cut, bench)
        case ExpertDelta(experts=experts, number=number) as part:
            a, b = _of_expert(*_stacked(experts, bench), experts, number)
            b, scale = fold_scale(b[part.start : part.stop], a, experts.scale)
            return lambda start, stored: _added(
                start, stored, _product(b, a, scale, start, len(stored), cut, bench), bench
            )


def _low_rank(delta: LowRankDelta[TensorInfo], cut: Tiling, bench: Workspace) -> Changer:
    a, b = _factor(bench, delta.a), _factor(bench, delta.b)
    b, scale = fold_scale(b, a, delta.scale)
    magnitude = None if delta.magnitude is None else _factor(bench, delta.magnitude)

    def change(start: int, stored: Tensor) -> Rows:
        rows = _added(start, stored, _product(b, a, scale, start, len(stored), cut, bench), bench)
        if magnitude is None:
            return rows
        return _replaced(start, stored, renormalize(rows.exact, magnitude[start : start + len(stored)]), bench)

    return change


def _product(b: Tensor, a: Tensor, scale: float, start: int, count: int, cut: Tiling, bench: Workspace) -> Tensor:
    """`count` rows of `scale · B A` from row `start` on."""
    # A product of few rows can take another kernel, which rounds otherwise than that of the whole matrix: the last
    # block is multiplied at full height, from rows that the block before it has had already.
    first = max(0, start + count - cut.height)
    return delta_rows(b[first : start + count], a, scale=scale, scratch=bench.scratch)[start - first :]


def _experts(delta: ExpertsDelta[TensorInfo], cut: Tiling, bench: Workspace) -> Changer:
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


def _stacked(delta: ExpertsDelta[TensorInfo], bench: Workspace) -> tuple[Tensor, Tensor]:
    """The factors of all experts."""
    return _factor(bench, delta.a), _factor(bench, delta.b)


def _of_expert(a: Tensor, b: Tensor, delta: ExpertsDelta[TensorInfo], number: int) -> tuple[Tensor, Tensor]:
    """One expert's factors, A of shape (rank, d_in) and B of shape (d_out, rank), as the weight is stored."""
    a, b = a[number * delta.rank : (number + 1) * delta.rank], b[:, number :: delta.n_experts].contiguous()
    return (b.T.contiguous(), a.T.contiguous()) if delta.transposed else (a, b)


def _transposed(delta: LowRankDelta[TensorInfo], cut: Tiling, bench: Workspace) -> Changer:
    """For a weight stored as (d_in, d_out): its rows are columns of A."""
    a, b = _factor(bench, delta.a), _factor(bench, delta.b)

    def change(start: int, stored: Tensor) -> Rows:
        stop = start + len(stored)
        first = max(0, stop - cut.height)  # see `_product`
        product = delta_rows(b, a[:, first:stop].contiguous(), scale=delta.scale, scratch=bench.scratch)
        return _added(start, stored, product[:, start - first :].T.contiguous(), bench)

    return change if delta.magnitude is None else _renormalized_columns(a, b, delta.scale, delta.magnitude, bench)


def _renormalized_columns(a: Tensor, b: Tensor, scale: float, magnitude: TensorInfo, bench: Workspace) -> Changer:
    norms = _factor(bench, magnitude)

    def change(start: int, stored: Tensor) -> Rows:
        # A norm of rows that lie in memory as columns is summed in their order, and rounds as PEFT's does.
        tuned = _wide(stored.to(bench.device)).T + delta_rows(b, a, scale=scale)
        return _replaced(start, stored, renormalize(tuned, norms).T.contiguous(), bench)

    return change


def _row_values(values: Tensor, rows: tuple[int, ...], bench: Workspace) -> Changer:
    places = torch.tensor(rows)

    def change(start: int, stored: Tensor) -> Rows:
        exact = _wide(stored.to(bench.device)).clone()
        inside = (places >= start) & (places < start + len(stored))
        exact[places[inside] - start] = values[inside].to(exact.dtype)
        return _replaced(start, stored, exact, bench)

    return change


def _added(start: int, stored: Tensor, change: Tensor, bench: Workspace) -> Rows:
    working = torch.promote_types(change.dtype, torch.promote_types(stored.dtype, torch.float32))
    weight = bench.scratch.wide("weight", stored, working)
    return Rows(start, weight, change, add(weight, change, scratch=bench.scratch))


def _replaced(start: int, stored: Tensor, exact: Tensor, bench: Workspace) -> Rows:
    weight = bench.scratch.wide("weight", stored, exact.dtype)
    return Rows(start, weight, exact - weight, exact)


def _round(rows: Rows, step: MergeStep, bench: Workspace) -> Tensor:
    exact = rows.exact
    if isinstance(bench.rounding, Stochastic):
        start = rows.start * exact.shape[1]
        noise = rounding_noise(seed=bench.rounding.seed, tensor=step.entry.name, start=start, count=exact.numel())
        return round_stochastic(exact, noise=noise.reshape(exact.shape).to(exact.device))
    return round_nearest(exact, dtype=TORCH_DTYPES[step.entry.dtype], scratch=bench.scratch)


def _matrix(rows: Tensor) -> Tensor:
    """Rows of a tensor with any number of axes, as a matrix."""
    return rows.reshape(len(rows), -1)


def _factor(bench: Workspace, info: TensorInfo) -> Tensor:
    """A factor, whole, in the dtype that is computed with."""
    return _wide(load(info).to(bench.device))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
