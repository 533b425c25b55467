"""Do one cell: check the patch, port it to the evolved model, merge it, and bring what was written to its place.

A job and its result are JSON values, so that they can go to another process or another machine.
"""

import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import on_disk, open_checkpoint
from portllm.checkpoint.safetensors.writer import DEFAULT_SHARD_BYTES
from portllm.errors import (
    CheckpointError,
    OutputBusyError,
    PlanRefusedError,
    PortLLMError,
    RemoteError,
    StorageError,
    refuse,
)
from portllm.files.output_folder import check_apart, staged_folder
from portllm.files.own_files import require_real
from portllm.files.seal import render_sealed
from portllm.fleets.storage import digests, fetch_patch, is_url, join, publish, remove, sizes
from portllm.matching.port_plan import PortPlan, plan_port
from portllm.matching.update import Update
from portllm.merging.manifest import MANIFEST_FILE
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.merging.rounding_modes import NEAREST, Stochastic
from portllm.patch.adapter_folder import RECORD_FILE, load_patch
from portllm.patch.patch import Patch
from portllm.porting.port import run_port
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.checking.report import PatchReport
    from portllm.checking.update.measures import MeasuredUpdate

Job = Mapping[str, Any]
Result = dict[str, Any]

CHECK_FILE = "check.json"
RECORDS = {"check": CHECK_FILE, "port": RECORD_FILE, "merge": MANIFEST_FILE}
"""The file of each step's output that vouches for the others."""

NO = ("will not hold", "cannot be ported")
"""Verdicts of a check after which nothing is ported."""


class CellWorker:
    """Does one cell after another; the models of the last one stay open for the next.

    Example:
        >>> job = {"folder": "v2/a", "base": None, "steps": ["port"], "options": {}, "dry": False}
        >>> CellWorker().do({**job, "evolved": {"place": "nowhere", "said": "nowhere"}})["reason"]
        "'nowhere': no such file or folder. ..."
    """

    def __init__(self) -> None:
        self._models: _Models | None = None

    def do(self, job: Job) -> Result:
        """What became of a cell; an error becomes a status, a reason, and whether it may pass."""
        began = time.monotonic()
        try:
            result = self._do(job)
        except PlanRefusedError as error:
            result = {"status": "refused", "reason": str(error)}
        except PortLLMError as error:
            result = {"status": "failed", "reason": str(error), "can_pass": _can_pass(error)}
        except MemoryError:
            result = {"status": "failed", "reason": "out of memory.", "can_pass": True}
        except Exception:  # a bug in one cell stops no other; its traceback is the reason
            result = {"status": "failed", "reason": traceback.format_exc().strip()}
        return {**result, "seconds": round(time.monotonic() - began, 3)}

    def _do(self, job: Job) -> Result:
        models = self._open(job)
        place = join(job["output"], job["folder"])
        if not is_url(place):
            require_real(Path(job["output"]), *job["folder"].split("/"))
        with tempfile.TemporaryDirectory(prefix="portllm-fleet-") as name:
            scratch = Path(name)
            patch = load_patch(fetch_patch(job["patch"]["place"], scratch / "patch"))
            patch = replace(patch, name=job["patch"]["place"])
            plan = plan_port(patch, models.update, **job["options"].get("port", {}))
            if job["dry"]:
                return _forecast(plan, job)
            facts: dict[str, Any] = {}
            if "check" in job["steps"]:
                facts["check"] = _check(plan, models.measured, place, scratch)
                if facts["check"]["verdict"] in NO:
                    _drop(("port", "merge"), place, plan)
                    return {**_no(facts["check"]), **_written(["check"], place)}
            refuse(plan.refusals)
            _drop(RECORDS.keys() - set(job["steps"]), place, plan)  # of an earlier run that was asked for more
            facts |= _run(plan, job, place, scratch)
        return {"status": "done", "facts": facts, **_written(job["steps"], place)}

    def _open(self, job: Job) -> "_Models":
        """The two models; opened again only where the last cell had others."""
        if self._models is None or not self._models.serve(job):
            self._models = _Models(job)
        return self._models


class _Models:
    """The models of a cell, and what a check reads of them, for all cells that have the same ones."""

    def __init__(self, job: Job) -> None:
        self._of, self._full = _models_of(job), _is_full(job)
        base = None if job["base"] is None else _open(job["base"])
        evolved = _open(job["evolved"])
        reads_base = self._full and not job["dry"]
        reads_evolved = not job["dry"] and (self._full or "merge" in job["steps"])
        self.update = Update(
            on_disk(base) if base is not None and reads_base else base, on_disk(evolved) if reads_evolved else evolved
        )

    def serve(self, job: Job) -> bool:
        """Whether a cell has the same models, to be read in the same way."""
        return self._of == _models_of(job)

    @cached_property
    def measured(self) -> "MeasuredUpdate":
        """What the update did; read for the first cell that is checked."""
        from portllm.checking.update.measures import measure_update  # loads what porting does without

        return measure_update(self.update, full=self._full)


def _models_of(job: Job) -> tuple[object, ...]:
    return job["base"], job["evolved"], "merge" in job["steps"], _is_full(job), job["dry"]


def _is_full(job: Job) -> bool:
    """Whether a check reads every weight."""
    return "check" in job["steps"] and bool(job["options"].get("check", {}).get("full", False))


def _open(model: Mapping[str, Any]) -> Checkpoint:
    """A model by the name that the fleet's file has for it.

    Raises:
        CheckpointError: It is not the one that the fleet was planned with.
    """
    checkpoint = replace(open_checkpoint(model["place"]), name=model["said"])
    found = fingerprint(checkpoint)
    if found != model["fingerprint"]:
        raise CheckpointError(
            f"'{model['said']}': has fingerprint {found}; when the fleet was planned it was "
            f"{model['fingerprint']}. It changed, or this machine has a different model there. Run again."
        )
    return checkpoint


def _forecast(plan: PortPlan, job: Job) -> Result:
    """What a dry run says of a cell: a patch that does not fit is found as a check would find it."""
    if "check" in job["steps"]:
        from portllm.checking.check import refused  # loads numpy's parts, which porting does without

        report = refused(plan)
        if report is not None:
            return _no(_told(report))
    refuse(plan.refusals)
    facts: dict[str, Any] = {"port": _port_facts(plan)}
    if "merge" in job["steps"]:
        # The ported patch does not exist yet; the patch itself has the same shapes, and belongs to another model.
        merged = plan_merge(plan.patch, into=plan.evolved, options=replace(_how(job), allow_other_base=True))
        refuse(merged.refusals)
        facts["merge"] = {"bytes": merged.n_bytes}
    return {"status": "done", "facts": facts}


def _run(plan: PortPlan, job: Job, place: str, scratch: Path) -> dict[str, Any]:
    """Port and merge; each output is at its place when it is whole."""
    facts: dict[str, Any] = {}
    if job["steps"] == ["check"]:
        return facts
    facts["port"] = _port_facts(plan)
    ported: list[Patch[TensorInfo]] = []
    with_port = "port" in job["steps"]

    def port(out: Path) -> None:
        ported.append(run_port(plan, out, overwrite=True))

    _place(port, join(place, "port") if with_port else None, scratch / "port", "port")
    if "merge" in job["steps"]:

        def merge(out: Path) -> None:
            facts["merge"] = _merge(ported[0], plan.evolved, job, out)

        _place(merge, join(place, "merge"), scratch / "merge", "merge")
    return facts


def _check(plan: PortPlan, known: "MeasuredUpdate", place: str, scratch: Path) -> dict[str, object]:
    """The verdict, whose whole report is written to its place."""
    from portllm.checking.check import check_patch
    from portllm.checking.report import patch_to_json
    from portllm.checking.update.report import update_to_json

    report = check_patch(plan, known)

    def write(out: Path) -> None:
        with staged_folder(out, overwrite=True, inputs=plan.files) as folder:
            text = render_sealed({"update": update_to_json(known.report), **patch_to_json(report)})
            (folder / CHECK_FILE).write_text(text, encoding="utf-8")

    _place(write, join(place, "check"), scratch / "check", "check")
    return _told(report)


def _drop(steps: Iterable[str], place: str, plan: PortPlan) -> None:
    """Remove outputs of a cell that no longer count; none in which lies what the cell reads."""
    for step in steps:
        if not is_url(place):
            check_apart(Path(place, step), plan.files)
        remove(join(place, step), records=[RECORDS[step]])


def _told(report: "PatchReport") -> dict[str, object]:
    """What the table of a fleet keeps of a check."""
    from portllm.checking.report import patch_to_json

    told = patch_to_json(report)
    return {name: told[name] for name in ("verdict", "reasons")}


def _no(check: Mapping[str, Any]) -> Result:
    """The result of a cell whose patch is not carried over, for what its check says."""
    reason = "\n".join(str(reason["text"]) for reason in check["reasons"])
    return {"status": "no", "facts": {"check": check}, "reason": reason}


def _place(write: Callable[[Path], None], place: str | None, staged: Path, step: str) -> None:
    """Write an output to its place: through a local folder where that is behind a URL, and there alone without one."""
    if place is None or is_url(place):
        write(staged)
        if place is not None:
            publish(staged, place, records=[RECORDS[step]])
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        write(Path(place))


def _merge(ported: Patch[TensorInfo], evolved: Checkpoint, job: Job, out: Path) -> dict[str, object]:
    from portllm.merging.merge import run_merge

    plan = plan_merge(ported, into=evolved, options=_how(job))
    report = run_merge(plan, out, overwrite=True)
    measures = {"kept_gain": report.total.kept_gain, "rounding_loss": report.total.rounding_loss}
    told = {name: value if math.isfinite(value) else None for name, value in measures.items()}  # JSON has no infinity
    return {"bytes": report.n_bytes, **told, "notes": list(plan.notes)}


def _how(job: Job) -> MergeOptions:
    options = job["options"].get("merge", {})
    gigabytes = options.get("max_shard_size", DEFAULT_SHARD_BYTES / 10**9)
    rounding = Stochastic(options.get("seed", 0)) if options.get("rounding") == "stochastic" else NEAREST
    return MergeOptions(dtype=options.get("dtype"), rounding=rounding, shard_bytes=int(gigabytes * 10**9))


def _port_facts(plan: PortPlan) -> dict[str, object]:
    return {"modules": len(plan.patch.deltas) + len(plan.patch.experts), **plan.evidence}


def _written(steps: list[str], place: str) -> Result:
    """What a run can compare when it is asked to go on: the files, and the digests of the records."""
    records = digests(place, [join(step, RECORDS[step]) for step in steps])
    return {"files": sizes(place), "records": records}


def _can_pass(error: PortLLMError) -> bool:
    """Whether the same cell may work when it is tried again."""
    return isinstance(error, RemoteError | OutputBusyError) or (isinstance(error, StorageError) and error.can_pass)
