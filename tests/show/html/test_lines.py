"""A curve goes through its numbers, and has a gap where there is none."""

import re

from portllm.show.html.lines import Curve, Point, lines
from tests.show.html.reading import EVIL, Page


def curve_path(picture):
    return re.search(r'd="([^"]+)" class="curve', picture)[1]


def draw(points, **how):
    return lines([Curve("c", points)], title="t", told="d", x_name="updates", unit="%", **how)


def test_where_there_is_no_number_the_curve_has_a_gap():
    path = curve_path(draw([Point(1, 0.5), Point(2, 0.6), Point(3, None), Point(4, 0.7)]))
    assert re.findall("[ML]", path) == ["M", "L", "M"]


def test_zero_has_no_place_on_a_logarithmic_axis():
    path = curve_path(draw([Point(1, 0.5), Point(2, 0.0)], is_log=True))
    assert re.findall("[ML]", path) == ["M"]


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis():
    path = curve_path(draw([Point(1, 1.0), Point(2, 0.1), Point(3, 0.01)], is_log=True))
    first, second, third = (float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path))
    assert abs((second - first) - (third - second)) < 0.2


def test_a_band_goes_from_the_least_to_the_most():
    picture = draw([Point(1, 0.5, 0.4, 0.6), Point(2, 0.3, 0.2, 0.4)], is_log=True)
    assert re.search(r'd="M[^"]+z" class="band s1"', picture)


def test_several_curves_are_named_below_and_one_is_not():
    one = draw([Point(1, 0.5)])
    both = lines(
        [Curve("in accuracy", [Point(1, 0.5)]), Curve("in loss", [Point(1, 0.6)], 2)],
        title="t", told="d", x_name="updates", unit="%",
    )  # fmt: skip
    assert "c" not in Page(one).texts
    assert {"in accuracy", "in loss"} <= set(Page(both).texts)


def test_nothing_to_draw_is_an_empty_picture():
    assert Page(draw([Point(1, None)])).elements[0][0] == "svg"
    assert Page(draw([], is_log=True)).elements[0][0] == "svg"


def test_names_may_say_anything():
    harmless, evil = (
        Page(lines([Curve(t, [Point(1, 0.5)])] * 2, title=t, told=t, x_name=t, unit=t, axis={0.5: t}))
        for t in ("x", EVIL)
    )
    assert evil.skeleton == harmless.skeleton
