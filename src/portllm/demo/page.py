"""The demo's comparison as a page, like that of `evaluate`. Pure."""

from collections.abc import Mapping

from portllm.demo.settings import ALIGNED_PROMPTS, SCORED_ROWS
from portllm.demo.story import BASE, EVOLUTION_TEXT, HELD_OUT_ROWS, TRAINING_ROWS, Story
from portllm.demo.text import aligned_text
from portllm.evaluating.decision import decide
from portllm.evaluating.page import evaluate_page


def story_page(story: Story, about: Mapping[str, str]) -> str:
    """The page of a story.

    Args:
        story: As it was told.
        about: What else is said at the top, such as the day.
    """
    told = {
        "patch": "a clinic's types of questions",
        "base": BASE,
        "updated base": f"trained on {EVOLUTION_TEXT.removesuffix('.jsonl')}",
        "aligned on": f"{ALIGNED_PROMPTS} passages of {TRAINING_ROWS}, without their answers",
        "align's own report": aligned_text(story.steps["align"].result),
        "data": f"{SCORED_ROWS} rows of {HELD_OUT_ROWS}",
    }
    title = f"The demo: a clinic's patch on the next version of {BASE}"
    return evaluate_page(story.comparison, decide(story.comparison), title=title, about=told | dict(about))
