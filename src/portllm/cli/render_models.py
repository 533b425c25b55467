"""What running a model brought, as text for people; apart from `render`, which needs no torch."""

from collections.abc import Callable

from portllm.cli.render import percent, render_summary, table
from portllm.comparison.compare import Comparison, ComparisonRow
from portllm.comparison.metrics import Estimate, Retention
from portllm.live.train import TrainReport
from portllm.pipeline.inspect import PatchSummary


def render_training(summary: PatchSummary, report: TrainReport) -> str:
    """What `train` prints: the patch, and how training went."""
    tail = report.losses[-max(1, len(report.losses) // 10) :]
    rows = {
        "training": f"{report.n_rows} rows, {report.steps} steps on {report.device} in {report.seconds:.0f} s",
        "loss": f"{report.losses[0]:.3f} at the first step, {sum(tail) / len(tail):.3f} over the last {len(tail)}"
        " (nats per token of completion)",
    }
    if report.n_cut_rows:
        rows["cut"] = f"{report.n_cut_rows} prompts were longer than --max-tokens and lost their beginning"
    return "\n".join([render_summary(summary), *table(rows)])


def render_comparison(comparison: Comparison) -> str:
    """What `evaluate` prints: a line for each model, then what it means."""
    judged = {"labels": "the likeliest label", "text": "the written text"}.get(comparison.kind, comparison.kind)
    header = ("", "score", "95 % interval", "loss", "95 % interval", "negative flips", "retention: score", "loss")
    rows = [header, *(_comparison_row(row) for row in comparison.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{comparison.n_rows} rows, judged by {judged}; loss in nats per token of the right answer; negative flips: "
        "right with base + patch, wrong now.",
        "retention: what the ported patch gains over the evolved model, as a share of what retraining gains.",
    ]
    notes += [
        f"{metric} of {comparison.kind}: "
        + ", ".join(f"{row.name} {row.scores.metrics[metric]:.4f}" for row in comparison.rows)
        for metric in comparison.rows[0].scores.metrics
    ]
    if comparison.n_cut_rows:
        notes.append(
            f"{comparison.n_cut_rows} prompts were longer than may be, and lost their beginning: --max-tokens."
        )
    reasons = {
        kept.reason
        for row in comparison.rows
        for kept in (row.score_retention, row.loss_retention)
        if kept is not None and kept.reason
    }
    return "\n".join([*lines, "", *notes, *(f"n/a: {reason}." for reason in sorted(reasons))])


def _comparison_row(row: ComparisonRow) -> tuple[str, ...]:
    return (
        row.name,
        percent(row.score.value),
        _interval(row.score, lambda value: f"{100 * value:.1f}"),
        f"{row.loss.value:.3f}",
        _interval(row.loss, lambda value: f"{value:.3f}"),
        "" if row.flips is None else f"{len(row.flips.negative)} of {row.flips.n_rows}",
        _retention(row.score_retention),
        _retention(row.loss_retention),
    )


def _interval(estimate: Estimate, text: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{text(estimate.low)} to {text(estimate.high)}"


def _retention(kept: Retention | None) -> str:
    if kept is None:
        return ""
    if kept.value is None or kept.low is None or kept.high is None:
        return "n/a"
    return f"{percent(kept.value)} ({100 * kept.low:.0f} to {100 * kept.high:.0f})"
