"""A name that was mistyped: what lies beside it under one that is nearly the same."""

import os
from pathlib import Path

CUTOFF = 0.75
"""How alike two names have to be, as `difflib` counts it."""

MOST_NAMES = 10_000


def did_you_mean(path: str | Path) -> str:
    """A sentence for the end of a message that a path leads nowhere; empty where nothing beside it is nearly named so.

    Example:
        >>> did_you_mean("/etc/hostnamme") in ("", " Did you mean '/etc/hostname'?")
        True
    """
    from difflib import get_close_matches  # of no use to a name that leads somewhere

    folder, name = os.path.split(os.path.normpath(path))
    try:
        with os.scandir(folder or ".") as entries:
            there = [entry.name for _, entry in zip(range(MOST_NAMES), entries, strict=False)]
    except (OSError, ValueError):
        return ""
    by_small = {one.lower(): one for one in sorted(there) if one.isprintable()}
    found = get_close_matches(name.lower(), by_small, n=1, cutoff=CUTOFF)
    return f" Did you mean '{os.path.join(folder, by_small[found[0]])}'?" if found else ""
