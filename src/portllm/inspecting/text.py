"""What `inspect` prints."""

from collections.abc import Mapping, Sequence

from msgspec import Struct, ValidationError, convert

from portllm.inspecting.inspect import CheckpointSummary, PatchSummary
from portllm.patch.record import Capture, Choice, PatchRecord, PortStep
from portllm.show.numbers import counted, n_params, three_percent
from portllm.show.table import n_bytes, table

SHOWN = 6

WORDING = {"prompt": "prompt", "completion": "answer", "shape": "rows of"}
"""What a record says of how prompts are made, and what that is called."""

TRAINING = (
    "rows", "epochs", "steps", "rank", "alpha", "learning_rate", "use_rslora", "start", "teacher", "teacher_base",
)  # fmt: skip
"""What is told of a training; --json has all of it."""


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
    if summary.beside:
        rows["beside it"] = ", ".join(summary.beside)
    if summary.nothing:
        rows["warning"] = summary.nothing
    if summary.changed_base:
        rows["began with"] = f"from the base's weights ({summary.changed_base}); 'portllm capture' converts it"
    rows |= _origin(summary.record) if summary.record else {"base": _unrecorded(summary)}
    lines = [f"{kind} {summary.name}", *table(rows)]
    if summary.record is not None and _has_lineage(summary.record):
        lines += ["lineage", *(f"  {line}" for line in _lineage(summary.record.capture, summary.record.ports))]
    return "\n".join(lines)


def _unrecorded(summary: PatchSummary) -> str:
    name = summary.base_name or "not said"
    if summary.base_name and summary.base_revision:
        name += f" at revision {summary.base_revision}"
    return f"{name}, by name only; 'portllm capture --adapter {summary.name} --base BASE' records its identity"


def _origin(record: PatchRecord) -> dict[str, str]:
    rows = {
        "base": f"{record.base.name} ({record.base.fingerprint})"
        + (f", quantized: {record.base.quantization}" if record.base.quantization else "")
    }
    if not _has_lineage(record):
        rows["captured"] = _captured(record.capture)
    rows |= _wording(record.capture)
    if record.capture.fitted_to is not None:
        told = record.capture.fitted_to
        rows["fitted to"] = f"the base quantized to {told.scheme}, except {', '.join(told.left_alone) or 'nothing'}"
    return rows


class _Input(Struct, frozen=True):
    """What the record of a combination says of one patch that went in."""

    name: str
    weight: float
    capture: Capture
    ports: tuple[PortStep, ...]


def _combined_from(capture: Capture) -> tuple[_Input, ...]:
    """The patches of a combination; none where its record, which anyone may have written, does not say them so."""
    if capture.method != "combine":
        return ()
    try:
        return convert(capture.settings.get("inputs"), tuple[_Input, ...])
    except ValidationError:
        return ()


def _has_lineage(record: PatchRecord) -> bool:
    return bool(record.ports) or record.capture.method == "combine"


def _lineage(capture: Capture, ports: Sequence[PortStep]) -> list[str]:
    """Where the deltas come from, oldest first: a line for each port, and a branch for each patch of a combination."""
    branches, before = [], 0
    for one in _combined_from(capture):
        first, *rest = _lineage(one.capture, one.ports)
        branches.append([f"{one.weight:g} x {one.name}: {first}", *rest])
        before = max(before, len(one.ports))
    # A combination has the ports of the input that was ported most often: they stand in its branch.
    branches += [[_ported(step)] for step in ports[before:]]
    lines = [_captured(capture)]
    for number, (first, *rest) in enumerate(branches, start=1):
        stem = "   " if number == len(branches) else "|  "
        lines += [f"{'`' if number == len(branches) else '|'}- {first}", *(stem + line for line in rest)]
    return lines


def _captured(capture: Capture) -> str:
    """How deltas came to be, with what shaped them; what went into a combination has branches of its own."""
    if capture.method == "combine":
        told = ", ".join(
            f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else str(value)
            for key, value in capture.settings.items()
            if key in ("method", "truncation_residual")
        )
        return f"combined: {told}"
    shown = {
        key: value
        for key, value in capture.settings.items()
        if value is not False
        and key not in (*WORDING, "epochs" if capture.settings.get("steps") else "")
        and (capture.method != "train" or key in TRAINING)
    }
    return f"by {capture.method}" + "".join(
        f", {key.replace('_', ' ')} {_setting(value)}" for key, value in shown.items()
    )


def _wording(capture: Capture) -> dict[str, str]:
    """How prompts are made, where it was kept."""
    return {name: str(capture.settings[key]) for key, name in WORDING.items() if capture.settings.get(key)}


def _ported(step: PortStep) -> str:
    drift = step.evidence.get("drift", step.evidence.get("sampled_drift"))
    return (
        f"to {step.target.name} by '{step.method}'"
        + ("" if drift is None else f", drift {three_percent(drift)}")
        + _chosen(step.choice)
        + f" ({step.target.fingerprint})"
    )


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
