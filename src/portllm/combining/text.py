"""What `combine` prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from portllm.capturing.text import _ranks
from portllm.files.record import encode
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import percent
from portllm.show.table import items, table

if TYPE_CHECKING:
    from portllm.combining.plan import CombinePlan, CombineReport


def render_combine_plan(plan: "CombinePlan", out: Path) -> str:
    """What `combine --dry-run` prints."""
    rows = {
        "patches": ", ".join(
            f"{weight:g} x {patch.name}" for patch, weight in zip(plan.patches, plan.weights, strict=True)
        ),
        "method": str(plan.how),
        "modules": str(len(plan.modules)),
        "output": str(out),
    }
    return "\n".join(["combine", *table(rows), *items("refused", plan.refusals)])


def render_combine_report(report: "CombineReport", out: Path, headline: Headline) -> str:
    """What `combine` prints."""
    rows = {
        "output": str(out),
        "base": f"{report.record.base.name} ({report.record.base.fingerprint})",
        "method": str(report.record.capture.settings["method"]),
        "deltas": f"{len(report.ranks)} modules, {_ranks(report.ranks.values())}",
    }
    if report.truncation_residual:
        rows["residual"] = f"{percent(report.truncation_residual, digits=2)} of the combined deltas was truncated"
    worst = max(report.residuals, key=lambda module: report.residuals[module])
    if report.residuals[worst]:
        rows["worst"] = f"{worst}, {percent(report.residuals[worst], digits=2)}"
    return "\n".join([*headline_lines(headline), "", *table(rows)])


def combine_report_to_json(report: "CombineReport", out: Path) -> dict[str, object]:
    """What `combine --json` prints."""
    return {
        "output": str(out),
        "record": encode(report.record),
        "truncation_residual": report.truncation_residual,
        "deltas": {
            module: {"rank": rank, "truncation_residual": report.residuals[module]}
            for module, rank in report.ranks.items()
        },
    }
