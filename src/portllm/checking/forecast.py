"""The forecast that comes with the program: fitted on measured cells by `scripts/fit_forecast.py`."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from portllm.checking.forecast_features import weight_features
from portllm.checking.forecast_model import Expected, Feature, Forecaster, Outcome, Shipped, Slope
from portllm.checking.report import PatchReport
from portllm.checking.update.report import UpdateReport

FILE = "forecast.json"
LOSS, ACCURACY = "loss", "accuracy"
WEIGHTS, TEXT = "weights", "text"


def expect(update: UpdateReport, patch: PatchReport) -> Expected | None:
    """The forecast for a patch on an update, from all that was measured of it.

    Args:
        update: What `check` found of the update.
        patch: What it found of the patch, with what prompts say where some were given.

    Returns:
        That which rests on most; None where measures are lacking, as for a patch that cannot be ported.
    """
    measures = weight_features(update, patch) | (patch.text.features() if patch.text else {})
    known = shipped()
    for name in (TEXT, WEIGHTS):
        forecasters = {target: found[name] for target, found in known.forecasters.items() if name in found}
        needed = {measure for forecaster in forecasters.values() for measure in forecaster.measures}
        if forecasters and needed <= measures.keys():
            forecasts = {target: forecaster.predict(measures) for target, forecaster in forecasters.items()}
            return Expected(forecasts, name, forecasters[LOSS].confidence, known)
    return None


def with_forecast(update: UpdateReport, patch: PatchReport) -> PatchReport:
    """The report with what is to be expected of the patch, by all that it says."""
    return replace(patch, forecast=expect(update, patch))


@cache
def shipped() -> Shipped:
    """The forecast in the package."""
    values = json.loads(Path(__file__).with_name(FILE).read_text(encoding="utf-8"))
    return Shipped(
        {
            target: {name: forecaster_from_json(fitted) for name, fitted in found["forecasters"].items()}
            for target, found in values["targets"].items()
        },
        values["base"],
        values["n_updates"],
        tuple(
            Outcome(
                cell["measures"]["drift"],
                {
                    target: cell[target][0]
                    for target in (LOSS, ACCURACY)
                    if cell[target] and cell[target][0] is not None
                },
            )
            for cell in values["cells"]
        ),
    )


def forecaster_to_json(forecaster: Forecaster) -> dict[str, object]:
    """A fitted forecast as JSON values; a reach without end is null."""
    return asdict(forecaster) | {"reach": forecaster.reach if math.isfinite(forecaster.reach) else None}


def forecaster_from_json(values: Mapping[str, Any]) -> Forecaster:
    """The fitted forecast that these JSON values stand for."""
    slopes = tuple(Slope(**{**slope, "feature": Feature(**slope["feature"])}) for slope in values["slopes"])
    reach = math.inf if values["reach"] is None else values["reach"]
    return Forecaster(**{**values, "slopes": slopes, "reach": reach})
