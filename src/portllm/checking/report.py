"""The report of `check`, as values and as JSON."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from portllm.checking.answers import Answers
from portllm.checking.chain import Chain
from portllm.checking.delta.measures import ChangeMeasures, summed
from portllm.checking.delta.places import PlacedDelta
from portllm.checking.forecast_model import Expected
from portllm.checking.prompts.measures import TextMeasures, text_to_json
from portllm.checking.update.report import UpdateReport, _drift, _number, _place
from portllm.checking.verdict import Answer, Reason, Verdict
from portllm.measures.estimate import DriftEstimate
from portllm.measures.overlap import Alignment, DriftShare
from portllm.measures.places import TensorPlace
from portllm.measures.quantization_gap import GapSums
from portllm.notebook import ShownInNotebook
from portllm.patch.rounding import MergeSums


@dataclass(frozen=True, slots=True)
class PatchReport:
    """The report on one patch.

    Attributes:
        name: Its name, as given by the user.
        verdict: Whether it will hold, and why.
        drift: Drift of the matrices that it changes; None if it could not be measured.
        delta_sq: |Δ|² over all that it changes.
        stored_as: The evolved model's dtype for most of what the patch changes.
        changes: By tensor of the evolved model, what was measured of each; empty where it cannot be ported.
        quantization: Quantization error of the weights that it was trained on (QLoRA); None if not measured.
        places: Its size by layer and module; None if not requested.
        text: Measures on prompts; None if there were none, or the patch does not match.
        forecast: Expected retention; None where measures are missing.
        answers: What became of old answers on updates that moved the weights about as far; None where too few were
            measured.
        chain: Its way from the base that it was trained on; None if it was not ported before.
    """

    name: str
    verdict: Verdict
    drift: DriftEstimate | None = None
    delta_sq: float = 0.0
    stored_as: str | None = None
    changes: Mapping[str, ChangeMeasures] = field(default_factory=dict)
    quantization: GapSums | None = None
    places: Mapping[TensorPlace, PlacedDelta] | None = None
    text: TextMeasures | None = None
    forecast: Expected | None = None
    answers: Answers | None = None
    chain: Chain | None = None

    @property
    def alignment(self) -> Alignment:
        """Alignment of patch and drift."""
        return sum((change.alignment for change in self.changes.values()), Alignment())

    @property
    def overlaps(self) -> Mapping[str, DriftShare]:
        """Fraction of the drift in the patch's input and output directions."""
        return summed(change.overlaps for change in self.changes.values())

    @property
    def rounding(self) -> Mapping[str, MergeSums]:
        """Kept gain of a merge, by storage dtype."""
        return summed(change.rounding for change in self.changes.values())

    @property
    def n_rescaled(self) -> int:
        """Number of changes with a DoRA magnitude."""
        return sum(change.is_rescaled for change in self.changes.values())

    def __repr__(self) -> str:
        return f"PatchReport({self.name!r}, {str(self.verdict.answer)!r})"

    @property
    def relative_size(self) -> float | None:
        """`|Δ| / |W1|` over the matrices that the patch changes."""
        return _ratio(self.delta_sq, self.drift.sums.evolved_sq) if self.drift else None

    @property
    def size_against_drift(self) -> float | None:
        """`|Δ| / |D|` over the same matrices; None where nothing drifted."""
        return _ratio(self.delta_sq, self.drift.sums.drift_sq) if self.drift else None


@dataclass(frozen=True, slots=True)
class CheckReport(ShownInNotebook):
    """The report of `check`.

    Attributes:
        update: Measures of the update from base to evolved model.
        patches: One report per patch, in the order given.
    """

    update: UpdateReport
    patches: tuple[PatchReport, ...]

    def __repr__(self) -> str:
        answers = Counter(str(patch.verdict.answer) for patch in self.patches)
        return f"CheckReport({self.update.base.name!r} -> {self.update.evolved.name!r}, {dict(answers)})"

    @property
    def holds(self) -> bool:
        """Whether every patch holds."""
        return all(patch.verdict.answer is Answer.HOLDS for patch in self.patches)


def patch_to_json(patch: PatchReport) -> dict[str, object]:
    """One patch's report as JSON values."""
    return {
        "patch": patch.name,
        "verdict": str(patch.verdict.answer),
        "method": patch.verdict.method,
        "reasons": [_reason(reason) for reason in patch.verdict.reasons],
        "remarks": list(patch.verdict.remarks),
        "drift": _drift(patch.drift),
        "relative_size": _number(patch.relative_size),
        "size_against_drift": _number(patch.size_against_drift),
        "cosine_with_drift": _number(patch.alignment.cosine),
        "overlap": {side: _share(share) for side, share in patch.overlaps.items()},
        "kept_gain": {dtype: _number(sums.kept_gain) for dtype, sums in patch.rounding.items()},
        "stored_as": patch.stored_as,
        "quantization_gap": None if patch.quantization is None else _number(patch.quantization.ratio),
        "text": None if patch.text is None else text_to_json(patch.text),
        "tensors": {name: _change(change) for name, change in patch.changes.items()},
        "layers": None
        if patch.places is None
        else [
            _place(place)
            | {"relative_size": _number(found.relative_size), "spectrum": list(map(_number, found.spectrum))}
            for place, found in patch.places.items()
        ],
        "forecast": None if patch.forecast is None else patch.forecast.to_json(),
        "answers": None if patch.answers is None else patch.answers.to_json(),
        "since_training": None
        if patch.chain is None
        else patch.chain.to_json() | {"drift": _drift(patch.chain.measured)},
    }


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


def _share(share: DriftShare) -> dict[str, object]:
    return {"share": _number(share.share), "by_chance": _number(share.by_chance)}


def _ratio(above: float, below: float) -> float | None:
    return math.sqrt(above / below) if below > 0 else None
