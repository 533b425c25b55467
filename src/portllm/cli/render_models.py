"""What running a model brought, as text for people; apart from `render`, which needs no torch."""

from portllm.cli.render import render_summary, table
from portllm.comparison.compare import Comparison
from portllm.live.train import TrainReport
from portllm.pipeline.inspect import PatchSummary
from portllm.report.comparison_tables import comparison_notes, comparison_rows


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
    rows = comparison_rows(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *comparison_notes(comparison)])
