"""Values to text for people."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.assess.quantization_gap import QuantizationGap
from portllm.assess.verdict import Answer
from portllm.output.manifest import MergeReport
from portllm.patch.record import Choice, PatchRecord
from portllm.pipeline.fitted import quantization_of
from portllm.pipeline.inspect import CheckpointSummary, PatchSummary
from portllm.pipeline.plan import MergePlan, PortPlan
from portllm.printable import one_line
from portllm.progress import Unit
from portllm.report.numbers import counted, n_params, percent

if TYPE_CHECKING:
    from portllm.pipeline.in_place import InPlacePlan

KEPT_GAIN_WORTH_A_WARNING = 0.99
SHOWN_TOKENS = 10


def amount(value: int, unit: Unit) -> str:
    """A count with its unit.

    Example:
        >>> amount(269_000_000, "bytes"), amount(40, "steps")
        ('269.0 MB', '40 steps')
    """
    return n_bytes(value) if unit == "bytes" else f"{value:,} {unit}"


def n_bytes(value: int) -> str:
    """A size in decimal units, as disks and networks are sold.

    Example:
        >>> n_bytes(999), n_bytes(19_600_000)
        ('999 B', '19.6 MB')
    """
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def render_summary(summary: CheckpointSummary | PatchSummary) -> str:
    """What `inspect` prints."""
    return _checkpoint(summary) if isinstance(summary, CheckpointSummary) else _patch(summary)


def render_port_plan(plan: PortPlan, out: Path) -> str:
    """What `port --dry-run` prints, and the first lines of `port`."""
    lines = [f"port {one_line(plan.patch.name)} by '{plan.method.id}': {plan.method.summary}"]
    rows = {
        "from": f"{plan.source.name} ({plan.source.fingerprint})",
        "to": f"{plan.target.name} ({plan.target.fingerprint})",
        "fit": f"{len(plan.patch.deltas) + len(plan.patch.experts)} modules, every tensor accounted for"
        if not plan.refusals or plan.choice is not None  # what was measured has been found to fit
        else "does not fit",
        "output": str(out),
    }
    if (scheme := quantization_of(plan.patch)) is not None:
        first = plan.patch.record.ports[0].source if plan.patch.record and plan.patch.record.ports else plan.source
        rows["fitted to"] = f"the values of {first.name} in {scheme}; merging adds what quantization took of them"
    if plan.choice is not None:
        rows["verdict"] = f"{plan.choice.verdict}; {plan.choice.reason}"
    if "sampled_drift" in plan.evidence:
        rows["drift"] = (
            f"{percent(plan.evidence['sampled_drift'], digits=2)} of the patched weights' norm, cosine "
            f"{plan.evidence['sampled_cosine']:.5f} (estimated from samples)"
        )
    elif plan.source.fingerprint == plan.target.fingerprint:
        rows["drift"] = "none: the evolved model is the base"
    if plan.tokens is not None:
        gone = list(plan.tokens.gone.values())
        shown = ", ".join(repr(token) for token in gone[:SHOWN_TOKENS])
        more = f" and {len(gone) - SHOWN_TOKENS} more" if len(gone) > SHOWN_TOKENS else ""
        lost = f"{counted(len(gone), 'token')} of the base {'is' if len(gone) == 1 else 'are'} gone: {shown}{more}"
        rows["tokens"] = (
            f"{counted(plan.tokens.n_moved, 'token')} moved to another row; {lost if gone else 'none is gone'}"
        )
    return "\n".join([*lines, *table(rows), *items("refused", plan.refusals)])


def port_warning(plan: PortPlan) -> str | None:
    """What to say on stderr of a port whose method was chosen though nothing says that it holds."""
    if plan.refusals or plan.choice is None or plan.choice.verdict == Answer.HOLDS:
        return None
    return f"warning: {plan.patch.name}: {plan.choice.verdict}; measure the ported patch with portllm evaluate."


def render_merge_plan(plan: MergePlan, out: Path) -> str:
    """What `merge --dry-run` prints."""
    size = f"{n_bytes(plan.n_bytes)} in {counted(len(plan.shards), 'file')}"
    return _merge_plan(plan, {"output": f"{out}: {size}"})


def render_in_place_plan(plan: "InPlacePlan") -> str:
    """What `merge --in-place --dry-run` prints."""
    size = n_bytes(plan.kept_bytes)
    return _merge_plan(
        plan.merge,
        {"output": f"{plan.folder}, in place: {size} are overwritten", "room": f"{size} for the old bytes of these"},
    )


def _merge_plan(plan: MergePlan, output: Mapping[str, str]) -> str:
    rows = {
        "patch": f"{plan.patch.name}, {len(plan.patch.deltas) + len(plan.patch.experts)} modules",
        "into": f"{plan.identity.name} ({plan.identity.fingerprint})",
        "changes": f"{plan.n_changed} of {len(plan.steps)} tensors; the others stay as they are",
        **output,
    }
    return "\n".join(["merge", *table(rows), *items("note", plan.notes), *items("refused", plan.refusals)])


def render_merge_report(report: MergeReport, out: Path, notes: tuple[str, ...]) -> str:
    """What `merge` prints: what was written, and what rounding took of the patch."""
    total, worst = report.total, report.worst
    rows = {
        "output": f"{out}: {_written(report)}",
        "identity": f"{report.output.fingerprint}, {report.output.digest}",
        "patch size": f"{percent(total.relative_size, digits=2)} of the changed weights' norm",
        "kept gain": f"{percent(total.kept_gain)} of the patch survives rounding to {'/'.join(report.dtype)}",
        "rounding loss": f"{percent(total.rounding_loss)} of the patch's norm",
    }
    if report.device != "cpu":
        rows["computed on"] = f"{report.device}: sums may differ in their last bit from those of a CPU"
    if worst is not None:
        rows["worst tensor"] = f"{worst}, keeps {percent(report.tensors[worst].kept_gain)}"
    gap = report.quantization
    if gap is not None:
        rows["quantization"] = _quantization(gap)
    if report.headers:
        notes += (f"to take it back: portllm merge --undo {out}; to make room instead, delete {out}/.portllm-undo",)
    lines = ["merged", *table(rows), *items("note", notes)]
    if gap is not None and gap.dominates:
        lines += [
            "  warning: the merge adds far more of what quantization took than of the patch, and the patch was fitted",
            "  without it. Models merged so were seen to break: evaluate the output, serve the adapter unmerged beside",
            "  the quantized model, or merge into its own values: --into QUANTIZED --dtype BF16.",
        ]
    least = report.tensors[worst].kept_gain if worst is not None else 1.0
    if report.rounding == "nearest" and min(least, total.kept_gain) < KEPT_GAIN_WORTH_A_WARNING:
        lines += [
            "  warning: changes smaller than half a step of the storage dtype are lost. To keep them, serve the",
            "  adapter unmerged, store a wider dtype (--dtype F32 or F16), or use --rounding stochastic.",
        ]
    return "\n".join(lines)


def _quantization(gap: QuantizationGap) -> str:
    """How large is what quantization took, in patches."""
    if gap.worst is None:
        return f"none of the changed weights was quantized ({gap.scheme})"
    return (
        f"W - dequant(W) of {gap.scheme} is {gap.total.ratio:.3g} times the patch, at worst "
        f"{gap.tensors[gap.worst].ratio:.3g} times: {gap.worst}"
    )


def _written(report: MergeReport) -> str:
    if report.headers:
        return f"{n_bytes(report.n_bytes)} overwritten in place, {len(report.tensors)} tensors, {report.n_copied} kept"
    return f"{n_bytes(report.n_bytes)}, {len(report.tensors)} tensors changed, {report.n_copied} copied"


def _checkpoint(summary: CheckpointSummary) -> str:
    rows = {
        **({"revision": summary.revision} if summary.revision else {}),
        "architecture": summary.architecture or "not said (no config.json)",
        "family": summary.family or "not known: names are taken as they are stored",
        "fingerprint": summary.fingerprint,
        "digest": summary.digest or "not taken (--digest reads all bytes)",
        "size": f"{n_params(summary.n_params)} parameters, {n_bytes(summary.n_bytes)}, "
        f"{counted(summary.files, 'file')}",
        **({"quantized": summary.quantization} if summary.quantization else {}),
        "tensors": f"{summary.n_tensors}: {_counts(summary.dtypes)}",
        "head": "tied to the embedding" if summary.tied_head else "its own matrix, or none",
        "modules": _counts(summary.modules),
    }
    return "\n".join([f"checkpoint {summary.name}", *table(rows)])


def _patch(summary: PatchSummary) -> str:
    kind = "patch" if summary.record else "adapter"
    rows = {
        **({"revision": summary.revision} if summary.revision else {}),
        "modules": f"{summary.n_modules}: {_counts(summary.modules)}",
        "rank": _by_module(summary.ranks),
        "scale": _by_module(summary.scales),
        "size": f"{n_params(summary.n_params)} parameters, {n_bytes(summary.n_bytes)}",
    }
    if summary.changed_base:
        rows["began with"] = f"a part of the base ({summary.changed_base}); 'portllm capture' converts it"
    rows |= _origin(summary.record) if summary.record else {"base": _unrecorded(summary)}
    return "\n".join([f"{kind} {summary.name}", *table(rows)])


def _unrecorded(summary: PatchSummary) -> str:
    name = summary.base_name or "not said"
    if summary.base_name and summary.base_revision:
        name += f" at revision {summary.base_revision}"
    return f"{name}, by name only; 'portllm capture --adapter {summary.name} --base BASE' writes its identity down"


def _origin(record: PatchRecord) -> dict[str, str]:
    rows = {
        "base": f"{record.base.name} ({record.base.fingerprint})"
        + (f", quantized: {record.base.quantization}" if record.base.quantization else ""),
        "captured": f"by {record.capture.method}"
        + "".join(f", {key} {_setting(value)}" for key, value in record.capture.settings.items()),
    }
    if record.capture.fitted_to is not None:
        told = record.capture.fitted_to
        rows["fitted to"] = f"the base quantized to {told.scheme}, all but {', '.join(told.left_alone) or 'nothing'}"
    for number, step in enumerate(record.ports, start=1):
        rows[f"port {number}"] = (
            f"by '{step.method}' from {step.source.name} to {step.target.name}{_chosen(step.choice)}"
        )
    return rows


def _chosen(choice: Choice | None) -> str:
    if choice is None:
        return ""
    return f", {'by force' if choice.is_forced else 'chosen'}: the verdict was '{choice.verdict}'"


def _setting(value: object) -> str:
    """One setting of a capture; what holds many values is counted, a model is called by its name."""
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return str(value["name"])
    return f"({len(value)})" if isinstance(value, Mapping | list) else str(value)


def table(rows: Mapping[str, str]) -> list[str]:
    """Names and texts in two columns."""
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {one_line(text)}" for name, text in rows.items()]


def items(kind: str, found: Iterable[object]) -> list[str]:
    """One line for each, such as a note or a refusal."""
    return [f"  {kind}: {one_line(str(item))}" for item in found]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _by_module(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in counts.items())
