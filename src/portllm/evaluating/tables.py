"""What `evaluate` found as a table and notes, for the terminal and the page alike. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from portllm.evaluating.metrics import Estimate, Retention, mean_words
from portllm.evaluating.names import PATCHED, RETRAINED, is_port
from portllm.show.numbers import counted, percent, points

if TYPE_CHECKING:
    from portllm.evaluating.compare import Comparison, ComparisonRow

JUDGED = {"labels": "the likeliest label", "text": "the generated text"}

MOVED = 0.1
"""Share of the rows by which an answer has to become commoner before it is said."""


def comparison_rows(comparison: "Comparison") -> list[tuple[str, ...]]:
    """A line for each model; the first names the columns. Retention has some where a retrained patch was given."""
    header = ("", "score", "95 % interval", "change", "95 % interval", "negative flips", "loss", "95 % interval")
    retention = ("retention: score", "retention: loss") if comparison.row(RETRAINED) else ()
    return [(*header, *retention), *(_row(row, retained=bool(retention)) for row in comparison.rows)]


def comparison_notes(comparison: "Comparison") -> list[str]:
    """What the columns mean, and what is special about these rows."""
    notes = [
        f"{counted(comparison.n_rows, 'row')}, judged by {JUDGED.get(comparison.kind, comparison.kind)}; loss in nats "
        "per token of the correct answer; change in points, against base + patch; negative flips: correct with "
        "base + patch, wrong now.",
    ]
    if comparison.row(RETRAINED):
        notes.append("retention: a ported patch's gain over the evolved model as a fraction of retraining's gain.")
    notes += [*_answered_alike(comparison), *_words(comparison)]
    notes += [
        f"{metric} of {comparison.kind}: "
        + ", ".join(f"{row.name} {row.scores.metrics[metric]:.4f}" for row in comparison.rows)
        for metric in comparison.rows[0].scores.metrics
    ]
    if comparison.n_cut_rows:
        notes.append(f"{counted(comparison.n_cut_rows, 'prompt')} longer than --max-tokens: truncated from the left.")
    reasons = {
        kept.reason
        for row in comparison.rows
        for kept in (row.score_retention, row.loss_retention)
        if kept is not None and kept.reason and comparison.row(RETRAINED)
    }
    return [*notes, *_moved(comparison), *(f"n/a: {reason}." for reason in sorted(reasons))]


def _answered_alike(comparison: "Comparison") -> Iterator[str]:
    """How many rows each model answers as base + patch did, right or wrong."""
    shares = [
        f"{row.name} {percent(row.agreement.value)} ({score_interval(row.agreement)})"
        for row in comparison.rows
        if row.agreement is not None
    ]
    if shares:
        yield f"same answer as {PATCHED}, right or wrong: {', '.join(shares)}."


def _words(comparison: "Comparison") -> Iterator[str]:
    """How long the texts are that each model writes."""
    if comparison.kind == "text":
        said = [("correct", comparison.right_answers), *((row.name, row.scores.answers) for row in comparison.rows)]
        yield f"words per answer: {', '.join(f'{name} {mean_words(answers):.1f}' for name, answers in said)}."


def _moved(comparison: "Comparison") -> Iterator[str]:
    """What a port answers far more often than base + patch did."""
    patched = comparison.row(PATCHED)
    if comparison.kind != "labels" or patched is None:
        return
    before = Counter(patched.scores.answers)
    for row in comparison.rows:
        more = Counter(row.scores.answers)
        more.subtract(before)
        ((answer, count),) = more.most_common(1)
        if is_port(row.name) and count >= MOVED * comparison.n_rows:
            times = (before[answer], before[answer] + count)
            then, now = (percent(number / comparison.n_rows, digits=0) for number in times)
            yield (
                f"{row.name} answers '{answer}' in {now} of the rows, {PATCHED} in {then}: the update shifted the "
                "balance between the answers. The patch may still discriminate between the rows; check whether "
                "its loss held."
            )


def score_interval(estimate: Estimate) -> str:
    """The interval of a share, in percent; empty where one row cannot tell."""
    return _interval(estimate, lambda value: f"{100 * value:.1f}")


def score_change_interval(change: Estimate) -> str:
    """The interval of a change of the score, in points; likewise."""
    return _interval(change, points)


def loss_interval(estimate: Estimate) -> str:
    """The interval of a loss; likewise."""
    return _interval(estimate, lambda value: f"{value:.3f}")


def retention_text(kept: Retention | None) -> str:
    """A retention with its interval; `n/a` where it is no number, empty where it is not asked for.

    Example:
        >>> retention_text(Retention(0.948, 0.89, 1.01)), retention_text(Retention(None, None, None, "why"))
        ('94.8 % (89 to 101)', 'n/a')
    """
    if kept is None:
        return ""
    if kept.value is None or kept.low is None or kept.high is None:
        return "n/a"
    return f"{percent(kept.value)} ({100 * kept.low:.0f} to {100 * kept.high:.0f})"


def flips_text(row: "ComparisonRow") -> str:
    """How many rows a model turned wrong; empty where there is nothing to compare with."""
    return "" if row.flips is None else f"{len(row.flips.negative)} of {row.flips.n_rows}"


def _row(row: "ComparisonRow", *, retained: bool) -> tuple[str, ...]:
    change = row.score_change
    kept = (retention_text(row.score_retention), retention_text(row.loss_retention)) if retained else ()
    return (
        row.name,
        percent(row.score.value),
        score_interval(row.score),
        "" if change is None else points(change.value),
        "" if change is None else score_change_interval(change),
        flips_text(row),
        f"{row.loss.value:.3f}",
        loss_interval(row.loss),
        *kept,
    )


def _interval(estimate: Estimate, text: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{text(estimate.low)} to {text(estimate.high)}"
