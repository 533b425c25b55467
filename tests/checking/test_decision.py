"""The sentence of check, and the command that follows from each verdict."""

import pytest

from portllm.checking.decision import Checked, decide
from portllm.checking.report import PatchReport
from portllm.checking.verdict import Answer, Measures, Reason, Verdict, judge
from portllm.errors import Refusal
from portllm.measures.thresholds import INDEPENDENT_COSINE


def patch(answer):
    return PatchReport("my patch", Verdict(answer, (Reason(answer, "so it was found."),)))


@pytest.mark.parametrize(
    ("answer", "tone", "action", "command"),
    [
        (Answer.HOLDS, "good", "port it as it is", "portllm port 'my patch' --base v1 --evolved v2 -o PORTED"),
        (Answer.UNCERTAIN, "doubt", "measure it before you ship it", "--method align --text PROMPTS.jsonl -o PORTED"),
        (Answer.CANNOT_BE_PORTED, "bad", "train it again", "portllm train --base v2 --teacher 'my patch'"),
    ],
)
def test_each_verdict_says_what_to_do_and_by_which_command(answer, tone, action, command):
    headline = decide(patch(answer), "v2", checked=Checked("v1", "v2"))
    assert headline.tone == tone
    assert headline.text.startswith(f"{answer}: my patch on v2; {action}")
    assert command in headline.command
    assert list(headline.reasons) == ["so it was found."]


def test_for_weights_that_have_nothing_in_common_the_method_is_the_one_that_keeps_no_factor():
    reason = Reason(Answer.WILL_NOT_HOLD, "unrelated.", INDEPENDENT_COSINE)
    report = PatchReport("my patch", Verdict(Answer.WILL_NOT_HOLD, (reason,)))
    headline = decide(report, "v2", checked=Checked("v1", "v2"))
    assert "--method transport --text PROMPTS.jsonl" in headline.command


def test_where_the_wrong_model_was_given_nobody_is_told_to_train():
    swapped = Refusal("--base", "the two are swapped. Pass --base v2 --evolved v1.", is_of_input=True)
    wrong = PatchReport("my patch", judge(Measures(refusals=(swapped,))))
    headline = decide(wrong, "v2", checked=Checked("v1", "v2"))
    assert headline.text == "cannot be ported: my patch on v2; pass what the reasons below name"
    assert headline.command == ""


def test_a_patch_of_any_name_that_is_itself_at_fault_is_to_be_trained_again():
    odd = Refusal("--lm_head", "the evolved model has no such module.")
    headline = decide(PatchReport("my patch", judge(Measures(refusals=(odd,)))), "v2", checked=Checked("v1", "v2"))
    assert "train it again" in headline.text
    assert headline.command


def test_without_names_no_command_is_made_up():
    assert decide(patch(Answer.HOLDS), "v2").command == ""
