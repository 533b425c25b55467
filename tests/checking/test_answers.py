"""What `check` says of answers that were kept on like updates: counts of measured patches, and no more."""

import pytest

from portllm.checking.answers import FEWEST, Carried, answers_about, shipped
from portllm.checking.decision import decide
from portllm.checking.report import PatchReport
from portllm.checking.verdict import Answer, Verdict


def carried(*drifts):
    return [Carried("m", str(drift), drift, {"add": 0.5 + drift, "align": 0.9 + drift}) for drift in drifts]


def test_patches_count_whose_weights_drifted_by_a_third_to_three_times_as_much():
    found = answers_about(0.03, carried(0.009, 0.011, 0.03, 0.08, 0.1))
    assert found.n == 3
    assert found.kept["add"] == pytest.approx((0.511, 0.5 + 0.121 / 3))
    assert found.kept["align"] == pytest.approx((0.911, 0.9 + 0.121 / 3))


def test_of_too_few_patches_nothing_is_said():
    assert answers_about(0.03, carried(*[0.03] * FEWEST)) is not None
    assert answers_about(0.03, carried(*[0.03] * (FEWEST - 1))) is None
    assert answers_about(shipped()[0].drift, []) is None


def test_what_comes_with_the_program_has_every_patch_by_both_methods():
    assert shipped()
    assert all(each.kept.keys() == {"add", "align"} and 0 < each.drift < 1 for each in shipped())


def test_a_sentence_says_how_many_and_the_least():
    seen = answers_about(0.03, carried(0.02, 0.03, 0.04))
    headline = decide(PatchReport("my patch", Verdict(Answer.UNCERTAIN, ()), answers=seen), "v2")
    assert headline.reasons == [
        "In 3 cases on m, with updates about as large, ports kept of the old answers: 53 % by addition (52 % at least) "
        "and 93 % by align (92 % at least)."
    ]
