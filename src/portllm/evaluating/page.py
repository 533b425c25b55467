"""The page of `evaluate`: models side by side, what is retained, and the rows that turned wrong to be read. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from portllm.evaluating.decision import decide, points_text, within, worst_port
from portllm.evaluating.labels.page import confusion_section, label_section
from portllm.evaluating.metrics import Estimate
from portllm.evaluating.names import MERGED, PATCHED, PORTED, RETRAINED, is_port
from portllm.evaluating.tables import (
    change_interval,
    change_text,
    comparison_notes,
    comparison_rows,
    flips_text,
    loss_text,
    retention_text,
    score_text,
)
from portllm.show.headline import Headline, Tone
from portllm.show.html.answered_rows import AnsweredRow, answered_rows
from portllm.show.html.bars import Row, bars, dots
from portllm.show.html.figure import facts, figure, figures, folded, side_by_side, table
from portllm.show.html.markup import Html, joined
from portllm.show.html.page import Tile, bullets, document, fragment, paragraph, section
from portllm.show.numbers import percent, points

if TYPE_CHECKING:
    from portllm.evaluating.compare import Comparison, ComparisonRow
    from portllm.evaluating.metrics import Flips

NUMBERS = "Scores, losses, flips and retention"

SERIES: Mapping[str, int] = {PATCHED: 1, PORTED: 2, MERGED: 4, RETRAINED: 3}
"""Colors of the models; rivals have that of the ported patch, those without a patch that of the background, 5."""

RETENTION_MARKS = {0.0: "the evolved model", 1.0: "retrained"}
"""What no and full retention are."""

NOTES: Mapping[str, str] = {
    "base + patch": "The model before the update. Everything is measured against it, on the same rows.",
    "evolved + ported": "The updated model with the ported patch; merged: the same, in one set of weights; by "
    "a method: another port of the same patch, which is compared and not judged.",
    "interval": "Between which values the number may lie for other inputs, with 95 % confidence, if these rows were "
    "drawn from them at random. Of the change: Bonett and Price, for paired answers; of the accuracy: Wilson.",
    "turned wrong": "Rows that base + patch answers correctly and the ported patch does not, also called negative "
    "flips. Training the patch again turns some as well: the retrained patch is the yardstick.",
    "retention": "(ported - evolved) / (retrained - evolved): the ported patch's gain over the updated model, as a "
    "share of what training it again gains.",
    "loss": "Nats per token of the correct answer; lower is better.",
}
"""What the words and numbers of the page mean: whoever is sent it has no other page."""


def evaluate_page(
    comparison: "Comparison",
    headline: Headline,
    *,
    title: str,
    about: Mapping[str, str],
    max_loss: float | None = None,
) -> str:
    """The page of one comparison.

    Args:
        comparison: What `evaluate` found.
        headline: What follows from it, as from `decide`.
        title: What was compared, such as the names of patch and models.
        about: What was compared, by name: models, patches, data, the limit, the day.
        max_loss: The share of answers that may be lost.
    """
    ports = _ports(comparison)
    parts = [
        side_by_side(joined([*_changes(ports, max_loss), _scores(comparison)]), *_labels(comparison)),
        *_confused(comparison),
        *_turned(comparison, [row for row in ports if row.flips is not None]),
        section("Loss and retention", figures(*_retention(ports), _losses(comparison))),
        folded("All numbers", table(comparison_rows(comparison), label=NUMBERS), bullets(comparison_notes(comparison))),
        folded("What the words mean", facts(NOTES)),
    ]
    tiles = _tiles(comparison, max_loss)
    return document(title, headline, parts, about=about, tiles=tiles)


def notebook(comparison: "Comparison") -> str:
    """What a notebook shows: a line for each model."""
    rows = table(comparison_rows(comparison), label=NUMBERS)
    return fragment(decide(comparison), rows, bullets(comparison_notes(comparison)))


def _ports(comparison: "Comparison") -> "list[ComparisonRow]":
    return [row for row in comparison.rows if is_port(row.name)]


def _tiles(comparison: "Comparison", max_loss: float | None) -> list[Tile]:
    """The change, where accuracy stands, what turned wrong, what was kept: of the port that may have lost more."""
    row, before = worst_port(comparison), comparison.row(PATCHED)
    if row is None or before is None or row.score_change is None or row.flips is None:
        return []
    change, wrong = row.score_change, len(row.flips.negative)
    tiles = [
        Tile("Change in accuracy", f"{points(change.value)} points", _between(change), *_passed(comparison, max_loss)),
        Tile("Accuracy now", percent(row.score.value), f"{percent(before.score.value)} before the update"),
        Tile("Turned wrong", f"{wrong:,} of {row.flips.n_rows:,}", _yardstick(comparison, row.flips)),
    ]
    kept = row.score_retention
    if kept is not None and kept.value is not None and kept.low is not None and kept.high is not None:
        interval = f"in accuracy; 95 % interval {100 * kept.low:.0f} to {100 * kept.high:.0f}"
        tiles.append(Tile("Kept of retraining's gain", percent(kept.value), interval))
    return tiles


def _passed(comparison: "Comparison", max_loss: float | None) -> tuple[Tone, str]:
    met = within(comparison, max_loss)
    if met is None or max_loss is None:
        return "plain", ""
    row = worst_port(comparison)
    lost = row is not None and row.score_change is not None and -row.score_change.value > max_loss
    limit = f"limit: {points_text(max_loss)}"
    return ("good", f"pass, {limit}") if met else ("bad" if lost else "doubt", f"{'fail' if lost else 'open'}, {limit}")


def _yardstick(comparison: "Comparison", flips: "Flips") -> str:
    """What a retrained patch turns wrong; without one, what turned right."""
    retrained = comparison.row(RETRAINED)
    if retrained is None or retrained.flips is None:
        return f"{len(flips.positive):,} turned right"
    return f"{len(flips.positive):,} turned right; a retrained patch turns {len(retrained.flips.negative):,} wrong"


def _between(change: Estimate) -> str:
    return f"95 % interval {change_interval(change)}" if change.low is not None else "one row gives no interval"


def _changes(ports: "list[ComparisonRow]", max_loss: float | None) -> list[Html]:
    """What the update cost, around zero."""
    found = [(row.name, row.score_change) for row in ports if row.score_change is not None]
    if not found:
        return []
    rows = [
        Row(name, change.value, f"{points(change.value)} points", change.low, change.high, _series(name))
        for name, change in found
    ]
    title = "What the update cost"
    explained = "Change in accuracy against before the update, over the same rows; the line is its 95 % interval."
    axis = {0.0: "no change"} if max_loss is None else {-max_loss: "your limit", 0.0: "no change"}
    refused = None if max_loss is None else (-math.inf, -max_loss)
    picture = dots(rows, title=title, told=_told(rows), axis=axis, unit="points", refused=refused)
    numbers = [("", "change in points"), *((name, change_text(change)) for name, change in found)]
    return [figure(title, explained, picture, numbers)]


def _labels(comparison: "Comparison") -> list[Html]:
    """What became of each label, for the port that may have lost more."""
    row, before = worst_port(comparison), comparison.row(PATCHED)
    if comparison.kind != "labels" or row is None or before is None:
        return []
    return [label_section(comparison.right_answers, before.scores.answers, row.scores.answers, of=row.name)]


def _confused(comparison: "Comparison") -> list[Html]:
    """Which labels are confused: a square that may need the whole width."""
    row, before = worst_port(comparison), comparison.row(PATCHED)
    if comparison.kind != "labels" or row is None or before is None:
        return []
    answered = (comparison.right_answers, before.scores.answers, row.scores.answers)
    return list(confusion_section(comparison.labels, *answered, of=row.name))


def _scores(comparison: "Comparison") -> Html:
    rows = [_bar(row.name, row.score, percent(row.score.value)) for row in comparison.rows]
    title, explained = "Accuracy", "Share of correct answers; the line is its 95 % interval."
    picture = bars(rows, title=title, told=_told(rows), unit="%", held=(0.0, 1.0))
    numbers = [("", "score"), *((row.name, score_text(row.score)) for row in comparison.rows)]
    return figure(title, explained, picture, numbers)


def _losses(comparison: "Comparison") -> Html:
    rows = [_bar(row.name, row.loss, f"{row.loss.value:.3f}") for row in comparison.rows]
    title = "Loss"
    explained = "Nats per token of the correct answer, lower is better; the line is its 95 % interval."
    picture = bars(rows, title=title, told=_told(rows), unit="")
    numbers = [("", "loss"), *((row.name, loss_text(row.loss)) for row in comparison.rows)]
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


def _turned(comparison: "Comparison", ports: "list[ComparisonRow]") -> Iterator[Html]:
    """Every row that a port turned wrong, once, with what each of them says."""
    if not ports:
        return
    before = comparison.row(PATCHED)
    wrong = sorted({index for row in ports if row.flips for index in row.flips.negative})
    rows = [
        AnsweredRow(
            index + 1,
            comparison.examples[index].prompt,
            {"right": comparison.examples[index].completion}
            | {row.name: row.scores.answers[index] for row in (*([before] if before else []), *ports)},
        )
        for index in wrong
    ]
    counts = "; ".join(f"{row.name}: {flips_text(row)}" for row in ports)
    said = f"Rows that {PATCHED} answers correctly and a port does not, counted from 1. {counts}."
    yield section("Answers that turned wrong", paragraph(said, quiet=True), answered_rows(rows))


def _bar(name: str, estimate: Estimate, text: str) -> Row:
    return Row(name, estimate.value, text, estimate.low, estimate.high, _series(name))


def _series(name: str) -> int:
    return SERIES.get(name, SERIES[PORTED] if is_port(name) else 5)


def _told(rows: list[Row]) -> str:
    return "; ".join(f"{row.name}: {row.text}" for row in rows)
