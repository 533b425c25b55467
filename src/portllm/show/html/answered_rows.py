"""Rows that two models answer otherwise, to be read: what was asked, and what each of them says. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portllm.show.html.markup import Html, element, joined
from portllm.show.html.page import paragraph

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
    """The first rows, and how many more there are."""
    parts = [_row(row) for row in rows[:SHOWN]]
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
    answers = (
        element("p", element("span", f"{who}: ", class_="quiet"), element("bdi", shortened(answer) or "(nothing)"))
        for who, answer in row.answers.items()
    )
    return element("div", paragraph(f"Row {row.number}", quiet=True), element("pre", shortened(row.prompt)), *answers,
                   class_="row")  # fmt: skip
