"""The sentence of evaluate: what the update cost, by the worse port and the honest end, and the user's limit alone."""

import pytest

from portllm.evaluating.decision import Compared, decide, within
from portllm.evaluating.metrics import accuracy_change, change_of_counts
from portllm.show.numbers import percent
from tests.evaluating.test_page import compared

NAMES = Compared("v2", "my patch")
PORTED, MERGED, RIVAL = "evolved + ported", "evolved + ported, merged", "evolved + ported by align"


def only_ported(n_right):
    return compared(without=(MERGED,), **{PORTED: n_right})


@pytest.mark.parametrize(
    ("n_right", "limit", "tone", "ending"),
    [
        (54, None, "plain", "1 of 60 answers turned wrong."),
        (55, 0.06, "good", "safe to ship by your limit of 6 points."),
        (54, 0.02, "doubt", "not shown to be safe: the interval reaches beyond your limit of 2 points."),
        (55, 0.005, "doubt", "not shown to be safe: the interval reaches beyond your limit of 0.5 points."),
        (40, 0.01, "bad", "not safe to ship: beyond your limit of 1 point."),
        (58, 0.0, "doubt", "not shown to be safe: the interval reaches beyond your limit of 0 points."),
    ],
)
def test_a_verdict_on_shipping_is_the_user_s_limit_against_the_far_end_of_the_interval(n_right, limit, tone, ending):
    comparison = only_ported(n_right)
    headline = decide(comparison, max_loss=limit)
    assert (headline.tone, headline.text[-len(ending) :]) == (tone, ending)
    assert within(comparison, limit) is (None if limit is None else tone == "good")
    assert limit is not None or "ship" not in headline.text


@pytest.mark.parametrize(("kinder", "worse"), [(PORTED, MERGED), (MERGED, PORTED)])
def test_of_adapter_and_merged_model_the_one_that_lost_more_is_the_headline(kinder, worse):
    comparison = compared(**{kinder: 55, worse: 50})
    assert decide(comparison).text.startswith("Loses 8.3 points")
    assert decide(comparison).reasons[0].startswith(f"{worse}: 83.3 % right, 91.7 % before")
    assert within(comparison, 0.06) is False


@pytest.mark.parametrize("n_right", [0, 40, 60])
def test_the_verdict_is_on_the_first_port_however_good_another_is(n_right):
    first, both = only_ported(50), compared(without=(MERGED,), **{PORTED: 50, RIVAL: n_right})
    alone, beside = (decide(comparison, max_loss=0.1) for comparison in (first, both))
    assert (beside.text, beside.tone, beside.reasons[0]) == (alone.text, alone.tone, alone.reasons[0])
    assert within(both, 0.1) is within(first, 0.1) is False
    assert any(reason.startswith(f"{RIVAL}: {percent(n_right / 60)} right; ") for reason in beside.reasons)
    assert beside.reasons[-1].startswith("Of several ports the first is judged")


@pytest.mark.parametrize(
    ("n_right", "told"), [(60, f"evaluate {RIVAL} as the first port, on other rows"), (41, "train")]
)
def test_another_port_that_is_shown_to_be_better_is_to_be_judged_on_other_rows(n_right, told):
    headline = decide(compared(without=(MERGED,), **{PORTED: 40, RIVAL: n_right}), max_loss=0.1, compared=NAMES)
    assert headline.next.startswith(told)


def test_flips_are_shown_beside_those_of_retraining_where_it_was_run():
    said = "For comparison, a patch retrained on the evolved model turns 4 of 60 answers wrong."
    assert said in decide(compared(**{"evolved + retrained": 51})).reasons
    assert not any("retrained" in reason for reason in decide(compared(without=("evolved + retrained",))).reasons)


def test_no_flip_on_few_rows_is_no_proof_that_nothing_is_lost():
    change = accuracy_change([True] * 10, [True] * 10)
    assert change.value == 0
    assert change.low < -0.1


@pytest.mark.parametrize(
    ("n_right", "limit", "command", "told"),
    [
        (55, 0.1, "portllm merge 'my patch' --into v2 -o MERGED", "serve the adapter, or merge it"),
        (40, 0.1, "portllm train --base v2 --init-from 'my patch'", "train on"),
        (54, 0.05, "", "rows"),
        (54, None, "", "--max-loss"),
    ],
)
def test_what_to_do_next_is_a_command_with_the_user_s_names(n_right, limit, command, told):
    headline = decide(only_ported(n_right), max_loss=limit, compared=NAMES)
    assert headline.command.startswith(command)
    assert bool(headline.command) == bool(command)
    assert told in headline.next


def test_the_rows_that_would_decide_do_if_the_change_stays():
    headline = decide(only_ported(54), max_loss=0.05, compared=NAMES)
    n_rows = int(headline.next.split()[2].replace(",", ""))
    low = change_of_counts(0, n_rows / 60, n_rows).low
    assert -0.05 <= low < -0.049
