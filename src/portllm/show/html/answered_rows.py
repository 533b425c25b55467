"""Rows that two models answer otherwise, to be read: what was asked, and what each of them says. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portllm.show.html.figure import folded
from portllm.show.html.markup import Html, element, joined
from portllm.show.html.page import paragraph

OPEN = 6
"""Rows that are shown at once; the others when they are asked for."""

SHOWN = 20
"""Rows that are shown; JSON and the models have the others."""

FIRST, LAST = 800, 500
"""Letters of a long text that are shown of its beginning and of its end, where the question mostly stands."""


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """One row.

    Attributes:
        number: Which row of the file.
        prompt: What was asked.
        answers: Who says what.
    """

    number: int
    prompt: str
    answers: Mapping[str, str]


def answered_rows(rows: Sequence[AnsweredRow]) -> Html:
    """The first rows, some of them folded away, and how many more there are."""
    shown = [_row(row) for row in rows[:SHOWN]]
    parts = [element("div", *shown[:OPEN], class_="rows")]
    if len(shown) > OPEN:
        parts.append(folded(f"{len(shown) - OPEN} more", element("div", *shown[OPEN:], class_="rows")))
    if len(rows) > SHOWN:
        parts.append(paragraph(f"{SHOWN} of {len(rows)} are shown.", quiet=True))
    return joined(parts)


def shortened(text: str) -> str:
    """A long text without its middle.

    Example:
        >>> shortened("a" * 2000).replace("a" * 500, "A")
        'A...[700 characters omitted] ...A'
    """
    if len(text) <= FIRST + LAST:
        return text
    return f"{text[:FIRST]}... [{len(text) - FIRST - LAST} characters omitted] ...{text[-LAST:]}"


def _row(row: AnsweredRow) -> Html:
    said = [
        part
        for who, answer in row.answers.items()
        for part in (element("dt", who), element("dd", element("bdi", shortened(answer) or "(nothing)")))
    ]
    number = element("p", f"Row {row.number:,}", class_="quiet")
    return element("div", number, element("pre", shortened(row.prompt)), element("dl", *said), class_="row")
