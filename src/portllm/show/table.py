"""Tables and amounts for a terminal."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from portllm.progress import Unit
from portllm.show.numbers import unbroken
from portllm.show.printable import one_line

LEAD = re.compile(r"\s*(?:[|` ]*[|`]- |- |note: |warning: |\S.{0,28}?\s{2,}(?=\S))?")
"""What stands before the text of a line: a mark, a branch of a tree, or the name of a fact and the room after it."""


def amount(value: int, unit: Unit) -> str:
    """A count with its unit.

    Example:
        >>> amount(269_000_000, "bytes"), amount(40, "steps")
        ('269.0 MB', '40 steps')
    """
    return n_bytes(value) if unit == "bytes" else f"{value:,} {unit}"


def done_of(done: int, total: int, unit: Unit) -> str:
    """How far a piece of work is.

    Example:
        >>> done_of(14, 30, "steps"), done_of(19_600_000, 269_000_000, "bytes")
        ('14 of 30 steps', '19.6 MB of 269.0 MB')
    """
    return f"{n_bytes(done) if unit == 'bytes' else f'{done:,}'} of {amount(total, unit)}"


def n_bytes(value: int) -> str:
    """A size in decimal units, as disks and networks are sold.

    Example:
        >>> n_bytes(999), n_bytes(19_600_000)
        ('999 B', '19.6 MB')
    """
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def table(rows: Mapping[str, str]) -> list[str]:
    """Names and texts in two columns."""
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {one_line(text)}" for name, text in rows.items()]


def items(kind: str, found: Iterable[object]) -> list[str]:
    """One line for each, such as a note or a refusal."""
    return [f"  {kind}: {one_line(str(item))}" for item in found]


def columns(rows: Sequence[Sequence[str]], *, width: int | None = None) -> list[str]:
    """Rows of equal length as lines, each column as wide as its widest cell.

    Where that is wider than the terminal, cells are wrapped by words; where that is not enough, columns that find no
    room follow below as a table of their own, with the first column again, and without the rows that are empty there.

    Args:
        rows: The first names the columns.
        width: Columns of the terminal; None for any.

    Example:
        >>> columns([("patch", "drift"), ("a", "1 %")])
        ['  patch  drift', '  a      1 %']
        >>> columns([("patch", "why"), ("a", "it drifted far")], width=20)
        ['  patch  why', '  a      it drifted', '         far']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None and sum(widths) + 2 * len(widths) > width:
        least = [max(map(_least, column)) for column in zip(*rows, strict=True)]
        least[0] = max(least[0], min(widths[0], width // 3))
        last = len(widths)
        while last > 2 and sum(least[:last]) + 2 * last > width:
            last -= 1
        if last < len(widths):
            kept = [row[:last] for row in rows]
            below = [(row[0], *row[last:]) for row in rows if any(row[last:])]
            return [*columns(kept, width=width), "", *columns(below, width=width)]
        while sum(widths) + 2 * len(widths) > width and widths != least:
            widest = max(range(len(widths)), key=lambda at: (widths[at] > least[at], widths[at]))
            widths[widest] -= 1
    return [line for row in rows for line in _wrapped_row(row, widths)]


def _least(cell: str) -> int:
    """How narrow a cell can be: numbers with their intervals stay on a line, all else is wrapped by words."""
    return len(cell) if cell[:1] in "+-0123456789" else max(map(len, cell.split()), default=0)


def _wrapped_row(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [
        [cell] if len(cell) <= width else textwrap.wrap(cell, max(width, 1), break_on_hyphens=False) or [""]
        for cell, width in zip(row, widths, strict=True)
    ]
    return [
        "  " + "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]


def wrapped(line: str, width: int) -> list[str]:
    r"""A line by words, the rest of it under its text; a command stays whole, to be copied.

    Example:
        >>> print(*wrapped("  size   3 % of the norm of the weights", 26), sep="\n")
          size   3 % of the norm
                 of the weights
    """
    if len(line) <= width or line.lstrip().startswith("portllm "):
        return [line]
    begin = LEAD.match(line)
    indent = 0 if begin is None else begin.end()
    if indent > width // 2:
        indent = 4
    lines = textwrap.wrap(
        unbroken(line),
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace("\u00a0", " ") for part in lines]
