"""What an update did to a base, as values and as JSON."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from portllm.checking.update.config_changes import ConfigChange
from portllm.checking.update.lineage import Lineage
from portllm.files.record import encode
from portllm.matching.tensor_pairs import Pairing
from portllm.matching.token_rows import TokenMap
from portllm.measures.drift import DriftSums
from portllm.measures.estimate import DriftEstimate, SampledEstimate
from portllm.measures.places import TensorPlace
from portllm.patch.record import ModelIdentity


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


@dataclass(frozen=True)
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
        same_in: The dtype in which both models are the same numbers, where only their dtypes differ; else None.
    """

    base: ModelIdentity
    evolved: ModelIdentity
    is_full: bool
    n_elements: int
    drift: DriftEstimate | None
    lineage: Lineage
    kinds: Mapping[str, KindReport]
    cells: Mapping[TensorPlace, DriftEstimate]
    pairing: Pairing
    config_changes: tuple[ConfigChange, ...]
    tokens: TokenMap | None
    has_vocabularies: bool
    broken: tuple[str, ...]
    same_in: str | None = None

    @cached_property
    def drift_of_worst_layer(self) -> float | None:
        """`|D| / |W0|` over all matrices of a layer, of the layer that drifted most."""
        layers: dict[tuple[str, int], DriftSums] = defaultdict(DriftSums)
        for place, drift in self.cells.items():
            if place.layer >= 0 and place.is_matrix:
                layers[(place.stack, place.layer)] += drift.sums
        return max((sums.relative for sums in layers.values()), default=None)

    @cached_property
    def drift_of_tokens(self) -> float | None:
        """`|D| / |W0|` of embedding and head, the one that drifted most."""
        drifts = [drift for place, drift in self.cells.items() if place.layer < 0 and place.is_matrix]
        return max((drift.relative.value for drift in drifts), default=None)


def update_to_json(update: UpdateReport) -> dict[str, object]:
    """The update as JSON values."""
    pairing = update.pairing
    return {
        "base": encode(update.base),
        "evolved": encode(update.evolved),
        "mode": "full" if update.is_full else "sampled",
        "elements_read": update.n_elements,
        "lineage": str(update.lineage),
        "same_in": update.same_in,
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


def _place(place: TensorPlace) -> dict[str, object]:
    return {"stack": place.stack, "layer": None if place.layer < 0 else place.layer, "kind": place.kind}


def _drift(drift: DriftEstimate | None) -> dict[str, object] | None:
    return None if drift is None else {"relative": _estimate(drift.relative), "cosine": _estimate(drift.cosine)}


def _estimate(estimate: SampledEstimate) -> dict[str, object]:
    return {"value": _number(estimate.value), "standard_error": _number(estimate.error)}


def _number(value: float | None) -> float | None:
    """A number that JSON has; None for an infinity or NaN."""
    return value if value is not None and math.isfinite(value) else None
