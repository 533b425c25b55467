"""Tables and amounts for a terminal."""

from collections.abc import Iterable, Mapping, Sequence

from portllm.progress import Unit
from portllm.show.printable import one_line


def amount(value: int, unit: Unit) -> str:
    """A count with its unit.

    Example:
        >>> amount(269_000_000, "bytes"), amount(40, "steps")
        ('269.0 MB', '40 steps')
    """
    return n_bytes(value) if unit == "bytes" else f"{value:,} {unit}"


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


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, each column as wide as its widest cell.

    Example:
        >>> columns([("patch", "drift"), ("a", "1 %")])
        ['  patch  drift', '  a      1 %']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
