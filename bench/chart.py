"""Bars of the results as SVG: wall time and private memory of each tool, contest by contest. Pure."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

WIDTH, LABEL, BAR = 1090, 400, 235
PANELS = (("seconds", "wall time", LABEL), ("private_bytes", "private memory", LABEL + BAR + 110))
LINE, HEAD = 20, 34
OURS, THEIRS, INK = "#2f6db5", "#a9b0b8", "#22262a"


def draw(name: str, contests: Mapping[str, Any]) -> str:
    """The picture: in each contest, bars share a scale; a line over a bar spans its runs."""
    parts = [_text(8, 20, name, weight="bold")]
    y = 32
    for result in contests.values():
        parts += _contest(result, y)
        y += HEAD + LINE * len(result["jobs"])
    size = f'width="{WIDTH}" height="{y + 12}" viewBox="0 0 {WIDTH} {y + 12}"'
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="12"'
    background = f'<rect width="{WIDTH}" height="{y + 12}" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{background}\n' + "\n".join(parts) + "\n</svg>\n"


def _contest(result: Mapping[str, Any], y: int) -> Iterator[str]:
    yield _text(8, y + 20, f"{result['title']}, cache {result['cache']}", weight="bold")
    for quantity, title, x in PANELS:
        yield _text(x, y + 20, title, color="#6a7178")
        largest = max(job["range"][quantity][1] for job in result["jobs"].values()) or 1
        for number, job in enumerate(result["jobs"].values()):
            top = y + HEAD - 6 + LINE * number
            yield from _bar(job, quantity, x, top, BAR / largest)
    for number, job in enumerate(result["jobs"].values()):
        yield _text(LABEL - 8, y + HEAD + 6 + LINE * number, job["label"], anchor="end")


def _bar(job: Mapping[str, Any], quantity: str, x: int, top: int, scale: float) -> Iterator[str]:
    length = job["median"][quantity] * scale
    low, high = (bound * scale for bound in job["range"][quantity])
    color = OURS if job["is_ours"] else THEIRS
    yield f'<rect x="{x}" y="{top}" width="{max(length, 1):.1f}" height="14" fill="{color}"/>'
    yield f'<path d="M{x + low:.1f} {top + 7}H{x + high:.1f}" stroke="{INK}" stroke-width="1.5"/>'
    number = job["median"][quantity]
    said = f"{number:.2f} s" if quantity == "seconds" else f"{number / 1e6:,.0f} MB"
    yield _text(round(x + max(length, high) + 6), top + 11, said)


def _text(x: int, y: int, text: str, *, anchor: str = "start", weight: str = "normal", color: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}">{escape(text)}</text>'
