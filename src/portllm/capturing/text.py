"""What making a patch would do and what it brought, as text for people and as JSON values."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.capturing.tuned_plan import TunedPlan
from portllm.files.record import encode
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import percent
from portllm.show.printable import one_line
from portllm.show.table import items, table

if TYPE_CHECKING:
    from portllm.capturing.tuned import TunedReport

SHOWN = 10


def render_tuned_plan(plan: TunedPlan, out: Path) -> str:
    """What `capture --tuned --dry-run` prints."""
    linear = sum(pair.module is not None for pair in plan.pairs.values())
    others = len(plan.pairs) - linear
    rank = "above the rounding noise of the two files" if plan.rank is None else str(plan.rank)
    rows = {
        "base": f"{plan.source.name} ({plan.source.fingerprint})",
        "tuned": f"{plan.target.name} ({plan.target.fingerprint})",
        "deltas": f"{linear} linear weights, rank {rank}{_and_experts(plan)}",
        "dense": f"{others} other tensors: where they differ, {_dense(plan.dense)}",
        "output": str(out),
    }
    mapped = next((pair.row_map for pair in plan.pairs.values() if pair.row_map is not None), None)
    if mapped is not None:
        rows["vocabulary"] = (
            f"{sum(row >= 0 for row in mapped.rows)} of {len(mapped.rows)} rows follow their token; "
            f"{len(mapped.extra)} rows of the tuned model do not exist in the base and are left out"
        )
    return "\n".join(["capture", *table(rows), *items("refused", plan.refusals)])


def _and_experts(plan: TunedPlan) -> str:
    return f"; {len(plan.experts)} weights of all experts of a layer" if plan.experts else ""


def render_tuned_report(report: "TunedReport", out: Path, headline: Headline) -> str:
    """What `capture --tuned` prints: what the patch holds, and what it does not."""
    ranks = [delta.rank for delta in report.deltas.values() if delta.rank is not None]
    rows = {
        "output": str(out),
        "base": f"{report.record.base.name} ({report.record.base.fingerprint})",
        "deltas": f"{len(ranks)} modules, {_ranks(ranks)}",
        "residual": f"{percent(report.truncation_residual)} of the linear weights' change is not in the deltas",
        "dense": f"{len(report.values)} tensors stored in full; {report.n_unchanged} are the same in both models",
    }
    lines = [*headline_lines(headline), "", *table(rows)]
    by_reason: dict[str, list[str]] = {}
    for name in report.left_out:
        by_reason.setdefault(report.reasons[name], []).append(name)
    for reason, names in by_reason.items():
        lines.append(f"  left out: {len(names)} tensors: {one_line(reason)}")
        lines += [f"    {name}: changed by {percent(report.left_out[name], digits=2)}" for name in names[:SHOWN]]
        if len(names) > SHOWN:
            lines.append(f"    and {len(names) - SHOWN} more, all in patch.json")
    return "\n".join(lines)


def tuned_report_to_json(report: "TunedReport", out: Path) -> dict[str, object]:
    """What `capture --tuned --json` prints."""
    return {
        "output": str(out),
        "record": encode(report.record),
        "truncation_residual": report.truncation_residual,
        "n_unchanged": report.n_unchanged,
        "deltas": {
            module: {
                "rank": delta.rank,
                "truncation_residual": delta.truncation_residual,
                "relative_size": delta.relative_size,
                "noise_edge": delta.noise_edge,
            }
            for module, delta in sorted(report.deltas.items())
        },
        "values": {name: {"relative_size": value.relative_size} for name, value in sorted(report.values.items())},
        "left_out": {
            name: {"relative_size": size, "reason": report.reasons[name]} for name, size in report.left_out.items()
        },
    }


def _dense(dense: str) -> str:
    return "kept whole" if dense == "keep" else "left out and counted"


def _ranks(ranks: Iterable[int]) -> str:
    counts = sorted(Counter(ranks).items())
    if len(counts) > SHOWN:
        return f"ranks {counts[0][0]} to {counts[-1][0]}"
    return "rank " + ", ".join(f"{rank} ({count})" if len(counts) > 1 else str(rank) for rank, count in counts)
