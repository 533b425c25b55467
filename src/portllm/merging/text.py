"""Values to text for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from portllm import __version__
from portllm.merging.decision import decide_all
from portllm.merging.manifest import MergeReport, report_to_json
from portllm.merging.plan import MergePlan
from portllm.merging.tables import merge_facts
from portllm.patch.folders import Outcome
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import counted, percent
from portllm.show.printable import one_line
from portllm.show.table import columns, items, n_bytes, table

Merged = tuple[MergePlan, MergeReport | None]
"""A plan, and what was done where it was carried out."""


if TYPE_CHECKING:
    from portllm.merging.in_place import InPlacePlan


def render_merge_plan(plan: MergePlan, out: Path) -> str:
    """What `merge --dry-run` prints."""
    size = f"{n_bytes(plan.n_bytes)} in {counted(len(plan.shards), 'file')}"
    return _merge_plan(plan, {"output": f"{out}: {size}"})


def render_in_place_plan(plan: "InPlacePlan") -> str:
    """What `merge --in-place --dry-run` prints."""
    size = n_bytes(plan.kept_bytes)
    return _merge_plan(
        plan.merge,
        {"output": f"{plan.folder}, in place: overwrites {size}", "room": f"{size} for the overwritten bytes"},
    )


def _merge_plan(plan: MergePlan, output: Mapping[str, str]) -> str:
    rows = {
        "patch": f"{plan.patch.name}, {len(plan.patch.deltas) + len(plan.patch.experts)} modules",
        "into": f"{plan.identity.name} ({plan.identity.fingerprint})",
        "changes": f"{plan.n_changed} of {len(plan.steps)} tensors; the others stay as they are",
        **output,
    }
    return "\n".join(["merge", *table(rows), *items("note", plan.notes), *items("refused", plan.refusals)])


def render_merge_report(report: MergeReport, out: Path, notes: tuple[str, ...], headline: Headline) -> str:
    """What `merge` prints: the sentence to act on, what was written, and what rounding took of the patch."""
    rows = {"output": f"{out}: {_written(report)}", **merge_facts(report)}
    if report.headers:
        notes += (f"the overwritten bytes are kept in {out}/.portllm-undo; without it the merge cannot be undone",)
    return "\n".join([*headline_lines(headline), "", *table(rows), *items("note", notes)])


def _written(report: MergeReport) -> str:
    if report.headers:
        return (
            f"{n_bytes(report.n_bytes)} overwritten in place: {len(report.tensors)} tensors changed, "
            f"{report.n_copied} kept"
        )
    return f"{n_bytes(report.n_bytes)}, {len(report.tensors)} tensors changed, {report.n_copied} copied"


def render_merge_outcomes(
    outcomes: Sequence[Outcome[Merged]], outputs: Sequence[Path], *, into: Path, width: int | None = None
) -> str:
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
    dry = first is not None and first[1] is None
    headline = decide_all(len(outcomes) - len(failed), len(outcomes), dry=dry, output=str(into))
    lines = [*headline_lines(headline), "", *columns(rows, width=width)]
    return "\n".join([*lines, *(f"{outcome.folder}: {one_line(str(outcome.error))}" for outcome in failed)])


def merged_to_json(merged: Merged, output: Path) -> dict[str, object]:
    """What `merge --json` prints of one of several patches."""
    report = merged[1]
    more = {} if report is None else {"manifest": report_to_json(report, program=__version__)}
    return {"output": str(output), **more}
