"""What running a model brought, as text for people; apart from `render`, which needs no torch."""

from portllm.evaluating.compare import Comparison
from portllm.evaluating.tables import comparison_notes, comparison_rows
from portllm.show.headline import Headline, headline_lines
from portllm.show.table import columns


def render_comparison(comparison: Comparison, headline: Headline, *, width: int | None = None) -> str:
    """What `evaluate` prints: the sentence to act on, what to do next, a line for each model, then what it means."""
    rows = columns(comparison_rows(comparison), width=width)
    return "\n".join([*headline_lines(headline), "", *rows, "", *comparison_notes(comparison)])
