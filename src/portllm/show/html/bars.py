"""Rows on one scale: bars from zero, or dots; each with its name, its number in words, and its interval. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from portllm.show.html.figure import drawing
from portllm.show.html.markup import Html, element
from portllm.show.html.scale import Scale, widened
from portllm.show.printable import one_line

WIDTH, EDGE = 360.0, 8.0
LINE, GROUP = 32.0, 22.0
NEAR, UNDER = 72.0, 12.0
"""How near two names under an axis would run into each other, and how much lower the second one stands then."""

LONGEST = 40
"""Letters of a name that are shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a picture.

    Attributes:
        name: What it is of.
        value: The number; None where there is none.
        text: The same for people, or why there is none.
        low: Lower end of its interval.
        high: Upper end.
        series: Which color and form, from 1.
        group: A heading above the first row of a group; empty for none.
    """

    name: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    series: int = 1
    group: str = ""


AXIS_UNITS = {"%": (100, " %"), "points": (100, "")}
"""Units whose numbers are shares, and how an axis shows them."""

Draw = Callable[[Row, Scale, float], list[Html]]
"""What stands on the scale of a row, at some height."""


def bars(
    rows: Sequence[Row],
    *,
    title: str,
    told: str,
    unit: str,
    axis: Mapping[float, str] | None = None,
    held: Sequence[float] = (0.0,),
) -> Html:
    """Bars from zero to each number, with a line from one end of its interval to the other.

    Args:
        rows: From top to bottom.
        title: Name of the picture.
        told: In words, what is to be seen.
        unit: `%` for shares, `points` for changes of them, or what stands behind the numbers of the axis.
        axis: Places that are marked, and their names.
        held: Numbers that the scale holds in any case.
    """
    return _picture(rows, title, told, axis or {}, unit, _bar, held)


def dots(
    rows: Sequence[Row],
    *,
    title: str,
    told: str,
    unit: str,
    axis: Mapping[float, str] | None = None,
    refused: tuple[float, float] | None = None,
) -> Html:
    """A dot for each number, on a line from one end of its interval to the other.

    Args:
        rows: As for `bars`, as are all others.
        title: Name of the picture.
        told: In words, what is to be seen.
        unit: Of the numbers.
        axis: Places that are marked, and their names.
        refused: Between which numbers the user's limit is not met; the ends of the scale where infinite.
    """
    return _picture(rows, title, told, axis or {}, unit, _dot, tuple(axis or ()), refused)


def shape(series: int, x: float, y: float) -> Html:
    """The form of a series at a place: each has one of its own beside its color."""
    match series:
        case 2:
            return element("rect", x=x - 4, y=y - 4, width=8, height=8, class_="fill s2")
        case 3:
            return element("path", d=f"M{x:.1f} {y - 5:.1f}l5 9h-10z", class_="fill s3")
        case 4:
            return element("path", d=f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z", class_="fill s4")
        case _:
            return element("circle", cx=x, cy=y, r=4.5, class_=f"fill s{series}")


def cut(name: str, most: int = LONGEST) -> str:
    """A name that is not longer than there is room for; the table has all of it.

    Example:
        >>> cut("a" * 50, 5)
        'aaaa…'
    """
    name = one_line(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def axis_text(value: float, step: float, unit: str) -> str:
    """A number of an axis, with no more digits than its step has.

    Example:
        >>> axis_text(0.25, 0.25, "%"), axis_text(0.025, 0.005, "%"), axis_text(2.0, 0.5, "nats")
        ('25 %', '2.5 %', '2.0 nats')
    """
    factor, behind = AXIS_UNITS.get(unit, (1, f" {unit}" if unit else ""))
    digits = next(count for count in range(12) if abs(round(factor * step, count) - factor * step) < 1e-9 * factor)
    return f"{factor * value + 0.0:.{digits}f}{behind}"  # without the sign of -0.0


def _picture(
    rows: Sequence[Row],
    title: str,
    told: str,
    axis: Mapping[float, str],
    unit: str,
    draw: Draw,
    held: Iterable[float],
    refused: tuple[float, float] | None = None,
) -> Html:
    seen = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    scale = Scale(*widened(seen, *held), EDGE, WIDTH - EDGE)
    parts: list[Html] = []
    y = 4.0
    for row in rows:
        if row.group:
            parts.append(element("text", cut(row.group), x=0, y=y + 14, font_weight="600"))
            y += GROUP
        parts.append(element("text", cut(row.name), x=EDGE, y=y + 11, class_="faint"))
        parts.append(element("text", row.text, x=WIDTH - EDGE, y=y + 11, class_="end"))
        parts += [_mark(scale.at(value), y + 21) for value in axis]
        parts += draw(row, scale, y + 21)
        y += LINE
    ground = [*_refused(refused, scale, y), *_mark_names(axis, scale, y + 2), *_ticks(scale, y + 2, unit)]
    below = 34 + UNDER * max(_levels(axis, scale).values(), default=0) if axis else 20
    return drawing(WIDTH, y + below, title, told, [*ground, *parts])


def _refused(between: tuple[float, float] | None, scale: Scale, height: float) -> list[Html]:
    """What lies beyond the user's limit, shaded."""
    if between is None:
        return []
    left, right = map(scale.at, between)
    return [element("rect", x=left, y=0, width=right - left, height=height, class_="refused")]


def _levels(axis: Mapping[float, str], scale: Scale) -> dict[float, int]:
    """On which line below the axis each name stands: two that are near each other on different ones."""
    found: dict[float, int] = {}
    for value in sorted(axis):
        near = [level for other, level in found.items() if scale.at(value) - scale.at(other) < NEAR]
        found[value] = next(level for level in range(len(axis)) if level not in near)
    return found


def _bar(row: Row, scale: Scale, y: float) -> list[Html]:
    parts = [element("rect", x=scale.start, y=y - 4, width=scale.stop - scale.start, height=9, class_="frame")]
    if row.value is not None:
        left, right = sorted((scale.at(0.0), scale.at(row.value)))
        parts.append(
            element("rect", x=left, y=y - 4, width=max(1.0, right - left), height=9, class_=f"bar s{row.series}")
        )
    return [*parts, *_interval(row, scale, y + 0.5, "reach")]


def _dot(row: Row, scale: Scale, y: float) -> list[Html]:
    parts = [element("path", d=f"M{scale.start:.1f} {y:.1f}H{scale.stop:.1f}", class_="axis")]
    parts += _interval(row, scale, y, f"whisker s{row.series}")
    return parts if row.value is None else [*parts, shape(row.series, scale.at(row.value), y)]


def _interval(row: Row, scale: Scale, y: float, kind: str) -> list[Html]:
    """A line with an end at each number; an end that lies beyond the scale is left open."""
    if row.low is None or row.high is None:
        return []
    left, right = scale.at(row.low), scale.at(row.high)
    ends = [place for value, place in ((row.low, left), (row.high, right)) if scale.low <= value <= scale.high]
    caps = "".join(f"M{place:.1f} {y - 3.5:.1f}v7" for place in ends)
    return [element("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}{caps}", class_=kind)]


def _mark(x: float, y: float) -> Html:
    """A marked place on one row."""
    return element("path", d=f"M{x:.1f} {y - 6:.1f}v12", class_="mark")


def _mark_names(axis: Mapping[float, str], scale: Scale, y: float) -> list[Html]:
    """The marked places under the axis, with their names."""
    parts = []
    for value, level in _levels(axis, scale).items():
        x = scale.at(value)
        side = "mid" if 60 < x < WIDTH - 60 else "end" if x >= WIDTH - 60 else ""
        parts.append(element("path", d=f"M{x:.1f} {y - 4:.1f}v8", class_="mark"))
        parts.append(element("text", axis[value], x=x, y=y + 27 + UNDER * level, class_=f"small faint {side}"))
    return parts


def _ticks(scale: Scale, y: float, unit: str) -> list[Html]:
    ticks = scale.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else scale.high - scale.low
    parts = [element("path", d=f"M{scale.start:.1f} {y:.1f}H{scale.stop:.1f}", class_="axis")]
    for value in ticks:
        x = scale.at(value)
        side = "mid" if EDGE + 12 < x < WIDTH - EDGE - 12 else "end" if x > WIDTH / 2 else ""
        parts.append(element("text", axis_text(value, step, unit), x=x, y=y + 13, class_=f"small faint {side}"))
    return parts
