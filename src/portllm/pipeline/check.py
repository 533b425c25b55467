"""Will a patch hold on the evolved model? From weights alone: no data, no forward pass.

What concerns the update is read once, however many patches there are: windows of every weight, or with `full` every
byte of both models. Each patch is then held against what was read; of its own tensors every byte is read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from portllm.assess.config_changes import compare_configs
from portllm.assess.estimate import DriftEstimate, Stratum, estimate_drift
from portllm.assess.lineage import lineage_of
from portllm.assess.overlap import Alignment, Share
from portllm.assess.places import Place
from portllm.assess.verdict import Measures, judge
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.reader import Checkpoint, on_disk, side_file
from portllm.checkpoint.ties import HEAD, embedding
from portllm.checkpoint.vocabulary import TOKENIZER_FILE
from portllm.patch.delta import Change, LowRankDelta
from portllm.patch.patch import Patch
from portllm.patch.rounding import MergeSums
from portllm.pipeline.check_report import CheckReport, KindReport, PatchReport, UpdateReport
from portllm.pipeline.drift_samples import DriftSample, drawn, sample_drift
from portllm.pipeline.fit import changes_on, oriented, tensor_of
from portllm.pipeline.fitted import quantization_of
from portllm.pipeline.pairs import Pair, Pairing, pair_tensors
from portllm.pipeline.patch_measures import ChangeMeasures, measure_change
from portllm.pipeline.plan import plan_port_on
from portllm.pipeline.sampled_gap import sample_gap
from portllm.pipeline.token_rows import has_token_rows
from portllm.pipeline.update import Update
from portllm.progress import Progress, silent

COLUMN_ELEMENTS = 1 << 24
"""Elements of columns of the drift that are kept at most, for all weights together: 64 MB."""

MOST_COLUMNS = 16
"""Of one weight."""

MOST_TENSORS = 32
"""Tensors of one patch that are read: enough for its angle, its size and what rounding takes of it."""

Strata = Mapping[Place, tuple[Stratum, ...]]
Columns = Mapping[str, Float32[np.ndarray, "rows some"]]


def check(
    *patches: Patch[TensorInfo],
    base: Checkpoint,
    evolved: Checkpoint,
    full: bool = False,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> CheckReport:
    """Say whether patches will hold on the evolved model, and why.

    Drift, lineage, fit, size, overlap and rounding are measured from weights; see `docs/check.md` for each. What could
    be measured of the update does not depend on the patches and is read once for all of them.

    Args:
        *patches: What may be ported.
        base: The model that they belong to.
        evolved: The later version of it.
        full: Read every weight of both, instead of a few megabytes spread over all of them.
        allow_other_base: Go on though `base` is not the one that a patch names.
        progress: Told of the bytes that `full` reads.

    Raises:
        CheckpointError, RemoteError: A model cannot be read.
    """
    if full:
        base, evolved = (on_disk(model, progress=progress) for model in (base, evolved))
    update = Update(base, evolved)
    pairing = pair_tensors(base, evolved)
    changes = [_changes_of(patch, update, pairing) for patch in patches]
    sample = sample_drift(list(pairing.pairs.values()))
    strata: Strata = sample.strata
    columns: Columns = {}
    if full:
        strata, columns = _measure_all(pairing, changes, progress)
    report = _update_report(update, pairing, strata, sample, is_full=full)
    known = _Known(update, report, strata, sample, columns, allow_other_base)
    return CheckReport(
        report, tuple(_check_patch(patch, found, known) for patch, found in zip(patches, changes, strict=True))
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """What every patch is held against."""

    update: Update
    report: UpdateReport
    strata: Strata
    sample: DriftSample
    columns: Columns
    allow_other_base: bool
    estimates: dict[frozenset[Place], DriftEstimate | None] = field(default_factory=dict)
    """Those that were asked for: most patches of a base change the same modules."""

    def drift_of(self, places: frozenset[Place]) -> DriftEstimate | None:
        """The drift of some places."""
        if places not in self.estimates:
            self.estimates[places] = _estimate(self.strata, sorted(places))
        return self.estimates[places]


Changes = Mapping[str, tuple[Change[TensorInfo], Pair]]
"""What a patch does, by the name of a pair."""


def _changes_of(patch: Patch[TensorInfo], update: Update, pairing: Pairing) -> Changes:
    """What a patch does to weights that both models have; whether it fits is the plan's to say."""
    evolved = update.evolved
    by_tensor: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairing.pairs.values():
        by_tensor[pair.evolved.name].append(pair)
    found: dict[str, tuple[Change[TensorInfo], Pair]] = {}
    for name, change in changes_on(oriented(patch, evolved), evolved).items():
        tensor = tensor_of(name, evolved)
        for pair in by_tensor.get(name if tensor is None else tensor.name, ()):
            found[pair.name] = (change, pair)
    return found


def _measure_all(pairing: Pairing, changes: Sequence[Changes], progress: Progress) -> tuple[Strata, Columns]:
    """The sums of every weight, and the drift of some columns of what a low-rank delta changes."""
    from portllm.pipeline.drift import measure_pairs  # needs torch, which the samples do without

    low_rank = {
        name: pair
        for found in changes
        for name, (change, pair) in found.items()
        if isinstance(change, LowRankDelta) and len(pair.base.shape) == 2
    }
    n_columns = min(MOST_COLUMNS, COLUMN_ELEMENTS // max(1, sum(pair.rows for pair in low_rank.values())))
    wanted = {name: drawn(name, pair.width, min(n_columns, pair.width)) for name, pair in low_rank.items()}
    drifts = measure_pairs(
        list(pairing.pairs.values()),
        columns={name: found for name, found in wanted.items() if found},
        progress=progress,
    )
    strata: dict[Place, tuple[Stratum, ...]] = defaultdict(tuple)
    for name, drift in drifts.items():
        strata[pairing.pairs[name].place] += (Stratum((drift.sums,)),)
    columns = {name: drift.columns.numpy() for name, drift in drifts.items() if drift.columns is not None}
    return dict(strata), columns


def _update_report(
    update: Update, pairing: Pairing, strata: Strata, sample: DriftSample, *, is_full: bool
) -> UpdateReport:
    if update.base is None or update.source is None:
        raise AssertionError("an update is checked from its base")
    matrices = _matrices(pairing, update.base)
    places: dict[str, list[Place]] = defaultdict(list)
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
    )


def _matrices(pairing: Pairing, base: Checkpoint) -> list[Pair]:
    """The weights that tell lineage: neither vectors, whose values lie around one, nor rows of tokens."""
    shared = embedding(base)
    by_token = {HEAD, *(() if shared is None else (shared.name,))}
    return [
        pair
        for pair in pairing.pairs.values()
        if len(pair.base.shape) > 1 and pair.base.name not in by_token and pair.name != HEAD
    ]


def _estimate(strata: Strata, places: Iterable[Place]) -> DriftEstimate | None:
    found = [stratum for place in places for stratum in strata.get(place, ())]
    finite = [stratum for stratum in found if stratum.total.is_finite]
    return estimate_drift(finite) if finite else None


def _broken(pairing: Pairing, strata: Strata) -> tuple[str, ...]:
    places = {place for place, found in strata.items() if not all(stratum.total.is_finite for stratum in found)}
    return tuple(name for name, pair in pairing.pairs.items() if pair.place in places)


def _check_patch(patch: Patch[TensorInfo], changes: Changes, known: _Known) -> PatchReport:
    plan = plan_port_on(patch, known.update, allow_other_base=known.allow_other_base)
    if plan.refusals:
        return PatchReport(patch.name, judge(Measures(refusals=plan.refusals)))
    measured: dict[str, ChangeMeasures] = {}
    for name, (change, pair) in _spread(changes).items():
        follows_tokens = plan.tokens is not None and has_token_rows(pair.evolved.name, known.update.evolved)
        sampled = known.sample.rows.get(name)
        if sampled is not None and not follows_tokens:
            with np.errstate(invalid="ignore", over="ignore"):  # what is no number is named below
                measured[name] = measure_change(change, sampled, known.columns.get(name))
    matrices = {pair.place for _, pair in changes.values() if len(pair.base.shape) > 1}
    places = frozenset(matrices or {pair.place for _, pair in changes.values()})
    drift = known.drift_of(places)
    rounding = _total_rounding(measured.values())
    overlaps = _total_overlaps(measured.values())
    alignment = sum((found.alignment for found in measured.values()), Alignment())
    gap = sample_gap(patch, measured, known.sample.rows)
    stored_as = Counter(pair.evolved.dtype for _, pair in changes.values()).most_common(1)
    verdict = judge(
        Measures(
            lineage={
                kind: known.report.kinds[kind].lineage
                for kind in sorted({place.kind for place in places} & known.report.kinds.keys())
            },
            drift=drift,
            broken=(*known.report.broken, *(name for name, found in measured.items() if not found.is_finite)),
            config_changes=known.report.config_changes,
            alignment=alignment.cosine,
            overlaps=overlaps,
            kept_gain={dtype: sums.kept_gain for dtype, sums in rounding.items()},
            stored_as=stored_as[0][0] if stored_as else None,
            changes_vocabulary=plan.tokens is not None,
            fitted_to=quantization_of(patch),
            quantization_gap=None if gap is None else gap.ratio,
        )
    )
    return PatchReport(
        patch.name,
        verdict,
        drift,
        _total_size(changes, measured),
        alignment,
        overlaps,
        rounding,
        stored_as[0][0] if stored_as else None,
        measured,
        sum(found.is_rescaled for found in measured.values()),
        gap,
    )


def _spread(changes: Changes) -> Changes:
    """At most `MOST_TENSORS` of the changes, evenly spaced over kinds of modules and layers."""
    names = sorted(changes, key=lambda name: (changes[name][1].place.kind, changes[name][1].place, name))
    count = min(MOST_TENSORS, len(names))
    return {name: changes[name] for name in (names[number * len(names) // count] for number in range(count))}


def _total_size(changes: Changes, measured: Mapping[str, ChangeMeasures]) -> float:
    """|Δ|² over the matrices; what was not measured is taken to be like what was of the same kind of module."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, (_, pair) in changes.items():
        if len(pair.base.shape) > 1:
            names[pair.place.kind].append(name)
    total = 0.0
    for kind in sorted(names):
        found = [measured[name].delta_sq for name in names[kind] if name in measured]
        total += sum(found) * len(names[kind]) / max(1, len(found))
    return total


def _total_overlaps(measured: Iterable[ChangeMeasures]) -> dict[str, Share]:
    total: dict[str, Share] = {}
    for found in measured:
        for side, share in found.overlaps.items():
            total[side] = total.get(side, Share()) + share
    return total


def _total_rounding(measured: Iterable[ChangeMeasures]) -> dict[str, MergeSums]:
    total: dict[str, MergeSums] = {}
    for found in measured:
        for dtype, sums in found.rounding.items():
            total[dtype] = total.get(dtype, MergeSums()) + sums
    return total
