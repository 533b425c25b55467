"""The frame that every page has: the verdict first, then sections; one style, no program, nothing to fetch. Pure."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources

from portllm import __version__
from portllm.show.headline import Headline, Tone
from portllm.show.html.markup import Html, element, joined
from portllm.show.numbers import unbroken

SIGNS: dict[Tone, str] = {"good": "✓ ", "doubt": "? ", "bad": "✗ ", "plain": ""}
"""What says the same as the color."""


def document(title: str, headline: Headline, parts: Iterable[str]) -> str:
    """The whole page.

    A policy in its head forbids a browser to fetch or to run anything, whatever should stand in the page.

    Args:
        title: What it is about.
        headline: What it says first.
        parts: Sections, in order.
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
    foot = element(
        "footer", f"Written by portllm {__version__}. docs/reports.md explains each picture.", class_="quiet"
    )
    body = element("body", element("h1", title), banner(headline), element("main", *parts), foot)
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
    first = element(heading, element("span", SIGNS[headline.tone], class_="tone"), unbroken(headline.text))
    parts = [first, bullets(map(unbroken, headline.reasons))]
    if headline.next:
        command = [": ", element("code", headline.command)] if headline.command else ["."]
        parts.append(element("p", f"Next: {headline.next}", *command, class_="next"))
    return element("div", *parts, class_=f"verdict {headline.tone}")


def about(rows: Mapping[str, str]) -> Html:
    """What a page is about, in a line where there is room: models, patches, data, limits."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", text)) for name, text in rows.items()), class_="about"
    )


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


@cache
def _style() -> str:
    return resources.files("portllm.show.html").joinpath("style.css").read_text(encoding="utf-8")
