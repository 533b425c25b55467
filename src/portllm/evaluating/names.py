"""What the models of a comparison are called, in the order of the story."""

BASE = "base"
PATCHED = "base + patch"
EVOLVED = "evolved"
PORTED = "evolved + ported"
MERGED = "evolved + ported, merged"
RETRAINED = "evolved + retrained"
ORDER = (BASE, PATCHED, EVOLVED, PORTED, MERGED, RETRAINED)

PORTS = (PORTED, MERGED)
"""Those that carry the old patch; their negative flips can be read as text."""
