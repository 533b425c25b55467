"""What `train` prints."""

from portllm.inspecting.inspect import PatchSummary
from portllm.inspecting.text import render_summary
from portllm.show.table import table
from portllm.training.settings import TrainReport


def render_training(summary: PatchSummary, report: TrainReport) -> str:
    """What `train` prints: the patch, and how training went."""
    tail = report.losses[-max(1, len(report.losses) // 10) :]
    rows = {
        "training": f"{report.n_rows} rows, {report.steps} steps on {report.device} in {report.seconds:.0f} s",
        "loss": f"{report.losses[0]:.3f} at the first step, {sum(tail) / len(tail):.3f} over the last {len(tail)}"
        " (nats per token of completion)",
    }
    if report.n_cut_rows:
        rows["cut"] = f"{report.n_cut_rows} prompts were longer than --max-tokens and were truncated from the left"
    return "\n".join([render_summary(summary), *table(rows)])
