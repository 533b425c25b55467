"""A picture with its numbers: whoever cannot see the one has the other. Pure."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from portllm.show.html.markup import Html, element, joined
from portllm.show.numbers import unbroken

Rows = Sequence[Sequence[str]]
"""A table: the first row names the columns."""

NUMBER = re.compile(r"(?:[-+±\d.,%()\[\] ]|\be[-+]\d|\bto\b|\bof\b|n/a)*")
"""What stands in a column of numbers."""

LONG = 20
"""Rows above which the numbers of a picture may go on on another page in print."""


def figure(title: str, explained: str, picture: Html, numbers: Rows) -> Html:
    """A picture under its title, and the numbers that it is drawn from, folded away.

    Args:
        title: What it shows.
        explained: How to read it; empty where the text above says so.
        picture: Made by `drawing`.
        numbers: The same as a table.
    """
    how = [element("span", explained, class_="quiet")] if explained else []
    caption = element("figcaption", element("b", title), *how)
    drawn = element("div", caption, picture, class_="drawn")
    below = folded("The numbers", table(numbers, label=f"{title}, in numbers"))
    return element("figure", drawn, below, class_="long" if len(numbers) > LONG else "short")


def side_by_side(*found: Html) -> Html:
    """Parts of a page in two columns where there is room for them; first the picture that carries the message."""
    return element("div", *(element("div", part) for part in found), class_="lead")


def figures(*found: Html) -> Html:
    """Pictures side by side, as many as there is room for."""
    return element("div", *found, class_="figures")


def drawing(width: float, height: float, title: str, told: str, parts: Iterable[Html]) -> Html:
    """A picture of lines and shapes.

    Args:
        width: Of its own coordinates; it is as wide as its place.
        height: Likewise.
        title: Its name.
        told: In words, what is to be seen.
        parts: What is drawn.
    """
    named = (element("title", title), element("desc", told))
    return element("svg", *named, *parts, role="img", viewBox=f"0 0 {width:g} {height:g}")


def folded(summary: str, *parts: str) -> Html:
    """What is shown when it is asked for, and printed in any case."""
    return element("details", element("summary", summary), *parts)


def table(rows: Rows, *, label: str, wide: Collection[int] = ()) -> Html:
    """A table in a box of its own, in which it can be moved aside where it is wider than the screen.

    Args:
        rows: The first names the columns; of each other, the first cell names the row.
        label: What it is, for whoever cannot see it.
        wide: Columns of text that may take several lines.
    """
    head, *body = rows
    kinds = ["wide" if at in wide else "number" * _is_of_numbers([row[at] for row in body]) for at in range(len(head))]
    kinds[0] = ""
    titles = element(
        "tr", *(_cell("th", breakable(title), kind, scope="col") for title, kind in zip(head, kinds, strict=True))
    )
    lines = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(_cell("td", text, kind) for text, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in body
    )
    inner = element("table", element("thead", titles), element("tbody", *lines))
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=label)


def facts(rows: Mapping[str, str]) -> Html:
    """Names and what is known under them, as a table of two columns."""
    lines = (
        element("tr", element("th", name, scope="row"), element("td", unbroken(text))) for name, text in rows.items()
    )
    return element("table", element("tbody", *lines), class_="facts") if rows else joined(())


def breakable(name: str) -> Html:
    """A name that may go on in the next line after each of its dots, as those of modules do.

    Example:
        >>> print(breakable("mlp.up_proj"))
        mlp.<wbr>up_proj
    """
    first, *others = name.split(".")
    return joined([first, *(part for other in others for part in (".", element("wbr"), other))])


def _is_of_numbers(cells: Sequence[str]) -> bool:
    """Whether a column is one of numbers, with their units and intervals, which stand under each other at the right.

    Example:
        >>> [_is_of_numbers(cells) for cells in (["84.3 %", "", "+5.3"], ["6.7 to 7.4", "9 of 108"], ["2 days"])]
        [True, True, False]
    """
    return any(cells) and all(NUMBER.fullmatch(cell) for cell in cells)


def _cell(name: str, text: str, kind: str, **attributes: str) -> Html:
    return element(name, text, class_=kind, **attributes) if kind else element(name, text, **attributes)
