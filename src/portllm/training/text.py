"""What `train` prints."""

from portllm.inspecting.inspect import PatchSummary
from portllm.inspecting.text import render_summary
from portllm.show.headline import Headline, headline_lines
from portllm.show.table import table
from portllm.training.decision import last_loss, n_last
from portllm.training.settings import TrainReport


def render_training(summary: PatchSummary, report: TrainReport, headline: Headline) -> str:
    """What `train` prints: the sentence to act on, the patch, and how training went."""
    rows = {
        "training": f"{report.n_rows} rows, {report.steps} steps on {report.device} in {report.seconds:.0f} s",
        "loss": f"{report.losses[0]:.3f} at the first step, {last_loss(report):.3f} over the last {n_last(report)}"
        " (nats per token of completion)",
    }
    if report.n_cut_rows:
        rows["cut"] = f"{report.n_cut_rows} prompts were longer than --max-tokens and were truncated from the left"
    return "\n".join([*headline_lines(headline), "", render_summary(summary), *table(rows)])
