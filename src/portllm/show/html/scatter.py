"""What became of others: a dot for each, over a logarithmic axis, and where this one stands among them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from portllm.show.html.bars import axis_text, shape
from portllm.show.html.figure import drawing
from portllm.show.html.markup import Html, element
from portllm.show.html.scale import Scale, widened

WIDTH, HEIGHT = 360.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 20.0, 36.0


@dataclass(frozen=True, slots=True)
class Here:
    """The one that the picture is about.

    Attributes:
        name: What it is called.
        x: Its place on the level axis.
        y: What is expected of it.
        low: Lower end of where that may lie.
        high: Upper end.
        near: Between which places on the level axis others count as like it.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    near: tuple[float, float]


def scatter(
    others: Sequence[tuple[float, float]], here: Here, *, title: str, told: str, x_name: str, ends: tuple[float, float]
) -> Html:
    """Dots of others and one with its interval; all numbers are shares, those beyond the ends stand on them.

    Args:
        others: Level, above 0, and upright place of each.
        here: The one that it is about.
        title: Name of the picture.
        told: In words, what is to be seen.
        x_name: What the level axis is.
        ends: Of the upright axis.
    """
    levels = [value for value in (*(level for level, _ in others), here.x) if value > 0]
    x = Scale(min(levels) / 1.5, max(levels) * 1.5, LEFT, WIDTH - RIGHT, is_log=True)
    y = Scale(*widened([], *ends), HEIGHT - BOTTOM, TOP)
    left, right = map(x.at, here.near)
    parts = [
        element("rect", x=left, y=TOP, width=right - left, height=HEIGHT - TOP - BOTTOM, class_="near"),
        *_axes(x, y, x_name),
    ]
    parts += [element("circle", cx=x.at(level), cy=y.at(kept), r=3.5, class_="other s1") for level, kept in others]
    middle, bottom, top = x.at(here.x), y.at(here.low), y.at(here.high)
    whisker = f"M{middle:.1f} {bottom:.1f}V{top:.1f}M{middle - 5:.1f} {bottom:.1f}h10M{middle - 5:.1f} {top:.1f}h10"
    parts += [element("path", d=whisker, class_="whisker s2"), shape(2, middle, y.at(here.y))]
    side = "end" if middle > WIDTH - 90 else "" if middle < LEFT + 60 else "mid"
    parts.append(element("text", here.name, x=middle, y=TOP - 7, class_=f"small {side}"))
    return drawing(WIDTH, HEIGHT, title, told, parts)


def _axes(x: Scale, y: Scale, x_name: str) -> list[Html]:
    parts = []
    for value in y.ticks():
        here = y.at(value)
        parts.append(element("path", d=f"M{LEFT} {here:.1f}H{WIDTH - RIGHT:.1f}", class_="axis"))
        parts.append(element("text", axis_text(value, 0.25, "%"), x=LEFT - 5, y=here + 4, class_="small end faint"))
    for value in x.ticks():
        text = f"{100 * value:g} %"
        parts.append(element("text", text, x=x.at(value), y=HEIGHT - BOTTOM + 15, class_="small mid faint"))
    name = element("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="small mid faint")
    return [*parts, name]
