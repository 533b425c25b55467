"""Curves over whole numbers, such as updates or singular values: a band or whiskers show where they may lie. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portllm.show.html.bars import axis_text, cut, shape
from portllm.show.html.figure import drawing
from portllm.show.html.markup import Html, element
from portllm.show.html.scale import Scale, widened

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 12.0, 34.0
KEY, KEYS = 15.0, 3
"""Height of a line of names, and how many stand in one."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place of a curve.

    Attributes:
        x: A whole number, from 1.
        y: The number; None where there is none, and the curve has a gap.
        low: Lower end of where it may lie.
        high: Upper end.
    """

    x: int
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of a picture.

    Attributes:
        name: What it is of.
        points: From left to right.
        series: Which color and form, from 1.
    """

    name: str
    points: Sequence[Point]
    series: int = 1


def lines(
    curves: Sequence[Curve],
    *,
    title: str,
    told: str,
    x_name: str,
    unit: str,
    axis: Mapping[float, str] | None = None,
    is_log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Html:
    """Curves on the same axes.

    Args:
        curves: What to draw.
        title: Name of the picture.
        told: In words, what is to be seen.
        x_name: What the whole numbers count.
        unit: `%` for shares, or what stands behind the numbers of the axis.
        axis: Places on the upright axis that are marked, and their names.
        is_log: Whether that axis is logarithmic; bands are drawn then, else whiskers and marks.
        limits: Its ends, where several pictures are to have the same.
    """
    found = [point for curve in curves for point in curve.points]
    seen = [value for point in found for value in (point.y, point.low, point.high) if value is not None]
    held = tuple(axis or ())
    ends = limits or (_decades(seen) if is_log else widened(seen, *held))
    y = Scale(*ends, TOP + HEIGHT - TOP - BOTTOM, TOP, is_log=is_log)
    last = max((point.x for point in found), default=2)
    x = Scale(1.0, max(2.0, float(last)), LEFT + 8, WIDTH - RIGHT - 8)
    parts = [*_upright(y, unit), *_level(x, last, x_name), *_marks(axis or {}, y)]
    for curve in curves:
        parts += _band(curve, x, y) if is_log else _whiskers(curve, x, y)
        parts.append(element("path", d=_path(curve, x, y), class_=f"curve s{curve.series}"))
        if not is_log:
            parts += [
                shape(curve.series, x.at(point.x), y.at(point.y)) for point in curve.points if point.y is not None
            ]
    keys = _keys(curves) if len(curves) > 1 else []
    bottom = HEIGHT + (8 + KEY * math.ceil(len(keys) / KEYS) if keys else 0)
    return drawing(WIDTH, bottom, title, told, [*parts, *keys])


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis; a number that is not positive has no place on one."""
    positive = [value for value in values if value > 0] or [0.1, 1.0]
    low, high = min(positive), max(positive)
    return (low / 1.1, high * 1.1)


def _path(curve: Curve, x: Scale, y: Scale) -> str:
    """Through all points, with a gap where there is no number, or none that the axis can show."""
    steps, pen = [], "M"
    for point in curve.points:
        if point.y is None or (y.is_log and point.y <= 0):
            pen = "M"
            continue
        steps.append(f"{pen}{x.at(point.x):.1f} {y.at(point.y):.1f}")
        pen = "L"
    return "".join(steps) or "M0 0"


def _band(curve: Curve, x: Scale, y: Scale) -> list[Html]:
    ends = [
        (x.at(point.x), y.at(point.low), y.at(point.high))
        for point in curve.points
        if point.low is not None and point.high is not None and point.high > 0
    ]
    if len(ends) < 2:
        return []
    upper = "L".join(f"{place:.1f} {high:.1f}" for place, _, high in ends)
    lower = "L".join(f"{place:.1f} {low:.1f}" for place, low, _ in reversed(ends))
    return [element("path", d=f"M{upper}L{lower}z", class_=f"band s{curve.series}")]


def _whiskers(curve: Curve, x: Scale, y: Scale) -> list[Html]:
    parts = []
    for point in curve.points:
        if point.low is not None and point.high is not None:
            place = x.at(point.x)
            ends = [end for end in (point.low, point.high) if y.low <= end <= y.high]
            caps = "".join(f"M{place - 3.5:.1f} {y.at(end):.1f}h7" for end in ends)
            d = f"M{place:.1f} {y.at(point.low):.1f}V{y.at(point.high):.1f}{caps}"
            parts.append(element("path", d=d, class_=f"whisker s{curve.series}"))
    return parts


def _upright(y: Scale, unit: str) -> list[Html]:
    ticks = y.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else y.high - y.low
    parts = [element("path", d=f"M{LEFT} {y.stop:.1f}V{y.start:.1f}", class_="axis")]
    for value in ticks:
        here = y.at(value)
        text = axis_text(value, value if y.is_log else step, unit)
        parts.append(element("path", d=f"M{LEFT} {here:.1f}H{WIDTH - RIGHT:.1f}", class_="axis"))
        parts.append(element("text", text, x=LEFT - 5, y=here + 4, class_="small end faint"))
    return parts


def _level(x: Scale, last: int, name: str) -> list[Html]:
    bottom = HEIGHT - BOTTOM
    every = max(1, -(-last // 8))
    shown = [number for number in range(1, last + 1) if number == 1 or number % every == 0]
    parts = [element("text", str(n), x=x.at(n), y=bottom + 14, class_="small mid faint") for n in shown]
    return [*parts, element("text", name, x=(LEFT + WIDTH) / 2, y=bottom + 28, class_="small mid faint")]


def _marks(axis: Mapping[float, str], y: Scale) -> list[Html]:
    parts = []
    for value, name in axis.items():
        here = y.at(value)
        parts.append(element("path", d=f"M{LEFT} {here:.1f}H{WIDTH - RIGHT:.1f}", class_="mark"))
        parts.append(element("text", name, x=WIDTH - RIGHT, y=here - 3, class_="small end faint"))
    return parts


def _keys(curves: Sequence[Curve]) -> list[Html]:
    """Names of the curves below the picture, some a line."""
    parts = []
    for number, curve in enumerate(curves):
        x, y = LEFT + (number % KEYS) * (WIDTH - LEFT) / KEYS, HEIGHT + KEY * (number // KEYS) + 14
        line = element("path", d=f"M{x:.1f} {y - 4:.1f}h22", class_=f"curve s{curve.series}")
        parts.append(element("g", line, element("text", cut(curve.name, 12), x=x + 28, y=y, class_="small")))
    return parts
