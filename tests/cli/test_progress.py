"""Progress where there is no terminal: a line now and then, nothing for short work."""

import pytest

from portllm.cli import progress as module
from portllm.cli.progress import shown_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_short_work_says_nothing(clock, capsys):
    with shown_progress() as show:
        for done in range(4):
            show("merge", done, 3, "bytes")
            clock.now += 1
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is_and_when_it_ends(clock, capsys):
    with shown_progress() as show:
        for done in (0, 1, 2, 3):
            show("train", done, 3, "steps")
            clock.now += 8
    assert capsys.readouterr().err.splitlines() == [
        "train: 2 of 3 steps, 16 s, about 8 s left",
        "train: 3 of 3 steps, 24 s",
    ]


def test_an_hour_of_work_says_a_few_lines(clock, capsys):
    with shown_progress() as show:
        for done in range(3601):
            show("train", done, 3600, "steps")
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 10 of 3,600 steps, 10 s, about 3590 s left"
    assert len(lines) == 10


def test_the_next_work_of_the_same_name_begins_anew(clock, capsys):
    with shown_progress() as show:
        for _ in range(2):
            for done in (0, 1, 2):
                show("train: x", done, 2, "steps")
                clock.now += 6
    assert capsys.readouterr().err.splitlines() == ["train: x: 2 of 2 steps, 12 s"] * 2


def test_quiet_says_nothing(clock, capsys):
    with shown_progress(quiet=True) as show:
        for done in range(3):
            show("train", done, 2, "steps")
            clock.now += 60
    assert capsys.readouterr().err == ""
