"""Bars are as long as their numbers, and an interval that has no end is drawn without one."""

import math
import re

import pytest

from portllm.show.html.bars import EDGE, WIDTH, Row, axis_text, bars, dots
from tests.show.html.reading import EVIL, Page


def bar_lengths(picture):
    return [float(width) for width in re.findall(r'width="([\d.]+)" height="9" class="bar', picture)]


def interval_paths(picture):
    return re.findall(r'd="([^"]+)" class="(?:reach|whisker s\d)"', picture)


def test_bars_are_in_proportion_to_their_numbers():
    picture = bars([Row("a", 0.5, "50 %"), Row("b", 1.0, "100 %")], title="t", told="d", unit="%", held=(0.0, 1.0))
    assert bar_lengths(picture) == [(WIDTH - 2 * EDGE) / 2, WIDTH - 2 * EDGE]


def test_an_interval_has_an_end_at_each_number_and_none_where_it_goes_on():
    closed, opened, none = (
        dots([Row("a", 0.5, "x", *ends)], title="t", told="d", axis={0.0: "0", 1.0: "1"}, unit="%")
        for ends in ((0.25, 0.75), (-math.inf, 0.75), (None, None))
    )
    assert interval_paths(closed) == ["M94.0 25.0H266.0M94.0 21.5v7M266.0 21.5v7"]
    assert interval_paths(opened) == ["M8.0 25.0H266.0M266.0 21.5v7"]
    assert interval_paths(none) == []


def test_what_lies_beyond_a_limit_is_shaded_to_the_end():
    rows, axis = [Row("a", -0.04, "x", -0.08, 0.0)], {-0.02: "limit", 0.0: "zero"}
    picture = dots(rows, title="t", told="d", unit="points", axis=axis, refused=(-math.inf, -0.02))
    x, width = re.search(r'<rect x="([\d.]+)" y="0" width="([\d.]+)" height="[\d.]+" class="refused"', picture).groups()
    assert float(x) == EDGE
    assert float(width) == (WIDTH - 2 * EDGE) * 3 / 4


@pytest.mark.parametrize(("limit", "lines"), [(-0.04, 1), (-0.001, 2)])
def test_two_names_that_would_run_into_each_other_stand_below_each_other(limit, lines):
    rows, axis = [Row("a", -0.04, "x", -0.08, 0.0)], {limit: "limit", 0.0: "zero"}
    picture = dots(rows, title="t", told="d", unit="points", axis=axis)
    heights = {re.search(rf'<text x="[\d.]+" y="([\d.]+)"[^>]*>{name}<', picture)[1] for name in ("limit", "zero")}
    assert len(heights) == lines


def test_a_row_without_a_number_has_its_reason_and_no_mark():
    picture = dots([Row("in score", None, "no number")], title="t", told="d", axis={1.0: "retrained"}, unit="%")
    assert "no number" in Page(picture).texts
    assert 'class="fill' not in picture


def test_every_series_has_a_form_of_its_own():
    pictures = [dots([Row("a", 0.5, "x", series=series)], title="t", told="d", unit="%") for series in (1, 2, 3, 4)]
    assert len({re.search(r'<(\w+) [^>]*class="fill', picture)[1] + picture[-200:] for picture in pictures}) == 4


def test_the_picture_says_what_it_shows_to_whoever_cannot_see_it():
    page = Page(bars([Row("a", 0.5, "50 %")], title="Score", told="a: 50 %", unit="%"))
    assert page.elements[0][1]["role"] == "img"
    assert page.texts[:2] == ["Score", "a: 50 %"]


def test_names_may_say_anything():
    harmless, evil = (
        Page(bars([Row(t, 0.5, t, group=t)], title=t, told=t, unit="%", axis={0.5: t})) for t in ("x", EVIL)
    )
    assert evil.skeleton == harmless.skeleton


@pytest.mark.parametrize(
    ("value", "step", "unit", "shown"),
    [(-0.0, 0.5, "%", "0 %"), (1e-5, 1e-5, "%", "0.001 %"), (-0.0, 0.02, "points", "0"), (-0.02, 0.02, "points", "-2")],
)
def test_numbers_of_an_axis_have_the_digits_of_its_step(value, step, unit, shown):
    assert axis_text(value, step, unit) == shown
