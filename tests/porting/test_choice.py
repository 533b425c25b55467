"""From every verdict to a method or to none."""

import pytest

from portllm.checking.verdict import Answer, Reason, Verdict
from portllm.methods.table import METHODS
from portllm.porting.choice import choose


def verdict(answer):
    return Verdict(answer, (Reason(answer, "the gravest."), Reason(Answer.HOLDS, "another.")))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("answer", [Answer.HOLDS, Answer.UNCERTAIN])
def test_what_holds_or_may_hold_is_added_and_nothing_is_forced(answer, force):
    decision = choose(verdict(answer), force=force)
    assert (decision.method, decision.is_forced) == ("add", False)
    assert decision.reason.endswith(": the gravest.")


def test_what_will_not_hold_has_no_method_unless_forced():
    refused, forced = (choose(verdict(Answer.WILL_NOT_HOLD), force=force) for force in (False, True))
    assert (refused.method, refused.is_forced) == (None, False)
    assert (forced.method, forced.is_forced) == ("add", True)


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_ported_is_not_ported_by_force(force):
    assert choose(verdict(Answer.CANNOT_BE_PORTED), force=force).method is None


@pytest.mark.parametrize("answer", Answer)
def test_what_is_chosen_is_a_row_of_the_table(answer):
    assert choose(verdict(answer), force=True).method in {None, *METHODS}


def test_a_verdict_without_reasons_leads_to_a_reason():
    assert choose(Verdict(Answer.UNCERTAIN, ())).reason.endswith("no evidence for or against the patch was found.")
