"""What `check` measured of a patch on an update, as numbers that a forecast can rest on."""

import math

from portllm.checking.report import PatchReport
from portllm.checking.update.report import UpdateReport
from portllm.measures.overlap import DriftShare


def weight_features(update: UpdateReport, patch: PatchReport) -> dict[str, float]:
    """Numbers about the whole patch, by name, in a fixed order; what could not be measured is left out.

    | name | formula |
    | --- | --- |
    | `drift` | `|D| / |W0|` over the matrices that the patch changes |
    | `drift_layer` | the same over all matrices of a layer, of the layer that drifted most |
    | `drift_tokens` | the same of embedding and head, the one that drifted most |
    | `angle` | `1 - <W0, W1> / (|W0| |W1|)` over the matrices that the patch changes |
    | `size` | `|Δ| / |W1|` over the same |
    | `drift_of_size` | `|D| / |Δ|` |
    | `with_drift` | `|<Δ, D>| / (|Δ| |D|)` |
    | `overlap_input`, `overlap_output` | share of the drift where the patch works, against what would be by chance |

    Args:
        update: What was measured of the update.
        patch: What was measured of a patch that fits it.
    """
    found: dict[str, float | None] = {}
    if patch.drift is not None:
        found["drift"] = patch.drift.relative.value
    found["drift_layer"] = update.drift_of_worst_layer
    found["drift_tokens"] = update.drift_of_tokens
    if patch.drift is not None:
        found["angle"] = max(0.0, 1 - patch.drift.cosine.value)
    found["size"] = patch.relative_size
    found["drift_of_size"] = _inverse(patch.size_against_drift)
    cosine = patch.alignment.cosine
    found["with_drift"] = None if cosine is None else abs(cosine)
    for side, share in patch.overlaps.items():
        found[f"overlap_{side}"] = _against_chance(share)
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _against_chance(share: DriftShare) -> float | None:
    return share.share / share.by_chance if share.share is not None and share.by_chance else None


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None
