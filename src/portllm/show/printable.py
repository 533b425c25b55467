"""Text of strangers made harmless to look at: what cannot be printed is written as an escape. Pure.

Names of models, modules and tokens come from files of strangers. A terminal obeys control characters in them, and a
browser what turns the direction of writing: they could clear a verdict and write another one. Half of a surrogate pair
can be sent to neither.
"""

SPACES = "\n\t\u00a0\u202f"
"""Ends of lines, tabs, and spaces at which no line ends."""

JOINERS = "\u200c\u200d"
"""Signs without a width that decide how their neighbors are written, in Persian, Hindi and emoji."""


def is_utf8(text: str) -> bool:
    r"""Whether a text can be written to a file: the name of one may hold bytes that stand for no character.

    Example:
        >>> is_utf8("modèle"), is_utf8("mod\udce8le")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    r"""A text that a file may have had a hand in, on one line, with every character that cannot be printed escaped.

    Example:
        >>> print(one_line("q_proj\x1b[2J\nverified"))
        q_proj\x1b[2J\nverified
    """
    return _escaped(text, keep="")


def readable(text: str) -> str:
    r"""A text to be read as it is, with its lines, spaces and joined signs; every other such character is escaped.

    Example:
        >>> print(readable("first\nsecond\x1b[2J"))
        first
        second\x1b[2J
    """
    return _escaped(text, keep=SPACES + JOINERS)


def _escaped(text: str, *, keep: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode() for sign in text
    )
