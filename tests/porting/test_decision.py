"""The sentence of port, and the command that follows from what is known of the ported patch."""

from dataclasses import replace

import msgspec
import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.matching.port_plan import plan_port
from portllm.matching.token_rows import TokenMap
from portllm.matching.update import Update
from portllm.patch.adapter_folder import load_patch
from portllm.patch.record import Choice, PortStep, Tried
from portllm.porting.decision import Named, decide
from portllm.porting.text import shortfall

NAMED = Named("v1", "my patch", "v2", "my patch v2")
EVALUATE = "portllm evaluate --base v1 --patch 'my patch' --evolved v2 --ported 'my patch v2' --data TEST.jsonl"


@pytest.fixture(scope="module")
def plan(tiny):
    return plan_port(
        load_patch(tiny("adapter")), Update(open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved")))
    )


def step_of(plan, **evidence):
    return PortStep(plan.source, plan.target, plan.method.id, evidence, (), plan.choice)


def measured(share, low, high):
    return {"agreement": share, "agreement_low": low, "agreement_high": high, "prompts_report": 200.0}


def decided(plan, **evidence):
    return decide(plan, step_of(plan, **evidence), wanted=0.9, named=NAMED)


def chosen(plan, verdict, *, forced=False):
    return replace(plan, choice=Choice(verdict, "a reason", ("it drifted by 1 %.",), forced))


def test_what_was_not_checked_is_to_be_measured(plan):
    headline = decided(plan)
    assert headline.tone == "plain"
    assert headline.text.startswith("Ported ")
    assert headline.text.endswith(" by addition; whether it holds was not checked.")
    assert headline.command == EVALUATE


@pytest.mark.parametrize(
    ("verdict", "forced", "tone", "said", "command"),
    [
        (
            "holds",
            False,
            "good",
            ", which is known to hold for so short an update.",
            "portllm merge 'my patch v2' --into v2",
        ),
        ("uncertain", False, "doubt", "; whether it holds is uncertain, so measure it before you ship it.", EVALUATE),
        ("will not hold", True, "bad", " by force: it will not hold.", EVALUATE),
    ],
)
def test_the_verdict_of_check_is_said_with_its_reasons(plan, verdict, forced, tone, said, command):
    headline = decided(chosen(plan, verdict, forced=forced))
    assert (headline.tone, list(headline.reasons)) == (tone, ["it drifted by 1 %."])
    assert headline.text.endswith(said)
    assert headline.command.startswith(command)


@pytest.mark.parametrize(
    ("share", "low", "high", "tone", "said", "command"),
    [
        (0.95, 0.92, 0.97, "good", "enough by the limit of 90 % (--agreement)", "portllm merge"),
        (0.91, 0.86, 0.94, "doubt", "not shown to be enough by the limit of 90 % (--agreement)", EVALUATE),
        (
            0.5,
            0.4,
            0.6,
            "bad",
            "too few by the limit of 90 % (--agreement)",
            "portllm train --base v2 --teacher 'my patch'",
        ),
    ],
)
def test_what_prompts_measured_goes_before_the_verdict(plan, share, low, high, tone, said, command):
    headline = decided(chosen(plan, "uncertain"), **measured(share, low, high))
    assert headline.tone == tone
    assert f"it gives {100 * share:.1f} % of the old answers ({100 * low:.1f} % to {100 * high:.1f} %)" in headline.text
    assert said in headline.text
    assert headline.command.startswith(command)


def test_written_answers_are_judged_by_their_tokens(plan):
    by_token = {
        f"token_{name}": value for name, value in measured(0.95, 0.92, 0.97).items() if name != "prompts_report"
    }
    found = measured(0.3, 0.2, 0.4) | by_token
    headline = decided(plan, **found)
    assert headline.tone == "good"
    assert "it gives 95.0 % of the old answers' tokens (92.0 % to 97.0 %)" in headline.text
    assert shortfall("mine", step_of(plan, **found), 0.9) is None
    assert "has fewer of the old answers' tokens than 98.0 %: at most 97.0 %" in shortfall(
        "mine", step_of(plan, **found), 0.98
    )


def test_trained_rows_that_are_lost_cast_doubt_on_what_would_hold(plan, monkeypatch):
    monkeypatch.setattr("portllm.porting.decision.trained_tokens_lost", lambda plan: ["<ticket>"])
    headline = decided(replace(chosen(plan, "holds"), tokens=TokenMap((0, 2), {1: "<ticket>"})))
    assert headline.tone == "doubt"
    assert "by addition, without the trained rows of '<ticket>'" in headline.text


def test_a_dry_run_says_what_would_be_and_names_no_next_command(plan):
    headline = decide(plan, None, wanted=0.9, named=NAMED)
    assert headline.text.startswith("Would port ")
    assert headline.command == ""


def test_where_addition_was_taken_it_is_told_what_would_have_come_nearer_and_at_what_price(plan):
    step = msgspec.structs.replace(step_of(plan, **measured(0.2, 0.1, 0.3)), method="align")
    assert "; nothing helps more than addition." in shortfall("mine", step, 0.9)
    tried = (
        Tried("add", 0.6, 0.0, 0.0, 0.0),
        Tried("add + logits", 0.7, 0.1, 0.3, 0.1, True),
        Tried("refit", 0.2, 0.1, 0.11, 0.02, True),
    )
    assert (
        "; 1 candidate would come nearer, but cost 0.13 nats or more per token of general text beyond addition, "
        "standard error included (--max-general-loss)."
    ) in shortfall("mine", msgspec.structs.replace(step, tried=tried), 0.9)
    best = (*tried[:2], Tried("add + states", 0.8, 0.1))
    corrected = msgspec.structs.replace(step, method="align: add + logits", tried=best)
    assert "; 'align: add + logits' is the best that was tried." in shortfall("mine", corrected, 0.9)
    dear = msgspec.structs.replace(corrected, tried=tried)
    assert "; 1 candidate would come nearer, but cost 0.13 nats or more" in shortfall("mine", dear, 0.9)
    assert shortfall("mine", step, 0.3) is None
