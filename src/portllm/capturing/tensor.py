"""Capture one tensor from two models: both are read once, side by side in blocks of rows, and digested on the way."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from portllm.capturing.tuned_plan import Dense, RowMap, TunedPair
from portllm.checkpoint.model.identity import digest_stored
from portllm.errors import NonFiniteError
from portllm.linalg import square_sum, working_dtype
from portllm.patch.capture import RoundingNoise, truncate
from portllm.patch.delta import ExpertsDelta, LowRankDelta
from portllm.tensors.info import TensorInfo
from portllm.tensors.rows import RowReader
from portllm.tensors.spool import Spool
from portllm.tensors.tensors import TORCH_DTYPES, encode, load_rows
from portllm.tensors.windows import runs

BLOCK_ELEMENTS = 1 << 17
"""Elements read at once: what is done to them finds them in the processor's cache."""

Known = tuple[Mapping[str, str], Mapping[str, str]]
"""Digests of the base's and the tuned model's tensors, by stored name."""


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """What became of one changed tensor.

    Attributes:
        base_sq: |W0|².
        difference_sq: |D|², for D = tuned - base.
        rank: Of the delta; None for a tensor that is kept whole or left out.
        residual_sq: |D - B A|², what the delta leaves out.
        noise_edge: Singular values of D below it are rounding; None where the rank was given.
    """

    base_sq: float
    difference_sq: float
    rank: int | None = None
    residual_sq: float = 0.0
    noise_edge: float | None = None

    @property
    def relative_size(self) -> float:
        """`|D| / |W0|`; of what a base of zero became, `|D|` itself, so that it is a number that JSON holds."""
        return math.sqrt(self.difference_sq / self.base_sq) if self.base_sq else math.sqrt(self.difference_sq)

    @property
    def truncation_residual(self) -> float:
        """`|D - B A| / |D|`; 0.0 for a difference of zero."""
        return math.sqrt(self.residual_sq / self.difference_sq) if self.difference_sq else 0.0


@dataclass(frozen=True, slots=True)
class Compared:
    """What was found of one tensor.

    Attributes:
        digests: Of the bytes that were read.
        measured: Its change; of size zero where both have the same values.
        delta: Of a linear weight or of experts; None where nothing of the change is kept.
        value: Of any other tensor, what replaces the base's.
        extra: The rows of tuned that base has none for.
    """

    digests: Known
    measured: CapturedTensor
    delta: LowRankDelta[TensorInfo] | ExpertsDelta[TensorInfo] | None = None
    value: TensorInfo | None = None
    extra: CapturedTensor | None = None


def compare_linear(
    name: str, pair: TunedPair, *, rank: int | None, max_rank: int | None, known: Known, spool: Spool
) -> Compared:
    """Cut the change of a linear weight to its rank.

    Raises:
        NonFiniteError: A weight holds an infinity or NaN.
    """
    sides = _Sides(pair, known)
    shape = (pair.base.shape[0], pair.base.shape[1])
    noise = RoundingNoise(shape) if rank is None else None
    difference: Tensor | None = None
    base_sq = difference_sq = 0.0
    for start, base, tuned in sides.rows():
        if noise is not None:
            noise.add_rows(start, base, tuned)
        wide = base.to(working_dtype(base, tuned))
        base_sq += square_sum(wide)
        if difference is None and not _same(base, tuned):
            difference = _MEMORY.matrix(shape, wide.dtype)
            difference[:start] = 0.0
        if difference is not None:
            rows = difference[start : start + len(base)].copy_(tuned).sub_(wide)
            difference_sq += square_sum(rows)
    _require_finite(name, base_sq + difference_sq)
    if difference is None or not difference_sq:
        return Compared(sides.digests(), CapturedTensor(base_sq, 0.0))
    edge = None if noise is None else noise.edge
    found = truncate(difference, rank=rank, edge=edge, max_rank=max_rank, difference_sq=difference_sq)
    measured = CapturedTensor(base_sq, difference_sq, found.rank, found.residual_sq, edge)
    delta = None if found.delta is None else _spooled(found.delta, name, spool, transposed=pair.transposed)
    return Compared(sides.digests(), measured, delta)


def compare_whole(name: str, pair: TunedPair, *, dense: Dense, known: Known, spool: Spool) -> Compared:
    """The tuned value of a tensor that is no linear weight, and how far it is from the base's.

    Raises:
        NonFiniteError: A weight holds an infinity or NaN.
    """
    sides = _Sides(pair, known)
    if pair.row_map is None or dense == "drop":
        measured, value = _measure(name, sides), pair.tuned
    else:
        with spool.writing(name, pair.tuned.dtype, pair.base.shape) as entry:
            measured = _measure(name, sides, entry.append_tensor)
        value = entry.info
    extra = CapturedTensor(measured.base_sq, _rows_square_sum(pair.tuned, pair.extra_rows)) if pair.extra_rows else None
    return Compared(sides.digests(), measured, value=value, extra=extra)


class _Sides:
    """Both tensors of a pair, read once."""

    def __init__(self, pair: TunedPair, known: Known) -> None:
        self._pair = pair
        self._base = _Digested(pair.base, known[0], _MEMORY.base)
        self._tuned = _Digested(pair.tuned, known[1], _MEMORY.tuned)

    def rows(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Rows as they are stored, two axes each, with the number of the first; a scalar is one row.

        The next ones overwrite them.
        """
        base, row_map = self._pair.base, self._pair.row_map
        n_rows = base.shape[0] if base.shape else 1
        step = max(1, BLOCK_ELEMENTS // max(1, base.n_params // max(1, n_rows)))
        with _MEMORY.base, _MEMORY.tuned:
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                before = self._base.rows(start, stop)
                after = self._tuned.rows(start, stop) if row_map is None else self._by_token(before, row_map, start)
                yield start, before, after

    def digests(self) -> Known:
        """Of both, when all rows were read."""
        return self._base.digests(), self._tuned.digests()

    def _by_token(self, base: Tensor, row_map: RowMap, start: int) -> Tensor:
        """Tuned's rows in base's order; where tuned has no such token, base's own row."""
        wanted = row_map.rows[start : start + len(base)]
        # Values of tuned, so its dtype: base's own rows are rounded where that is the narrower one.
        rows = base.to(TORCH_DTYPES[self._pair.tuned.dtype], copy=True)
        for first, last in runs(wanted):
            if wanted[first] >= 0:
                rows[first:last] = load_rows(self._pair.tuned, wanted[first], wanted[first] + last - first)
        return rows


class _Digested:
    """A tensor whose digest is taken while its rows are read in order, unless it is known."""

    def __init__(self, info: TensorInfo, known: Mapping[str, str], reader: RowReader) -> None:
        self._info, self._known, self._reader = info, known, reader
        # The rows of a quantized tensor are not the bytes that are stored.
        self._is_plain = info.encoding is None
        self._reads_bytes = self._is_plain and info.name not in known
        self._state = blake3()
        self._n_bytes = 0

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of two axes, which the next call overwrites."""
        load = self._reader.rows if self._is_plain else load_rows
        rows = load(self._info, start, stop).reshape(stop - start, -1)
        if self._reads_bytes:
            self._state.update(encode(rows))
            self._n_bytes += rows.nbytes
        return rows

    def digests(self) -> Mapping[str, str]:
        """Of its bytes and those of what it needs to be decoded; what was not read in order is read again."""
        if self._reads_bytes and self._n_bytes == self._info.n_bytes:
            return {self._info.name: self._state.hexdigest()}
        return digest_stored(self._info, self._known)


class _Memory(threading.local):
    """Memory of one thread, taken once: for each difference anew, it would cost as much as to read both tensors."""

    def __init__(self) -> None:
        self.base, self.tuned = RowReader(), RowReader()
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix of any content, overwritten by the next."""
        count = shape[0] * shape[1] * dtype.itemsize
        if self._bytes.numel() < count:
            self._bytes = torch.empty(count, dtype=torch.uint8)
        return self._bytes[:count].view(dtype).reshape(shape)


_MEMORY = _Memory()


def _measure(name: str, sides: _Sides, take: Callable[[Tensor], None] | None = None) -> CapturedTensor:
    base_sq = difference_sq = 0.0
    for _, base, tuned in sides.rows():
        base_sq += square_sum(base)
        if not _same(base, tuned):
            dtype = working_dtype(base, tuned)
            difference_sq += square_sum(tuned.to(dtype) - base.to(dtype))
        if take is not None:
            take(tuned)
    _require_finite(name, base_sq + difference_sq)
    return CapturedTensor(base_sq, difference_sq)


def _same(base: Tensor, tuned: Tensor) -> bool:
    """Whether both hold the same bytes."""
    return base.dtype == tuned.dtype and torch.equal(base.view(torch.uint8), tuned.view(torch.uint8))


def not_finite(name: str) -> NonFiniteError:
    """What is said of a weight that holds something else than numbers."""
    return NonFiniteError(
        f"'{name}': the base or the tuned model contains an infinity or NaN. The training run may have diverged."
    )


def _require_finite(name: str, square_sums: float) -> None:
    if not math.isfinite(square_sums):
        raise not_finite(name)


def _rows_square_sum(info: TensorInfo, rows: tuple[int, ...]) -> float:
    return math.fsum(square_sum(load_rows(info, rows[a], rows[a] + b - a)) for a, b in runs(rows))


def _spooled(delta: LowRankDelta[Tensor], name: str, spool: Spool, *, transposed: bool) -> LowRankDelta[TensorInfo]:
    # Of a weight that is stored as (d_in, d_out) the factors of the transpose are kept, as PEFT does.
    a, b = (delta.b.T.contiguous(), delta.a.T.contiguous()) if transposed else (delta.a, delta.b)
    return LowRankDelta(
        a=spool.add(f"{name}.lora_A", a.float()),
        b=spool.add(f"{name}.lora_B", b.float()),
        scale=1.0,
        transposed=transposed,
    )
