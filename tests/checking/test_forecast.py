"""The forecast beside a report: from as much as was measured, and nothing where too little was."""

import json
import math
from dataclasses import replace
from importlib import resources

import pytest

from portllm.checking import forecast
from portllm.checking.check import check_weights
from portllm.checking.forecast import FILE, forecaster_from_json, forecaster_to_json, shipped, with_forecast
from portllm.checking.forecast_model import Feature, Forecaster, Outcome, Shipped, Slope
from portllm.checking.prompts.measures import Outputs, TextMeasures
from portllm.checkpoint.open import open_checkpoint
from portllm.measures.outputs import Distance
from portllm.measures.thresholds import AGREEMENT
from portllm.patch.adapter_folder import load_patch


def slope(name, *, sign=-1, low=1e-4, high=0.05):
    return Slope(
        Feature(name, sign=sign, is_log=sign < 0), 1.0, center=-4.0 if sign < 0 else 0.5, spread=1.0, low=low, high=high
    )


KNOWN = Shipped(
    {
        target: {
            "weights": Forecaster((slope("drift"),), intercept=shift, reach=0.5, confidence=0.9),
            "text": Forecaster((slope("drift"), slope("effect_kept", sign=1, low=0, high=1)), shift, 0.2, 0.9),
        }
        for target, shift in (("loss", 0.0), ("accuracy", -1.0))
    },
    "a small model",
    n_updates=5,
    outcomes=tuple(Outcome(0.001 * (1 + number), {"loss": 0.9, "accuracy": 0.8}) for number in range(20)),
)


@pytest.fixture
def known(monkeypatch):
    """A forecast whose numbers are known, in the place of the one in the package."""
    monkeypatch.setattr(forecast, "shipped", lambda: KNOWN)


def text_of_a_patch_that_keeps(share):
    """What two prompts say of it."""
    near, far = Distance((1.0 - share, 1.0 - share), 0.5), Distance((1.0, 1.0), 0.5)
    outputs = Outputs(far, far, near, far, far, None)
    return TextMeasures(
        "patch", n_prompts=2, n_cut=0, n_tokens=2, shared="", outputs=outputs, modules={}, similarity=()
    )


def report_on(tiny, evolved):
    return check_weights(
        load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), evolved=open_checkpoint(evolved)
    )


def test_a_patch_is_forecast_from_what_was_measured(known, tiny):
    report = report_on(tiny, tiny("evolved", drift=0.002))
    found = report.patches[0].forecast
    drift = report.patches[0].drift.relative.value
    for target in ("loss", "accuracy"):
        assert found.forecasts[target] == KNOWN.forecasters[target]["weights"].predict({"drift": drift})
    assert (found.rests_on, found.outside) == ("weights", ())
    values = json.loads(json.dumps(found.to_json()))
    assert values["accuracy"]["retention"] < values["loss"]["retention"] <= values["loss"]["high"]
    assert values["fitted_on"] == {"base": "a small model", "updates": 5, "cells": 20}


def test_prompts_are_rested_on_where_there_are_some(known, tiny):
    report = report_on(tiny, tiny("evolved", drift=0.002))
    drift = report.patches[0].drift.relative.value
    for share in (0.2, 0.9):
        found = with_forecast(
            report.update, replace(report.patches[0], text=text_of_a_patch_that_keeps(share))
        ).forecast
        assert found.rests_on == "text"
        expected = KNOWN.forecasters["loss"]["text"].predict({"drift": drift, "effect_kept": share})
        assert found.forecasts["loss"].retention == pytest.approx(expected.retention)


def test_what_lies_outside_of_the_measured_cells_is_said_to(known, tiny):
    report = report_on(tiny, tiny("evolved", drift=0.05))
    assert report.patches[0].forecast.to_json()["extrapolated"] == ["drift"]


def test_nothing_is_forecast_of_a_patch_that_cannot_be_ported(known, tiny):
    report = report_on(tiny, tiny("base", inner=24))
    assert report.patches[0].forecast is None


def test_a_forecast_is_the_same_after_a_file():
    for forecaster in KNOWN.forecasters["loss"].values():
        assert forecaster_from_json(json.loads(json.dumps(forecaster_to_json(forecaster)))) == forecaster


def test_a_forecast_without_an_end_to_its_interval_is_the_same_after_a_file():
    forecaster = Forecaster((slope("drift"),), intercept=0.0, reach=math.inf, confidence=0.9)
    text = json.dumps(forecaster_to_json(forecaster), allow_nan=False)
    assert forecaster_from_json(json.loads(text)) == forecaster


def test_the_forecast_in_the_package_can_be_read():
    found = shipped()
    assert found.n_cells >= found.n_updates >= 1
    for forecasters in found.forecasters.values():
        for forecaster in forecasters.values():
            best, worst = (
                {s.feature.name: s.high if (s.feature.sign > 0) == good else s.low for s in forecaster.slopes}
                for good in (True, False)
            )
            assert forecaster.predict(best).retention >= forecaster.predict(worst).retention


def test_the_cells_in_the_package_bear_out_the_threshold_of_agreement():
    cells = json.loads(resources.files("portllm.checking").joinpath(FILE).read_text(encoding="utf-8"))["cells"]
    lost = {
        f"{cell['pair']}, {cell['patch']}": cell["measures"]["ported_agreement"]
        for cell in cells
        if not cell["patch"].startswith("question-style")
        and round(cell["accuracies"]["ported"] - cell["accuracies"]["patched"], 6) < -0.04
    }
    assert len(cells) == 64
    assert len(lost) > 10
    assert {name: agreement for name, agreement in lost.items() if agreement >= AGREEMENT.value} == {}
