"""What `check` prints: the verdict first, then why, then the numbers."""

from collections.abc import Sequence

from portllm.checking.decision import Checked, decide, decide_all
from portllm.checking.prompts.text import render_text, render_texts
from portllm.checking.report import CheckReport, PatchReport, patch_to_json
from portllm.checking.tables import kind_rows, layer_rows, patch_facts, patch_rows, update_facts
from portllm.checking.update.report import update_to_json
from portllm.patch.folders import Outcome
from portllm.patch.patch import Patch
from portllm.show.headline import Tone, headline_lines
from portllm.show.table import columns, table
from portllm.tensors.info import TensorInfo

Failed = Sequence[Outcome[Patch[TensorInfo]]]


def check_to_json(report: CheckReport, failed: Failed) -> dict[str, object]:
    """What `check --json` prints: the update once, and a list of the patches."""
    patches = [patch_to_json(patch) for patch in report.patches]
    wrong = [{"patch": str(outcome.folder), "error": str(outcome.error)} for outcome in failed]
    return {"update": update_to_json(report.update), "patches": [*patches, *wrong]}


def render_check(
    report: CheckReport,
    failed: Failed,
    *,
    by_layer: bool = False,
    checked: Checked | None = None,
    width: int | None = None,
) -> str:
    """What `check` prints."""
    update = report.update
    lines = (
        _one_patch(report.patches[0], update.evolved.name, checked)
        if len(report.patches) == 1
        else _several_patches(report, checked, width)
    )
    lines += [f"{outcome.folder}: {outcome.error}" for outcome in failed]
    lines += ["", f"update from {update.base.name} to {update.evolved.name}", *table(update_facts(update))]
    lines += ["", "drift by kind of module", *columns(kind_rows(update), width=width)]
    if by_layer:
        lines += ["", "drift by layer", *columns(layer_rows(update), width=width)]
    return "\n".join(lines)


def check_tone(report: CheckReport, failed: Failed) -> Tone:
    """The tone of the first line."""
    return decide_all(report, failed=bool(failed)).tone


def _one_patch(patch: PatchReport, evolved: str, checked: Checked | None) -> list[str]:
    lines = headline_lines(decide(patch, evolved, checked=checked))
    facts = patch_facts(patch)
    if facts:
        lines += ["", "patch", *table(facts)]
    return lines if patch.text is None else [*lines, "", *render_text(patch.text)]


def _several_patches(report: CheckReport, checked: Checked | None, width: int | None) -> list[str]:
    headline = decide_all(report, checked=checked)
    rows: list[tuple[str, ...]] = [(*row, why.partition(";")[0]) for *row, why in patch_rows(report)]
    if headline.reasons:  # what all have in common stands above
        rows = [row[:-1] for row in rows]
    texts = [patch.text for patch in report.patches if patch.text is not None]
    lines = [*headline_lines(headline), "", *columns(rows, width=width)]
    return [*lines, "", *render_texts(texts, width=width)] if texts else lines
