"""Elements of HTML and SVG, of which everything is text that has not been made here: no file can write markup. Pure."""

from collections.abc import Iterable
from html import escape

from portllm.show.printable import readable

VOID = ("meta", "link", "wbr")
"""Elements that hold nothing and have no end tag."""


class Html(str):
    """Markup; a text that is not of this class is escaped wherever it is put into an element."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float) -> Html:
    """One element.

    Args:
        name: Of the element.
        *children: What stands in it, in order: markup as it is, any other text escaped.
        **attributes: Values are text, and escaped; a number has at most two decimals. In a name, `_` at the end is left
            out and any other is a hyphen.

    Example:
        >>> print(element("p", "a < b ", element("b", "c"), class_="note"))
        <p class="note">a &lt; b <b>c</b></p>
    """
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    start = f"<{name}{told}>"
    return Html(start) if name in VOID else Html(f"{start}{joined(children)}</{name}>")


def joined(parts: Iterable[str], *, by: str = "") -> Html:
    """Parts one after the other, with a text between them.

    Example:
        >>> print(joined(["1 < 2", element("b", "x")], by=", "))
        1 &lt; 2, <b>x</b>
    """
    return Html(_text(by).join(map(_text, parts)))


def _text(part: str) -> str:
    return part if isinstance(part, Html) else escape(readable(part))


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(readable(value))
    return f"{value:.2f}".rstrip("0").rstrip(".")
