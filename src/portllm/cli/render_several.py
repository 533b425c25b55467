"""What became of several patches, as one table or one list."""

from collections.abc import Sequence
from pathlib import Path

from portllm import __version__
from portllm.checkpoint.header import TensorInfo
from portllm.output.manifest import MergeReport, report_to_json
from portllm.patch.folders import Outcome
from portllm.patch.patch import Patch
from portllm.patch.record import record_to_json
from portllm.pipeline.plan import MergePlan, PortPlan
from portllm.printable import one_line
from portllm.report.numbers import percent

Carried = tuple[PortPlan, Patch[TensorInfo] | None]
"""A plan, and the ported patch where the plan was carried out."""

Merged = tuple[MergePlan, MergeReport | None]
"""A plan, and what was done where it was carried out."""


def render_port_outcomes(outcomes: Sequence[Outcome[Carried]], outputs: Sequence[Path]) -> str:
    """What `port` prints of several patches: a line for each, and why those that failed did."""
    rows = [("patch", "modules", "drift", "output")]
    for outcome, output in zip(outcomes, outputs, strict=True):
        if outcome.value is None:
            rows.append((str(outcome.folder), "", "", "failed, see below"))
        else:
            rows.append((str(outcome.folder), *_facts(outcome.value[0]), str(output)))
    failed = [outcome for outcome in outcomes if outcome.error]
    first = next((outcome.value for outcome in outcomes if outcome.value), None)
    done = "would port" if first is not None and first[1] is None else "ported"
    lines = [f"{done} {len(outcomes) - len(failed)} of {len(outcomes)} patches", *columns(rows)]
    return "\n".join([*lines, *(f"{outcome.folder}: {one_line(str(outcome.error))}" for outcome in failed)])


def _facts(plan: PortPlan) -> tuple[str, str]:
    drift = plan.evidence.get("sampled_drift")
    modules = str(len(plan.patch.deltas) + len(plan.patch.experts))
    return modules, "" if drift is None else percent(drift, digits=2)


def port_outcomes_to_json(outcomes: Sequence[Outcome[Carried]], outputs: Sequence[Path]) -> list[dict[str, object]]:
    """What `port --json` prints of several patches."""
    rows: list[dict[str, object]] = []
    for outcome, output in zip(outcomes, outputs, strict=True):
        row: dict[str, object] = {"patch": str(outcome.folder)}
        if outcome.value is None:
            rows.append({**row, "error": str(outcome.error)})
        else:
            ported = outcome.value[1]
            rows.append({**row, "output": str(output)} if ported is None else {**row, **ported_to_json(ported, output)})
    return rows


def render_merge_outcomes(outcomes: Sequence[Outcome[Merged]], outputs: Sequence[Path]) -> str:
    """What `merge` prints of several patches: a line for each, and why those that failed did."""
    rows = [("patch", "tensors", "kept gain", "output")]
    for outcome, output in zip(outcomes, outputs, strict=True):
        if outcome.value is None:
            rows.append((str(outcome.folder), "", "", "failed, see below"))
        else:
            plan, report = outcome.value
            kept = "" if report is None else percent(report.total.kept_gain)
            rows.append((str(outcome.folder), str(plan.n_changed), kept, str(output)))
    failed = [outcome for outcome in outcomes if outcome.error]
    first = next((outcome.value for outcome in outcomes if outcome.value), None)
    done = "would merge" if first is not None and first[1] is None else "merged"
    lines = [f"{done} {len(outcomes) - len(failed)} of {len(outcomes)} patches", *columns(rows)]
    return "\n".join([*lines, *(f"{outcome.folder}: {one_line(str(outcome.error))}" for outcome in failed)])


def merge_outcomes_to_json(outcomes: Sequence[Outcome[Merged]], outputs: Sequence[Path]) -> list[dict[str, object]]:
    """What `merge --json` prints of several patches."""
    rows: list[dict[str, object]] = []
    for outcome, output in zip(outcomes, outputs, strict=True):
        row: dict[str, object] = {"patch": str(outcome.folder)}
        if outcome.value is None:
            rows.append({**row, "error": str(outcome.error)})
        else:
            report = outcome.value[1]
            more = {} if report is None else {"manifest": report_to_json(report, program=__version__)}
            rows.append({**row, "output": str(output), **more})
    return rows


def ported_to_json(ported: Patch[TensorInfo], output: Path) -> dict[str, object]:
    """A ported patch as JSON values: where it is, and its record."""
    return {"output": str(output), "record": None if ported.record is None else record_to_json(ported.record)}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, each column as wide as its widest cell.

    Example:
        >>> columns([("patch", "drift"), ("a", "1 %")])
        ['  patch  drift', '  a      1 %']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
