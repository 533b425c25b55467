"""What a patch does to the rows that were sampled: its size, its angle to the drift, what a merge would keep of it.

Works on what `drift_samples` read once for all patches; of each patch its own tensors are read, one module at a time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32, Int64

from portllm.assess.kept_gain import measure_rounding
from portllm.assess.overlap import Alignment, Share, align, product_square, share_inside
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.sample import load_spans, load_values
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.rounding import MergeSums
from portllm.pipeline.drift_samples import SampledRows

Matrix = Float[np.ndarray, "_ _"]
INPUT, OUTPUT = "input", "output"
LOW_RANK = "low rank"
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
    overlaps: Mapping[str, Share] = field(default_factory=dict)
    rounding: Mapping[str, MergeSums] = field(default_factory=dict)
    is_rescaled: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether no infinity or NaN came out."""
        return math.isfinite(self.delta_sq)


def measure_change(
    change: Change[TensorInfo], sampled: SampledRows, columns: Float32[np.ndarray, "rows some"] | None
) -> ChangeMeasures:
    """Measure what a patch does to one weight.

    Args:
        change: Of the tensor that `sampled.pair.evolved` is, or is a part of.
        sampled: Rows of that weight in both models.
        columns: The drift of some columns of the whole weight, where all of it was read.
    """
    drift = sampled.drift
    match change:
        case LowRankDelta() as delta:
            infos = (delta.a, delta.b)
            values = load_spans([(info, 0, info.n_params) for info in infos])
            a, b = (found.reshape(info.shape) for info, found in zip(infos, values, strict=True))
            return _of_low_rank(delta, a, b, sampled, drift, columns)
        case ExpertsDelta() | ExpertDelta():
            return _of_experts(change, sampled, drift)
        case WholeValue(values=info):
            return _of_values(_rows_of(info, sampled) - sampled.base, sampled, drift, "value")
        case VectorDelta(values=info, scale=scale):
            return _of_values(np.float32(scale) * _rows_of(info, sampled), sampled, drift, "bias")
        case RowValues() as rows:
            return _of_token_rows(rows, sampled)


def _of_low_rank(
    delta: LowRankDelta[TensorInfo],
    a: Matrix,
    b: Matrix,
    sampled: SampledRows,
    drift: Matrix,
    columns: Float32[np.ndarray, "rows some"] | None,
) -> ChangeMeasures:
    # A weight that is stored as (d_in, d_out) is the transposed one with its factors in each other's place.
    left, right = (a.T, b.T) if delta.transposed else (b, a)
    across, along = (OUTPUT, INPUT) if delta.transposed else (INPUT, OUTPUT)
    added = np.float32(delta.scale) * (left[sampled.rows] @ right)
    overlaps = {across: share_inside(drift, right)}
    if columns is not None:
        overlaps[along] = share_inside(np.ascontiguousarray(columns.T), left.T)
    return ChangeMeasures(
        LOW_RANK,
        delta.rank,
        delta.scale**2 * product_square(b, a),
        align(added, drift),
        overlaps,
        _rounding(_rescaled(delta, added, sampled), sampled),
        is_rescaled=delta.magnitude is not None,
    )


def _rescaled(delta: LowRankDelta[TensorInfo], added: Matrix, sampled: SampledRows) -> Matrix:
    """What a merge would add to the sampled rows: with a DoRA magnitude, rows are rescaled by `m / |W0 + Δ|`."""
    if delta.magnitude is None or delta.transposed:
        return added
    magnitude = load_values(delta.magnitude, 0, delta.magnitude.n_params)[sampled.rows]
    factor = magnitude / np.linalg.norm(sampled.base + added, axis=1)
    merged: Matrix = factor[:, None] * (sampled.evolved + added) - sampled.evolved
    return merged


def _of_experts(
    change: ExpertsDelta[TensorInfo] | ExpertDelta[TensorInfo], sampled: SampledRows, drift: Matrix
) -> ChangeMeasures:
    """The sampled rows of one expert after the other; the size is that of the experts in the sample, for all."""
    experts = change if isinstance(change, ExpertsDelta) else change.experts
    n_experts, height, width = experts.shape
    stored = sampled.rows + sampled.pair.first_row
    if isinstance(change, ExpertDelta):
        stored = stored + change.number * height + change.start
    stacked = load_values(experts.b, 0, experts.b.n_params).reshape(height, experts.rank, n_experts)
    added, overlap, delta_sq, seen = np.zeros_like(sampled.base), Share(), 0.0, 0
    for number in np.unique(stored // height):
        first = int(number) * experts.rank * width
        a = load_values(experts.a, first, first + experts.rank * width).reshape(experts.rank, width)
        b = np.ascontiguousarray(stacked[:, :, number])
        mine = stored // height == number
        added[mine] = np.float32(experts.scale) * (b[stored[mine] % height] @ a)
        overlap += share_inside(drift[mine], a)
        start, stop = (change.start, change.stop) if isinstance(change, ExpertDelta) else (0, height)
        delta_sq += experts.scale**2 * product_square(b[start:stop], a)
        seen += stop - start
    return ChangeMeasures(
        LOW_RANK,
        experts.rank,
        delta_sq * sampled.pair.rows / max(1, seen),
        align(added, drift),
        {INPUT: overlap},
        _rounding(added, sampled),
    )


def _of_values(added: Matrix, sampled: SampledRows, drift: Matrix, kind: str) -> ChangeMeasures:
    alignment = align(added, drift)
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
    first = slice(0, sampled.n_first)
    return measure_rounding(sampled.evolved[first], added[first])


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
