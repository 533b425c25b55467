"""What `check` found, as values, and those as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from portllm.assess.config_changes import ConfigChange
from portllm.assess.estimate import DriftEstimate, Estimate
from portllm.assess.lineage import Lineage
from portllm.assess.overlap import Alignment, Share
from portllm.assess.places import Place
from portllm.assess.quantization_gap import GapSums
from portllm.assess.verdict import Answer, Reason, Verdict
from portllm.patch.record import ModelIdentity, identity_to_json
from portllm.patch.rounding import MergeSums
from portllm.pipeline.pairs import Pairing
from portllm.pipeline.patch_measures import ChangeMeasures
from portllm.pipeline.patch_places import PlacedDelta
from portllm.pipeline.text_measures import TextMeasures, text_to_json
from portllm.pipeline.token_rows import TokenMap


@dataclass(frozen=True, slots=True)
class KindReport:
    """The drift of one kind of module, over all layers.

    Attributes:
        drift: Of all its weights.
        lineage: What that says.
        n_tensors: How many there are.
    """

    drift: DriftEstimate
    lineage: Lineage
    n_tensors: int


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What the update did to the base; the same for every patch.

    Attributes:
        base: The base's identity.
        evolved: The evolved model's.
        is_full: Whether every weight was read, or windows of each.
        n_elements: Elements that were read of each model.
        drift: Of all matrices but embeddings and heads; None where the models have none in common.
        lineage: What that says.
        kinds: By kind of module.
        cells: By layer and kind of module.
        pairing: Which tensors are which.
        config_changes: What changed in `config.json`.
        tokens: How rows of the vocabularies go together; None where they are the same, or a model does not say.
        has_vocabularies: Whether both models say which row is which token.
        broken: Tensors that hold an infinity or NaN.
    """

    base: ModelIdentity
    evolved: ModelIdentity
    is_full: bool
    n_elements: int
    drift: DriftEstimate | None
    lineage: Lineage
    kinds: Mapping[str, KindReport]
    cells: Mapping[Place, DriftEstimate]
    pairing: Pairing
    config_changes: tuple[ConfigChange, ...]
    tokens: TokenMap | None
    has_vocabularies: bool
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What was found of one patch.

    Attributes:
        name: What the user called it.
        verdict: Whether it will hold, and why.
        drift: Of the matrices that it changes; None where none could be measured.
        delta_sq: |Δ|² over all that it changes.
        alignment: Patch and drift.
        overlaps: By side, how much of the drift lies where the patch works.
        rounding: By storage dtype, what a merge would keep.
        stored_as: The dtype that the evolved model stores most of what the patch changes in.
        changes: By tensor of the evolved model, what was measured of each.
        n_rescaled: How many of them have a DoRA magnitude.
        quantization: What quantization took of the weights that it was fitted to (QLoRA); None where not measured.
        places: Where in the model it sits; None where that was not asked for.
        text: What prompts say of it; None where none were given, or it does not fit.
    """

    name: str
    verdict: Verdict
    drift: DriftEstimate | None = None
    delta_sq: float = 0.0
    alignment: Alignment = field(default_factory=Alignment)
    overlaps: Mapping[str, Share] | None = None
    rounding: Mapping[str, MergeSums] | None = None
    stored_as: str | None = None
    changes: Mapping[str, ChangeMeasures] | None = None
    n_rescaled: int = 0
    quantization: GapSums | None = None
    places: Mapping[Place, PlacedDelta] | None = None
    text: TextMeasures | None = None

    @property
    def relative_size(self) -> float | None:
        """`|Δ| / |W1|` over the matrices that the patch changes."""
        return _ratio(self.delta_sq, self.drift.sums.evolved_sq) if self.drift else None

    @property
    def size_against_drift(self) -> float | None:
        """`|Δ| / |D|` over the same; None where nothing drifted."""
        return _ratio(self.delta_sq, self.drift.sums.drift_sq) if self.drift else None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found.

    Attributes:
        update: What the update did to the base.
        patches: What becomes of each patch, in the order they were given.
    """

    update: UpdateReport
    patches: tuple[PatchReport, ...]

    @property
    def holds(self) -> bool:
        """Whether every patch holds."""
        return all(patch.verdict.answer is Answer.HOLDS for patch in self.patches)


def update_to_json(update: UpdateReport) -> dict[str, object]:
    """The update as JSON values."""
    pairing = update.pairing
    return {
        "base": identity_to_json(update.base),
        "evolved": identity_to_json(update.evolved),
        "mode": "full" if update.is_full else "sampled",
        "elements_read": update.n_elements,
        "lineage": str(update.lineage),
        "drift": _drift(update.drift),
        "kinds": {
            kind: {"lineage": str(found.lineage), "tensors": found.n_tensors, **(_drift(found.drift) or {})}
            for kind, found in update.kinds.items()
        },
        "layers": [_place(place) | (_drift(drift) or {}) for place, drift in update.cells.items()],
        "tensors": {
            "compared": len(pairing.pairs),
            "added": list(pairing.added),
            "removed": list(pairing.removed),
            "reshaped": {name: [list(shape) for shape in shapes] for name, shapes in pairing.reshaped.items()},
            "grown": {name: list(rows) for name, rows in pairing.grown.items()},
            "no_numbers": list(pairing.no_numbers),
            "not_finite": list(update.broken),
        },
        "config_changes": [
            {"field": change.field, "base": change.base, "evolved": change.evolved, "effect": str(change.effect)}
            for change in update.config_changes
        ],
        "vocabulary": {
            "known": update.has_vocabularies,
            "changed": update.tokens is not None,
            "moved": 0 if update.tokens is None else update.tokens.n_moved,
            "gone": [] if update.tokens is None else list(update.tokens.gone.values()),
        },
    }


def patch_to_json(patch: PatchReport) -> dict[str, object]:
    """One patch's report as JSON values."""
    return {
        "patch": patch.name,
        "verdict": str(patch.verdict.answer),
        "reasons": [_reason(reason) for reason in patch.verdict.reasons],
        "remarks": list(patch.verdict.remarks),
        "drift": _drift(patch.drift),
        "relative_size": _number(patch.relative_size),
        "size_against_drift": _number(patch.size_against_drift),
        "cosine_with_drift": _number(patch.alignment.cosine),
        "overlap": {side: _share(share) for side, share in (patch.overlaps or {}).items()},
        "kept_gain": {dtype: _number(sums.kept_gain) for dtype, sums in (patch.rounding or {}).items()},
        "stored_as": patch.stored_as,
        "quantization_gap": None if patch.quantization is None else _number(patch.quantization.ratio),
        "text": None if patch.text is None else text_to_json(patch.text),
        "tensors": {name: _change(change) for name, change in (patch.changes or {}).items()},
        "layers": None
        if patch.places is None
        else [
            _place(place)
            | {"relative_size": _number(found.relative_size), "spectrum": list(map(_number, found.spectrum))}
            for place, found in patch.places.items()
        ],
    }


def _place(place: Place) -> dict[str, object]:
    return {"stack": place.stack, "layer": None if place.layer < 0 else place.layer, "kind": place.kind}


def _change(change: ChangeMeasures) -> dict[str, object]:
    return {
        "kind": change.kind,
        "rank": change.rank,
        "norm": _number(math.sqrt(change.delta_sq)),
        "rescaled": change.is_rescaled,
        "cosine_with_drift": _number(change.alignment.cosine),
        "overlap": {side: _share(share) for side, share in change.overlaps.items()},
        "kept_gain": {dtype: _number(sums.kept_gain) for dtype, sums in change.rounding.items()},
    }


def _reason(reason: Reason) -> dict[str, object]:
    threshold = reason.threshold
    decided = (
        None if threshold is None else {"name": threshold.name, "value": threshold.value, "source": threshold.source}
    )
    return {"verdict": str(reason.answer), "text": reason.text, "threshold": decided}


def _drift(drift: DriftEstimate | None) -> dict[str, object] | None:
    return None if drift is None else {"relative": _estimate(drift.relative), "cosine": _estimate(drift.cosine)}


def _estimate(estimate: Estimate) -> dict[str, object]:
    return {"value": _number(estimate.value), "standard_error": _number(estimate.error)}


def _share(share: Share) -> dict[str, object]:
    return {"share": _number(share.share), "by_chance": _number(share.by_chance)}


def _number(value: float | None) -> float | None:
    """A number that JSON has; None for an infinity or NaN."""
    return value if value is not None and math.isfinite(value) else None


def _ratio(above: float, below: float) -> float | None:
    return math.sqrt(above / below) if below > 0 else None
