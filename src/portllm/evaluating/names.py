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

PORTS = (PORTED, MERGED)
"""Those that carry the old patch; their negative flips can be read as text."""
