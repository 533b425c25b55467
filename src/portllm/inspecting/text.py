"""What `inspect` prints."""

from collections.abc import Mapping, Sequence

from portllm.inspecting.inspect import CheckpointSummary, PatchSummary
from portllm.patch.record import Choice, PatchRecord
from portllm.show.numbers import counted, n_params
from portllm.show.table import n_bytes, table

SHOWN = 6


def render_summary(summary: CheckpointSummary | PatchSummary) -> str:
    """What `inspect` prints."""
    return _checkpoint(summary) if isinstance(summary, CheckpointSummary) else _patch(summary)


def _checkpoint(summary: CheckpointSummary) -> str:
    rows = {
        **({"revision": summary.revision} if summary.revision else {}),
        "architecture": summary.architecture or "unknown (no config.json)",
        "family": summary.family or "unknown: tensor names are used as stored",
        "fingerprint": summary.fingerprint,
        "digest": summary.digest or "not computed (--digest reads all bytes)",
        "size": f"{n_params(summary.n_params)} parameters, {n_bytes(summary.n_bytes)}, "
        f"{counted(summary.files, 'file')}",
        **({"quantized": summary.quantization} if summary.quantization else {}),
        "tensors": f"{summary.n_tensors}: {_counts(summary.dtypes)}",
        "head": "tied to the embedding" if summary.tied_head else "untied, or none",
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
    if summary.whole:
        rows["held whole"] = f"{len(summary.whole)}: {_shown(summary.whole)}"
    if summary.token_rows:
        rows["token rows"] = ", ".join(f"{count} of {module}" for module, count in summary.token_rows.items())
    if summary.copies:
        rows["copies"] = f"{_shown(summary.copies)}: of the base's own weights, or trained; 'capture' compares them"
    if summary.nothing:
        rows["warning"] = summary.nothing
    if summary.changed_base:
        rows["began with"] = f"from the base's weights ({summary.changed_base}); 'portllm capture' converts it"
    rows |= _origin(summary.record) if summary.record else {"base": _unrecorded(summary)}
    return "\n".join([f"{kind} {summary.name}", *table(rows)])


def _unrecorded(summary: PatchSummary) -> str:
    name = summary.base_name or "not said"
    if summary.base_name and summary.base_revision:
        name += f" at revision {summary.base_revision}"
    return f"{name}, by name only; 'portllm capture --adapter {summary.name} --base BASE' records its identity"


def _origin(record: PatchRecord) -> dict[str, str]:
    rows = {
        "base": f"{record.base.name} ({record.base.fingerprint})"
        + (f", quantized: {record.base.quantization}" if record.base.quantization else ""),
        "captured": f"by {record.capture.method}"
        + "".join(f", {key} {_setting(value)}" for key, value in record.capture.settings.items()),
    }
    if record.capture.fitted_to is not None:
        told = record.capture.fitted_to
        rows["fitted to"] = f"the base quantized to {told.scheme}, except {', '.join(told.left_alone) or 'nothing'}"
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


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _by_module(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in counts.items())
