"""The frame that every page has: the verdict first, then sections; one style, no program, nothing to fetch. Pure."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from portllm import __version__
from portllm.show.headline import Headline, Tone
from portllm.show.html.markup import Html, element, joined
from portllm.show.numbers import unbroken

SIGNS: dict[Tone, str] = {"good": "✓ ", "doubt": "? ", "bad": "✗ ", "plain": ""}
"""What says the same as the color."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number that decides, in large letters.

    Attributes:
        name: What it is.
        value: The number.
        detail: What it is measured against, or its interval.
        tone: Whether it passes; plain where nothing is asked of it.
        verdict: The same in words, such as `within your limit`.
    """

    name: str
    value: str
    detail: str = ""
    tone: Tone = "plain"
    verdict: str = ""


def document(
    title: str,
    headline: Headline,
    parts: Iterable[str],
    *,
    about: Mapping[str, str] | None = None,
    tiles: Sequence[Tile] = (),
) -> str:
    """The whole page.

    A policy in its head forbids a browser to fetch or to run anything, whatever should stand in the page.

    Args:
        title: What it is about.
        headline: What it says first.
        parts: Sections, in order.
        about: What was compared, by name: models, patches, data, limits, the day.
        tiles: The numbers that decide.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=f"portllm {__version__}"),
        element("link", rel="icon", href="data:,"),  # or a browser asks a server for one
        element("title", f"{headline.text} | {title}"),
        element("style", Html(style)),
    )
    foot = element("footer", f"Written by portllm {__version__}.", class_="quiet")
    top = element("header", element("h1", title), *([_about(about)] if about else []))
    body = element("body", top, banner(headline), *_tiles(tiles), element("main", *parts), foot)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def fragment(headline: Headline, *parts: str) -> Html:
    """The verdict and some parts of a page, to be shown inside another one, such as a notebook."""
    return element("div", banner(headline), *parts)


def banner(headline: Headline, *, heading: str = "p") -> Html:
    """A headline in its box.

    Args:
        headline: What to say.
        heading: The element of its first line; `h2` where it begins a section.
    """
    text = headline.text[:1].upper() + headline.text[1:]
    first = element(heading, element("span", SIGNS[headline.tone], class_="tone"), unbroken(text))
    parts = [first, bullets(map(unbroken, headline.reasons))]
    if headline.next:
        command = [": ", element("code", headline.command)] if headline.command else ["."]
        parts.append(element("p", f"Next: {headline.next}", *command, class_="next"))
    return element("div", *parts, class_=f"verdict {headline.tone}")


def section(title: str, *parts: str, level: int = 2) -> Html:
    """A heading and what belongs to it."""
    return element("section", element(f"h{level}", title), *parts)


def paragraph(text: str, *, quiet: bool = False) -> Html:
    """A paragraph; a quiet one explains."""
    return element("p", text, class_="quiet") if quiet else element("p", text)


def bullets(texts: Iterable[str]) -> Html:
    """A list, or nothing where there is nothing to list."""
    found = [element("li", text) for text in texts]
    return element("ul", *found) if found else joined(())


def _about(rows: Mapping[str, str]) -> Html:
    named = (element("div", element("dt", name), element("dd", text)) for name, text in rows.items())
    return element("dl", *named, class_="about")


def _tiles(tiles: Sequence[Tile]) -> list[Html]:
    return [element("div", *map(_tile, tiles), class_="tiles")] if tiles else []


def _tile(tile: Tile) -> Html:
    parts = [element("p", tile.name, class_="name"), element("p", unbroken(tile.value), class_="value")]
    if tile.verdict:
        sign = element("span", SIGNS[tile.tone], class_="tone")
        parts.append(element("p", sign, tile.verdict, class_="said"))
    if tile.detail:
        parts.append(element("p", unbroken(tile.detail), class_="quiet"))
    return element("div", *parts, class_=f"tile {tile.tone}")


@cache
def _style() -> str:
    return resources.files("portllm.show.html").joinpath("style.css").read_text(encoding="utf-8")
