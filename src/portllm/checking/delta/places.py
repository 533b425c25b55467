"""Where in a model a patch sits: how large it is in each place, and in how many directions. Every factor is read.

Apart from `patch_measures`, of which a verdict needs no more than some tensors: this is for a picture of all of them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checking.delta.measures import ChangeMeasures
from portllm.matching.tensor_pairs import TensorPair
from portllm.measures.estimate import DriftEstimate
from portllm.measures.places import TensorPlace
from portllm.measures.spectrum import product_values
from portllm.patch.delta import Change, LowRankDelta
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_spans


@dataclass(frozen=True, slots=True)
class PlacedDelta:
    """What a patch does in one place of a model.

    Attributes:
        relative_size: `|Δ| / |W1|` over the tensors of the place.
        spectrum: The singular values of `s·B·A` divided by `|W1|`, falling: their squares add up to that of the size.
            Empty where the change is no low-rank delta of one matrix.
    """

    relative_size: float
    spectrum: tuple[float, ...] = ()


def place_patch(
    changes: Mapping[str, tuple[Change[TensorInfo], TensorPair]],
    measured: Mapping[str, ChangeMeasures],
    cells: Mapping[TensorPlace, DriftEstimate],
) -> dict[TensorPlace, PlacedDelta]:
    """Size and spectrum by place; a place of which nothing is known is left out.

    Args:
        changes: What the patch does, by the name of a pair.
        measured: What is known of some of these: of what is no low-rank delta, its size.
        cells: By place, the sums of the weights.

    Raises:
        AdapterFormatError, CheckpointError: A factor cannot be read.
    """
    names: dict[TensorPlace, list[str]] = defaultdict(list)
    for name, (_, pair) in changes.items():
        names[pair.place].append(name)
    spectra = _spectra({name: change for name, (change, _) in changes.items() if isinstance(change, LowRankDelta)})
    placed = {}
    for place in sorted(names.keys() & cells.keys()):
        weight = math.sqrt(cells[place].sums.evolved_sq)
        squares = [
            math.fsum(value**2 for value in spectra[name]) if name in spectra else measured[name].delta_sq
            for name in names[place]
            if name in spectra or name in measured
        ]
        if squares and weight > 0:
            values = spectra.get(names[place][0], ()) if len(names[place]) == 1 else ()
            size = math.sqrt(math.fsum(squares) * len(names[place]) / len(squares))
            placed[place] = PlacedDelta(size / weight, tuple(value / weight for value in values))
    return placed


def _spectra(deltas: Mapping[str, LowRankDelta[TensorInfo]]) -> dict[str, tuple[float, ...]]:
    """The singular values of each `s·B·A`; files are read side by side."""
    values = load_spans([(info, 0, info.n_params) for delta in deltas.values() for info in (delta.b, delta.a)])
    spectra = {}
    for name, delta in deltas.items():
        b, a = (next(values).reshape(info.shape) for info in (delta.b, delta.a))
        spectra[name] = tuple((abs(delta.scale) * product_values(b, a)).tolist())
    return spectra
