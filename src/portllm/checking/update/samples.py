"""Windows of two models, spread over every weight: a fixed number of megabytes, whatever the size of the models.

A window is whole rows, so that what a patch does to them can be worked out. Each weight is divided into equal parts,
and in each part one window lies at a place that is drawn from the weight's name: the same models give the same windows,
however they are split into files. Of a model with more weights than the budget has windows, all weights but those of
experts are read, and of the experts of each layer as many as fit.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from blake3 import blake3

from portllm.arrays import Float32, Int64
from portllm.matching.tensor_pairs import TensorPair
from portllm.measures.drift import DriftSums, measure_drift
from portllm.measures.estimate import Stratum
from portllm.measures.overlap import square
from portllm.measures.places import TensorPlace
from portllm.tensors.windows import load_spans

BUDGET_ELEMENTS = 1 << 22
"""Elements that are read of each model, about: 8 MB of bfloat16."""

WINDOW_ELEMENTS = 1 << 11
"""Elements of a window at least, where the weight has as many: 4 kB, which one page or one request brings."""

MOST_WINDOWS = 3
"""Of one weight: more would tell little more, and each is a request where a model is on the hub."""

FEWEST_WINDOWS = 2
"""Of one weight: one alone would not tell how far the next may lie from it."""


@dataclass(frozen=True)
class SampledRows:
    """Some rows of one weight in both models, as a matrix.

    Attributes:
        pair: The weight.
        rows: Which rows, rising.
        base: Their values, shape (rows, width).
        evolved: The same rows of the evolved model.
        n_first: Rows of the first window.
    """

    pair: TensorPair
    rows: Int64[np.ndarray, " rows"]
    base: Float32[np.ndarray, "rows width"]
    evolved: Float32[np.ndarray, "rows width"]
    n_first: int

    @cached_property
    def drift(self) -> Float32[np.ndarray, "rows width"]:
        """What the update added to these rows; kept as it is used, for every patch that changes them."""
        drift: Float32[np.ndarray, "rows width"] = self.evolved - self.base
        return drift

    @cached_property
    def drift_sq(self) -> float:
        """|D|² of these rows."""
        return square(self.drift)

    @property
    def first(self) -> Float32[np.ndarray, "rows width"]:
        """The rows of the first window in the evolved model."""
        return self.evolved[: self.n_first]


@dataclass(frozen=True, slots=True)
class AlikeRows:
    """Some rows of several weights of one shape, the same number of each.

    Attributes:
        each: Of one weight after the other.
        drift: What the update added to them.
        first: The rows of each weight's first window in the evolved model, one after the other.
    """

    each: tuple[SampledRows, ...]
    drift: Float32[np.ndarray, "n rows width"]
    first: Float32[np.ndarray, "n elements"]


@dataclass(frozen=True, slots=True)
class DriftColumns:
    """The drift of some columns of one weight.

    Attributes:
        values: As rows, shape (columns, rows of the weight).
        square: Their squared norm.
    """

    values: Float32[np.ndarray, "columns rows"]
    square: float


@dataclass(frozen=True)
class DriftSample:
    """What was read of two models.

    Attributes:
        strata: What the windows stand for, by place.
        rows: The rows of each weight, by its name.
        n_elements: Elements that were read of each model.
    """

    strata: Mapping[TensorPlace, tuple[Stratum, ...]]
    rows: Mapping[str, SampledRows]
    n_elements: int

    def alike(self, names: tuple[str, ...]) -> AlikeRows:
        """The rows of some weights of one shape; kept, for most patches of a base change the same modules."""
        if names not in self._alike:
            each = tuple(self.rows[name] for name in names)
            first = np.stack([rows.first.reshape(-1) for rows in each])
            self._alike[names] = AlikeRows(each, np.stack([rows.drift for rows in each]), first)
        return self._alike[names]

    @cached_property
    def _alike(self) -> dict[tuple[str, ...], AlikeRows]:
        """Those that were asked for."""
        return {}


def sample_drift(pairs: Sequence[TensorPair]) -> DriftSample:
    """Read windows of both models; slices of remote files are read side by side.

    Raises:
        CheckpointError, RemoteError: A window cannot be read.
    """
    chosen, n_windows = _choose(pairs)
    windows = [(pair, start, stop) for pair in chosen for start, stop in windows_of(pair, n_windows)]
    spans = [
        (info, start * pair.width, stop * pair.width)
        for pair, start, stop in windows
        for info in (pair.base, pair.evolved)
    ]
    values = load_spans(spans)
    read: dict[str, list[tuple[int, Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]]] = defaultdict(list)
    for (pair, start, _), base, evolved in zip(windows, values, values, strict=True):
        read[pair.name].append((start, base.reshape(-1, pair.width), evolved.reshape(-1, pair.width)))
    rows = {pair.name: _joined(pair, read[pair.name]) for pair in chosen}
    sums = {name: tuple(measure_drift(base, evolved) for _, base, evolved in parts) for name, parts in read.items()}
    return DriftSample(
        _strata(pairs, sums, rows), rows, sum((stop - start) * pair.width for pair, start, stop in windows)
    )


def windows_of(pair: TensorPair, n_windows: int) -> list[tuple[int, int]]:
    """Ranges of rows, one in each of `n_windows` equal parts of the weight; all rows where these are not more."""
    height = math.ceil(WINDOW_ELEMENTS / max(1, pair.width))
    if pair.rows <= n_windows * height:
        return [(0, pair.rows)]
    return [(start, start + height) for start in drawn(pair.name, pair.rows, n_windows, height)]


def drawn(name: str, total: int, count: int, length: int = 1) -> list[int]:
    """Where `count` pieces of a length begin, one in each of as many equal parts of `total`, drawn from a name.

    Example:
        >>> drawn("w", total=10, count=2, length=5)
        [0, 5]
    """
    draws = blake3(f"portllm drift 1\0{name}".encode()).digest(8 * count) if count else b""
    edges = [number * total // count for number in range(count + 1)] if count else []
    found = []
    for number in range(count):
        draw = int.from_bytes(draws[8 * number : 8 * number + 8], "little")
        found.append(edges[number] + draw % (edges[number + 1] - edges[number] - length + 1))
    return found


def _cost(pair: TensorPair, n_windows: int) -> int:
    return sum(stop - start for start, stop in windows_of(pair, n_windows)) * pair.width


def _choose(pairs: Sequence[TensorPair]) -> tuple[list[TensorPair], int]:
    """Which weights are read, and by how many windows each."""
    pairs = [pair for pair in pairs if pair.base.n_params]
    least = sum(_cost(pair, FEWEST_WINDOWS) for pair in pairs)
    if least <= BUDGET_ELEMENTS:
        return pairs, max(FEWEST_WINDOWS, min(MOST_WINDOWS, BUDGET_ELEMENTS * FEWEST_WINDOWS // max(1, least)))
    cells: dict[TensorPlace, list[TensorPair]] = defaultdict(list)
    for pair in pairs:
        if pair.place.is_expert:
            cells[pair.place].append(pair)
    of_experts = {pair.name for cell in cells.values() for pair in cell}
    rest = BUDGET_ELEMENTS - sum(_cost(pair, FEWEST_WINDOWS) for pair in pairs if pair.name not in of_experts)
    share = max(0, rest) / max(1, sum(_cost(pair, FEWEST_WINDOWS) for cell in cells.values() for pair in cell))
    kept = {pair.name for cell in cells.values() for pair in _spread(cell, math.ceil(share * len(cell)))}
    return [pair for pair in pairs if pair.name not in of_experts or pair.name in kept], FEWEST_WINDOWS


def _spread(cell: Sequence[TensorPair], count: int) -> list[TensorPair]:
    """At least two of the experts of a layer, evenly spaced."""
    count = min(len(cell), max(2, count))
    return [cell[number * len(cell) // count] for number in range(count)]


def _joined(
    pair: TensorPair, parts: Sequence[tuple[int, Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]]
) -> SampledRows:
    rows = np.concatenate([np.arange(start, start + len(base)) for start, base, _ in parts])
    base, evolved = (np.concatenate([part[side] for part in parts]) for side in (1, 2))
    return SampledRows(pair, rows, base, evolved, len(parts[0][1]))


def _strata(
    pairs: Sequence[TensorPair], sums: Mapping[str, tuple[DriftSums, ...]], rows: Mapping[str, SampledRows]
) -> dict[TensorPlace, tuple[Stratum, ...]]:
    """A stratum for each weight; the experts of a layer of which only some are read are one."""
    cells: dict[TensorPlace, list[TensorPair]] = defaultdict(list)
    for pair in pairs:
        if pair.base.n_params:
            cells[pair.place].append(pair)
    strata: dict[TensorPlace, tuple[Stratum, ...]] = {}
    for place, cell in cells.items():
        read = [pair for pair in cell if pair.name in sums]
        if len(read) == len(cell):
            strata[place] = tuple(
                Stratum(sums[pair.name], pair.base.n_params / rows[pair.name].base.size) for pair in cell
            )
        else:
            n_read = sum(rows[pair.name].base.size for pair in read)
            units = tuple(sum(sums[pair.name], DriftSums()) for pair in read)
            strata[place] = (Stratum(units, sum(pair.base.n_params for pair in cell) / n_read),)
    return strata
