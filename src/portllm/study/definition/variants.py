"""The models that a study compares: their keys in its results, and what they are called."""

BASE, PATCHED, EVOLVED, PORTED, RETRAINED = "base", "patched", "evolved", "ported", "retrained"
AGAIN = "again"
"""Retrained with other seeds, where a study asks for that."""

VARIANTS = (BASE, PATCHED, EVOLVED, PORTED, RETRAINED)
"""In the order in which they are shown."""

HEADS = {
    BASE: "base",
    PATCHED: "base + patch",
    EVOLVED: "evolved",
    PORTED: "evolved + ported",
    RETRAINED: "evolved + retrained",
    AGAIN: "retrained again",
}
