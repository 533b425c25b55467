"""A patch that is ported again and again: the drift of all updates counts, not that of the last alone."""

import json

import pytest
from safetensors.torch import load_file

from portllm.capturing.adapter import capture_adapter
from portllm.checking.chain import chain_of
from portllm.checking.check import check_weights
from portllm.checking.text import check_to_json, render_check
from portllm.checking.verdict import Answer
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.patch.record import ModelIdentity
from portllm.porting.port import port
from tests.models import make_adapter, make_base, make_evolved

SHORT = 0.00008
"""Drift of each update: 0.04 % of the weights' norm."""

N = 4

TOKENIZER = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}})


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """Models, each a little away from the one before, and a patch that was ported along them, but for the last step."""
    folder = tmp_path_factory.mktemp("way")
    import torch

    models = [make_base(folder / "0", dtype=torch.float32)]
    for number in range(1, N):
        models.append(make_evolved(models[-1], folder / str(number), seed=number, drift=SHORT))
    for model in models:
        (model / "tokenizer.json").write_text(TOKENIZER)
    patch = capture_adapter(
        load_patch(make_adapter(models[0], folder / "adapter")), base=open_checkpoint(models[0]), out=folder / "patch"
    )
    patches = [patch]
    for number in range(1, N - 1):
        patches.append(port(patches[-1], base=models[number - 1], evolved=models[number], out=folder / f"p{number}"))
    return models, patches


def check(patch, models, **how):
    base, evolved = (open_checkpoint(model) for model in models)
    return check_weights(patch, base=base, evolved=evolved, **how)


def test_three_short_updates_are_not_three_times_a_short_one(way):
    models, patches = way
    alone = [check(patch, models[n : n + 2]).patches[0] for n, patch in enumerate(patches)]
    assert [report.verdict.answer for report in alone] == [Answer.HOLDS, Answer.HOLDS, Answer.HOLDS_ALIGNED]
    assert "over 3 updates" in alone[2].verdict.reasons[0].text
    assert f"--trained-on {models[0]}" in alone[2].verdict.reasons[0].text


def test_the_bound_is_never_below_the_drift_and_the_first_base_gives_the_drift_itself(way):
    models, patches = way
    found = check(patches[-1], models[-2:], trained_on=open_checkpoint(models[0]), full=True).patches[0].chain
    before, after = (load_file(model / "model.safetensors") for model in (models[0], models[-1]))
    names = [name for name in before if "proj" in name]
    moved = sum(float((after[name].double() - before[name].double()).square().sum()) for name in names)
    exact = (moved / sum(float(before[name].double().square().sum()) for name in names)) ** 0.5
    assert found.measured.relative.value == pytest.approx(exact, rel=1e-4)
    assert exact < found.at_most < 2 * exact  # of three updates that know nothing of each other: √3 times as much


def test_what_is_measured_since_training_decides_in_place_of_the_bound(way):
    models, patches = way
    report = check(patches[-1], models[-2:], trained_on=open_checkpoint(models[0]))
    assert report.patches[0].chain.at_most > 0.001 > report.patches[0].chain.measured.relative.high
    assert report.patches[0].verdict.answer is Answer.HOLDS
    assert "drift since" in render_check(report, [])


def test_an_update_that_nobody_measured_leaves_the_sum_unknown(way, tmp_path):
    models, patches = way
    unmeasured = port(patches[0], evolved=models[1], out=tmp_path / "unmeasured")
    report = check(unmeasured, models[1:3])
    assert report.patches[0].verdict.answer is Answer.UNCERTAIN
    assert "was not measured when it was ported" in report.patches[0].verdict.reasons[0].text
    assert "unknown drift since" in render_check(report, [])


def test_a_patch_that_was_never_ported_has_no_way(way):
    models, patches = way
    assert check(patches[0], models[:2]).patches[0].chain is None


def test_the_report_says_every_update_on_the_way(way):
    models, patches = way
    report = check(patches[-1], models[-2:], trained_on=open_checkpoint(models[0]))
    told = json.loads(json.dumps(check_to_json(report, [])))["patches"][0]["since_training"]
    assert told["trained_on"]["fingerprint"] == patches[0].record.base.fingerprint
    assert [update["to"] for update in told["updates"]] == [str(model) for model in models[1:]]
    assert all(0 < update["drift"] < 0.001 for update in told["updates"])
    assert told["drift"]["relative"]["value"] < told["drift_at_most"]


def test_another_model_than_that_of_the_training_is_refused(way):
    models, patches = way
    with pytest.raises(PlanRefusedError, match="is not the model that .* was trained on"):
        check(patches[-1], models[-2:], trained_on=open_checkpoint(models[1]))


def test_a_base_that_the_record_does_not_name_is_an_update_that_nobody_measured(way):
    models, patches = way
    found = check(patches[1], [models[0], models[2]], allow_other_base=True).patches[0].chain
    assert found.at_most is None
    assert [hop.drift is None for hop in found.hops] == [False, True, False]


@pytest.mark.parametrize("noted", [{}, {"sampled_drift": -1.0}, {"drift": 0.1, "drift_error": float("inf")}])
def test_what_is_no_measure_is_none(way, noted):
    from msgspec import structs

    record = way[1][1].record
    step = structs.replace(record.ports[0], evidence=noted)
    evolved = ModelIdentity("later", "s4k1:" + "0" * 40, None)
    assert chain_of(structs.replace(record, ports=(step,)), record.base, evolved, None).hops[0].drift is None
