import itertools

import pytest

from portllm.demo import story
from portllm.demo.settings import MERGED_ROWS, SCORED_ROWS


def test_how_long_the_story_takes_is_told_once_from_the_first_steps_of_training(monkeypatch):
    clock = itertools.count(100.0, 2.0)
    monkeypatch.setattr(story.time, "perf_counter", lambda: next(clock))
    estimates, told = [], []
    show = story.estimating(lambda *now: told.append(now), estimates.append)
    for done in range(41):
        show("train", done, 40, "steps")
    assert estimates == [pytest.approx(story.WHOLE * 2.0 / story.FIRST_STEPS)]
    assert told == [("train", done, 40, "steps") for done in range(41)]


def test_every_type_is_among_the_passages_that_models_answer():
    task = story.held_out()
    assert (task.n_rows, len(task.labels)) == (SCORED_ROWS, 9)
    assert len({example.completion for example in task.examples[:MERGED_ROWS]}) > 5
