"""What running a model brought, as text for people; apart from `render`, which needs no torch."""

from portllm.evaluating.compare import Comparison
from portllm.evaluating.tables import comparison_notes, comparison_rows


def render_comparison(comparison: Comparison) -> str:
    """What `evaluate` prints: a line for each model, then what it means."""
    rows = comparison_rows(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *comparison_notes(comparison)])
