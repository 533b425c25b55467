import itertools
import json

import pytest

from portllm.demo import story
from portllm.demo.page import story_page
from portllm.demo.settings import MERGED_ROWS, SCORED_ROWS
from portllm.demo.text import TITLES, render_step, render_story, story_to_json
from portllm.patch.adapter_folder import load_patch
from tests.show.html.reading import Page


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


@pytest.mark.slow
def test_the_story_is_told_whole_with_both_ports_beside_one_another_and_a_second_time_from_its_records(
    reader, tmp_path, monkeypatch
):
    monkeypatch.setattr(story, "BASE", str(reader))
    steps = []
    first, again = (story.tell(tmp_path / "demo", on_step=steps.append) for _ in range(2))
    assert [step.name for step in steps] == [*TITLES] * 2
    assert [step.kept.reused for step in steps] == [False] * len(TITLES) + [True] * len(TITLES)
    assert first.comparison == again.comparison
    names = [row.name for row in first.comparison.rows]
    assert names[3:] == ["evolved + ported", "evolved + ported by align", "evolved + retrained"]
    step = load_patch(tmp_path / "demo" / "aligned").record.ports[-1]
    assert step.method.startswith("align")
    told = json.loads(json.dumps(story_to_json(first), allow_nan=False))
    assert told["steps"]["align"]["result"] == {"method": step.method, **step.evidence}
    assert [row["name"] for row in told["comparison"]["rows"]] == names
    said = "\n".join([*map(render_step, steps), render_story(first, page=tmp_path / "page.html")])
    assert f"of {step.evidence['prompts_report']:.0f} passages" in said
    page = Page(story_page(first, {}))
    assert [row[0] for row in page.tables["Accuracy, in numbers"][1:]] == names
