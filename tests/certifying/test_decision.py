"""The sentence of certify: the bound, by the user's limit, with what it rests on."""

import pytest
from msgspec.structs import replace

from portllm.certifying.certificate import ASSUMES, count_labels
from portllm.certifying.decision import decide
from portllm.evaluating.decision import Compared
from tests.certifying.test_certificate import FREE, WHOLE

CLEAN = replace(WHOLE, inputs=replace(WHOLE.inputs, repeated=0))
LOST = replace(CLEAN, labels=count_labels(3, 0, 30, 40, confidence=0.95), wanted=0.02)
NAMES = Compared("v2", "ported")


@pytest.mark.parametrize(
    ("certificate", "tone", "ending"),
    [
        (replace(CLEAN, wanted=None), "plain", "turned wrong."),
        (CLEAN, "good", "safe to ship by your limit of 20 points."),
        (WHOLE, "doubt", "within your limit of 20 points, but the inputs are in doubt."),
        (replace(CLEAN, wanted=0.01), "doubt", "not shown to be safe: the bound is beyond your limit of 1 point."),
        (LOST, "bad", "not safe to ship: beyond your limit of 2 points."),
    ],
)
def test_the_sentence_says_the_bound_if_the_inputs_are_random_draws_and_the_limit_decides(certificate, tone, ending):
    headline = decide(certificate)
    assert (headline.tone, headline.text[-len(ending) :]) == (tone, ending)
    assert "if the inputs are random draws" in headline.text
    assert ASSUMES in headline.reasons


def test_free_text_gets_no_bound_and_no_verdict():
    headline = decide(FREE, compared=NAMES)
    assert (headline.tone, headline.command) == ("plain", "")
    assert headline.text.startswith("Gives no bound on the loss")


@pytest.mark.parametrize(
    ("certificate", "command"),
    [
        (CLEAN, "portllm merge ported --into v2 -o MERGED"),
        (LOST, "portllm train --base v2 --init-from ported"),
        (replace(CLEAN, wanted=0.05), "portllm certify --plan --max-loss 5 --expected-disagreement 0.025"),
        (replace(CLEAN, wanted=None), ""),
    ],
)
def test_what_to_do_next_is_a_command(certificate, command):
    headline = decide(certificate, compared=NAMES)
    assert headline.next
    assert headline.command.startswith(command)
