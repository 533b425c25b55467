"""What an update did to the weights: what `check` holds every patch against, and reads once for all of them.

Windows of every weight are read, or every byte of both models.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from portllm.checking.update.config_changes import compare_configs
from portllm.checking.update.drift import measure_pairs
from portllm.checking.update.lineage import lineage_of
from portllm.checking.update.report import KindReport, UpdateReport
from portllm.checking.update.samples import DriftColumns, DriftSample, drawn, sample_drift
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import same_rounded
from portllm.checkpoint.open import side_file
from portllm.checkpoint.vocabulary import TOKENIZER_FILE
from portllm.matching.tensor_pairs import Pairing, TensorPair, pair_tensors
from portllm.matching.update import Update
from portllm.measures.estimate import DriftEstimate, Stratum, estimate_drift
from portllm.measures.overlap import square
from portllm.measures.places import TensorPlace
from portllm.progress import Progress, silent

COLUMN_ELEMENTS = 1 << 24
"""Elements of columns of the drift that are kept at most, for all weights together: 64 MB."""

MOST_COLUMNS = 16
"""Of one weight."""

Strata = Mapping[TensorPlace, tuple[Stratum, ...]]
Columns = Mapping[str, DriftColumns]


@dataclass(frozen=True)
class MeasuredUpdate:
    """What was read of an update; nothing of it depends on a patch.

    Attributes:
        update: The two models.
        report: What the update did.
        strata: The sums of what was read, by place.
        sample: Windows of both models.
        columns: By weight, the drift of some of its columns, where every weight was read.
    """

    update: Update
    report: UpdateReport
    strata: Strata
    sample: DriftSample
    columns: Columns

    def drift_of(self, places: frozenset[TensorPlace]) -> DriftEstimate | None:
        """The drift of some places."""
        if places not in self._estimates:
            self._estimates[places] = _estimate(self.strata, sorted(places))
        return self._estimates[places]

    @cached_property
    def pairs_of(self) -> Mapping[str, tuple[TensorPair, ...]]:
        """The pairs that a tensor of the evolved model is, or is a part of, by its name."""
        found: dict[str, tuple[TensorPair, ...]] = defaultdict(tuple)
        for pair in self.report.pairing.pairs.values():
            found[pair.evolved.name] += (pair,)
        return dict(found)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Where each pair stands, by its name, when those of a kind of module follow each other from layer to layer."""
        pairs = sorted(self.report.pairing.pairs.values(), key=lambda pair: (pair.place.kind, pair.place, pair.name))
        return {pair.name: number for number, pair in enumerate(pairs)}

    @cached_property
    def _estimates(self) -> dict[frozenset[TensorPlace], DriftEstimate | None]:
        """Those that were asked for: most patches of a base change the same modules."""
        return {}


def measure_update(update: Update, *, full: bool = False, progress: Progress = silent) -> MeasuredUpdate:
    """Read what can be measured of an update.

    Args:
        update: Of a base that is known.
        full: Read every weight of both, which lie on this disk, instead of a few megabytes spread over all of them.
        progress: Progress callback (bytes that `full` reads).

    Raises:
        CheckpointError, RemoteError: A model cannot be read.
    """
    if update.base is None:
        raise TypeError("an update is measured from its base")
    pairing = pair_tensors(update.base, update.evolved)
    sample = sample_drift(list(pairing.pairs.values()))
    strata: Strata = sample.strata
    columns: Columns = {}
    if full:
        strata, columns = _measure_all(pairing, progress)
    report = _update_report(update, pairing, strata, sample, is_full=full)
    return MeasuredUpdate(update, report, strata, sample, columns)


def _measure_all(pairing: Pairing, progress: Progress) -> tuple[Strata, Columns]:
    """The sums of every weight, and the drift of some columns of each matrix but those of experts."""
    matrices = {
        name: pair for name, pair in pairing.pairs.items() if len(pair.base.shape) == 2 and not pair.place.is_expert
    }
    n_columns = min(MOST_COLUMNS, COLUMN_ELEMENTS // max(1, sum(pair.rows for pair in matrices.values())))
    wanted = {name: drawn(name, pair.width, min(n_columns, pair.width)) for name, pair in matrices.items()}
    drifts = measure_pairs(
        list(pairing.pairs.values()),
        columns={name: found for name, found in wanted.items() if found},
        progress=progress,
    )
    strata: dict[TensorPlace, tuple[Stratum, ...]] = defaultdict(tuple)
    for name, drift in drifts.items():
        strata[pairing.pairs[name].place] += (Stratum((drift.sums,)),)
    columns = {
        name: np.ascontiguousarray(drift.columns.T) for name, drift in drifts.items() if drift.columns is not None
    }
    return dict(strata), {name: DriftColumns(values, square(values)) for name, values in columns.items()}


def _update_report(
    update: Update, pairing: Pairing, strata: Strata, sample: DriftSample, *, is_full: bool
) -> UpdateReport:
    if update.base is None or update.source is None:
        raise AssertionError("an update is checked from its base")
    matrices = _matrices(pairing, update.base)
    places: dict[str, list[TensorPlace]] = defaultdict(list)
    for place in strata:
        places[place.kind].append(place)
    counts = Counter(pair.place.kind for pair in pairing.pairs.values())
    kinds = {}
    for kind in sorted(places):
        drift = _estimate(strata, places[kind])
        if drift is not None:
            kinds[kind] = KindReport(drift, lineage_of(drift), counts[kind])
    drift = _estimate(strata, sorted({pair.place for pair in matrices}))
    cells = {place: cell for place in sorted(strata) if (cell := _estimate(strata, [place])) is not None}
    has_vocabularies = all(side_file(model, TOKENIZER_FILE) is not None for model in (update.base, update.evolved))
    return UpdateReport(
        base=update.source,
        evolved=update.target,
        is_full=is_full,
        n_elements=sum(pair.base.n_params for pair in pairing.pairs.values()) if is_full else sample.n_elements,
        drift=drift,
        lineage=lineage_of(drift),
        kinds=kinds,
        cells=cells,
        pairing=pairing,
        config_changes=compare_configs(update.base.config, update.evolved.config),
        tokens=update.tokens,
        has_vocabularies=has_vocabularies,
        broken=_broken(pairing, strata),
        same_in=same_rounded(update.base, update.evolved),
    )


def _matrices(pairing: Pairing, base: Checkpoint) -> list[TensorPair]:
    """The weights that tell lineage: neither vectors, whose values lie around one, nor rows of tokens."""
    by_token = {base.head_name, *(() if base.embedding is None else (base.embedding.name,))}
    return [
        pair
        for pair in pairing.pairs.values()
        if len(pair.base.shape) > 1 and pair.base.name not in by_token and pair.name != base.head_name
    ]


def _estimate(strata: Strata, places: Iterable[TensorPlace]) -> DriftEstimate | None:
    found = [stratum for place in places for stratum in strata.get(place, ())]
    finite = [stratum for stratum in found if stratum.total.is_finite]
    return estimate_drift(finite) if finite else None


def _broken(pairing: Pairing, strata: Strata) -> tuple[str, ...]:
    places = {place for place, found in strata.items() if not all(stratum.total.is_finite for stratum in found)}
    return tuple(name for name, pair in pairing.pairs.items() if pair.place in places)
