"""The page of `evaluate`: models side by side, what is retained, and the rows that turned wrong to be read. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from portllm.evaluating.decision import decide, interval_text
from portllm.evaluating.metrics import Estimate
from portllm.evaluating.names import MERGED, PATCHED, PORTED, PORTS, RETRAINED
from portllm.evaluating.tables import (
    comparison_notes,
    comparison_rows,
    flips_text,
    loss_interval,
    retention_text,
    score_interval,
)
from portllm.show.headline import Headline
from portllm.show.html.answered_rows import AnsweredRow, answered_rows
from portllm.show.html.bars import Row, bars, dots
from portllm.show.html.figure import figure, figures, table
from portllm.show.html.markup import Html
from portllm.show.html.page import about, bullets, document, fragment, paragraph, section
from portllm.show.numbers import percent, points

if TYPE_CHECKING:
    from portllm.evaluating.compare import Comparison, ComparisonRow

NUMBERS = "Scores, losses, flips and retention"

SERIES: Mapping[str, int] = {PATCHED: 1, PORTED: 2, MERGED: 4, RETRAINED: 3}
"""Colors of the models; those without a patch have that of the background, 5."""

RETENTION_MARKS = {0.0: "the evolved model", 1.0: "retrained"}
"""What no and full retention are."""


def evaluate_page(comparison: "Comparison", headline: Headline, *, title: str, compared: Mapping[str, str]) -> str:
    """The page of one comparison.

    Args:
        comparison: What `evaluate` found.
        headline: What follows from it, as from `decide`.
        title: What was compared, such as the names of patch and models.
        compared: What was compared, by name: models, patches, data, the limit.
    """
    ports = _ports(comparison)
    parts = [
        about(compared),
        figures(*_changes(ports), _scores(comparison), _losses(comparison), *_retention(ports)),
        section(
            "In numbers",
            table(comparison_rows(comparison), label=NUMBERS),
            bullets(comparison_notes(comparison)),
        ),
        *(_turned(comparison, row) for row in ports if row.flips is not None),
    ]
    return document(f"portllm evaluate: {title}", headline, parts)


def notebook(comparison: "Comparison") -> str:
    """What a notebook shows: a line for each model."""
    rows = table(comparison_rows(comparison), label=NUMBERS)
    return fragment(decide(comparison), rows, bullets(comparison_notes(comparison)))


def _ports(comparison: "Comparison") -> "list[ComparisonRow]":
    return [row for row in comparison.rows if row.name in PORTS]


def _changes(ports: "list[ComparisonRow]") -> list[Html]:
    """What the update cost, around zero."""
    found = [(row.name, row.score_change) for row in ports if row.score_change is not None]
    if not found:
        return []
    rows = [
        Row(name, change.value, f"{points(change.value)} points", change.low, change.high, SERIES[name])
        for name, change in found
    ]
    title = "Change of the score"
    explained = "Against base + patch, over the same rows; the line is its 95 % interval."
    picture = dots(rows, title=title, told=_told(rows), axis={0.0: "no change"}, unit="%")
    numbers = [("", "change in points", "95 % interval")]
    numbers += [(name, points(change.value), interval_text(change)) for name, change in found]
    return [figure(title, explained, picture, numbers)]


def _scores(comparison: "Comparison") -> Html:
    rows = [_bar(row.name, row.score, percent(row.score.value)) for row in comparison.rows]
    title, explained = "Score", "Accuracy; the line is its 95 % interval."
    picture = bars(rows, title=title, told=_told(rows), unit="%", held=(0.0, 1.0))
    numbers = [
        ("", "score", "95 % interval"),
        *((r.name, percent(r.score.value), score_interval(r.score)) for r in comparison.rows),
    ]
    return figure(title, explained, picture, numbers)


def _losses(comparison: "Comparison") -> Html:
    rows = [_bar(row.name, row.loss, f"{row.loss.value:.3f}") for row in comparison.rows]
    title = "Loss"
    explained = "Nats per token of the correct answer, lower is better; the line is its 95 % interval."
    picture = bars(rows, title=title, told=_told(rows), unit="")
    numbers = [
        ("", "loss", "95 % interval"),
        *((r.name, f"{r.loss.value:.3f}", loss_interval(r.loss)) for r in comparison.rows),
    ]
    return figure(title, explained, picture, numbers)


def _retention(ports: "list[ComparisonRow]") -> list[Html]:
    found = [
        (f"{row.name}, in {what}", kept, series)
        for row in ports
        for what, kept, series in (("score", row.score_retention, 1), ("loss", row.loss_retention, 2))
        if kept is not None and kept.value is not None
    ]
    if not found:
        return []
    rows = [Row(name, kept.value, retention_text(kept), kept.low, kept.high, series) for name, kept, series in found]
    title = "Retention"
    explained = (
        "The ported patch's gain over the evolved model as a fraction of retraining's gain; the line is its 95 % "
        "interval."
    )
    picture = dots(rows, title=title, told=_told(rows), axis=RETENTION_MARKS, unit="%")
    return [
        figure(
            title, explained, picture, [("", "retention"), *((name, retention_text(kept)) for name, kept, _ in found)]
        )
    ]


def _turned(comparison: "Comparison", row: "ComparisonRow") -> Html:
    turned = [
        AnsweredRow(found.row, found.prompt, {"right": found.right, PATCHED: found.before, row.name: found.after})
        for found in comparison.turned_wrong(row.name)
    ]
    said = f"{flips_text(row)} rows: correct with {PATCHED}, wrong with {row.name}. Rows are counted from 1."
    return section(f"Negative flips: {row.name}", paragraph(said, quiet=True), answered_rows(turned))


def _bar(name: str, estimate: Estimate, text: str) -> Row:
    return Row(name, estimate.value, text, estimate.low, estimate.high, SERIES.get(name, 5))


def _told(rows: list[Row]) -> str:
    return "; ".join(f"{row.name}: {row.text}" for row in rows)
