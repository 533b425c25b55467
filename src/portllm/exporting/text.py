"""What `export` prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from portllm.exporting.export import serve_command
from portllm.files.record import encode
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import percent
from portllm.show.table import items, table

if TYPE_CHECKING:
    from portllm.exporting.export import Exported
    from portllm.exporting.plan import ExportPlan


def render_export_plan(plan: "ExportPlan", out: Path) -> str:
    """What `export --dry-run` prints."""
    rows = {
        "patch": plan.patch.name,
        "runtime": f"{plan.runtime.title} (source of {plan.runtime.version} read)",
        "output": str(out),
        "name": plan.name,
        "modules": _modules(plan.n_modules, plan.rank, plan.dtype) if plan.slots else str(plan.n_modules),
    }
    serve = [] if plan.refusals else ["serve it with:", f"  {serve_command(plan, out)}"]
    return "\n".join(["export", *table(rows), *items("note", plan.notes), *items("refused", plan.refusals), *serve])


def render_exported(exported: "Exported", headline: Headline) -> str:
    """What `export` prints: the sentence to act on with the command that serves it, and what proves it."""
    record = exported.record
    rows = {
        "output": str(exported.given),
        "base": "unknown" if record.base is None else f"{record.base.name} ({record.base.fingerprint})",
        "name": record.name,
        "modules": str(exported.n_modules)
        if record.rank is None or record.dtype is None
        else _modules(exported.n_modules, record.rank, record.dtype),
    }
    if record.kept_gain is not None:
        rows["kept gain"] = percent(record.kept_gain, digits=2)
    then = ["Then prove that it is served as it is:", f"  {exported.prove}"] if exported.prove else []
    return "\n".join([*headline_lines(headline), *then, "", *table(rows), *items("note", exported.notes)])


def _modules(count: int, rank: int, dtype: str) -> str:
    return f"{count}, rank {rank}, scale 1, {dtype}"


def exported_to_json(exported: "Exported") -> dict[str, object]:
    """What `export --json` prints."""
    return {
        "output": str(exported.folder),
        "given": str(exported.given),
        "record": encode(exported.record),
        "modules": exported.n_modules,
        "serve": exported.serve,
        "prove": exported.prove,
        "notes": list(exported.notes),
    }
