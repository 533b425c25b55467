"""`auto`: the verdict of a check decides over the port, and the record says so."""

from dataclasses import replace

import pytest

from portllm.checking.check import check_weights
from portllm.checking.update import measures as update_measures
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError, PortError
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.patch.adapter_folder import load_patch
from portllm.patch.finite import require_finite
from portllm.porting.auto import Route
from portllm.porting.port import port

SHORT = 0.00003
"""Of `make_evolved`: an update within what is known to hold."""

SIX_DIGITS = 1e-5


@pytest.fixture
def auto(tiny, tmp_path):
    """Ports the tiny adapter by `auto`."""

    def run(evolved, **how):
        models = {"base": open_checkpoint(tiny("base")), "evolved": open_checkpoint(evolved)}
        return port(load_patch(tiny("adapter")), **{**models, "out": tmp_path / "ported", "method": "auto", **how})

    return run


def test_what_drifted_little_is_added_and_the_record_says_why(auto, tiny):
    evolved = tiny("evolved", drift=SHORT)
    (step,) = auto(evolved).record.ports
    report = check_weights(
        load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), evolved=open_checkpoint(evolved)
    )
    (found,) = report.patches
    assert (step.method, step.choice.verdict, step.choice.is_forced) == ("add", "holds", False)
    assert step.choice.findings == tuple(reason.text for reason in found.verdict.reasons)
    assert step.choice.findings[0] in step.choice.reason
    assert step.evidence["drift"] == pytest.approx(found.drift.relative.value, rel=SIX_DIGITS)
    assert step.evidence["drift_error"] == pytest.approx(found.drift.relative.error, rel=SIX_DIGITS)
    assert step.evidence["cosine_with_drift"] == pytest.approx(found.alignment.cosine, rel=SIX_DIGITS)
    assert step.evidence["overlap_input"] == pytest.approx(found.overlaps["input"].share, rel=SIX_DIGITS)


def test_it_carries_over_what_add_carries_over(auto, tiny, tmp_path):
    evolved = tiny("evolved", drift=SHORT)
    auto(evolved)
    auto(evolved, method="add", out=tmp_path / "added")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ported" / weights).read_bytes() == (tmp_path / "added" / weights).read_bytes()
    assert load_patch(tmp_path / "added").record.ports[0].choice is None


def test_what_is_uncertain_is_added(auto, tiny):
    (step,) = auto(tiny("evolved", drift=0.02)).record.ports
    assert (step.method, step.choice.verdict) == ("add", "uncertain")


def test_weights_from_another_start_are_refused_with_what_to_do(auto, tiny, tmp_path):
    with pytest.raises(
        PlanRefusedError, match=r"will not hold; .*are unrelated to.*--teacher.*docs/refresh.md.*--force"
    ):
        auto(tiny("base", seed=7))
    assert not (tmp_path / "ported").exists()


def test_what_will_not_hold_is_ported_by_force_and_recorded_as_such(auto, tiny):
    ported = auto(tiny("base", seed=7), force=True)
    choice = ported.record.ports[-1].choice
    assert (choice.verdict, choice.is_forced) == ("will not hold", True)
    require_finite(ported)


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_ported_is_refused_as_by_add_and_nothing_is_measured(force, tiny, monkeypatch):
    monkeypatch.delattr(update_measures, "measure_update")
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("base", inner=24))
    patch = load_patch(tiny("adapter"))
    plan = Route(Update(base, evolved), method="auto", force=force).plan(patch)
    assert plan.refusals == plan_port(patch, Update(base, evolved)).refusals != ()


def test_without_its_base_no_choice_can_be_made(tiny, tmp_path):
    from portllm.capturing.adapter import capture_adapter

    patch = capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), out=tmp_path / "patch")
    (refusal,) = Route(Update(None, open_checkpoint(tiny("evolved"))), method="auto").plan(patch).refusals
    assert str(refusal) == "--base: method 'auto' compares the evolved model with the base: pass the base with --base."


def test_the_update_is_measured_once_for_many_patches(tiny, monkeypatch):
    measured = []
    measure = update_measures.measure_update
    monkeypatch.setattr(update_measures, "measure_update", lambda update: measured.append(update) or measure(update))
    route = Route(Update(open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))), method="auto")
    plans = [route.plan(replace(load_patch(tiny("adapter", seed=seed)), name=str(seed))) for seed in (0, 5)]
    assert all(plan.choice for plan in plans)
    assert len(measured) == 1


def test_force_means_nothing_to_a_method_that_never_refuses(auto, tiny):
    with pytest.raises(PortError, match="requires method 'auto'"):
        auto(tiny("evolved"), method="add", force=True)
