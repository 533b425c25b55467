"""Will a patch hold on the evolved model? From weights alone: no data, no forward pass.

What concerns the update is read once, however many patches there are (`measured_update`). Each patch is then held
against what was read; of its own tensors every byte is read, of at most `MOST_TENSORS` of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from portllm.checking.answers import answers_about
from portllm.checking.chain import chain_of
from portllm.checking.delta.measures import ChangeMeasures, measure_changes, summed
from portllm.checking.delta.places import place_patch
from portllm.checking.delta.quantization import sample_gap
from portllm.checking.forecast import with_forecast
from portllm.checking.report import CheckReport, PatchReport
from portllm.checking.update.measures import MeasuredUpdate, measure_update
from portllm.checking.verdict import Measures, judge
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import on_disk
from portllm.errors import Refusal, refuse
from portllm.files.input_file import unchanged
from portllm.matching.changes import changes_on
from portllm.matching.in_step import not_in_step
from portllm.matching.port_plan import PortPlan, plan_port
from portllm.matching.quantized_base import quantization_of
from portllm.matching.tensor_pairs import TensorPair
from portllm.matching.token_rows import has_token_rows
from portllm.matching.update import Update
from portllm.measures.overlap import Alignment
from portllm.patch.adapter_folder import files_of
from portllm.patch.delta import Change
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.stacks import AlikeReader

ADD = "add"
"""The method that leaves a patch as it is."""

MOST_TENSORS = 32
"""Tensors of one patch that are read: enough for its angle, its size and what rounding takes of it."""

Changes = Mapping[str, tuple[Change[TensorInfo], TensorPair]]
"""What a patch does, by the name of a pair."""


def check_weights(
    *patches: Patch[TensorInfo],
    base: Checkpoint,
    evolved: Checkpoint,
    trained_on: Checkpoint | None = None,
    full: bool = False,
    places: bool = False,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> CheckReport:
    """Say whether patches will hold on the evolved model, and why; arguments and errors as for `check` without `text`.

    Drift, lineage, fit, size, overlap and rounding are measured from weights; see `docs/check.md` for each. What could
    be measured of the update does not depend on the patches and is read once for all of them.

    Raises:
        InputChangedError: A file changed while it was read.
        PlanRefusedError: By `full`, a head is found not to be the embedding that its model says it is tied to; or
            `trained_on` is not the model that a patch was trained on.
    """
    if trained_on is not None and not allow_other_base:
        given = identify(trained_on)
        refuse([refusal for patch in patches for refusal in _not_trained_on(patch, given)])
    if full:
        base, evolved = (on_disk(model, progress=progress) for model in (base, evolved))
        trained_on = None if trained_on is None else on_disk(trained_on, progress=progress)
    first = () if trained_on is None else trained_on.files
    with unchanged([*base.files, *evolved.files, *first, *(file for patch in patches for file in files_of(patch))]):
        if full:
            require_equal((*base.stored_twice, *evolved.stored_twice), progress=progress)
        known = measure_update(Update(base, evolved), full=full, progress=progress)
        since = None
        if trained_on is not None:
            since = measure_update(Update(trained_on, evolved), full=full, progress=progress)
        plans = (plan_port(patch, known.update, allow_other_base=allow_other_base) for patch in patches)
        reader = AlikeReader()
        found = (check_patch(plan, known, reader, since=since, places=places) for plan in plans)
        return CheckReport(known.report, tuple(found))


def _not_trained_on(patch: Patch[TensorInfo], given: ModelIdentity) -> Iterator[Refusal]:
    """Why a model is not the one that a patch was trained on, or says nothing of how far the patch has come."""
    if patch.record is None:
        return
    first = patch.record.ports[0].source if patch.record.ports else patch.record.base
    if first.fingerprint != given.fingerprint:
        yield Refusal(
            "--trained-on",
            f"{given.name} ({given.fingerprint}) is not the model that {patch.name} was trained on, {first.name} "
            f"({first.fingerprint}). Pass that one, or omit the option.",
        )
    changed = next((port.method for port in patch.record.ports if port.method != ADD), None)
    if changed is not None:
        yield Refusal(
            "--trained-on",
            f"{patch.name} was ported by '{changed}', which fits a patch to the weights it is ported to: the distance "
            "to those that it was trained on no longer says how well it fits. Omit the option.",
        )


def refused(plan: PortPlan) -> PatchReport | None:
    """What is found of a patch whose plan has refusals, from headers alone; None where it has none."""
    return PatchReport(plan.patch.name, judge(Measures(refusals=plan.refusals))) if plan.refusals else None


def check_patch(
    plan: PortPlan,
    known: MeasuredUpdate,
    reader: AlikeReader | None = None,
    *,
    since: MeasuredUpdate | None = None,
    places: bool = False,
) -> PatchReport:
    """Hold one patch against an update.

    Args:
        plan: To carry it through that update; where it has refusals, they are what is found.
        known: What was read of the update.
        reader: Keeps its memory from patch to patch, where several are checked.
        since: What was read of the way from the base that the patch was trained on; None where that is not at hand.
        places: As for `check_weights`.
    """
    if (found := refused(plan)) is not None:
        return found
    patch = plan.patch
    changes = _changes_of(patch, known)
    read = {
        name: change
        for name, (change, pair) in _spread(changes, known).items()
        if name in known.sample.rows
        and not (plan.tokens is not None and has_token_rows(pair.evolved.name, known.update.evolved))
    }
    with np.errstate(invalid="ignore", over="ignore"):  # what is no number is named below
        measured = measure_changes(read, known.sample, known.columns, reader or AlikeReader())
    matrices = {pair.place for _, pair in changes.values() if len(pair.base.shape) > 1}
    changed = frozenset(matrices or {pair.place for _, pair in changes.values()})
    drift = known.drift_of(changed)
    alignment = sum((found.alignment for found in measured.values()), Alignment())
    chain = chain_of(patch.record, known.report.base, known.report.evolved, drift)
    if chain is not None and since is not None:
        chain = replace(chain, measured=since.drift_of(changed))
    gap = sample_gap(patch, measured, known.sample.rows)
    stored_as = Counter(pair.evolved.dtype for _, pair in changes.values()).most_common(1)
    verdict = judge(
        Measures(
            is_alignable=plan.patch.is_plain_lora and not any(not_in_step(plan, method="align")),
            lineage={
                kind: known.report.kinds[kind].lineage
                for kind in sorted({place.kind for place in changed} & known.report.kinds.keys())
            },
            drift=drift,
            broken=(*known.report.broken, *(name for name, found in measured.items() if not found.is_finite)),
            config_changes=known.report.config_changes,
            alignment=alignment.cosine,
            overlaps=summed(found.overlaps for found in measured.values()),
            kept_gain={
                dtype: sums.kept_gain for dtype, sums in summed(found.rounding for found in measured.values()).items()
            },
            stored_as=stored_as[0][0] if stored_as else None,
            changes_vocabulary=plan.tokens is not None,
            fitted_to=quantization_of(patch),
            quantization_gap=None if gap is None else gap.ratio,
            same_in=known.report.same_in,
            chain=chain,
            nothing=plan.nothing,
        )
    )
    report = PatchReport(
        patch.name,
        verdict,
        drift,
        _total_size(changes, measured),
        stored_as[0][0] if stored_as else None,
        measured,
        gap,
        place_patch(changes, measured, known.report.cells) if places else None,
        answers=None if drift is None or verdict.method == "transport" else answers_about(drift.relative.value),
        chain=chain,
    )
    return with_forecast(known.report, report)


def _changes_of(patch: Patch[TensorInfo], known: MeasuredUpdate) -> Changes:
    """What a patch that fits does to weights that both models have."""
    evolved = known.update.evolved
    found: dict[str, tuple[Change[TensorInfo], TensorPair]] = {}
    for name, change in changes_on(patch, evolved).items():
        tensor = evolved.tensor(name)
        for pair in known.pairs_of.get(name if tensor is None else tensor.name, ()):
            found[pair.name] = (change, pair)
    return found


def _spread(changes: Changes, known: MeasuredUpdate) -> Changes:
    """At most `MOST_TENSORS` of the changes, evenly spaced over kinds of modules and layers."""
    names = sorted(changes, key=known.position.__getitem__)
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
