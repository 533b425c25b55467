"""The forecast is fitted from a study's folder alone, and judged on updates that were left out."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from portllm.checking.forecast import forecaster_from_json
from portllm.evaluating.metrics import Estimate
from portllm.files.kept_results import with_versions
from portllm.study.definition.file import read_study
from portllm.study.definition.plan import data_of, settings_of, steps_of
from portllm.study.run import study_results
from scripts import fit_forecast
from scripts.fit_forecast import FEATURES, fit_all, has_lost, main, read_cells, render, rounded
from scripts.forecast.held_out import rank_agreement
from scripts.judge_check import judged

DRIFTS = {f"update-{n}": 10 ** (-4 + 0.4 * n) for n in range(11)}
TASKS = ("one", "other")
ROWS = 60

FILE = """
title = "Made-up cells"
base = "base"
[check]
[patch]
steps = 1
""" + "".join(
    [f'[tasks.{name}]\nkind = "rows"\ntrain = "t"\nscore = "s"\nprompt = "{{q}}"\ncompletion = "a"\n' for name in TASKS]
    + [f'[evolutions.{name}]\nkind = "full"\ntext = "t"\n' for name in DRIFTS]
)


def kept_after(drift):
    """A retention that falls from 1 to 0 over two decades of drift."""
    return 1 / (1 + (drift / 0.03) ** 2)


def found_by(step, gainless=frozenset()):
    """What a step of the made-up study found: losses fall from 3 nats by the share of 2 that is gained."""
    draw = np.random.Generator(np.random.PCG64(list(step.name.encode())))
    if step.kind == "check":
        drift = DRIFTS[step.model.partition(".")[0]]
        size = 0.01 if step.task == "one" else 0.02
        weights = {
            "drift": drift, "drift_layer": 1.5 * drift, "drift_tokens": drift / 2, "drift_of_size": drift / size,
            "overlap_input": 1.0,
        }  # fmt: skip
        return {"verdict": "holds" if drift < 0.02 else "uncertain", "reasons": [], "weights": weights, "text": {}}
    if step.kind != "score":
        return {"relative": 0.1, "cosine": 0.9}
    drift = DRIFTS.get(step.model.partition(".")[0], 0.0)
    gain = {None: 0.0, "patched": 1.0, "retrained": 1.0, "add": kept_after(drift)}[step.patch]
    if step.model in gainless:
        gain = 0.0
    losses = 3 - 2 * gain + 0.05 * draw.normal(size=ROWS)
    right = (draw.random(ROWS) < 0.2 + 0.7 * gain).tolist()
    return {"correct": right, "losses": losses.tolist(), "answers": [str(hit) for hit in right]}


def write_results(folder, *, leave=lambda step: False, gainless=frozenset()):
    """A study's file and its folder, as a run leaves them; returns the file."""
    file, out = folder / "made-up.toml", folder / "made-up.study"
    file.write_text(FILE)
    study = read_study(file)
    (out / "steps").mkdir(parents=True)
    (out / "inputs.json").write_text(json.dumps({"base": "b", "data": {}}))
    for step in steps_of(study):
        if leave(step):
            continue
        inputs = {"base": "b", "data": {}.get(data_of(step)), "settings": settings_of(step, study)}
        inputs["steps"] = {name: f"files of {name}" for name in step.inputs}
        record = {
            "inputs": with_versions(inputs),
            "files": f"files of {step.name}" if step.makes else "",
            "seconds": 1.0,
            "result": found_by(step, gainless),
        }
        (out / "steps" / f"{step.name}.json").write_text(json.dumps(record))
    return file


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """An interval from a tenth of the draws, which take most of a fit's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_forecast, "rank_agreement", functools.partial(rank_agreement, resamples=200))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A made-up study, all of it done."""
    return write_results(tmp_path_factory.mktemp("made-up"))


@pytest.fixture(scope="module")
def fitted(file):
    """What is fitted to it."""
    return fit_all(results_of(file))


def results_of(file):
    return study_results(file, out=file.with_suffix(".study"))


def test_every_cell_has_its_retention_and_what_was_known_before(file):
    cells, left_out = read_cells(results_of(file), "loss")
    assert (len(cells), left_out) == (len(DRIFTS) * len(TASKS), [])
    for each in cells:
        assert each.cell.retention == pytest.approx(kept_after(each.cell.measures["drift"]), abs=0.03)
        assert each.cell.pair == each.row.evolution
    assert set(cells[0].cell.measures) >= {feature.name for feature in FEATURES["weights"]}


@pytest.mark.slow
def test_what_is_written_forecasts_updates_that_were_left_out(fitted):
    found = fitted
    assert (found["n_cells"], found["n_updates"], found["base"]) == (22, 11, "base")
    by_loss, by_accuracy = found["targets"]["loss"], found["targets"]["accuracy"]
    assert set(by_loss["forecasters"]) == set(by_accuracy["forecasters"]) == {"weights"}  # the study gave no prompts
    judged = by_loss["held_out"]["weights"]
    assert by_accuracy["held_out"]["weights"]["spearman"]["value"] > 0.7
    assert judged["spearman"]["value"] > 0.9
    assert judged["spearman"]["low"] <= judged["spearman"]["value"] <= judged["spearman"]["high"]
    assert set(by_loss["held_out"]) == {"weights", "drift alone"}
    assert found["verdicts"]["holds"]["least"] > 0.6
    assert 0 < found["verdicts"]["uncertain"]["lost"] <= found["verdicts"]["uncertain"]["cells"]
    assert found["rules"]["copy where shapes match"]["trained"] == 0.0
    assert found["rules"]["loss, weights"]["points"] < found["rules"]["copy where shapes match"]["points"] / 3
    assert judged["mean_miss"] < 0.1
    assert DRIFTS["update-3"] < found["lost_from"] <= DRIFTS["update-7"]


def test_cells_of_a_study_that_goes_on_and_those_without_a_gain_are_left_out(tmp_path):
    file = write_results(
        tmp_path,
        leave=lambda step: step.model == "update-10.1" and step.patch == "retrained",
        gainless={"update-0.1"},
    )
    cells, told = read_cells(results_of(file), "loss")
    assert (len(cells), len(told)) == (2 * (len(DRIFTS) - 2), 2)
    assert all("update-0, " in text and "indistinguishable from zero" in text for text in told)


@pytest.mark.slow
def test_the_script_writes_the_same_file_every_time(file, fitted, tmp_path):
    main([str(file), "--output", str(file.with_suffix(".study")), "--to", str(tmp_path / "forecast.json")])
    assert (tmp_path / "forecast.json").read_text() == render(rounded(fitted))


@pytest.mark.slow
def test_the_program_reads_what_is_written(fitted):
    values = json.loads(render(rounded(fitted)))
    forecaster = forecaster_from_json(values["targets"]["loss"]["forecasters"]["weights"])
    near, far = (forecaster.predict(dict.fromkeys(forecaster.measures, drift)).retention for drift in (0.001, 0.3))
    assert near > 0.9 > 0.2 > far


def test_of_too_few_updates_the_cells_are_written_and_nothing_is_fitted(tmp_path):
    file = write_results(tmp_path, leave=lambda step: step.model not in ("base", "update-0.1", "update-1.1"))
    found = fit_all(results_of(file))
    assert (found["n_cells"], len(found["cells"])) == (4, 4)
    assert [found["targets"][name]["forecasters"] for name in ("loss", "accuracy")] == [{}, {}]
    assert set(found["rules"]) == {"copy where shapes match", "copy up to 0.1 % of drift", "train always"}


def test_nothing_is_written_before_a_cell_is_measured(tmp_path):
    file = write_results(tmp_path, leave=lambda step: step.kind == "check")
    with pytest.raises(SystemExit, match="no cell is measured"):
        fit_all(results_of(file))


def test_numbers_are_rounded_and_infinities_are_null():
    assert rounded({"a": [1.23456789, math.inf], "b": 3}) == {"a": [1.23457, None], "b": 3}


def test_what_check_said_is_set_beside_what_became_of_each_patch(file):
    results = results_of(file)
    page = judged(results)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| update-")]
    assert len(rows) == len(DRIFTS) * len(TASKS)
    assert [row[-1].startswith("yes") for row in rows] == [has_lost(row) for row in results.tasks]
    assert {row[4] for row in rows} == {"holds", "uncertain"}
    (by_loss,) = (line for line in page.splitlines() if line.startswith("| loss | weights |"))
    assert by_loss.split(" | ")[2] == str(len(rows))


def test_a_patch_that_holds_aligned_is_judged_by_its_port_by_align(file):
    results = results_of(file)
    nothing = Estimate(0.0, 0.0, 0.0, ROWS)
    told = [replace(row, checked=replace(row.checked, verdicts=("holds aligned",))) for row in results.tasks]
    aligned = [replace(row, method="align", change=nothing, behind=nothing) for row in told]
    both = judged(replace(results, tasks=(*told, *aligned)))
    among = sum(0.001 < row.checked.weights["drift"] <= 0.02 for row in told)
    assert f"Of {among} patches on updates of 0.1 to 2 % of drift, {among} got a decision; 0 of these were lost" in both
    rows = [line.split(" | ") for line in both.splitlines() if line.startswith("| update-")]
    assert {row[5] for row in rows} == {"align"}
    unknown = judged(replace(results, tasks=tuple(told)))  # nobody ported them so: what is known is addition
    assert {line.split(" | ")[5] for line in unknown.splitlines() if line.startswith("| update-")} == {"add"}
