"""What the demo says: how long it takes, what to expect of a check, whether merging changed anything."""

import pytest

from portllm.demo.page import story_page
from portllm.demo.story import DemoStep, Story
from portllm.demo.text import render_estimate, render_step
from portllm.files.kept_results import Kept
from tests.evaluating.test_page import COMPARISON
from tests.show.html.reading import Page

FORECAST = {
    "loss": {"retention": 0.99, "low": 0.77, "high": 1.0},
    "accuracy": {"retention": 0.93, "low": 0.51, "high": 1.0},
}


@pytest.mark.parametrize(
    ("agreement", "forecast", "said"),
    [
        (
            0.98,
            FORECAST,
            "uncertain; 98 % of the answers begin as on the base; expected retention 93 % (51 % to 100 %) in score, "
            "99 % (77 % to 100 %) in loss",
        ),
        (0.98, None, "uncertain; 98 % of the answers begin as on the base"),
        (None, None, "cannot be ported"),
    ],
)
def test_the_check_of_the_demo_says_what_to_expect(agreement, forecast, said):
    verdict = "uncertain" if agreement else "cannot be ported"
    result = {"verdict": verdict, "reasons": ["why"], "agreement": agreement, "forecast": forecast}
    head, found = render_step(DemoStep("check", Kept(result, seconds=8.0, reused=False))).splitlines()
    assert head.startswith("check ")
    assert found.strip() == said


@pytest.mark.parametrize(("seconds", "said"), [(3.0, "about 1 minute."), (200.0, "about 3 minutes.")])
def test_the_time_that_the_story_takes_is_told_in_whole_minutes(seconds, said):
    assert said in render_estimate(seconds)


def test_the_merged_model_is_set_beside_the_ported_patch():
    result = {"rows": 18, "same": 17, "loss_change": -0.00251}
    _, found = render_step(DemoStep("agree", Kept(result, seconds=8.0, reused=False))).splitlines()
    assert found.strip() == "17 of 18 answers are the same; the loss differs by -0.003 nats per token"


ALIGNED = {
    "method": "align: refit", "prompts_report": 24.0, "agreement": 22 / 24, "agreement_low": 0.742,
    "agreement_high": 0.977, "agreement_added": 0.75,
}  # fmt: skip
OWN = "92 % (74 % to 98 %) of 24 passages that nothing was fitted or chosen on are answered as before; by addition 75 %"


def test_the_step_of_align_says_what_its_own_record_does():
    head, found = render_step(DemoStep("align", Kept(ALIGNED, seconds=80.0, reused=False))).splitlines()
    assert head.startswith("align ")
    assert found.strip() == OWN


def test_the_page_of_the_demo_says_what_was_compared_and_what_it_cost(tmp_path):
    steps = {"align": Kept(ALIGNED, seconds=80.0, reused=False)}
    page = Page(story_page(Story(tmp_path, steps, COMPARISON), {"date": "1 May"}))
    assert page.shown[page.shown.index("align's own report") + 1] == OWN
    assert page.shown[1] == "The demo: a clinic's patch on the next version of builtin:smollm2-135m"
    assert {"date", "1 May", "Change in accuracy", "By label", "Confusion matrix"} <= {*page.shown, *page.tables}
