"""What the models of a comparison are called, in the order of the story, and the kinds of answers."""

from typing import Literal

AnswerKind = Literal["choices", "exact", "free"]
"""The likeliest of the choices; what is written, compared as a whole; the same, compared token by token."""

BASE = "base"
PATCHED = "base + patch"
EVOLVED = "evolved"
PORTED = "evolved + ported"
MERGED = "evolved + ported, merged"
RETRAINED = "evolved + retrained"
ORDER = (BASE, PATCHED, EVOLVED, PORTED, MERGED, RETRAINED)

FIRST_PORT = (PORTED, MERGED)
"""The one that the verdict is on, as an adapter and in weights."""


def rival(method: str) -> str:
    """What another port of the same patch is called, which is set beside the first one.

    Example:
        >>> rival("align"), is_rival(rival("align")), is_rival(PORTED)
        ('evolved + ported by align', True, False)
    """
    return f"{PORTED} by {method}"


def is_rival(name: str) -> bool:
    """Whether a model is evolved with another port than the first one."""
    return name.startswith(rival(""))


def is_port(name: str) -> bool:
    """Whether a model carries the old patch to the evolved one; its negative flips can be read as text."""
    return name in FIRST_PORT or is_rival(name)


def place(name: str) -> int:
    """Where a model stands in the order of the story; rivals where the ported patch does, so behind it when sorted."""
    return ORDER.index(PORTED if is_rival(name) else name)
