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
    columns: dict[str, Callable[[ComparisonRow], str]] = {
        "": lambda row: row.name,
        "score": lambda row: score_text(row.score),
        "change": lambda row: "" if row.score_change is None else change_text(row.score_change),
        "negative flips": flips_text,
        "same answer": lambda row: "" if row.agreement is None else score_text(row.agreement),
        "loss": lambda row: loss_text(row.loss),
    }
    if comparison.kind == "text":
        columns["words"] = lambda row: f"{mean_words(row.scores.answers):.1f}"
    if comparison.row(RETRAINED):
        columns["retention: score"] = lambda row: retention_text(row.score_retention)
        columns["retention: loss"] = lambda row: retention_text(row.loss_retention)
    return [tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in comparison.rows)]


def comparison_notes(comparison: "Comparison") -> list[str]:
    """What the columns mean, and what is special about these rows."""
    notes = [
        f"{counted(comparison.n_rows, 'row')}, judged by {JUDGED.get(comparison.kind, comparison.kind)}; 95 % "
        "intervals in parentheses; loss in nats per token of the correct answer; change in points, against base + "
        "patch; negative flips: correct with base + patch, wrong now; same answer: as base + patch, right or wrong.",
    ]
    if comparison.kind == "text":
        notes.append(f"words: per answer, on average; correct answers have {mean_words(comparison.right_answers):.1f}.")
    if comparison.row(RETRAINED):
        notes.append("retention: a ported patch's gain over the evolved model as a fraction of retraining's gain.")
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


def score_text(estimate: Estimate) -> str:
    """A share and its interval, in percent; one row has no interval.

    Example:
        >>> score_text(Estimate(0.787, 0.701, 0.854, 108)), score_text(Estimate(1.0, None, None, 1))
        ('78.7 % (70.1 to 85.4)', '100.0 %')
    """
    return _with_interval(percent(estimate.value), _interval(estimate, lambda value: f"{100 * value:.1f}"))


def change_text(change: Estimate) -> str:
    """A change of the score and its interval, in points; likewise."""
    return _with_interval(points(change.value), change_interval(change))


def change_interval(change: Estimate) -> str:
    """The interval of a change of the score, in points; empty where one row cannot tell."""
    return _interval(change, points)


def loss_text(estimate: Estimate) -> str:
    """A loss and its interval; likewise."""
    return _with_interval(f"{estimate.value:.3f}", _interval(estimate, lambda value: f"{value:.3f}"))


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


def _with_interval(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _interval(estimate: Estimate, text: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{text(estimate.low)} to {text(estimate.high)}"
