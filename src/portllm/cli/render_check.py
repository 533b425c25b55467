"""What `check` prints: the verdict first, then why, then the numbers."""

import math
from collections.abc import Iterable, Sequence

from portllm.assess.estimate import Estimate
from portllm.checkpoint.header import TensorInfo
from portllm.cli.render import n_params, percent, table
from portllm.cli.render_several import columns
from portllm.cli.render_text import render_text, render_texts
from portllm.patch.folders import Outcome
from portllm.patch.patch import Patch
from portllm.pipeline.check_report import CheckReport, PatchReport, UpdateReport, patch_to_json, update_to_json

Failed = Sequence[Outcome[Patch[TensorInfo]]]
SHOWN = 3
"""Names of tensors that are shown of each kind; --json has all."""


def check_to_json(report: CheckReport, failed: Failed) -> dict[str, object]:
    """What `check --json` prints: the update once, and a list of the patches."""
    wrong = [{"patch": str(outcome.folder), "error": str(outcome.error)} for outcome in failed]
    return {"update": update_to_json(report.update), "patches": [*map(patch_to_json, report.patches), *wrong]}


def render_check(report: CheckReport, failed: Failed, *, by_layer: bool = False) -> str:
    """What `check` prints."""
    update = report.update
    lines = _one_patch(report.patches[0], update) if len(report.patches) == 1 else _several_patches(report)
    lines += [f"{outcome.folder}: {outcome.error}" for outcome in failed]
    lines += ["", f"update from {update.base.name} to {update.evolved.name}", *table(_update_rows(update))]
    lines += ["", "drift by kind of module", *columns(_kind_rows(update))]
    if by_layer:
        lines += ["", "drift by layer", *columns(_layer_rows(update))]
    return "\n".join(lines)


def _one_patch(patch: PatchReport, update: UpdateReport) -> list[str]:
    lines = [f"{patch.verdict.answer}: {patch.name} on {update.evolved.name}"]
    lines += [f"  - {reason.text}" for reason in patch.verdict.reasons]
    lines += [f"  note: {remark}" for remark in patch.verdict.remarks]
    rows = _patch_rows(patch)
    if rows:
        lines += ["", "patch", *table(rows)]
    return lines if patch.text is None else [*lines, "", *render_text(patch.text)]


def _several_patches(report: CheckReport) -> list[str]:
    counts: dict[str, int] = {}
    for patch in report.patches:
        counts[str(patch.verdict.answer)] = counts.get(str(patch.verdict.answer), 0) + 1
    rows = [("verdict", "patch", "size", "drift", "with drift", "kept", "why")]
    for patch in report.patches:
        why = patch.verdict.reasons[0].text if patch.verdict.reasons else ""
        kept = (patch.rounding or {}).get(patch.stored_as or "")
        rows.append(
            (
                str(patch.verdict.answer),
                patch.name,
                _share(patch.relative_size),
                "" if patch.drift is None else _share(patch.drift.relative.value),
                "" if patch.alignment.cosine is None else f"{patch.alignment.cosine:.3f}",
                "" if kept is None else percent(kept.kept_gain),
                why if len(why) <= 70 else f"{why[:67]}...",
            )
        )
    total = ", ".join(f"{count} {answer}" for answer, count in counts.items())
    lines = [f"{len(report.patches)} patches on {report.update.evolved.name}: {total}", *columns(rows)]
    texts = [patch.text for patch in report.patches if patch.text is not None]
    return [*lines, "", *render_texts(texts)] if texts else lines


def _patch_rows(patch: PatchReport) -> dict[str, str]:
    if not patch.changes:
        return {}
    against = patch.size_against_drift
    rows = {
        "size": f"{_share(patch.relative_size)} of the norm of the weights it changes"
        + ("" if against is None else f", {_three_digits(against)} times their drift"),
    }
    if patch.n_rescaled:
        rows["size"] += f"; without the rescaling of {patch.n_rescaled} DoRA modules"
    if patch.alignment.cosine is not None:
        rows["with drift"] = f"cosine {patch.alignment.cosine:.4f} between patch and drift"
    for side, share in (patch.overlaps or {}).items():
        if share.share is not None and share.by_chance is not None:
            rows[f"in its {side}s"] = f"{_share(share.share)} of the drift, {_share(share.by_chance)} by chance"
    if patch.rounding:
        kept = (f"{dtype} {percent(sums.kept_gain)}" for dtype, sums in patch.rounding.items())
        rows["kept gain"] = f"if merged and stored as {', '.join(kept)}"
    return rows


def _update_rows(update: UpdateReport) -> dict[str, str]:
    pairing = update.pairing
    rows = {"lineage": str(update.lineage)}
    if update.drift is not None:
        rows["drift"] = f"{_with_error(update.drift.relative)} of the matrices' norm"
        rows["cosine"] = _plain_with_error(update.drift.cosine)
    rows["read"] = (
        f"every weight of both, {n_params(update.n_elements)} each"
        if update.is_full
        else f"{n_params(update.n_elements)} weights of each model, spread over all tensors; --full reads all"
    )
    rows["tensors"] = f"{len(pairing.pairs)} compared" + "".join(
        f"; {len(names)} {what} ({_named(names)})"
        for what, names in (
            ("only in the base", pairing.removed),
            ("only in the evolved model", pairing.added),
            ("of another shape", pairing.reshaped),
            ("with other numbers of rows", pairing.grown),
            ("not of numbers", pairing.no_numbers),
            ("not finite", update.broken),
        )
        if names
    )
    rows["vocabulary"] = _vocabulary(update)
    if update.config_changes:
        rows["config.json"] = "; ".join(f"{c.field} {c.base} to {c.evolved}" for c in update.config_changes)
    return rows


def _vocabulary(update: UpdateReport) -> str:
    if update.tokens is not None:
        return f"{update.tokens.n_moved} tokens moved to other rows, {len(update.tokens.gone)} are gone"
    return "the same tokens in the same rows" if update.has_vocabularies else "a model has no tokenizer.json"


def _kind_rows(update: UpdateReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("module", "tensors", "drift", "least", "most", "cosine", "lineage")]
    for kind, found in update.kinds.items():
        cells = [cell.relative.value for place, cell in update.cells.items() if place.kind == kind]
        rows.append(
            (
                kind,
                str(found.n_tensors),
                _with_error(found.drift.relative),
                _share(min(cells)),
                _share(max(cells)),
                f"{found.drift.cosine.value:.5f}",
                str(found.lineage),
            )
        )
    return rows


def _layer_rows(update: UpdateReport) -> list[tuple[str, ...]]:
    """A line for each layer, a column for each kind of module; what stands in no layer comes last."""
    inside = {place: cell for place, cell in update.cells.items() if place.layer >= 0}
    kinds = sorted({place.kind for place in inside if not place.kind.endswith(("norm", ".bias"))})
    stacks = sorted({(place.stack, place.layer) for place in inside})
    found = {(place.stack, place.layer, place.kind): cell for place, cell in inside.items()}
    rows: list[tuple[str, ...]] = [("layer", *kinds)]
    for stack, layer in stacks:
        cells = (found.get((stack, layer, kind)) for kind in kinds)
        rows.append((f"{stack}.{layer}", *("" if cell is None else _share(cell.relative.value) for cell in cells)))
    return rows


def _with_error(estimate: Estimate) -> str:
    if not estimate.error:
        return _share(estimate.value)
    error = "?" if math.isinf(estimate.error) else f"{100 * estimate.error:.1g}"
    return f"{_three_digits(100 * estimate.value)} ± {error} %"


def _plain_with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.6f}" + (f" ± {estimate.error:.1g}" if estimate.error else "")


def _share(value: float | None) -> str:
    return "" if value is None else "infinite" if math.isinf(value) else f"{_three_digits(100 * value)} %"


def _three_digits(value: float) -> str:
    """Three significant digits, zeros at the end with them, so that the numbers of a column can be compared.

    Example:
        >>> [_three_digits(value) for value in (1.0, 0.9984, 100.2, 0.0)]
        ['1.00', '0.998', '100', '0']
    """
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
