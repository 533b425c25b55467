"""Verdicts from measures alone, and that each reason names what decided."""

import math
from pathlib import Path

import pytest

from portllm.checking.update.config_changes import ConfigChange, Effect
from portllm.checking.update.lineage import Lineage
from portllm.checking.verdict import Answer, Measures, judge, with_answers
from portllm.errors import Refusal
from portllm.measures import thresholds
from portllm.measures.drift import DriftSums
from portllm.measures.estimate import DriftEstimate, SampledEstimate
from portllm.measures.overlap import DriftShare


def drifted(relative, *, error=0.0):
    cosine = 1 / math.sqrt(1 + relative**2)
    sums = DriftSums(1.0, relative**2, 1.0, 1 + relative**2)
    return DriftEstimate(SampledEstimate(relative, error), SampledEstimate(cosine, error), sums)


NEAR = {"lineage": {"q_proj": Lineage.CONTINUATION}, "drift": drifted(0.0005)}


def test_a_short_continuation_holds_and_the_reason_says_who_measured_that():
    verdict = judge(Measures(**NEAR))
    assert verdict.answer is Answer.HOLDS
    (reason,) = verdict.reasons
    assert "0.05 % of their norm" in reason.text
    assert reason.threshold is thresholds.SHORT_DRIFT


def test_no_drift_holds():
    assert judge(Measures(lineage={"q_proj": Lineage.SAME}, drift=drifted(0.0))).answer is Answer.HOLDS


def test_beyond_what_was_measured_it_is_uncertain():
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION}, drift=drifted(0.1)))
    assert verdict.answer is Answer.UNCERTAIN
    assert "portllm evaluate" in verdict.reasons[0].text


@pytest.mark.parametrize(
    ("drift", "is_alignable", "answer"),
    [
        (0.0011, True, Answer.HOLDS_ALIGNED),
        (0.02, True, Answer.HOLDS_ALIGNED),
        (0.0201, True, Answer.UNCERTAIN),
        (0.0011, False, Answer.UNCERTAIN),
    ],
)
def test_beyond_addition_ports_by_align_hold_up_to_a_drift_where_the_patch_is_of_lora_alone(
    drift, is_alignable, answer
):
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION}, drift=drifted(drift), is_alignable=is_alignable))
    assert (verdict.answer, verdict.method) == (answer, "align")
    assert verdict.reasons[0].threshold is (thresholds.ALIGNED_DRIFT if is_alignable else thresholds.SHORT_DRIFT)
    assert ("a port by align" in verdict.reasons[0].text) is is_alignable


@pytest.mark.parametrize(
    ("drift", "error", "answer"),
    [(0.00099, 0.0001, Answer.HOLDS_ALIGNED), (0.0199, 0.001, Answer.UNCERTAIN), (0.03, 0.0001, Answer.UNCERTAIN)],
)
def test_an_interval_on_both_sides_of_a_threshold_counts_as_beyond_it_and_points_to_a_full_reading(
    drift, error, answer
):
    verdict = judge(Measures(**{**NEAR, "drift": drifted(drift, error=error)}))
    assert verdict.answer is answer
    assert ("--full" in verdict.reasons[0].text) is (drift < 0.02)


@pytest.mark.parametrize("far", [Lineage.INDEPENDENT, Lineage.UNRELATED])
def test_one_kind_of_module_that_has_nothing_in_common_is_enough(far):
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION, "up_proj": far}, drift=drifted(0.0005)))
    assert verdict.answer is Answer.WILL_NOT_HOLD
    assert verdict.reasons[0].text.startswith("up_proj: ")


def test_siblings_are_uncertain_even_with_little_drift():
    assert judge(Measures(lineage={"q_proj": Lineage.SIBLING}, drift=drifted(0.0005))).answer is Answer.UNCERTAIN


def test_refusals_come_before_everything_and_all_of_them_are_told():
    refusals = (Refusal("a", "no such module."), Refusal("b", "another shape."))
    verdict = judge(Measures(**NEAR, refusals=refusals))
    assert verdict.answer is Answer.CANNOT_BE_PORTED
    assert [reason.text for reason in verdict.reasons] == ["a: no such module.", "b: another shape."]


@pytest.mark.parametrize(
    "more",
    [
        {"alignment": 0.5},
        {"alignment": -0.5},
        {"overlaps": {"input": DriftShare(inside=0.3, chance=0.002, total=1.0)}},
        {"config_changes": (ConfigChange("activation", "silu", "gelu", Effect.FUNCTION),)},
        {"changes_vocabulary": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_puts_a_short_continuation_in_doubt(more):
    verdict = judge(Measures(**NEAR, **more))
    assert verdict.answer is Answer.UNCERTAIN
    assert verdict.reasons[-1].answer is Answer.HOLDS


def test_a_large_share_of_the_drift_is_no_doubt_where_chance_gives_as_much():
    overlaps = {"input": DriftShare(inside=0.34, chance=0.33, total=1.0)}
    assert judge(Measures(**NEAR, overlaps=overlaps)).answer is Answer.HOLDS


def test_a_weight_that_is_not_finite_will_not_hold():
    assert judge(Measures(**NEAR, broken=("model.norm.weight",))).answer is Answer.WILL_NOT_HOLD


def test_positions_and_rounding_are_remarks():
    verdict = judge(
        Measures(
            **NEAR,
            config_changes=(ConfigChange("rope theta", 1e4, 5e5, Effect.POSITION),),
            kept_gain={"BF16": 0.55, "F16": 0.998, "F32": 1.0},
            stored_as="BF16",
        )
    )
    assert verdict.answer is Answer.HOLDS
    assert "rope theta was 10000.0 and is 500000.0" in verdict.remarks
    assert "--dtype F16" in verdict.remarks[1]


@pytest.mark.parametrize(("drift", "answer"), [(0.0, Answer.UNCERTAIN), (0.1, Answer.UNCERTAIN)])
def test_answers_that_begin_otherwise_put_a_patch_in_doubt(drift, answer):
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION}, drift=drifted(drift)))
    doubted = with_answers(verdict, agreement=0.89, n_prompts=100)
    assert doubted.answer is answer
    assert {reason.text for reason in doubted.reasons} > {reason.text for reason in verdict.reasons}
    assert thresholds.AGREEMENT in [reason.threshold for reason in doubted.reasons]


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_answers_that_begin_alike_take_no_doubt_away(drift):
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION}, drift=drifted(drift)))
    assert with_answers(verdict, agreement=1.0, n_prompts=100) == verdict


def test_answers_that_addition_loses_are_no_doubt_about_a_port_by_align():
    verdict = judge(Measures(lineage={"q_proj": Lineage.CONTINUATION}, drift=drifted(0.005)))
    doubted = with_answers(verdict, agreement=0.2, n_prompts=100)
    assert doubted.answer is Answer.HOLDS_ALIGNED
    assert "by addition, 20 % of 100 answers begin as" in " ".join(reason.text for reason in doubted.reasons)


def test_what_will_not_hold_does_not_become_uncertain_by_its_answers():
    verdict = judge(Measures(**NEAR, broken=("model.norm.weight",)))
    assert with_answers(verdict, agreement=0.0, n_prompts=100).answer is Answer.WILL_NOT_HOLD


def test_without_a_measure_of_drift_nothing_is_promised():
    assert judge(Measures()).answer is Answer.UNCERTAIN


def test_a_quantization_that_dwarfs_the_patch_puts_it_in_doubt_and_a_small_one_is_a_remark():
    large, small = (judge(Measures(fitted_to="nf4", quantization_gap=gap)) for gap in (12.0, 0.5))
    assert any(reason.threshold is thresholds.QUANTIZATION_GAP for reason in large.reasons)
    assert not any(reason.threshold is thresholds.QUANTIZATION_GAP for reason in small.reasons)
    assert "0.5 times as large as the patch" in small.remarks[0]
    assert "is not measured" in judge(Measures(fitted_to="Q4_K")).remarks[0]


def test_every_threshold_names_its_source():
    assert all(threshold.source and threshold.divides for threshold in thresholds.ALL)
    assert len({threshold.name for threshold in thresholds.ALL}) == len(thresholds.ALL)


def test_the_page_has_every_threshold_with_its_value():
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    for threshold in thresholds.ALL:
        assert f"| {threshold.name} | {threshold.value:g} |" in page
