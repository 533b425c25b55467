"""What `export` prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from portllm.exporting.export import file_of, serve_command
from portllm.files.record import encode
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
        **_rows(plan.name, len(plan.slots), plan.rank, plan.dtype),
    }
    serve = [] if plan.refusals else ["serve it with", f"  {serve_command(plan, out, file_of(plan))}"]
    return "\n".join(["export", *table(rows), *items("note", plan.notes), *items("refused", plan.refusals), *serve])


def render_exported(exported: "Exported") -> str:
    """What `export` prints."""
    record = exported.record
    rows = {
        "output": str(exported.given),
        "base": "unknown" if record.base is None else f"{record.base.name} ({record.base.fingerprint})",
        **_rows(record.name, exported.n_modules, record.rank, record.dtype),
    }
    lines = [f"exported for {record.runtime}", *table(rows), *items("note", exported.notes)]
    return "\n".join([*lines, "serve it with", f"  {exported.serve}"])


def _rows(name: str, n_modules: int, rank: int | None, dtype: str | None) -> dict[str, str]:
    as_it_was = rank is None or dtype is None or not n_modules
    return {
        "name": name,
        "modules": f"{n_modules}, as in the patch" if as_it_was else f"{n_modules}, rank {rank}, scale 1, {dtype}",
    }


def exported_to_json(exported: "Exported") -> dict[str, object]:
    """What `export --json` prints."""
    return {
        "output": str(exported.folder),
        "given": str(exported.given),
        "record": encode(exported.record),
        "modules": exported.n_modules,
        "serve": exported.serve,
        "notes": list(exported.notes),
    }
