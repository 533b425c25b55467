"""What a patch does to the rows that were sampled: its size, its angle to the drift, what a merge would keep of it.

Works on what `drift_samples` read once for all patches; of each patch its own tensors are read, one module at a time.
Neither delta nor drift is formed whole: with `Δ = s·B·A` and sampled rows S of the drift `D`, all but the rounding
follows from `A Aᵀ`, `Bᵀ B`, `A D_Sᵀ` and `B_S`, matrices with as many rows or columns as the rank.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from portllm.arrays import Float, Float32, Int64
from portllm.checking.update.samples import AlikeRows, DriftColumns, DriftSample, SampledRows
from portllm.measures.kept_gain import measure_rounding
from portllm.measures.overlap import (
    Alignment,
    DriftShare,
    align,
    gram,
    product_squares,
    products,
    shares_inside,
    square,
)
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.rounding import MergeSums
from portllm.tensors.info import TensorInfo
from portllm.tensors.stacks import AlikeReader
from portllm.tensors.windows import load_values

Matrix = Float[np.ndarray, "_ _"]
Columns = Mapping[str, DriftColumns]
INPUT, OUTPUT = "input", "output"
LOW_RANK = "low rank"
MOST_ELEMENTS = 1 << 21
"""Of factors that are read at once: 8 MB."""

LONGEST_ROWS = 256
"""Trained token rows that are measured at most."""


@dataclass(frozen=True, slots=True)
class ChangeMeasures:
    """What was measured of one tensor that a patch changes.

    Attributes:
        kind: What the change is: `low rank`, `value`, `rows`, `bias`.
        rank: Of a low-rank delta, else None.
        delta_sq: |Δ|²; exact for a low-rank delta, estimated from the sampled rows for a value.
        alignment: Patch and drift on the sampled rows.
        overlaps: By side, how much of the drift lies where the delta works.
        rounding: By storage dtype, the sums of a merge of the first sampled rows.
        is_rescaled: Whether a DoRA magnitude rescales each row besides; sizes and angles are those of `s·B·A` then.
    """

    kind: str
    rank: int | None
    delta_sq: float
    alignment: Alignment = field(default_factory=Alignment)
    overlaps: Mapping[str, DriftShare] = field(default_factory=dict)
    rounding: Mapping[str, MergeSums] = field(default_factory=dict)
    is_rescaled: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether no infinity or NaN came out."""
        return math.isfinite(self.delta_sq)


S = TypeVar("S", DriftShare, MergeSums)


def summed(parts: Iterable[Mapping[str, S]]) -> dict[str, S]:
    """The sums of what has the same name, such as the overlaps of several changes by their side."""
    total: dict[str, S] = {}
    for part in parts:
        for name, sums in part.items():
            total[name] = total[name] + sums if name in total else sums
    return total


def measure_changes(
    changes: Mapping[str, Change[TensorInfo]], sample: DriftSample, columns: Columns, reader: AlikeReader
) -> dict[str, ChangeMeasures]:
    """Measure what one patch does to some weights.

    Args:
        changes: By weight, what is done to the tensor that its `pair.evolved` is, or is a part of.
        sample: Rows of these weights in both models.
        columns: The drift of some columns of whole weights, where all of them was read.
        reader: Of the factors.

    Raises:
        CheckpointError: A tensor of the patch cannot be read.
    """
    found: dict[str, ChangeMeasures] = {}
    low_rank: dict[str, LowRankDelta[TensorInfo]] = {}
    for name, change in changes.items():
        sampled = sample.rows[name]
        match change:
            case LowRankDelta():
                low_rank[name] = change
            case ExpertsDelta() | ExpertDelta():
                found[name] = _of_experts(change, sampled)
            case WholeValue(values=info):
                found[name] = _of_values(_rows_of(info, sampled) - sampled.base, sampled, "value")
            case VectorDelta(values=info, scale=scale):
                found[name] = _of_values(np.float32(scale) * _rows_of(info, sampled), sampled, "bias")
            case RowValues():
                found[name] = _of_token_rows(change, sampled)
    for names in _alike(low_rank, sample.rows):
        deltas = [low_rank[name] for name in names]
        a, b = reader.read([delta.a for delta in deltas], [delta.b for delta in deltas])
        some = [columns[name] for name in names] if all(name in columns for name in names) else []
        found |= zip(names, _of_low_rank(deltas, a, b, sample.alike(names), some), strict=True)
    return {name: found[name] for name in changes}


def _alike(
    deltas: Mapping[str, LowRankDelta[TensorInfo]], rows: Mapping[str, SampledRows]
) -> Iterator[tuple[str, ...]]:
    """Names of deltas of one shape, for whose weights the same number of rows was read; not too many at once."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, delta in deltas.items():
        sampled = rows[name]
        factors = (delta.a.shape, delta.a.dtype, delta.b.shape, delta.b.dtype, delta.transposed)
        groups[factors, sampled.base.shape, sampled.n_first].append(name)
    for names in groups.values():
        delta = deltas[names[0]]
        step = max(1, MOST_ELEMENTS // max(1, delta.a.n_params, delta.b.n_params))
        yield from (tuple(names[start : start + step]) for start in range(0, len(names), step))


def _of_low_rank(
    deltas: Sequence[LowRankDelta[TensorInfo]],
    a: Float32[np.ndarray, "n rank d_in"],
    b: Float32[np.ndarray, "n d_out rank"],
    sampled: AlikeRows,
    columns: Sequence[DriftColumns],
) -> Iterator[ChangeMeasures]:
    # A weight that is stored as (d_in, d_out) is the transposed one with its factors in each other's place.
    is_turned = deltas[0].transposed
    (left, right), (across, along) = ((a, b), (OUTPUT, INPUT)) if is_turned else ((b, a), (INPUT, OUTPUT))
    left, right = (left, right.swapaxes(1, 2)) if is_turned else (left.swapaxes(1, 2), right)
    of_left, of_right = gram(left), gram(right)
    picked = np.stack([factor[rows.rows] for factor, rows in zip(left.swapaxes(1, 2), sampled.each, strict=True)])
    inner = products(right, sampled.drift)
    drift_sq = [rows.drift_sq for rows in sampled.each]
    overlaps = {across: shares_inside(inner, of_right, totals=drift_sq, width=right.shape[2])}
    if columns:
        inner_along = np.stack([products(factor, drift.values) for factor, drift in zip(left, columns, strict=True)])
        totals = [drift.square for drift in columns]
        overlaps[along] = shares_inside(inner_along, of_left, totals=totals, width=left.shape[2])
    scales = np.array([delta.scale for delta in deltas])
    sizes = (scales**2 * product_squares(of_left, of_right)).tolist()
    sampled_sizes = (scales**2 * product_squares(gram(picked.swapaxes(1, 2)), of_right)).tolist()
    along_drift = (scales * np.einsum("nkr,nrk->n", picked, inner)).tolist()
    n_first = sampled.each[0].n_first
    added = scales.astype(np.float32)[:, None, None] * (picked[:, :n_first] @ right)
    merged = [_merged(*each) for each in zip(deltas, added, sampled.each, strict=True)]
    rounding = measure_rounding(sampled.first, np.stack(merged).reshape(len(merged), -1))
    for number, delta in enumerate(deltas):
        yield ChangeMeasures(
            LOW_RANK,
            delta.rank,
            sizes[number],
            Alignment(along_drift[number], sampled_sizes[number], drift_sq[number]),
            {side: shares[number] for side, shares in overlaps.items()},
            rounding[number],
            is_rescaled=delta.magnitude is not None,
        )


def _merged(delta: LowRankDelta[TensorInfo], added: Matrix, sampled: SampledRows) -> Matrix:
    """What a merge would add to the first rows: with a DoRA magnitude, rows are rescaled by `m / |W0 + Δ|`."""
    if delta.magnitude is None or delta.transposed:
        return added
    first = slice(0, sampled.n_first)
    magnitude = load_values(delta.magnitude, 0, delta.magnitude.n_params)[sampled.rows[first]]
    factor = magnitude / np.linalg.norm(sampled.base[first] + added, axis=1)
    merged: Matrix = factor[:, None] * (sampled.first + added) - sampled.first
    return merged


def _of_experts(change: ExpertsDelta[TensorInfo] | ExpertDelta[TensorInfo], sampled: SampledRows) -> ChangeMeasures:
    """The sampled rows of one expert after the other; the size is that of the experts in the sample, for all."""
    experts = change if isinstance(change, ExpertsDelta) else change.experts
    n_experts, height, width = experts.shape
    stored = sampled.rows + sampled.pair.first_row
    if isinstance(change, ExpertDelta):
        stored = stored + change.number * height + change.start
    d_in = experts.a.shape[1]
    stacked = load_values(experts.b, 0, experts.b.n_params).reshape(-1, experts.rank, n_experts)
    added, overlap, delta_sq, seen = np.zeros_like(sampled.base), DriftShare(), 0.0, 0
    for number in np.unique(stored // height):
        first = int(number) * experts.rank * d_in
        a = load_values(experts.a, first, first + experts.rank * d_in).reshape(experts.rank, d_in)
        b = np.ascontiguousarray(stacked[:, :, number])
        if experts.transposed:
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        mine = stored // height == number
        added[mine] = np.float32(experts.scale) * (b[stored[mine] % height] @ a)
        of_a, drift = gram(a)[None], sampled.drift[mine]
        overlap += shares_inside(products(a, drift)[None], of_a, totals=[square(drift)], width=width)[0]
        start, stop = (change.start, change.stop) if isinstance(change, ExpertDelta) else (0, height)
        delta_sq += experts.scale**2 * float(product_squares(gram(b[start:stop].T)[None], of_a)[0])
        seen += stop - start
    return ChangeMeasures(
        LOW_RANK,
        experts.rank,
        delta_sq * sampled.pair.rows / max(1, seen),
        align(added, sampled.drift),
        {OUTPUT if experts.transposed else INPUT: overlap},
        _rounding(added, sampled),
    )


def _of_values(added: Matrix, sampled: SampledRows, kind: str) -> ChangeMeasures:
    alignment = align(added, sampled.drift)
    whole = sampled.pair.base.n_params / max(1, sampled.base.size)
    return ChangeMeasures(kind, None, whole * alignment.delta_sq, alignment, {}, _rounding(added, sampled))


def _of_token_rows(change: RowValues[TensorInfo], sampled: SampledRows) -> ChangeMeasures:
    width = sampled.pair.width
    places = [(number, row) for number, row in enumerate(change.rows) if row < sampled.pair.rows]
    delta_sq = 0.0
    for number, row in places[:LONGEST_ROWS]:
        moved = load_values(change.values, number * width, (number + 1) * width) - load_values(
            sampled.pair.base, row * width, (row + 1) * width
        )
        delta_sq += float(np.vdot(moved.astype(np.float64), moved))
    return ChangeMeasures("rows", None, delta_sq * len(places) / max(1, min(len(places), LONGEST_ROWS)))


def _rounding(added: Matrix, sampled: SampledRows) -> dict[str, MergeSums]:
    """What each storage dtype would keep, from the rows of the first window."""
    first = sampled.first.reshape(1, -1)
    return measure_rounding(first, added[: sampled.n_first].reshape(1, -1).astype(np.float32, copy=False))[0]


def _rows_of(info: TensorInfo, sampled: SampledRows) -> Float32[np.ndarray, "rows width"]:
    """The sampled rows of a tensor of the patch that has the weight's shape."""
    width = sampled.pair.width
    parts = [load_values(info, start * width, stop * width) for start, stop in runs_of(sampled.rows)]
    return np.concatenate(parts).reshape(-1, width)


def runs_of(rows: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that follow each other; `rows` rise."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
