"""Where a key stands in a TOML file, and which one was meant: for messages about what people wrote."""

import difflib
import re
from collections.abc import Iterable, Sequence

_TABLE = re.compile(r"\s*\[\s*([\w.\"' -]+?)\s*\]")
_KEY = re.compile(r"\s*([\w.\"'-]+)\s*=")


def line_of(text: str, keys: Sequence[str]) -> int | None:
    """The line, counted from 1, on which a key of a TOML file stands, or its table where the key has no line.

    Example:
        >>> line_of(chr(10).join(["a = 1", "", "[merge]", "dtype = 'F32'"]), ["merge", "dtype"])
        4
    """
    table: tuple[str, ...] = ()
    found = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _parts(header[1])
            here = table
        elif key := _KEY.match(line):
            here = (*table, *_parts(key[1]))
        else:
            continue
        if here == tuple(keys):
            return number
        if here and here == tuple(keys)[: len(here)]:
            found = number
    return found


def meant(key: str, known: Iterable[str]) -> str:
    """The known name that an unknown one is nearest to, or all of them.

    Example:
        >>> meant("metod", ["method", "base"]), meant("x", ["method", "base"])
        ('Did you mean method?', 'Known keys: method, base.')
    """
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(names)}."


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
